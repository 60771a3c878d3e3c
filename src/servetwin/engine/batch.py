"""One scheduled step: which requests run, with how many tokens, and what happened to it."""

from __future__ import annotations

from bisect import bisect

from servetwin.engine.request import Request
from servetwin.timing.shape import StepShape

NOBODY = 0, 0, 1 << 62
"""Sum, maximum and minimum of no contexts."""


class Batch:
    """Entries are parallel lists in schedule order: running requests in running order, then admitted ones.

    Requests that ride (see `Riders`) get a token each in a batch without being listed in it: they are counted.
    """

    __slots__ = (
        "before",
        "begin_ns",
        "contexts",
        "drafts",
        "end_ns",
        "free",
        "gone",
        "index",
        "joined",
        "lane",
        "number",
        "orders",
        "preempted",
        "requests",
        "riders",
        "riding",
        "running",
        "samples",
        "scheduled_ns",
        "shape",
        "tokens",
        "waiting",
        "width",
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
        self.orders: list[int] = []
        """place of each entry in the running order"""
        self.preempted: list[Request] = []
        self.number = self.lane = 0
        """which batch with something to run this is, from 1 (0: it is empty), in which lane (see `Riding`)"""
        self.riders = self.joined = 0
        """how many requests ride; how many entries ride from the next batch on"""
        self.contexts = NOBODY
        """of those that ride: sum, maximum and minimum of their computed tokens before the step"""
        self.width = 1
        """tokens of each of them"""
        self.riding: list[Request] = []
        """those that ride, in running order, where somebody wants to know"""
        self.gone = 0
        """their contexts before the step, less their bases"""
        self.running = self.waiting = self.free = 0
        self.shape: StepShape | None = None

    def __len__(self) -> int:
        return len(self.requests) + self.riders

    def add(self, request: Request, tokens: int, before: int, drafts: int) -> None:
        self.requests.append(request)
        self.tokens.append(tokens)
        self.before.append(before)
        self.drafts.append(drafts)
        self.orders.append(request.order)

    def insert(self, request: Request, tokens: int) -> None:
        """List a request that rode in this batch after all, in its place, with so many tokens."""
        at = bisect(self.orders, request.order)
        self.orders.insert(at, request.order)
        self.requests.insert(at, request)
        self.tokens.insert(at, tokens)
        self.before.insert(at, 0)
        self.drafts.insert(at, tokens - 1)
        self.samples.insert(at, True)

    def withdraw(self, request: Request) -> int:
        """Take a request that was preempted in the same step out again; its tokens."""
        for i, entry in enumerate(self.requests):
            if entry is request:
                del self.requests[i], self.before[i], self.drafts[i], self.orders[i]
                return self.tokens.pop(i)
        return 0

    def entries(self) -> list[tuple[Request, int, int, int]]:
        """(request, new tokens, computed tokens before, drafts) of each request of the batch in schedule order, as it
        was when launched. Needs `riding`."""
        listed = list(zip(self.requests, self.tokens, self.before, self.drafts, strict=True))
        if not self.riding:
            return listed
        listed += [(rider, self.width, rider.base + self.gone, self.width - 1) for rider in self.riding]
        return sorted(listed, key=lambda entry: entry[0].order)

    def measure(self) -> StepShape:
        """The shape of the step, also kept in `shape`."""
        prefills = prefill_tokens = prefill_context = pairs = 0
        decodes, decode_tokens = self.riders, self.riders * self.width
        context, largest, smallest = self.contexts
        if self.requests:
            for q, c, drafts in zip(self.tokens, self.before, self.drafts, strict=True):
                if q == 1 or drafts:
                    decodes += 1
                    decode_tokens += q
                    context += c
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
            context,
            largest,
            smallest if decodes else 0,
        )
        return self.shape
