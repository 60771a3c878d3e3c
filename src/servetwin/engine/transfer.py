"""The engine's side of a KV hand-over between a prefill and a decode engine: which copies are under way and when
they end.

How long a copy takes is given from outside (`duration`): this room knows only the states.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from servetwin.engine.request import Request


class KVConnector:
    """Copies of KV into (a decode engine) or out of (a prefill engine) this engine's blocks.

    `duration(tokens)` gives the ns that a copy of so many tokens takes.
    """

    def __init__(self, duration: Callable[[int], int]) -> None:
        self.duration = duration
        self._under_way: list[tuple[int, int, Request]] = []
        self._started = 0

    @staticmethod
    def tokens_to_load(request: Request, local_hit: int) -> int:
        """Prompt tokens that another engine has and this one has not (once: a preempted request recomputes)."""
        return request.prompt - local_hit if request.remote_prefill else 0

    def start(self, request: Request, tokens: int, now: int) -> None:
        self._started += 1
        heapq.heappush(self._under_way, (now + self.duration(tokens), self._started, request))

    def ended(self, now: int) -> list[Request]:
        """The requests whose copies have ended by `now`, each reported once, in order of ending."""
        ended = []
        while self._under_way and self._under_way[0][0] <= now:
            ended.append(heapq.heappop(self._under_way)[2])
        return ended

    @property
    def next_end_ns(self) -> int | None:
        return self._under_way[0][0] if self._under_way else None
