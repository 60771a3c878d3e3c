"""The runtime loop: one clock, on which arrivals, routing and the engines' steps meet.

Nothing polls: the next thing that happens is either an arrival or an engine that wants to be woken. Ties break in a
fixed order (arrivals before engines, then by number), so that a run is a pure function of scenario and seed.

Invariants: C1 the clock never goes back; C2 every request ends exactly once: finished, failed or aborted.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from servetwin.cluster.routing import Router
from servetwin.cluster.sessions import Releases, Sessions
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
        self.sessions = Sessions(table)
        closed = table.concurrency is not None
        self._releases = Releases(iter(()) if closed else self.sessions.roots())
        self._backlog = self.sessions.queue()[::-1] if closed else []
        """rows of a closed loop (those that open a session together) that wait for a free place, last ones first"""
        self._deliveries: list[tuple[int, int, int, Request, bool]] = []
        """(time, 0 arrival / 1 abort, row, request, whether it is an abort) on their way to an engine's inbox"""
        self._wakes: list[tuple[int, int]] = []
        self._wake_of: list[int | None] = []
        self._in_system = 0

    # Called by engines ---------------------------------------------------------------------------------------------

    def ended(self, request: Request, now: int) -> None:
        """A request has ended: turns that waited for it come, in a closed loop its place is taken by the next one."""
        self._leave(request, now)
        self._fill(now)

    def horizon(self, engine: Engine) -> int | None:
        """The earliest time at which something can reach `engine` from outside; None: nothing will any more."""
        soonest = self._deliveries[0][0] if self._deliveries else None
        if self._releases.next is not None:
            arrival = self._releases.next[0] + self._front_end(engine)
            soonest = arrival if soonest is None or arrival < soonest else soonest
        if (self._backlog or self.sessions.waiting) and len(self.engines) > 1:
            # A request that ends elsewhere may send the next one here, or a turn of its session once its tool has run.
            tool = 0 if self._backlog else self.sessions.shortest_ns
            for number, wake in enumerate(self._wake_of):
                if number != engine.number and wake is not None and (soonest is None or wake + tool < soonest):
                    soonest = wake + tool
        return soonest

    # The loop ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run until every request has ended."""
        self._wake_of = [None] * len(self.engines)
        self._fill(0)
        while True:
            wake = self._wakes[0] if self._wakes else None
            arrival = self._releases.next
            delivery = self._deliveries[0] if self._deliveries else None
            if arrival is not None and (delivery is None or arrival[0] <= delivery[0]):
                if wake is None or arrival[0] <= wake[0]:
                    self._releases.pop()
                    self._arrive(arrival[1], arrival[0])
                    self._fill(arrival[0])  # a turn that cannot be served may have ended its session
                    continue
            elif delivery is not None and (wake is None or delivery[0] <= wake[0]):
                heapq.heappop(self._deliveries)
                self._deliver(delivery[3], delivery[4], delivery[0])
                continue
            if wake is None:
                if self.unfinished or self.sessions.waiting:  # C2: nothing is left to happen, so they would never end
                    raise RuntimeError(f"requests {sorted(self.unfinished)[:5]} (or turns after them) never ended")
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
        """Let the next requests or sessions of a closed loop in, as long as there are free places."""
        while self._backlog and self._in_system < (self.table.concurrency or 0):
            self._in_system += 1
            for row in self._backlog.pop():
                earliest = int(self.table.arrival_ns[row])
                if earliest > now:
                    self._releases.add(earliest, row)
                else:
                    self._arrive(row, now)

    def _leave(self, request: Request, now: int) -> None:
        self.unfinished.pop(request.row, None)
        self.engines[request.engine].unfinished -= 1
        released, failed = self.sessions.after(request, now)
        for time, row in released:
            self._releases.add(time, row)
        for one in (request, *failed):
            self.ended_requests.append(one)
            self._in_system -= self.sessions.ended(one.row)

    def _arrive(self, row: int, time: int) -> None:
        self.events += 1
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
            self._leave(request, time)
            return
        request.queued_ns = time + self._front_end(engine)
        heapq.heappush(self._deliveries, (request.queued_ns, 0, row, request, False))
        if request.abort_ns >= 0:
            # A client may give up while its request is still on its way; the engine hears of it behind the request.
            heapq.heappush(self._deliveries, (max(request.abort_ns, request.queued_ns), 1, row, request, True))

    def _front_end(self, engine: Engine) -> int:
        """Time between a client's request and its arrival in the engine."""
        return 0 if self.table.at_engine else engine.host.request_ns

    def _deliver(self, request: Request, abort: bool, time: int) -> None:
        engine = self.engines[request.engine]
        engine.inbox.append((request, abort))
        if not engine.awaiting:
            current = self._wake_of[engine.number]
            if current is None or time < current:
                self._wake_of[engine.number] = time
                heapq.heappush(self._wakes, (time, engine.number))
