"""The runtime loop: one clock, on which arrivals, routing and the engines' steps meet.

Nothing polls: the next thing that happens is either an arrival or an engine that wants to be woken. Ties break in a
fixed order (arrivals before engines, then by number), so that a run is a pure function of scenario and seed.

Invariants: C1 the clock never goes back; C2 every request ends exactly once: finished, failed or aborted.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from servetwin.cluster.frontend import GATHER_NS, FrontEnd
from servetwin.cluster.routing import Router
from servetwin.engine.engine import Engine
from servetwin.engine.request import Request, Status
from servetwin.workload.table import RequestTable

Progress = Callable[[int, int, int], None]
"""Told now and then: requests ended, requests in all, simulated ns."""

NewRequest = Callable[[int, int, Engine], Request]
"""Makes request `row`, released at a time, for an engine."""


class Cluster:
    """Engines behind a router.

    `engines` are created by `build` from the callbacks of this class: `ended` for requests that end, `horizon` for how
    far an engine may run ahead.
    """

    def __init__(self, table: RequestTable, router: Router, progress: Progress | None = None) -> None:
        self.table, self.router, self.progress = table, router, progress
        self.engines: list[Engine] = []
        self.new_request: NewRequest | None = None
        self.ended_requests: list[Request] = []
        self.unfinished: dict[int, Request] = {}
        self.events = 0
        self.now = 0
        self._order = _release_order(table)
        self._next = next(self._order, None)
        """the next open-loop arrival (time, row)"""
        self._deliveries: list[tuple[int, int, int, Request | None, bool]] = []
        """(time, 0 arrival / 1 abort, row, request, whether it is an abort) on their way to an engine's inbox, and
        (time, 2, engine, None, False) when the engine's front end gathers the next prompts to tokenise"""
        self._front_ends: list[FrontEnd] = []
        self._wakes: list[tuple[int, int]] = []
        self._wake_of: list[int | None] = []
        self._in_system = 0
        self._backlog: list[int] = []
        """rows of a closed loop that wait for a free place, last one first"""
        if table.concurrency is not None:
            rows = [row for _, row in self._all_rows()]
            self._backlog = rows[::-1]

    def _all_rows(self) -> Iterator[tuple[int, int]]:
        yield from [] if self._next is None else [self._next]
        yield from self._order
        self._next = None

    # Called by engines ---------------------------------------------------------------------------------------------

    def ended(self, request: Request, now: int) -> None:
        """A request has ended; in a closed loop its place is taken by the next one."""
        self._leave(request)
        self._fill(now)

    def horizon(self, engine: Engine) -> int | None:
        """The earliest time at which something can reach `engine` from outside; None: nothing will any more."""
        soonest = self._deliveries[0][0] if self._deliveries else None
        if self._next is not None:
            arrival = self._next[0] + (0 if self.table.at_engine else self._front_ends[engine.number].shortest())
            soonest = arrival if soonest is None or arrival < soonest else soonest
        if self._backlog and len(self.engines) > 1:
            # A request that ends elsewhere may send the next one here.
            for number, wake in enumerate(self._wake_of):
                if number != engine.number and wake is not None and (soonest is None or wake < soonest):
                    soonest = wake
        return soonest

    # The loop ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run until every request has ended."""
        self._wake_of = [None] * len(self.engines)
        self._front_ends = [FrontEnd(engine.host) for engine in self.engines]
        self._fill(0)
        while True:
            wake = self._wakes[0] if self._wakes else None
            arrival = self._next
            delivery = self._deliveries[0] if self._deliveries else None
            if arrival is not None and (delivery is None or arrival[0] <= delivery[0]):
                if wake is None or arrival[0] <= wake[0]:
                    self._next = next(self._order, None)
                    self._arrive(arrival[1], arrival[0])
                    continue
            elif delivery is not None and (wake is None or delivery[0] <= wake[0]):
                heapq.heappop(self._deliveries)
                if delivery[3] is None:
                    self._tokenise(delivery[2], delivery[0])
                else:
                    self._deliver(delivery[3], delivery[4], delivery[0])
                continue
            if wake is None:
                if self.unfinished:  # C2: nothing is left to happen, so they would never end
                    raise RuntimeError(f"requests {sorted(self.unfinished)[:5]} never ended")
                return
            heapq.heappop(self._wakes)
            time, number = wake
            if self._wake_of[number] != time:
                continue  # superseded by an earlier wake
            self._wake(number, time)

    def _wake(self, number: int, time: int) -> None:
        assert time >= self.now, "the clock went back"
        self.now = time
        self.events += 1
        self._wake_of[number] = None
        following = self.engines[number].wake(time)
        if following is not None:
            self._wake_of[number] = following
            heapq.heappush(self._wakes, (following, number))
        if self.progress is not None and self.events % 512 == 0:
            self.progress(len(self.ended_requests), len(self.table), time)

    def _fill(self, now: int) -> None:
        """Let the next requests of a closed loop in, as long as there are free places."""
        while self._backlog and self._in_system < (self.table.concurrency or 0):
            row = self._backlog.pop()
            self._arrive(row, max(now, int(self.table.arrival_ns[row])))

    def _leave(self, request: Request) -> None:
        self.ended_requests.append(request)
        self.unfinished.pop(request.row, None)
        self.engines[request.engine].unfinished -= 1
        self._in_system -= 1

    def _arrive(self, row: int, time: int) -> None:
        self.events += 1
        self._in_system += 1
        engine = self.router.choose(self.engines)
        assert self.new_request is not None
        request = self.new_request(row, time, engine)
        request.engine = engine.number
        engine.unfinished += 1
        self.unfinished[row] = request
        longest = engine.scheduler.options.max_model_len
        if request.prompt >= longest:
            request.status, request.finish_ns = Status.FAILED, time
            request.reason = (
                f"its prompt of {request.prompt} tokens leaves no room for output in max_model_len {longest}"
            )
            self._leave(request)
            return
        front_end = self._front_ends[engine.number]
        if self.table.at_engine:
            self._send(request, time)
        elif front_end.passes(request):
            self._send(request, time + engine.host.request_ns)
        elif front_end.idle():
            heapq.heappush(self._deliveries, (time + GATHER_NS, 2, engine.number, None, False))

    def _tokenise(self, number: int, time: int) -> None:
        """An engine's front end takes up the next prompts."""
        batch, spent = self._front_ends[number].gather()
        for request in batch:
            self._send(request, time + spent + self.engines[number].host.request_ns)
        if batch:
            heapq.heappush(self._deliveries, (time + spent + GATHER_NS, 2, number, None, False))

    def _send(self, request: Request, time: int) -> None:
        """The request will be in its engine's inbox at `time`."""
        request.queued_ns = time
        heapq.heappush(self._deliveries, (time, 0, request.row, request, False))
        if request.abort_ns >= 0:
            # A client may give up while its request is still on its way; the engine hears of it behind the request.
            heapq.heappush(self._deliveries, (max(request.abort_ns, time), 1, request.row, request, True))

    def _deliver(self, request: Request, abort: bool, time: int) -> None:
        engine = self.engines[request.engine]
        engine.inbox.append((request, abort))
        if not engine.awaiting:
            current = self._wake_of[engine.number]
            if current is None or time < current:
                self._wake_of[engine.number] = time
                heapq.heappush(self._wakes, (time, engine.number))


def _release_order(table: RequestTable) -> Iterator[tuple[int, int]]:
    """(arrival, row) in order of arrival, ties by row."""
    arrivals: Sequence[int] = table.arrival_ns.tolist()
    order = np.argsort(table.arrival_ns, kind="stable").tolist()
    return ((arrivals[row], row) for row in order)
