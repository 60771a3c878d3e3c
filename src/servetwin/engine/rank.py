"""One rank of a lock-step group: an engine whose loop takes part in the passes of its group."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from typing import TYPE_CHECKING

from servetwin.engine.batch import Batch
from servetwin.engine.engine import Engine, Log, OnEnd
from servetwin.engine.scheduler import Scheduler
from servetwin.timing.host import NO_OVERHEAD, HostOverhead
from servetwin.timing.protocol import StepTimer
from servetwin.timing.shape import StepShape

if TYPE_CHECKING:
    from servetwin.engine.lockstep import LockStep

UNKNOWN = 1 << 62
"""Later than any time: the end of a pass to which not all ranks have come."""


class Stage(Enum):
    """Where the loop of a rank is."""

    TOP = auto()
    """about to look at its inbox and to schedule"""
    OLDEST = auto()
    """waits for its oldest batch in flight"""
    DUMMY = auto()
    """its dummy batch waits for the other ranks"""
    POLL = auto()
    """has requests, none of which can run: sleeps a little"""
    CHECK = auto()
    """waits for the others to agree whether to go on"""
    PAUSED = auto()
    """only an arrival here, or a wave that another rank starts, brings it on"""


class Rank(Engine):
    """An engine to routers and to the runtime loop; a wake of any rank is a wake of its group.

    Every turn of its loop takes part in exactly one pass of the group: with what the scheduler gave, or else with a
    dummy batch.
    """

    def __init__(
        self,
        group: LockStep,
        number: int,
        scheduler: Scheduler,
        timer: StepTimer,
        log: Log,
        on_end: OnEnd,
        *,
        host: HostOverhead = NO_OVERHEAD,
        poll_ns: int | None = None,
        horizon: Callable[[], int | None] | None = None,
    ) -> None:
        super().__init__(number, scheduler, timer, log, on_end, host=host, poll_ns=poll_ns, horizon=horizon)
        self.group = group
        self.place = group.join(self)
        self.together = group.numbers
        self.stage = Stage.PAUSED
        self.at = 0
        """when it came to its stage"""
        self.launched = 0
        """passes that it has come to"""
        self.passes = 0
        """turns of its loop in this wave, each with a pass"""
        self.votes = False
        """at a check: whether it has unfinished requests"""
        self._until: int | None = None
        """end of a sleep, or of the wait for the other ranks; None: not known yet"""
        self._hopeless = False
        """nothing that is on its way can make its requests run"""

    def wake(self, now: int) -> int | None:
        return self.group.wake(self, now)

    @property
    def coasts(self) -> bool:
        """Whether passes may be carried out many at once."""
        return self._horizon is not None and self.scheduler.options.pipeline == 1

    def horizon(self) -> int | None:
        """When something can reach it from outside next; None: never again."""
        assert self._horizon is not None
        return self._horizon()

    @property
    def due_ns(self) -> int | None:
        """When it can go on; None: not before something else has happened."""
        if self.stage is Stage.OLDEST:
            end = self._batches[0].end_ns
            return None if end == UNKNOWN else end
        return self._until if self.stage in (Stage.DUMMY, Stage.POLL) else None

    @property
    def idle(self) -> bool:
        """Nothing to run and nothing in flight."""
        return not self.scheduler.has_work and not self._batches

    @property
    def flying(self) -> Batch | None:
        """The oldest batch in flight."""
        return self._batches[0] if self._batches else None

    @property
    def full(self) -> bool:
        """The next batch is the last one that there is room for."""
        return len(self._batches) == self._room - 1

    def tokens(self, shape: StepShape) -> int:
        """Tokens that it brings to a pass; a dummy batch is one decode, as wide as real ones are with draft tokens."""
        return shape.tokens or 1 + self.scheduler.options.speculative_tokens

    def go_to(self, stage: Stage) -> None:
        self.stage = stage
        self.awaiting = not (stage is Stage.PAUSED or (stage is Stage.POLL and self.group.alone))

    def go_on(self, now: int) -> None:
        """Take note of what has happened by `now`."""
        match self.stage:
            case Stage.PAUSED:
                if self.inbox or self.group.running:
                    self.at = now
                    self.go_to(Stage.TOP)
            case Stage.OLDEST:
                if self._batches[0].end_ns <= now:
                    self.at = now
                    oldest = self._batches.popleft()
                    for request in self.scheduler.update(oldest, now):
                        self.on_end(request, now)
                    if not self._ran and self._stuck(oldest, now):
                        self._rest(oldest)
                    else:
                        self._end_turn(executed=self._ran)
            case Stage.DUMMY:
                if self._until is not None and self._until <= now:
                    self.at = self._until
                    self._passed()
            case Stage.POLL:
                assert self._until is not None
                if self._until <= now or (self.inbox and not self.awaiting):
                    self.at = now
                    self._end_turn(executed=False)

    def act(self) -> None:
        """From the top of the loop: take what arrived, schedule, and come to the next pass."""
        now, scheduler, batches = self.at, self.scheduler, self._batches
        self._hopeless = self._ran = False
        self._open_inbox(now)
        if scheduler.has_work:
            interval = scheduler.options.prefill_schedule_interval
            if interval > 1 and not self.group.alone:
                scheduler.holds_prefills = self.passes % interval != 0
            batch = scheduler.schedule(now)
            if scheduler.hopeless:
                self._end_hopeless(now)
            self._ran = batch.number > 0
            if self._ran:
                self._come(batch)
            else:  # told to the workers, in order, but takes no time
                batch.end_ns = max(now, self._last_end)
            batches.append(batch)
            if len(batches) < self._room and (self._ran or scheduler.has_work):
                if not self._ran and self._stuck(batch, now):
                    self._rest(batch)
                else:
                    self._end_turn(executed=self._ran)
                return
        elif not batches:
            self._end_turn(executed=False)
            return
        self.go_to(Stage.OLDEST)

    def executed(self, batch: Batch, begin: int, end: int, released: int) -> None:
        """All ranks have come to the pass of `batch`, so that its times are known."""
        batch.index, batch.begin_ns, batch.end_ns = self.steps, begin, end
        self.steps += 1
        self.last_batch = batch
        self.log.step(self.number, batch, self.scheduler.options.usable_blocks - batch.free)
        if len(batch):
            self._last_end = end
        else:
            self._until = released

    def ran(self, steps: int, flying: Batch | None) -> None:
        """So many passes were carried out in one go; `flying`: what is in flight after them."""
        self.steps += steps
        self.launched = self.group.passes
        if self.scheduler.running:
            self._last_end = self.group.ends[-1]
        if flying is not None:
            self._batches[0] = self.last_batch = flying

    def waits(self, until: int) -> None:
        """Its dummy batch keeps it until then."""
        self._until = until
        self.go_to(Stage.DUMMY)

    def _come(self, batch: Batch) -> None:
        batch.begin_ns = batch.end_ns = UNKNOWN
        self.group.launch(self, batch, self.at)

    def _rest(self, batch: Batch) -> None:
        """`batch` came out empty though requests are there: sleep, and then join the pass of the others."""
        look = self._next_look(self.at, batch)
        if look is None:
            self._hopeless = True
            self._end_turn(executed=False)
            return
        joins = not self.group.alone and (self.group.running or self.scheduler.unfinished)
        self._until = self.at + (self.poll_ns or 0) if joins else look
        self.go_to(Stage.POLL)

    def _end_turn(self, *, executed: bool) -> None:
        if executed:
            self._passed()
        elif not self.group.alone and (self.group.running or self._has_unfinished):
            scheduler, dummy = self.scheduler, Batch(self.at)
            dummy.running, dummy.waiting = len(scheduler.running), scheduler.waiting_count
            dummy.free = scheduler.kv.pool.free
            self._until = None
            self.go_to(Stage.DUMMY)
            self._come(dummy)
        else:
            goes_on = self.inbox or ((self.scheduler.has_work or self._batches) and not self._hopeless)
            self.go_to(Stage.TOP if goes_on else Stage.PAUSED)

    def _passed(self) -> None:
        self.passes += 1
        self.votes = self._has_unfinished
        self.go_to(Stage.CHECK if self.group.checks(self.passes) else Stage.TOP)

    @property
    def _has_unfinished(self) -> bool:
        return self.scheduler.unfinished > 0 and not self._hopeless
