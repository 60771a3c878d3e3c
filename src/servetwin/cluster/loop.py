"""The runtime loop: one clock, on which arrivals, routing and the engines' steps meet.

Nothing polls: the next thing that happens is either an event from outside the engines (an arrival, a delivery, a client
or a timer that gives up on a request) or an engine that wants to be woken. Ties break in a fixed order (events by kind
and row, then engines by number), so that a run is a pure function of scenario and seed. Requests are routed between
wakes, never within one: the router sees every engine as it is after all that happened before.

Invariants: C1 the clock never goes back; C2 every request ends exactly once: finished, failed or aborted.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from servetwin.catalog.units import format_duration
from servetwin.cluster.frontend import FrontEnd
from servetwin.cluster.routing.router import Router
from servetwin.cluster.sessions import Sessions
from servetwin.engine.engine import Engine
from servetwin.engine.request import Request, Status
from servetwin.workload.table import RequestTable

if TYPE_CHECKING:
    from servetwin.engine.compiled.fleet import Fleet

Progress = Callable[[int, int, int], None]
"""Told now and then: requests ended, requests in all, simulated ns."""

FOREVER = (1 << 63) - 1
"""Later than any time."""

ARRIVAL, DELIVERY, ABORT, TIMEOUT, TOKENISING = range(5)


class Requests(Protocol):
    """Makes requests of the rows of the workload."""

    def new(self, row: int, time: int) -> Request:
        """Request `row`, which has come at `time`."""

    def place(self, request: Request, engine: Engine) -> None:
        """Fill in what depends on the engine that it goes to."""


class Cluster:
    """Engines behind a router.

    `engines` are created by `build` from the callbacks of this class: `ended` for requests that end, `horizon` for how
    far an engine may run ahead.
    """

    def __init__(self, table: RequestTable, router: Router, model: str, progress: Progress | None = None) -> None:
        """`model`: what requests ask for that name none."""
        self.table, self.router, self.progress = table, router, progress
        self.engines: list[Engine] = []
        self.fleet: Fleet | None = None
        """steps engines in compiled code, as long as they need nothing else"""
        self.requests: Requests | None = None
        self.ended_requests: list[Request] = []
        self.on_ended: Callable[[Request], None] = self.ended_requests.append
        """takes a request that has ended; what nobody else holds is then forgotten"""
        self.ended_count = 0
        self.unfinished: dict[int, Request] = {}
        self.events = self._advances = 0
        self.now = 0
        self._models = [model] if table.model is None else list(table.models)
        self._model_of = None if table.model is None else table.model.tolist()
        self._happenings: list[tuple[int, int, int, Request | None]] = []
        """(time, kind, row, request) of what comes from outside the engines; of TOKENISING the row is that of the
        first request of the batch"""
        self._front_ends: dict[int, FrontEnd] = {}
        """by number of the first engine behind it"""
        self._gave_up: dict[int, int] = {}
        """row -> kind of the end of requests whose prompt is being tokenised"""
        self._wakes: list[tuple[int, int]] = []
        """(time, engine); those that `_wake_of` does not hold are superseded"""
        self._wake_of: list[int | None] = []
        self._last_wake = (-1, -1)
        self._queue: deque[Request] = deque()
        """requests that wait in the router, first come, first served; some may have ended"""
        self._made_room = False
        """a request has ended: another one may come in its place"""
        self.sessions = Sessions(table)
        self._order = iter(()) if table.concurrency is not None else self.sessions.roots()
        self._coming = -1
        """row of the next open-loop arrival, the only one among the happenings"""
        self._places = 0
        """free places of a closed loop"""
        self._backlog: list[list[int]] = []
        """rows of a closed loop (those that open a session together) that wait for a free place, last ones first"""
        if table.concurrency is None:
            self._next_arrival()
        else:
            self._places = table.concurrency
            self._backlog = self.sessions.queue()[::-1]

    # Called by engines ---------------------------------------------------------------------------------------------

    def ended(self, request: Request, now: int) -> None:
        """A request has ended in its engine; another one may come in its place, once the engine has done its work."""
        if now > self.now:  # the engine went on, as nothing else could happen
            self.now, self._last_wake = now, (now, request.engine)
        self._count_out(request, now)

    def _count_out(self, request: Request, now: int) -> None:
        self.router.ended(request.engine)
        self._leave(request, now)

    def horizon(self, engine: Engine) -> int | None:
        """A time before which nothing can reach `engine` from outside, and nobody looks at it; None: for ever."""
        first = self._first_happening()
        if self._others_wait:
            if self._made_room:
                return self.now
            # A request that ends elsewhere may send the next one here.
            soonest, chosen_at = self._first_wake(), None
        else:
            soonest = first
            if self.sessions.waiting and (wake := self._first_wake()) is not None:
                # A request that ends elsewhere may send a turn of its session here, once its tool has run.
                turn = wake + self.sessions.shortest_ns
                soonest = turn if soonest is None else min(soonest, turn)
            if soonest is None:
                return None
            chosen_at = soonest
        boundary = self.router.boundary(self.now, chosen_at)
        return min((time for time in (soonest, boundary, first) if time is not None), default=None)

    @property
    def _others_wait(self) -> bool:
        """Whether requests wait for others to end."""
        return bool(self._backlog or self._queue)

    def _first_happening(self) -> int | None:
        """When the next thing happens outside; timers that have lost their meaning are dropped on the way."""
        happenings = self._happenings
        while happenings:
            time, kind, _, request = happenings[0]
            if request is None or not _in_vain(kind, request):
                return time
            heapq.heappop(happenings)
        return None

    def _first_wake(self) -> int | None:
        wakes, wake_of = self._wakes, self._wake_of
        while wakes:
            time, number = wakes[0]
            if wake_of[number] == time:
                return time
            heapq.heappop(wakes)
        return None

    # The loop ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run until every request has ended."""
        self._wake_of = [None] * len(self.engines)
        happenings, wakes, wake_of = self._happenings, self._wakes, self._wake_of
        self._refill(0)
        try:
            while True:
                if self.fleet is not None and self._advance(self.fleet):
                    pass
                elif happenings and not (wakes and wakes[0][0] < happenings[0][0]):
                    time, kind, row, request = heapq.heappop(happenings)
                    self._happen(time, kind, row, request)
                elif wakes:
                    time, number = heapq.heappop(wakes)
                    if wake_of[number] != time:
                        continue  # superseded by an earlier wake
                    self._wake(number, time)
                else:
                    break
                while self._made_room:
                    self._made_room = False
                    self._refill(self.now)
                    self._empty_queue(self.now)
        finally:
            if self.fleet is not None:
                self.fleet.settle()
        if self.unfinished or self.sessions.waiting:  # C2: nothing is left to happen, so they would never end
            raise RuntimeError(f"requests {sorted(self.unfinished)[:5]} (or turns after them) never ended")

    def _wake(self, number: int, time: int) -> None:
        assert time >= self.now, "the clock went back"
        self.now = time
        self.events += 1
        self._wake_of[number] = None
        self._last_wake = time, number
        engine = self.engines[number]
        for each in engine.together:
            self.router.touch(each, time)
        following = engine.wake(time)
        if following is not None:
            self._wake_of[number] = following
            heapq.heappush(self._wakes, (following, number))
        if self.progress is not None and self.events % 512 == 0:
            self.progress(self.ended_count, len(self.table), time)

    def _advance(self, fleet: Fleet) -> bool:
        """Let a fleet go on until something happens outside it. True: a request of it has ended, and others wait for
        that."""
        stops = self._others_wait or self.sessions.waiting > 0
        limit, number = FOREVER, 0
        if self._happenings:
            limit, kind, _, _ = self._happenings[0]
            if kind == TOKENISING and not stops:
                return False  # which looks at no engine
        if stops and (wake := self._first_wake()) is not None and wake < limit:
            limit, number = self._wakes[0]
        ended, left = fleet.advance(limit, number, stops)
        if stops and ended:
            self.now = ended[0].finish_ns
            self._last_wake = self.now, ended[0].engine
        for request in ended:
            self._count_out(request, request.finish_ns)
        for engine, now, coming in left:
            for at, request in coming:
                heapq.heappush(self._happenings, (at, DELIVERY, request.row, request))
            self._wake_of[engine.number] = now
            if stops:  # it is still at its turn
                self._wake(engine.number, now)
            else:
                heapq.heappush(self._wakes, (now, engine.number))
        self._advances += 1
        if self.progress is not None and self._advances % 512 == 0:
            self.progress(self.ended_count, len(self.table), self.now)
        return stops and bool(ended or left)

    def _happen(self, time: int, kind: int, row: int, request: Request | None) -> None:
        if request is not None and _in_vain(kind, request):
            return
        assert time >= self.now, "the clock went back"
        self.now = time
        if request is None:
            if row == self._coming:
                self._next_arrival()
            self._arrive(row, time)
        elif kind == TOKENISING:
            self._tokenise(self._front_end(request), time)
        elif kind == DELIVERY:
            self._deliver(request, None, time)
        else:
            self._give_up(kind, request, time)

    def _woken(self, now: int) -> int:
        """The last engine that was woken at `now`; engines with lower numbers have come past that moment too."""
        time, number = self._last_wake
        return number if time == now else -1

    # Arrivals ------------------------------------------------------------------------------------------------------

    def _next_arrival(self) -> None:
        time, self._coming = next(self._order, (0, -1))
        if self._coming >= 0:
            heapq.heappush(self._happenings, (time, ARRIVAL, self._coming, None))

    def _refill(self, now: int) -> None:
        """Let the next requests of a closed loop in, as long as there are free places."""
        while self._backlog and self._places:
            self._places -= 1
            for row in self._backlog.pop():
                time = max(now, int(self.table.arrival_ns[row]))
                heapq.heappush(self._happenings, (time, ARRIVAL, row, None))

    def _arrive(self, row: int, time: int) -> None:
        self.events += 1
        assert self.requests is not None
        request = self.requests.new(row, time)
        self.unfinished[row] = request
        limits = self.router.limits
        if not self.router.serves(self._model(row)):
            self._fail(request, f"no pool serves model {self._model(row)}", time)
            return
        if self._queue or self.router.full:
            if limits.rejects:
                self._fail(request, f"rejected: max_in_flight {limits.max_in_flight} is reached", time)
                return
            self._queue.append(request)
        elif not self._send(request, time):
            return
        if request.abort_ns >= 0:
            heapq.heappush(self._happenings, (max(request.abort_ns, time), ABORT, row, request))
        if limits.queue_timeout is not None:
            heapq.heappush(self._happenings, (time + limits.queue_timeout, TIMEOUT, row, request))

    def _model(self, row: int) -> str:
        return self._models[self._model_of[row] if self._model_of else 0]

    def _empty_queue(self, now: int) -> None:
        """Send the requests that wait in the router, as long as there is room."""
        queue = self._queue
        while queue and (queue[0].finished or not self.router.full):
            request = queue.popleft()
            if not request.finished:
                self._send(request, now)

    def _send(self, request: Request, now: int) -> bool:
        """Send a request to an engine, now; whether the engine took it."""
        engine = self.router.choose(request, self._model(request.row), now, self._woken(now))
        request.engine = engine.number
        longest = engine.scheduler.options.max_model_len
        reason = self.router.refusal(engine)
        if request.prompt >= longest:
            reason = f"its prompt of {request.prompt} tokens leaves no room for output in max_model_len {longest}"
        if reason:
            self._fail(request, reason, now)
            return False
        assert self.requests is not None
        self.requests.place(request, engine)
        self.router.sent(engine.number, now)
        front_end = self._front_end(request)
        if front_end.gathers and not self.table.at_engine:
            request.queued_ns = -1
            begin = front_end.hold(request, now)
            if begin is not None:
                heapq.heappush(self._happenings, (begin, TOKENISING, request.row, request))
            return True
        self._bring(request, now if self.table.at_engine else now + front_end.request_ns, now)
        return True

    def _bring(self, request: Request, at: int, now: int) -> None:
        """A request is on its way to its engine, which it reaches at `at`."""
        request.queued_ns = at
        if self.fleet is not None and self.fleet.holds[request.engine]:
            self.fleet.send(request, request.engine, at)
        elif at == now:
            self._deliver(request, None, now)
        else:
            heapq.heappush(self._happenings, (at, DELIVERY, request.row, request))

    def _front_end(self, request: Request) -> FrontEnd:
        """The API server through which `request` comes; engines that step together are behind one."""
        engine = self.engines[request.engine]
        first = engine.together[0]
        found = self._front_ends.get(first)
        if found is None:
            found = self._front_ends[first] = FrontEnd(engine.host)
        return found

    def _tokenise(self, front_end: FrontEnd, now: int) -> None:
        batch, ready, following = front_end.take_up(now)
        for request in batch:
            self._bring(request, ready, now)
            kind = self._gave_up.pop(request.row, None)
            if kind is not None:
                heapq.heappush(self._happenings, (ready, kind, request.row, request))
        if following is not None:
            first = front_end.first
            heapq.heappush(self._happenings, (following, TOKENISING, first.row, first))

    def _deliver(self, request: Request, end: Status | None, time: int) -> None:
        """A request comes to its engine; or, with `end`, the word that it is to end so."""
        engine = self.engines[request.engine]
        engine.inbox.append((request, end))
        if engine.awaiting:
            sooner = engine.interrupt(time, engine.number <= self._woken(time))
            if sooner is not None:
                self._wake_of[engine.number] = sooner
                heapq.heappush(self._wakes, (sooner, engine.number))
        else:
            current = self._wake_of[engine.number]
            if current is None or time < current:
                self._wake_of[engine.number] = time
                heapq.heappush(self._wakes, (time, engine.number))

    # Early ends ----------------------------------------------------------------------------------------------------

    def _give_up(self, kind: int, request: Request, now: int) -> None:
        """A client goes away, or a request has waited for too long; its engine hears of it behind the request."""
        waits_in_router = request.engine < 0
        if not waits_in_router and request.queued_ns < 0:
            self._gave_up.setdefault(request.row, kind)
            return
        if not waits_in_router and request.queued_ns > now:
            heapq.heappush(self._happenings, (request.queued_ns, kind, request.row, request))
            return
        status, reason = Status.ABORTED, "aborted by the client"
        if kind == TIMEOUT:
            timeout = format_duration(self.router.limits.queue_timeout or 0)
            status, reason = Status.FAILED, f"timed out after {timeout} in the queue"
        if waits_in_router:
            self._end(request, status, reason, now)
            return
        request.reason = reason
        self._deliver(request, status, now)

    def _fail(self, request: Request, reason: str, now: int) -> None:
        self._end(request, Status.FAILED, reason, now)

    def _end(self, request: Request, status: Status, reason: str, now: int) -> None:
        """End a request that is in no engine."""
        request.status, request.reason, request.finish_ns = status, reason, now
        self._leave(request, now)

    def _leave(self, request: Request, now: int) -> None:
        """`request` has ended at `now`: turns that waited for it come, or fail with it."""
        del self.unfinished[request.row]
        released, failed = self.sessions.after(request, now)
        for time, row in released:
            heapq.heappush(self._happenings, (time, ARRIVAL, row, None))
        for one in (request, *failed):
            self.on_ended(one)
            self.ended_count += 1
            self._places += self.sessions.ended(one.row)
        self._made_room = True


def _in_vain(kind: int, request: Request) -> bool:
    """Whether a timer has nothing left to end."""
    return (kind in (ABORT, TIMEOUT) and request.finished) or (kind == TIMEOUT and request.scheduled_ns >= 0)
