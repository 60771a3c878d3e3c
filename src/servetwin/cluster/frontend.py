"""The way of a request from its client into an engine: parsing, tokenising, delivery."""

from __future__ import annotations

from collections import deque

from servetwin.engine.request import Request
from servetwin.timing.host import HostOverhead

GATHER_NS = 2_000_000
LARGEST = 32
"""vLLM's API server tokenises the prompts that reach it within 2 ms together, at most 32 at a time, in one thread
(`AsyncMicrobatchTokenizer`, vLLM 0.10 and later)."""


class FrontEnd:
    """One API server. Prompts are tokenised batch by batch; a batch takes the time of all its tokens, after which its
    requests go on together. So a burst waits for its own tokenising, and a single request takes

        request_ns + GATHER_NS + request_token_ns * prompt tokens

    Without a time a token nothing is gathered, and every request takes `request_ns`.
    """

    def __init__(self, host: HostOverhead) -> None:
        self._host = host
        self._waiting: deque[Request] = deque()
        self._busy = False

    def shortest(self) -> int:
        """The least time (ns) from a client to the engine."""
        return self._host.request_ns + (GATHER_NS if self._host.request_token_ns else 0)

    def passes(self, request: Request) -> bool:
        """Whether the request goes straight on to the engine, `request_ns` later; else it is held for a batch."""
        if not self._host.request_token_ns:
            return True
        self._waiting.append(request)
        return False

    def idle(self) -> bool:
        """Whether nobody has said when to gather the next batch; from now on somebody has."""
        was, self._busy = not self._busy, True
        return was

    def gather(self) -> tuple[list[Request], int]:
        """The next batch and the time (ns) to tokenise it; an empty one ends the work until `idle` is asked again."""
        batch = [self._waiting.popleft() for _ in range(min(LARGEST, len(self._waiting)))]
        self._busy = bool(batch)
        return batch, self._host.request_token_ns * sum(request.prompt for request in batch)
