"""Many steps of a pipeline of stages at once, while none of the batches that take turns in it changes (see `coast`).

With as many batches in flight as stages, the oldest is awaited, and then its requests are scheduled again behind the
others: the *lanes* that hold requests (see `Riding`) take turns in an order that stays. Empty batches may stand between
theirs; they take no time, but keep their places, which say what joins which batch once something changes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from servetwin.engine.batch import Batch
from servetwin.engine.coast import SHORTEST, Times, Underway, unbook
from servetwin.engine.riding import Riding
from servetwin.engine.scheduler import Scheduler
from servetwin.errors import InputError
from servetwin.timing.shape import StepShape

if TYPE_CHECKING:
    from servetwin.engine.engine import Engine


class Part(NamedTuple):
    """What a lane does in a rotation."""

    lane: Riding
    flying: Batch | None
    """its batch on the devices, when the run begins; None: its turn is the first"""
    shape: StepShape
    """of its first step"""


class Rotation(Underway):
    """A run in which `parts` take turns: step i is one of part i modulo their number."""

    __slots__ = ("_free", "_ring", "parts")

    def __init__(
        self, parts: list[Part], steps: int, times: Times, free: list[list[int]], ring: Sequence[Batch]
    ) -> None:
        """`free`: when each stage is free, before the run and after each step. `ring`: the batches in flight, empty
        ones among them."""
        super().__init__(steps, times)
        self.parts, self._free, self._ring = parts, free, ring

    def _blocks(self, scheduler: Scheduler, first: int, last: int) -> list[int]:
        return take_blocks(scheduler, self.parts, first, last)

    def carry_out(self, engine: Engine) -> list[Batch]:
        scheduler, parts, steps = engine.scheduler, self.parts, self.steps
        tops, begins, ends = self.times
        for place, part in enumerate(parts):
            done, priced = len(range(place, steps, len(parts))), len(range(place, len(ends), len(parts)))
            if done < priced:
                unbook(engine.timer, None, part.shape, done, priced, 1)
        self._take(scheduler, steps)
        self._log(engine)
        for place, part in enumerate(parts):
            scheduler.count_scheduled(len(range(place, steps, len(parts))), part.lane)
        for place, part in enumerate(parts):
            _hand_out(scheduler, part, tops[place or len(parts) : steps + 1 : len(parts)])
        following = steps % len(parts)
        slots: list[Batch | None] = [None, *self._ring]  # the first is that of part 0
        after, place = slots.copy(), -1
        for i, slot in enumerate(slots):
            if slot is not None and not len(slot):
                after[i] = Batch(tops[steps])
                continue
            place += 1
            turns = range(place, steps, len(parts))
            if place == following:
                at, after[i] = i, None
            elif turns:
                step = turns[-1]
                batch = after[i] = _in_flight(parts[place], len(turns), tops[step])
                batch.index, batch.begin_ns, batch.end_ns = engine.steps + step, begins[step], ends[step]
        engine.steps += steps
        engine.occupy_until(self._free[steps])
        return [batch for batch in after[at + 1 :] + after[:at] if batch is not None]

    def _log(self, engine: Engine) -> None:
        scheduler, parts = engine.scheduler, self.parts
        _, begins, ends = self.times
        steps, used = self.steps, self._used
        queue = len(scheduler.running), scheduler.waiting_count
        rows = [[request.row for request in part.lane.requests()] if part.lane.keeps_entries else [] for part in parts]
        write = engine.log.run
        if len(parts) == 1:
            write(engine.number, engine.steps, parts[0].shape, begins[:steps], ends[:steps], used, queue, rows[0])
            return
        for step in range(steps):
            turn, place = divmod(step, len(parts))
            shape, at = parts[place].shape.later(turn), slice(step, step + 1)
            write(engine.number, engine.steps + step, shape, begins[at], ends[at], used[at], queue, rows[place])


def begin(engine: Engine, now: int, most: int, horizon: int | None, ring: Sequence[Batch]) -> Rotation | None:
    """The run of `engine` from the loop top at `now`, of at most `most` steps, all loop tops of which come before
    `horizon`; None when it would be shorter than SHORTEST. `ring`: the batches in flight, oldest first."""
    last = engine.last_batch
    if last is None:
        return None
    if horizon is not None:
        lanes = 1 + sum(len(batch) > 0 for batch in ring)
        typical = max(1, (last.end_ns - last.begin_ns) // lanes)
        if now + SHORTEST * typical >= horizon:
            return None
        most = min(most, (horizon - now) // typical + 2)
    planned = plan(engine.scheduler, ring, most)
    if planned is None:
        return None
    parts, steps = planned
    saved = engine.timer.ledger.copy()
    try:
        priced = [
            engine.run_stage_times(part.shape, len(range(place, steps, len(parts)))) for place, part in enumerate(parts)
        ]
    except InputError:  # a step of the run cannot be priced, but it may never come to that one
        engine.timer.ledger.restore(saved)
        return None
    before = [engine.host.before(part.shape.decode_seqs) for part in parts]
    when, free = times(now, engine.stage_free, [batch.end_ns for batch in ring if len(batch)], priced, before, steps)
    if horizon is not None and when.tops[-1] >= horizon:
        steps = bisect_left(when.tops, horizon) - 1
        if steps < SHORTEST:
            engine.timer.ledger.restore(saved)
            return None
    return Rotation(parts, steps, when, free, tuple(ring))


def plan(scheduler: Scheduler, ring: Sequence[Batch], most: int) -> tuple[list[Part], int] | None:
    """The lanes that would take turns from this loop top on if nothing reached the scheduler from outside, and for how
    many steps, at most `most`; None when those are fewer than SHORTEST. See `coast.plan`."""
    lane = scheduler.riding
    if not lane.riders.count or lane.plain:
        return None
    if scheduler.waiting_count:
        if len(scheduler.running) < scheduler.max_active:
            return None
        if scheduler.options.prefill_schedule_interval > 1:  # empty batches count differently there
            return None
    if scheduler.copying:
        return None
    flying = [batch for batch in ring if len(batch)]
    if any(len(batch.requests) != batch.joined for batch in flying):
        return None
    lanes = [lane, *(scheduler.lanes[batch.lane] for batch in flying)]
    steps = most
    for place, lane in enumerate(lanes):
        turns = lane.riders.next_leave() - 1 - lane.scheduled  # its last token comes with the step in which it leaves
        steps = min(steps, place + turns * len(lanes))
    steps = _steps_with_blocks(scheduler, lanes, steps) if steps >= SHORTEST else 0
    if steps < SHORTEST:
        return None
    parts = []
    for lane, batch in zip(lanes, [None, *flying], strict=True):
        count = lane.riders.count
        shape = StepShape(0, 0, 0, 0, count, count, *lane.riders.contexts(lane.scheduled + 1))
        parts.append(Part(lane, batch, shape))
    return parts, steps


def times(
    now: int,
    free: list[int],
    flying: Sequence[int],
    priced: Sequence[Sequence[Sequence[int]]],
    before: Sequence[int],
    steps: int,
) -> tuple[Times, list[list[int]]]:
    """The times of consecutive steps from the loop top at `now`, and when each stage is free before the first of them
    and after each.

    `free`: when each stage is free now; `flying`: ends of the batches in flight. `priced`, `before`: for each lane, the
    durations of its steps by stage, and what the host takes before each of them.
    """
    tops, begins, ends, frees = [now], [], [], [free]
    due, lanes, top = deque(flying), len(priced), now
    for step in range(steps):
        turn, place = divmod(step, lanes)
        at = top + before[place]
        if free[0] > at:
            at = free[0]
        begins.append(at)
        following = []
        for idle, ns in zip(free, priced[place][turn], strict=True):
            if idle > at:
                at = idle
            at += ns
            following.append(at)
        free = following
        frees.append(free)
        ends.append(at)
        due.append(at)
        oldest = due.popleft()
        if oldest > top:
            top = oldest
        tops.append(top)
    return Times(tops, begins, ends), frees


def take_blocks(scheduler: Scheduler, parts: Sequence[Part], first: int, last: int) -> list[int]:
    """Give the riders the blocks for steps `first` up to before `last`; the blocks in use after each."""
    kv, after = scheduler.kv, []
    lanes = [(part.lane, part.lane.scheduled + 1) for part in parts]
    for step in range(first, last):
        turn, place = divmod(step, len(parts))
        lane, number = lanes[place]
        lane.take_blocks(number + turn)
        after.append(kv.pool.used)
    return after


def _hand_out(scheduler: Scheduler, part: Part, outputs_ns: Sequence[int]) -> None:
    """A lane's outputs that came at `outputs_ns`, from its batch in flight on."""
    lane, flying = part.lane, part.flying
    if flying is not None and flying.requests and outputs_ns:  # they began to ride with it, and get their first token
        ended = scheduler.update(flying, outputs_ns[0])
        assert not ended, "who ends does not ride"
        outputs_ns = outputs_ns[1:]
    elif flying is not None and outputs_ns:
        lane.flying.clear()
    lane.count_processed(outputs_ns)


def _in_flight(part: Part, turns: int, scheduled_ns: int) -> Batch:
    """The batch of a lane's last step, still on the devices."""
    batch, lane = Batch(scheduled_ns), part.lane
    batch.shape = part.shape.later(turns - 1)
    batch.riders, batch.number, batch.lane = part.shape.decode_seqs, lane.scheduled, lane.lane
    lane.flying.append(batch)
    return batch


def _steps_with_blocks(scheduler: Scheduler, lanes: Sequence[Riding], steps: int) -> int:
    """The largest number of steps, at most `steps`, for which the free blocks suffice."""
    free = scheduler.kv.pool.free
    turns = steps // len(lanes) + 1
    if sum(lane.riders.groups * lane.riders.count * (turns // lane.riders.size + 1) for lane in lanes) <= free:
        return steps
    for step in range(steps):
        turn, place = divmod(step, len(lanes))
        free -= lanes[place].riders.blocks(lanes[place].scheduled + 1 + turn)
        if free < 0:
            return step
    return steps
