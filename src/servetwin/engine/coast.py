"""Many steps at once: while an engine's batch does not change, its next steps differ only in context length.

`coast` carries out such a run of pure decode steps in one go, with exactly the effects of single steps: the same times,
the same blocks taken in the same order, the same gaps between tokens. It stops before anything can change the batch: a
request's last token, a full KV cache, or `horizon`, the time before which nothing can reach the engine from outside.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from servetwin.engine.batch import Batch
from servetwin.engine.request import Request
from servetwin.timing.shape import StepShape

if TYPE_CHECKING:
    from servetwin.engine.engine import Engine

SHORTEST = 2
"""A run of fewer steps costs more to prepare than it saves."""


def coast(engine: Engine, now: int, horizon: int | None, flying: Batch | None) -> tuple[int, Batch | None]:
    """Carry out as many steps as possible from the loop top at `now`; the time of the new loop top and the batch in
    flight.

    `flying` is the batch on the device (asynchronous scheduling), None when scheduling waits for each step.
    """
    running = engine.scheduler.running
    last = engine.last_batch
    if last is None or len(last) != len(running) or not running:
        return now, flying
    typical = max(1, last.end_ns - last.begin_ns)
    if horizon is not None and now + SHORTEST * typical >= horizon:
        return now, flying
    if not _steady(engine, 1 if flying else 0):
        return now, flying
    steps = min(_steps_to_an_end(request, engine) for request in running) - 1
    if horizon is not None:
        steps = min(steps, (horizon - now) // typical + 2)
    steps = _steps_with_blocks(engine, steps)
    if steps < SHORTEST:
        return now, flying
    return _carry_out(engine, now, horizon, flying, steps)


def _steady(engine: Engine, in_flight: int) -> bool:
    """Whether each running request would get one token in the next step, and nobody could be admitted."""
    scheduler, options = engine.scheduler, engine.scheduler.options
    running = scheduler.running
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


def _steps_to_an_end(request: Request, engine: Engine) -> int:
    left = min(request.max_tokens - request.outputs, engine.scheduler.options.max_model_len - request.known)
    if request.stop_after is not None:
        left = min(left, request.stop_after - request.outputs)
    return left


def _steps_with_blocks(engine: Engine, steps: int) -> int:
    """The largest number of steps, at most `steps`, for which the free blocks suffice."""
    kv, running = engine.scheduler.kv, engine.scheduler.running
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


def _carry_out(
    engine: Engine, now: int, horizon: int | None, flying: Batch | None, steps: int
) -> tuple[int, Batch | None]:
    running = engine.scheduler.running
    seqs = len(running)
    contexts = [request.computed for request in running]
    shape = StepShape(0, 0, 0, 0, seqs, seqs, sum(contexts), max(contexts), min(contexts))
    before, gap = engine.host.before(seqs), engine.host.gap(seqs)
    saved = engine.timer.ledger.copy()
    durations = engine.timer.run_ns(shape, steps)
    tops, begins, ends = _times(now, flying, [ns + gap for ns in durations], before)
    if horizon is not None and tops[-1] >= horizon:
        fit = next(i for i, top in enumerate(tops) if top >= horizon) - 1
        # Steps priced for nothing must not count in the ledger.
        engine.timer.ledger.restore(saved)
        if fit < SHORTEST:
            return now, flying
        engine.timer.run_ns(shape, fit)
        steps, tops, begins, ends = fit, tops[: fit + 1], begins[:fit], ends[:fit]
    used = _take_blocks(engine, steps, asynchronous=flying is not None)
    _hand_out_tokens(engine, tops[1:])
    first = engine.steps
    engine.steps += steps
    engine.scheduler.count_steps(steps)
    queue = (seqs, engine.scheduler.waiting_count)
    engine.log.run(engine.number, first, shape, begins, ends, used, queue, [request.row for request in running])
    engine.occupy_until(ends[-1])
    if flying is None:
        return tops[-1], None
    return tops[-1], _batch_in_flight(engine, shape.later(steps - 1), tops[-2], begins[-1], ends[-1])


def _times(now: int, flying: Batch | None, durations: list[int], before: int) -> tuple[list[int], list[int], list[int]]:
    """Loop tops (one more than steps), begins and ends of consecutive steps.

    Waiting for each step, a loop top is the end of the step before. Scheduling ahead, it is the end of the step before
    that, so that a step begins when the device is free and the host has prepared it.
    """
    tops, begins, ends = [now], [], []
    free = flying.end_ns if flying else now
    for ns in durations:
        begin = max(free, tops[-1] + before)
        begins.append(begin)
        tops.append(free if flying else begin + ns)
        free = begin + ns
        ends.append(free)
    return tops, begins, ends


def _take_blocks(engine: Engine, steps: int, asynchronous: bool) -> list[int]:
    """Give the requests their new blocks in the order of single steps; the blocks in use after each step."""
    scheduler = engine.scheduler
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


def _hand_out_tokens(engine: Engine, times: list[int]) -> None:
    """One token to each running request at each of `times`."""
    steps, running, gaps = len(times), engine.scheduler.running, engine.scheduler.gaps
    for request in running:
        gap = times[0] - request.last_token_ns
        gaps[gap] = gaps.get(gap, 0) + 1
        request.outputs += steps
        request.known += steps
        request.computed += steps
        request.last_token_ns = times[-1]
        if request.token_ns is not None:
            request.token_ns += times
    for i in range(1, steps):
        gap = times[i] - times[i - 1]
        gaps[gap] = gaps.get(gap, 0) + len(running)


def _batch_in_flight(engine: Engine, shape: StepShape, scheduled: int, begin: int, end: int) -> Batch:
    """The last batch of a run, still on the device, as single stepping would have left it."""
    batch = Batch(scheduled)
    running = engine.scheduler.running
    batch.requests = list(running)
    batch.tokens, batch.drafts, batch.samples = [1] * len(running), [0] * len(running), [True] * len(running)
    batch.before = [request.computed - 1 for request in running]
    batch.shape, batch.index = shape, engine.steps - 1
    batch.begin_ns, batch.end_ns = begin, end
    for request in running:
        request.last_batch = engine.scheduler.scheduled_batches
    return batch
