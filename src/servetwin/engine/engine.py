"""One serving engine: its loop, its batches in flight, its clock.

The loop is that of vLLM's engine core. Synchronous: take what arrived, schedule, execute, hand out the outputs. With
several batches in flight (asynchronous scheduling, pipeline stages) a batch is scheduled as long as the queue of
batches has room; otherwise the oldest batch is awaited. The engine only looks at its inbox between those actions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from servetwin.engine import coast, rotation
from servetwin.engine.batch import Batch
from servetwin.engine.request import Request, Status
from servetwin.engine.scheduler import Scheduler
from servetwin.timing.host import NO_OVERHEAD, HostOverhead
from servetwin.timing.protocol import StepTimer
from servetwin.timing.shape import StepShape
from servetwin.timing.stages import apportion

SHORTEST_REACH, FARTHEST_REACH = 8, 512
"""How many steps an engine runs ahead: few where it was interrupted soon, so that little is priced in vain."""


class Log(Protocol):
    """Where executed steps are written (see `StepLog`)."""

    @property
    def keeps_entries(self) -> bool:
        """Whether it wants to know each request of a batch."""

    def step(self, engine: int, batch: Batch, used: int) -> None: ...
    def run(
        self,
        engine: int,
        first: int,
        shape: StepShape,
        begins: list[int],
        ends: list[int],
        used: list[int],
        queue: tuple[int, int],
        requests: list[int],
    ) -> None: ...


OnEnd = Callable[[Request, int], None]
"""Told about each request that ended, and when."""


class Engine:
    """Runs one scheduler over one (possibly pipelined) group of devices.

    `poll_ns`: an engine that has requests but nothing to run looks again after so long; None: when the next copy ends.
    `horizon()`: when something can reach the engine from outside next (None: never again); given, runs of unchanged
    decode steps are carried out in one go, with the same results (see `coast`). `runs_ahead`: the engine is told
    of what reaches it during a run (`interrupt`), so that it need not ask. `alone`: there is no other engine, so that
    one wake may go on to the horizon.
    """

    def __init__(
        self,
        number: int,
        scheduler: Scheduler,
        timer: StepTimer,
        log: Log,
        on_end: OnEnd,
        *,
        host: HostOverhead = NO_OVERHEAD,
        poll_ns: int | None = None,
        horizon: Callable[[], int | None] | None = None,
        runs_ahead: bool = False,
        alone: bool = False,
    ) -> None:
        self.number, self.scheduler, self.timer, self.log, self.on_end = number, scheduler, timer, log, on_end
        self.host, self.poll_ns = host, poll_ns
        self.inbox: deque[tuple[Request, Status | None]] = deque()
        """arrivals (None), and requests that are to end as ABORTED or FAILED (their `reason` says why), which the loop
        has not looked at yet, in time order"""
        self.together: Sequence[int] = (number,)
        """numbers of the engines that a wake of this one may change"""
        self.steps = 0
        self.awaiting = False
        """the loop waits for the oldest batch, and looks at nothing else before that has ended"""
        self.last_batch: Batch | None = None
        self._ran = False
        self._last_end = 0
        self._horizon = horizon
        self._runs_ahead, self._reach = runs_ahead, SHORTEST_REACH
        self._alone = alone and horizon is not None
        self._until: int | None = None
        self._foreseen = False
        """whether `_until` is what `horizon` would say"""
        self.run: coast.Underway | None = None
        """steps that are decided but not carried out yet"""
        self._begin = coast.begin if scheduler.options.pipeline == 1 else rotation.begin
        for lane in scheduler.lanes:
            lane.keeps_entries = log.keeps_entries
        self._batches: deque[Batch] = deque()
        self._room = scheduler.options.max_batches
        self._device_free = [0] * scheduler.options.pipeline

    def wake(self, now: int) -> int | None:
        """Run the loop from `now` until it must wait, or as far as nothing can reach it from outside; when to wake it
        next (None: only an arrival can)."""
        scheduler, batches = self.scheduler, self._batches
        self._foreseen = False
        while True:
            if self.run is not None:
                self._end_run()
            elif self.awaiting:
                end = batches[0].end_ns
                if end > now:
                    if not self._alone or not self._foresees(end):
                        return end
                    now = end
                oldest = batches.popleft()
                self._finish(oldest, now)
                self.awaiting = False
                if not self._ran and self._stuck(oldest, now):
                    return self._next_look(now, oldest)
            if self.inbox:
                self._open_inbox(now)
            if self._horizon is not None and len(batches) == self._room - 1 and scheduler.turns_to_riders():
                if self._runs_ahead:
                    self.run = self._begin(self, now, self._reach, None, batches)
                    if self.run is not None:
                        self.awaiting = True
                        return self.run.end_ns
                else:
                    self._foresees(now)
                    self.run = self._begin(self, now, FARTHEST_REACH, self._until, batches)
                    if self.run is not None:
                        now = self.run.end_ns
                        self._end_run()
            if scheduler.has_work:
                batch = scheduler.schedule(now)
                if scheduler.hopeless:
                    self._end_hopeless(now)
                self._ran = batch.number > 0
                if self._ran:
                    self._launch(batch, now)
                else:  # told to the workers, in order, but takes no time
                    batch.end_ns = max(now, self._last_end)
                batches.append(batch)
                if len(batches) < self._room and (self._ran or scheduler.has_work):
                    if not self._ran and self._stuck(batch, now):
                        return self._next_look(now, batch)
                    continue
            elif batches:
                self._ran = False
            else:
                return None
            self.awaiting = True

    def _foresees(self, ns: int) -> bool:
        """Whether nothing can reach the engine from outside before `ns` or at it; what is known stays true until a
        request ends."""
        if not self._foreseen:
            assert self._horizon is not None
            self._until, self._foreseen = self._horizon(), True
        return self._until is None or ns < self._until

    def _ended(self, request: Request, now: int) -> None:
        self._foreseen = False  # another one may come in its place
        self.on_end(request, now)

    def _end_run(self) -> None:
        run = self.run
        assert run is not None
        flying = run.carry_out(self)
        self._batches.clear()
        self._batches.extend(flying)
        if run.steps >= self._reach:
            self._reach = min(2 * self._reach, FARTHEST_REACH)
        self.run, self.awaiting = None, False

    def interrupt(self, now: int, passed: bool = False) -> int | None:
        """Something reaches the inbox at `now`: when the loop will look at it, if that is sooner than `wake` said.

        `passed`: single steps would have come past a loop top at `now` already.
        """
        run = self.run
        if run is None or run.end_ns <= now:
            return None
        planned = run.steps
        end = run.cut(now + passed)
        self._reach = max(SHORTEST_REACH, min(2 * run.steps, FARTHEST_REACH))
        return end if run.steps < planned else None

    def catch_up(self, now: int, passed: bool = False) -> None:
        """Bring the KV cache to where it is at `now`, for somebody who looks at it; with a loop top at `now` only where
        single steps would have come past it already (`passed`)."""
        if self.run is not None:
            self.run.take_blocks(self.scheduler, now + passed)

    def resume(self, flying: Sequence[Batch], steps: int, device_free: int, last_end: int) -> None:
        """Go on from this state, at the top of the loop; the scheduler has taken over its own."""
        self._batches.extend(flying)
        self.steps, self._device_free[0], self._last_end = steps, device_free, last_end

    @property
    def stage_free(self) -> list[int]:
        """When each pipeline stage is free, in ns."""
        return self._device_free.copy()

    def occupy_until(self, free: Sequence[int]) -> None:
        """The stages are busy until `free`, ns each."""
        self._device_free[:] = free
        self._last_end = free[-1]

    def _end_hopeless(self, now: int) -> None:
        for request in self.scheduler.fail_hopeless(now):
            self._ended(request, now)

    def _fail_unservable(self, now: int) -> bool:
        """End the request that blocks the queue for ever, if there is one."""
        found = self.scheduler.unservable()
        if found is None:
            return False
        request, reason = found
        self.scheduler.fail(request, reason, now)
        self._ended(request, now)
        return True

    def _stuck(self, batch: Batch, now: int) -> bool:
        """Nothing was run last. `batch` came out empty, though requests are there, and nothing runs: at this moment
        nothing more can be done.

        Where a request that can never be served is in the way, it is ended, and the next one can be tried at once.
        """
        if not self.scheduler.has_work or any(len(batch) for batch in (batch, *self._batches)):
            return False
        return self._has_preempted(batch) or not self._fail_unservable(now)

    def _has_preempted(self, batch: Batch) -> bool:
        """Whether `batch` or an empty one behind it, the last to be scheduled, has changed the queue."""
        return any(each.preempted for each in (batch, *self._batches))

    def _next_look(self, now: int, batch: Batch) -> int | None:
        """When to schedule again after `batch` came out empty."""
        if self._has_preempted(batch):  # the queue is another one now
            return now + (self.poll_ns or 0)
        connector = self.scheduler.connector
        end = connector.next_end_ns if connector else None
        if self.poll_ns is None:
            return end
        if any(request.loaded for request in self.scheduler.loading):
            return now + self.poll_ns
        return None if end is None else now + max(1, -(-(end - now) // self.poll_ns)) * self.poll_ns

    def _open_inbox(self, now: int) -> None:
        inbox, scheduler = self.inbox, self.scheduler
        while inbox:
            request, end = inbox.popleft()
            if end is None:
                scheduler.add(request)
            elif not request.finished:
                if end == Status.ABORTED:
                    scheduler.abort(request, now)
                else:
                    scheduler.fail(request, request.reason, now)
                self._ended(request, now)

    def stage_times(self, shape: StepShape, ns: int) -> list[int]:
        """`ns` of a step, host gap included, split over the pipeline stages in proportion to what each computes."""
        return [ns] if len(self._device_free) == 1 else apportion(ns, self.timer.stage_ns(shape))

    def run_stage_times(self, shape: StepShape, steps: int) -> list[list[int]]:
        """The same of consecutive steps of one batch of decodes, which are accounted for as well."""
        timer, gap = self.timer, self.host.gap(shape.decode_seqs)
        durations, stages = timer.run_ns(shape, steps), timer.run_stage_ns(shape, steps)
        if gap:
            return [apportion(ns + gap, parts) for ns, parts in zip(durations, stages, strict=True)]
        return stages

    def _launch(self, batch: Batch, now: int) -> None:
        """Price the batch and put it on the device, behind what is there."""
        shape = batch.measure()
        host, seqs = self.host, shape.prefill_seqs + shape.decode_seqs
        ready = now + host.before(seqs)
        ns, free = self.timer.step_ns(shape) + host.gap(seqs), self._device_free
        batch.begin_ns = at = max(ready, free[0])
        if len(free) == 1:
            free[0] = at = at + ns
        else:
            for stage, part in enumerate(self.stage_times(shape, ns)):
                free[stage] = at = max(at, free[stage]) + part
        batch.end_ns = self._last_end = at
        batch.index = self.steps
        self.steps += 1
        self.last_batch = batch
        self.log.step(self.number, batch, self.scheduler.options.usable_blocks - batch.free)

    def _finish(self, batch: Batch, now: int) -> None:
        for request in self.scheduler.update(batch, now):
            self._ended(request, now)
