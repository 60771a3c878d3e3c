"""The two orders in which waiting requests are served. A queue is any of them: peek, pop, push, push_front, remove."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from typing import Protocol

from servetwin.engine.request import Request


class WaitingQueue(Protocol):
    """Waiting requests in the order in which they will be tried."""

    def __len__(self) -> int: ...
    def peek(self) -> Request: ...
    def pop(self) -> Request: ...
    def push(self, request: Request) -> None: ...
    def push_front(self, requests: Iterable[Request]) -> None:
        """Put `requests` before all others, in the order given."""

    def remove(self, requests: set[Request]) -> None: ...


class Fcfs(deque[Request]):
    """First come, first served; a preempted request goes back to the front."""

    def peek(self) -> Request:
        return self[0]

    def pop(self) -> Request:  # type: ignore[override]
        return self.popleft()

    push = deque.append

    def push_front(self, requests: Iterable[Request]) -> None:
        self.extendleft(reversed(list(requests)))

    def remove(self, requests: set[Request]) -> None:  # type: ignore[override]
        kept = [request for request in self if request not in requests]
        self.clear()
        self.extend(kept)


class ByPriority:
    """Smallest (priority, arrival, id as text) first; there is no front to be put at."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int, str], Request]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def peek(self) -> Request:
        return self._heap[0][1]

    def pop(self) -> Request:
        return heapq.heappop(self._heap)[1]

    def push(self, request: Request) -> None:
        heapq.heappush(self._heap, ((request.priority, request.arrival_ns, str(request.row)), request))

    def push_front(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.push(request)

    def remove(self, requests: set[Request]) -> None:
        self._heap = [entry for entry in self._heap if entry[1] not in requests]
        heapq.heapify(self._heap)
