"""Many steps at once: while an engine's batch does not change, its next steps differ only in context length.

`coast` carries out such a run of pure decode steps in one go, with exactly the effects of single steps: the same times,
the same blocks taken in the same order, the same gaps between tokens. It stops before anything can change the batch: a
request's last token, a full KV cache, or `horizon`, the time before which nothing can reach the engine from outside.

A run is three things, which engines that step together can put together differently: `plan` says of one scheduler what
the run is and how long it can be, `times` says when its steps happen given how long each takes, and `apply` leaves the
scheduler as the single steps would have.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from servetwin.engine.batch import Batch
from servetwin.engine.request import Request
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
    if last is None or len(last) != len(scheduler.running):
        return now, flying
    if horizon is not None:
        typical = max(1, last.end_ns - last.begin_ns)
        most = (horizon - now) // typical + 2
        if now + SHORTEST * typical >= horizon:
            return now, flying
    planned = plan(scheduler, flying is not None, most)
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
    used = apply(scheduler, tops[1:])
    first = engine.steps
    engine.steps += steps
    queue = (len(scheduler.running), scheduler.waiting_count)
    rows = [request.row for request in scheduler.running]
    engine.log.run(engine.number, first, shape, begins, ends, used, queue, rows)
    engine.occupy_until(ends[-1])
    if flying is None:
        return tops[-1], None
    batch = batch_in_flight(scheduler, shape.later(steps - 1), tops[-2])
    batch.index, batch.begin_ns, batch.end_ns = engine.steps - 1, begins[-1], ends[-1]
    return tops[-1], batch


def plan(scheduler: Scheduler, flying: bool, most: int | None = None) -> Plan | None:
    """The run of pure decode steps, at most `most` of them, that `scheduler` would make from this loop top if nothing
    reached it from outside; None when that is not a run of SHORTEST steps or more.

    `flying`: a batch of the same requests is on the device (asynchronous scheduling).
    """
    running = scheduler.running
    if not running or not _steady(scheduler, 1 if flying else 0):
        return None
    steps = min(_steps_to_an_end(request, scheduler) for request in running) - 1
    if most is not None:
        steps = min(steps, most)
    steps = _steps_with_blocks(scheduler, steps)
    if steps < SHORTEST:
        return None
    contexts, seqs = [request.computed for request in running], len(running)
    return Plan(StepShape(0, 0, 0, 0, seqs, seqs, sum(contexts), max(contexts), min(contexts)), steps)


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
    used = _take_blocks(scheduler, len(outputs_ns))
    _hand_out_tokens(scheduler, outputs_ns)
    scheduler.count_steps(len(outputs_ns))
    return used


def batch_in_flight(scheduler: Scheduler, shape: StepShape, scheduled_ns: int) -> Batch:
    """After `apply`: the last batch of the run, still on the device, as single stepping would have left it (but for
    its index and its times on the device)."""
    batch = Batch(scheduled_ns)
    running = scheduler.running
    batch.requests = list(running)
    batch.tokens, batch.drafts, batch.samples = [1] * len(running), [0] * len(running), [True] * len(running)
    batch.before = [request.computed - 1 for request in running]
    batch.shape = shape
    for request in running:
        request.last_batch = scheduler.scheduled_batches
    return batch


def _steady(scheduler: Scheduler, in_flight: int) -> bool:
    """Whether each running request would get one token in the next step, and nobody could be admitted."""
    options, running = scheduler.options, scheduler.running
    if options.speculative_tokens or options.prefill_schedule_interval > 1 or not scheduler.kv.uniform:
        return False
    if scheduler.waiting_count and len(running) < scheduler.max_active:
        return False
    if len(running) > options.max_num_batched_tokens:
        return False
    if scheduler.connector is not None and scheduler.connector.next_end_ns is not None:
        return False
    return all(
        request.outputs > 0
        and request.placeholders == in_flight
        and request.in_flight == in_flight
        and not request.stale
        and request.known + in_flight - request.computed == 1
        for request in running
    )


def _steps_to_an_end(request: Request, scheduler: Scheduler) -> int:
    left = min(request.max_tokens - request.outputs, scheduler.options.max_model_len - request.known)
    if request.stop_after is not None:
        left = min(left, request.stop_after - request.outputs)
    return left


def _steps_with_blocks(scheduler: Scheduler, steps: int) -> int:
    """The largest number of steps, at most `steps`, for which the free blocks suffice."""
    kv, running = scheduler.kv, scheduler.running
    size, free = kv.block_size, kv.pool.free
    spare = [len(kv.holdings[request.row].tables[0]) * size - request.computed for request in running]

    def needed(count: int) -> int:
        return sum(-(-(count - slots) // size) for slots in spare if slots < count)

    if steps < SHORTEST or needed(steps) <= free:
        return steps
    low, high = 0, steps
    while high - low > 1:
        middle = (low + high) // 2
        if needed(middle) <= free:
            low = middle
        else:
            high = middle
    return low


def _take_blocks(scheduler: Scheduler, steps: int) -> list[int]:
    """Give the requests their new blocks in the order of single steps; the blocks in use after each step."""
    running = scheduler.running
    due = [(request.quiet - request.computed + 1, i) for i, request in enumerate(running)]
    due = [(max(step, 1), i) for step, i in due if step <= steps]
    heapq.heapify(due)
    start = [request.computed for request in running]
    used, at = [0] * steps, 0
    while due:
        step, i = heapq.heappop(due)
        while at < step - 1:
            used[at] = scheduler.kv.pool.used
            at += 1
        request = running[i]
        scheduler.grow(request, computed=start[i] + step - 1, known=request.known + step - 1)
        following = max(step + 1, request.quiet - start[i] + 1)
        if following <= steps:
            heapq.heappush(due, (following, i))
    while at < steps:
        used[at] = scheduler.kv.pool.used
        at += 1
    return used


def _hand_out_tokens(scheduler: Scheduler, outputs_ns: Sequence[int]) -> None:
    """One token to each running request at each of `outputs_ns`."""
    steps, running, gaps = len(outputs_ns), scheduler.running, scheduler.gaps
    for request in running:
        gap = outputs_ns[0] - request.last_token_ns
        gaps[gap] = gaps.get(gap, 0) + 1
        request.outputs += steps
        request.known += steps
        request.computed += steps
        request.last_token_ns = outputs_ns[-1]
        if request.token_ns is not None:
            request.token_ns += outputs_ns
    for i in range(1, steps):
        gap = outputs_ns[i] - outputs_ns[i - 1]
        gaps[gap] = gaps.get(gap, 0) + len(running)
