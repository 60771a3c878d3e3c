"""Many steps at once: while an engine's batch does not change, its next steps differ only in context length.

Such a *run* of pure decode steps is carried out in one go, with exactly the effects of single steps: the same times,
the same blocks taken in the same order, the same gaps between tokens. It ends before anything can change the batch from
within (a request's last token, a full KV cache), and is cut short when something reaches the engine from outside.

A run is three things, which engines that step together can put together differently: `plan` says of one scheduler what
the run is and how long it can be, `times` says when its steps happen given how long each takes, and `apply` leaves the
scheduler as the single steps would have.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from servetwin.engine.batch import Batch
from servetwin.engine.scheduler import Scheduler
from servetwin.errors import InputError
from servetwin.memory.counted import CountedKV
from servetwin.timing.ledger import RunShares
from servetwin.timing.protocol import StepTimer
from servetwin.timing.shape import StepShape

if TYPE_CHECKING:
    from servetwin.engine.engine import Engine

SHORTEST = 2
"""A run of fewer steps costs more to prepare than it saves."""


class Plan(NamedTuple):
    """A run that a scheduler could make: the shape of its first step, and the most steps (>= SHORTEST) it can have."""

    shape: StepShape
    steps: int


class Times(NamedTuple):
    """When the steps of a run happen, in ns: loop tops (one more than steps), begins and ends on the device.

    Step i is scheduled at `tops[i]`; at `tops[i + 1]` the outputs of the oldest batch in flight are handed out.
    """

    tops: list[int]
    begins: list[int]
    ends: list[int]


class Underway:
    """Steps of an engine that are planned and priced, and carried out when they are over.

    Until then they can be cut short, and the KV cache be brought to the state of any moment of them.
    """

    __slots__ = ("_taken", "_used", "steps", "times")

    def __init__(self, steps: int, times: Times) -> None:
        self.steps, self.times = steps, times
        self._taken = 0
        """steps whose blocks are taken"""
        self._used: list[int] = []
        """blocks in use after each of them"""

    @property
    def end_ns(self) -> int:
        return self.times.tops[self.steps]

    def cut(self, now: int) -> int:
        """End with the first loop top that sees what reaches the engine at `now`; when that is."""
        self.steps = self._scheduled(now)
        return self.end_ns

    def take_blocks(self, scheduler: Scheduler, now: int) -> None:
        """Bring the KV cache to where it is just before `now`."""
        self._take(scheduler, self._scheduled(now))

    def _scheduled(self, now: int) -> int:
        """Steps that were scheduled before `now`, or at once when it began."""
        tops, steps = self.times.tops, self.steps
        return max(bisect_right(tops, tops[0], hi=steps), bisect_left(tops, now, hi=steps))

    def _take(self, scheduler: Scheduler, steps: int) -> None:
        if steps > self._taken:
            self._used += self._blocks(scheduler, self._taken, steps)
            self._taken = steps

    def _blocks(self, scheduler: Scheduler, first: int, last: int) -> list[int]:
        """Give the riders the blocks for steps `first` up to before `last`; the blocks in use after each."""
        raise NotImplementedError

    def carry_out(self, engine: Engine) -> list[Batch]:
        """Leave `engine` as single steps would have; the batches that are then in flight, empty ones among them."""
        raise NotImplementedError


class Run(Underway):
    """A run of one batch."""

    __slots__ = ("_booked", "_flying", "shape")

    def __init__(
        self, shape: StepShape, steps: int, times: Times, flying: Batch | None, booked: RunShares | None
    ) -> None:
        """`booked`: what the timer says it has accounted for all steps of `times`."""
        super().__init__(steps, times)
        self.shape, self._flying, self._booked = shape, flying, booked

    def _blocks(self, scheduler: Scheduler, first: int, last: int) -> list[int]:
        return take_blocks(scheduler, first, last)

    def carry_out(self, engine: Engine) -> list[Batch]:
        scheduler, shape, steps = engine.scheduler, self.shape, self.steps
        growth = scheduler.riding.growth
        tops, begins, ends = self.times
        if steps < len(ends):
            unbook(engine.timer, self._booked, shape, steps, len(ends), growth)
            del tops[steps + 1 :], begins[steps:], ends[steps:]
        rows = [request.row for request in scheduler.running] if scheduler.riding.keeps_entries else []
        self._take(scheduler, steps)
        _hand_out(scheduler, tops[1:])
        queue = (shape.decode_seqs, scheduler.waiting_count)
        note(engine, shape, begins, ends, self._used, queue, rows)
        engine.steps += steps
        engine.occupy_until([ends[-1]])
        if self._flying is None:
            return []
        batch = batch_in_flight(scheduler, shape.later((steps - 1) * growth), tops[-2])
        batch.index, batch.begin_ns, batch.end_ns = engine.steps - 1, begins[-1], ends[-1]
        engine.last_batch = batch
        return [batch]


def begin(engine: Engine, now: int, most: int, horizon: int | None, batches: Sequence[Batch]) -> Run | None:
    """The run of `engine` from the loop top at `now`, of at most `most` steps, all loop tops of which come before
    `horizon`; None when it would be shorter than SHORTEST.

    `batches` is the batch on the device (asynchronous scheduling); none when scheduling waits for each step.
    """
    flying = batches[0] if batches else None
    last = engine.last_batch
    if last is None or not engine.scheduler.riding.riders.count:
        return None
    if horizon is not None:
        typical = max(1, last.end_ns - last.begin_ns)
        if now + SHORTEST * typical >= horizon:
            return None
        most = min(most, (horizon - now) // typical + 2)
    planned = plan(engine.scheduler, flying, most)
    if planned is None:
        return None
    shape, steps = planned
    seqs, growth = shape.decode_seqs, engine.scheduler.riding.growth
    try:
        durations, booked = price(engine.timer, shape, steps, growth)
    except InputError:  # a step of the run cannot be priced, but it may never come to that one
        return None
    gap = engine.host.gap(seqs)
    if gap:
        durations = [ns + gap for ns in durations]
    when = times(now, flying.end_ns if flying else None, durations, engine.host.before(seqs))
    if horizon is not None and when.tops[-1] >= horizon:
        fit = bisect_left(when.tops, horizon) - 1
        if fit < SHORTEST:
            unbook(engine.timer, booked, shape, 0, steps, growth)
            return None
        steps = fit
    return Run(shape, steps, when, flying, booked)


def price(timer: StepTimer, shape: StepShape, steps: int, growth: int) -> tuple[list[int], RunShares | None]:
    """Device times of consecutive steps of decodes, each of which goes on by `growth` tokens in a step, and what
    the timer says it has accounted for them.

    Where one of them is refused with an InputError, none is accounted.
    """
    if growth == 1:
        return timer.run_ns(shape, steps), timer.booked
    saved = timer.ledger.copy()
    try:
        return [timer.step_ns(shape.later(i * growth)) for i in range(steps)], None
    except InputError:
        timer.ledger.restore(saved)
        raise


def note(
    engine: Engine,
    shape: StepShape,
    begins: list[int],
    ends: list[int],
    used: list[int],
    queue: tuple[int, int],
    rows: list[int],
) -> None:
    """Write the next steps of `engine` into its log; each has one row where contexts grow by more than a token."""
    growth = engine.scheduler.riding.growth
    if growth == 1:
        engine.log.run(engine.number, engine.steps, shape, begins, ends, used, queue, rows)
        return
    for i, step in enumerate(zip(begins, ends, used, strict=True)):
        begin, end, blocks = step
        later = shape.later(i * growth)
        engine.log.run(engine.number, engine.steps + i, later, [begin], [end], [blocks], queue, rows)


def unbook(timer: StepTimer, booked: RunShares | None, shape: StepShape, first: int, last: int, growth: int) -> None:
    """Take the steps `first` up to before `last` of a run that was priced out of the ledger again: they will not
    happen. Where the timer did not keep what they added, they are priced once more."""
    ledger = timer.ledger
    if booked is not None:
        ledger.book([-ns for ns in booked.between(first, last)])
        return
    saved = ledger.copy()
    price(timer, shape.later(first * growth), last - first, growth)
    priced = ledger.less(saved)
    ledger.restore(saved.less(priced))


def plan(scheduler: Scheduler, flying: Batch | None, most: int | None = None) -> Plan | None:
    """The run of pure decode steps, at most `most` of them, that `scheduler` would make from this loop top if nothing
    reached it from outside; None when that is not a run of SHORTEST steps or more.

    `flying`: the batch on the device (asynchronous scheduling), if any.
    """
    riders, running = scheduler.riding.riders, scheduler.running
    if not riders.count or scheduler.riding.plain:
        return None
    if scheduler.holds_prefills is not None and scheduler.waiting_count:
        return None
    if riders.handing + (flying.joined if flying is not None else 0) != riders.count:
        return None
    if riders.count * scheduler.riding.width > scheduler.options.max_num_batched_tokens:
        return None
    if scheduler.copying:
        return None
    steps = riders.next_leave() - scheduler.riding.scheduled
    if not scheduler.riding.last_rides:
        steps -= 1  # its last token is not in flight yet: it comes with the step in which it leaves
    if most is not None and most < steps:
        steps = most
    if steps < SHORTEST:
        return None
    first = scheduler.riding.scheduled + 1
    if scheduler.waiting_count and len(running) < scheduler.max_active:
        steps = _steps_refused(scheduler, first, steps)
        if steps < SHORTEST:
            return None
    steps = _steps_with_blocks(scheduler, first, steps)
    if steps < SHORTEST:
        return None
    context, largest, smallest = riders.contexts(first)
    tokens = riders.count * scheduler.riding.width
    return Plan(StepShape(0, 0, 0, 0, riders.count, tokens, context, largest, smallest), steps)


def times(now: int, device_free: int | None, durations: Sequence[int], before: int) -> Times:
    """The times of consecutive steps from the loop top at `now`; each takes the host `before` and then its duration.

    `device_free` None: scheduling waits for each step, and a loop top is the end of the step before. Else a batch is in
    flight until `device_free`; a loop top is the end of the step before the last one, so that a step begins when the
    device is free and the host has prepared it.
    """
    if device_free is None:
        ends = list(accumulate([ns + before for ns in durations] if before else durations, initial=now))
        tops = ends.copy()
        del ends[0]
        return Times(tops, [top + before for top in tops[:-1]], ends)
    if now + before <= device_free and before <= min(durations, default=before):  # the device never waits for the host
        ends = list(accumulate(durations, initial=device_free))
        begins = ends[:-1]
        tops = [now, *begins]
        del ends[0]
        return Times(tops, begins, ends)
    tops, begins, ends = [now], [], []
    free = device_free
    for ns in durations:
        begin = max(free, tops[-1] + before)
        begins.append(begin)
        tops.append(free)
        free = begin + ns
        ends.append(free)
    return Times(tops, begins, ends)


def apply(scheduler: Scheduler, outputs_ns: Sequence[int]) -> list[int]:
    """Carry out a planned run, or its beginning, in `scheduler`: one step, and outputs handed out, for each of
    `outputs_ns` (at least one). The blocks in use after each step."""
    used = take_blocks(scheduler, 0, len(outputs_ns))
    _hand_out(scheduler, outputs_ns)
    return used


def take_blocks(scheduler: Scheduler, first: int, last: int) -> list[int]:
    """Give the riders the blocks for steps `first` up to before `last` of a run that `scheduler` has not been told of;
    the blocks in use after each."""
    kv, number = scheduler.kv, scheduler.riding.scheduled + 1
    if isinstance(kv, CountedKV):
        riders, used = scheduler.riding.riders, kv.pool.used
        each = list(accumulate([riders.blocks(number + step) for step in range(first, last)], initial=used))
        kv.pool.free -= each[-1] - used
        return each[1:]
    after = []
    for step in range(first, last):
        scheduler.riding.take_blocks(number + step)
        after.append(kv.pool.used)
    return after


def _hand_out(scheduler: Scheduler, outputs_ns: Sequence[int]) -> None:
    """As many batches of riders alone as there are `outputs_ns`, from the one in flight on."""
    flying = scheduler.riding.flying[0] if scheduler.riding.flying else None
    scheduler.count_scheduled(len(outputs_ns))
    if flying is not None and flying.requests:  # some began to ride with it, and get their first token
        ended = scheduler.update(flying, outputs_ns[0])
        assert not ended, "who ends does not ride"
        outputs_ns = outputs_ns[1:]
    scheduler.riding.count_processed(outputs_ns)


def batch_in_flight(scheduler: Scheduler, shape: StepShape, scheduled_ns: int) -> Batch:
    """After `apply`: the last batch of the run, still on the device, as single stepping would have left it (but for
    its index and its times on the device)."""
    batch = Batch(scheduled_ns)
    batch.riders, batch.number, batch.shape = shape.decode_seqs, scheduler.riding.scheduled, shape
    scheduler.riding.flying.clear()
    scheduler.riding.flying.append(batch)
    return batch


def _steps_refused(scheduler: Scheduler, first: int, steps: int) -> int:
    """For how many steps from batch `first` on, at most `steps`, nobody can be admitted for want of blocks."""
    lacking = scheduler.refused() if scheduler.riding.width == 1 else None
    if lacking is None:
        return 0
    # No rider may make findable what is lacking: it would with the last token of a block, which is known one step later
    # when scheduling ahead.
    filled = (lacking + 1) * scheduler.options.block_size - 1 + scheduler.options.max_batches - 1
    return scheduler.riding.riders.batches_below(filled, first, steps)


def _steps_with_blocks(scheduler: Scheduler, first: int, steps: int) -> int:
    """The largest number of steps from batch `first` on, at most `steps`, for which the free blocks suffice."""
    riders, free = scheduler.riding.riders, scheduler.kv.pool.free
    if riders.groups * riders.count * (steps * riders.growth // riders.size + 1) <= free:
        return steps
    for i in range(steps):
        free -= riders.blocks(first + i)
        if free < 0:
            return i
    return steps
