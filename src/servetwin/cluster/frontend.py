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
        self.request_ns, self._token_ns = host.request_ns, host.request_token_ns
        self._waiting: deque[Request] = deque()
        self._free_ns = 0
        """when the batch under way is done"""

    @property
    def gathers(self) -> bool:
        """Whether requests are held to be tokenised."""
        return self._token_ns > 0

    def hold(self, request: Request, now: int) -> int | None:
        """`request` waits to be tokenised; when the batch that it is the first of is taken up, None: it is not."""
        self._waiting.append(request)
        return max(now, self._free_ns) + GATHER_NS if len(self._waiting) == 1 else None

    @property
    def first(self) -> Request:
        """The request that waits the longest; there is one."""
        return self._waiting[0]

    def take_up(self, now: int) -> tuple[list[Request], int, int | None]:
        """The batch that is taken up at `now`, when its requests are in their engines, and when to take up the next one
        (None: nobody waits)."""
        batch = [self._waiting.popleft() for _ in range(min(LARGEST, len(self._waiting)))]
        self._free_ns = now + self._token_ns * sum(request.prompt for request in batch)
        return batch, self._free_ns + self.request_ns, self._free_ns + GATHER_NS if self._waiting else None
