"""A request as one engine sees it."""

from __future__ import annotations

from enum import IntEnum

from servetwin.engine.tokens import TokenTimes
from servetwin.memory.kv import Chain


class Status(IntEnum):
    """Where a request is. FINISHED and later are final: a request ends exactly once."""

    WAITING = 0
    PREEMPTED = 1
    """waiting again: it lost its KV and will recompute it"""
    LOADING = 2
    """waiting with blocks allocated, which another engine's KV is being copied into"""
    RUNNING = 3
    FINISHED = 4
    ABORTED = 5
    FAILED = 6


class Request:
    """State of one request. All times in ns, all lengths in tokens; -1 = has not happened.

    `known` = prompt and outputs so far; `computed` = tokens whose KV is there or is being computed (advanced when a
    step
    is scheduled); `placeholders` = outputs that scheduled steps will produce but that are not known yet (asynchronous
    scheduling); `in_flight` = tokens of scheduled steps that have not ended.
    """

    __slots__ = (
        "abort_ns",
        "arrival_ns",
        "base",
        "cached_tokens",
        "chain",
        "computed",
        "deferred",
        "drafts",
        "drop_stale",
        "engine",
        "farthest",
        "finish_ns",
        "first_token_ns",
        "in_flight",
        "joined",
        "known",
        "lane",
        "last_token_ns",
        "loaded",
        "max_tokens",
        "order",
        "outputs",
        "placeholders",
        "preemptions",
        "prefilling",
        "priority",
        "prompt",
        "queued_ns",
        "quiet",
        "reason",
        "remote_decode",
        "remote_prefill",
        "rides_to",
        "row",
        "scheduled_ns",
        "session",
        "stale",
        "status",
        "stop_after",
        "token_ns",
    )

    def __init__(
        self,
        row: int,
        arrival_ns: int,
        prompt: int,
        max_tokens: int,
        *,
        stop_after: int | None = None,
        priority: int = 0,
        chain: Chain | None = None,
        remote_prefill: bool = False,
        remote_decode: bool = False,
        abort_ns: int = -1,
        session: int = -1,
    ) -> None:
        self.row = row
        self.arrival_ns = self.queued_ns = arrival_ns
        self.prompt = self.known = prompt
        self.max_tokens = max_tokens
        self.stop_after = stop_after
        """number of outputs after which a stop token ends it, which the scheduler cannot foresee"""
        self.priority = priority
        self.chain = chain
        self.remote_prefill, self.remote_decode = remote_prefill, remote_decode
        self.abort_ns = abort_ns
        self.session = session
        self.engine = -1
        self.status = Status.WAITING
        self.reason = ""
        self.computed = self.placeholders = self.in_flight = self.outputs = 0
        self.drafts = 0
        self.prefilling = False
        self.stale = 0
        """tokens in flight that were scheduled before the last preemption"""
        self.drop_stale = False
        self.deferred = False
        self.loaded = False
        self.order = 0
        """place in the running order: the number of its last admission"""
        self.joined = self.rides_to = self.base = self.lane = 0
        """while it rides (see `Riders`; 0: it does not): the batch in which it began to, that of its last token; where
        its context would have been before batch 1; its lane"""
        self.quiet = 0
        """tokens up to which the KV cache has nothing to do for this request"""
        self.preemptions = 0
        self.farthest = -1
        """most tokens computed when it gave way to itself with the whole cache free"""
        self.scheduled_ns = self.first_token_ns = self.last_token_ns = self.finish_ns = -1
        self.cached_tokens = 0
        self.token_ns: TokenTimes | None = None
        """when each output was handed out, where that is recorded"""

    @property
    def finished(self) -> bool:
        return self.status >= Status.FINISHED

    @property
    def holds_blocks(self) -> bool:
        return self.computed > 0 or self.status == Status.LOADING
