"""Many steps at once: while an engine's batch does not change, its next steps differ only in context length.

`coast` carries out such a run of pure decode steps in one go, with exactly the effects of single steps: the same times,
the same blocks taken in the same order, the same gaps between tokens. It stops before anything can change the batch: a
request's last token, a full KV cache, or `horizon`, the time before which nothing can reach the engine from outside.

A run is three things, which engines that step together can put together differently: `plan` says of one scheduler what
the run is and how long it can be, `times` says when its steps happen given how long each takes, and `apply` leaves the
scheduler as the single steps would have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from servetwin.engine.batch import Batch
from servetwin.engine.scheduler import Scheduler
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


def coast(engine: Engine, now: int, horizon: int | None, flying: Batch | None) -> tuple[int, Batch | None]:
    """Carry out as many steps as possible from the loop top at `now`; the time of the new loop top and the batch in
    flight.

    `flying` is the batch on the device (asynchronous scheduling), None when scheduling waits for each step.
    """
    scheduler, last, most = engine.scheduler, engine.last_batch, None
    if last is None or not scheduler.riders.count:
        return now, flying
    if horizon is not None:
        typical = max(1, last.end_ns - last.begin_ns)
        most = (horizon - now) // typical + 2
        if now + SHORTEST * typical >= horizon:
            return now, flying
    planned = plan(scheduler, flying, most)
    if planned is None:
        return now, flying
    shape, steps = planned
    before, gap = engine.host.before(shape.decode_seqs), engine.host.gap(shape.decode_seqs)
    device_free = flying.end_ns if flying else None
    saved = engine.timer.ledger.copy()
    durations = [ns + gap for ns in engine.timer.run_ns(shape, steps)]
    tops, begins, ends = times(now, device_free, durations, before)
    if horizon is not None and tops[-1] >= horizon:
        steps = next(i for i, top in enumerate(tops) if top >= horizon) - 1
        # Steps priced for nothing must not count in the ledger.
        engine.timer.ledger.restore(saved)
        if steps < SHORTEST:
            return now, flying
        engine.timer.run_ns(shape, steps)
        tops, begins, ends = tops[: steps + 1], begins[:steps], ends[:steps]
    rows = [request.row for request in scheduler.running] if scheduler.keeps_entries else []
    used = apply(scheduler, tops[1:])
    first = engine.steps
    engine.steps += steps
    queue = (len(scheduler.running), scheduler.waiting_count)
    engine.log.run(engine.number, first, shape, begins, ends, used, queue, rows)
    engine.occupy_until(ends[-1])
    if flying is None:
        return tops[-1], None
    batch = batch_in_flight(scheduler, shape.later(steps - 1), tops[-2])
    batch.index, batch.begin_ns, batch.end_ns = engine.steps - 1, begins[-1], ends[-1]
    return tops[-1], batch


def plan(scheduler: Scheduler, flying: Batch | None, most: int | None = None) -> Plan | None:
    """The run of pure decode steps, at most `most` of them, that `scheduler` would make from this loop top if nothing
    reached it from outside; None when that is not a run of SHORTEST steps or more.

    `flying`: the batch on the device (asynchronous scheduling), if any.
    """
    riders, running = scheduler.riders, scheduler.running
    if not riders.count or scheduler.plain or riders.handing != riders.count:
        return None
    if flying is not None and flying.requests:
        return None
    if riders.count > scheduler.options.max_num_batched_tokens:
        return None
    if scheduler.waiting_count and len(running) < scheduler.max_active:
        return None
    if scheduler.connector is not None and scheduler.connector.next_end_ns is not None:
        return None
    steps = riders.next_leave() - scheduler.scheduled_batches
    if flying is None:
        steps -= 1  # its last token is not in flight yet: it comes with the step in which it leaves
    if most is not None and most < steps:
        steps = most
    if steps < SHORTEST:
        return None
    first = scheduler.scheduled_batches + 1
    steps = _steps_with_blocks(scheduler, first, steps)
    if steps < SHORTEST:
        return None
    context, largest, smallest = riders.contexts(first)
    return Plan(StepShape(0, 0, 0, 0, riders.count, riders.count, context, largest, smallest), steps)


def times(now: int, device_free: int | None, durations: Sequence[int], before: int) -> Times:
    """The times of consecutive steps from the loop top at `now`; each takes the host `before` and then its duration.

    `device_free` None: scheduling waits for each step, and a loop top is the end of the step before. Else a batch is in
    flight until `device_free`; a loop top is the end of the step before the last one, so that a step begins when the
    device is free and the host has prepared it.
    """
    tops, begins, ends = [now], [], []
    free = now if device_free is None else device_free
    for ns in durations:
        begin = max(free, tops[-1] + before)
        begins.append(begin)
        tops.append(begin + ns if device_free is None else free)
        free = begin + ns
        ends.append(free)
    return Times(tops, begins, ends)


def apply(scheduler: Scheduler, outputs_ns: Sequence[int]) -> list[int]:
    """Carry out a planned run, or its beginning, in `scheduler`: one step, and outputs handed out, for each of
    `outputs_ns` (at least one). The blocks in use after each step."""
    used, pool = [], scheduler.kv.pool
    for number in range(scheduler.scheduled_batches + 1, scheduler.scheduled_batches + 1 + len(outputs_ns)):
        scheduler.take_blocks(number)
        used.append(pool.used)
    scheduler.carried_out(outputs_ns)
    return used


def batch_in_flight(scheduler: Scheduler, shape: StepShape, scheduled_ns: int) -> Batch:
    """After `apply`: the last batch of the run, still on the device, as single stepping would have left it (but for
    its index and its times on the device)."""
    batch = Batch(scheduled_ns)
    batch.riders, batch.number, batch.shape = shape.decode_seqs, scheduler.scheduled_batches, shape
    scheduler.flying.clear()
    scheduler.flying.append(batch)
    return batch


def _steps_with_blocks(scheduler: Scheduler, first: int, steps: int) -> int:
    """The largest number of steps from batch `first` on, at most `steps`, for which the free blocks suffice."""
    riders, free = scheduler.riders, scheduler.kv.pool.free
    if riders.count * (steps // riders.size + 1) <= free:
        return steps
    for i in range(steps):
        free -= riders.blocks(first + i)
        if free < 0:
            return i
    return steps
