"""One scheduled step: which requests run, with how many tokens, and what happened to it."""

from __future__ import annotations

from servetwin.engine.request import Request
from servetwin.timing.shape import StepShape


class Batch:
    """Entries are parallel lists in schedule order: running requests in running order, then admitted ones."""

    __slots__ = (
        "before",
        "begin_ns",
        "drafts",
        "end_ns",
        "free",
        "index",
        "preempted",
        "requests",
        "running",
        "samples",
        "scheduled_ns",
        "shape",
        "tokens",
        "waiting",
    )

    def __init__(self, now: int) -> None:
        self.index = -1
        self.scheduled_ns = self.begin_ns = self.end_ns = now
        self.requests: list[Request] = []
        self.tokens: list[int] = []
        """new tokens of each entry, drafts included"""
        self.before: list[int] = []
        """computed tokens of each entry before the step"""
        self.drafts: list[int] = []
        """draft tokens of each entry; empty without speculative decoding"""
        self.samples: list[bool] = []
        """whether the step ends with a new token for the entry (a chunk that leaves prompt over gives none)"""
        self.preempted: list[Request] = []
        self.running = self.waiting = self.free = 0
        self.shape: StepShape | None = None

    def __len__(self) -> int:
        return len(self.requests)

    def add(self, request: Request, tokens: int, before: int, drafts: int) -> None:
        self.requests.append(request)
        self.tokens.append(tokens)
        self.before.append(before)
        self.drafts.append(drafts)

    def withdraw(self, request: Request) -> int:
        """Take a request that was preempted in the same step out again; its tokens."""
        for i, entry in enumerate(self.requests):
            if entry is request:
                del self.requests[i], self.before[i], self.drafts[i]
                return self.tokens.pop(i)
        return 0

    def measure(self) -> StepShape:
        """The shape of the step, also kept in `shape`."""
        prefills = prefill_tokens = prefill_context = pairs = 0
        decodes = decode_tokens = decode_context = largest = 0
        smallest = 1 << 62
        for q, c, drafts in zip(self.tokens, self.before, self.drafts, strict=True):
            if q == 1 or drafts:
                decodes += 1
                decode_tokens += q
                decode_context += c
                if c > largest:
                    largest = c
                if c < smallest:
                    smallest = c
            else:
                prefills += 1
                prefill_tokens += q
                prefill_context += c
                pairs += q * c + q * (q + 1) // 2
        self.shape = StepShape(
            prefills,
            prefill_tokens,
            prefill_context,
            pairs,
            decodes,
            decode_tokens,
            decode_context,
            largest,
            smallest if decodes else 0,
        )
        return self.shape
