"""Many steps at once, compiled by numba: what `servetwin.engine.coast` does, over arrays.

While the batch does not change, a step needs nothing of its requests but the sum and the largest of their contexts.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, no-any-return"
from __future__ import annotations

import numba

from servetwin.engine.compiled.columns import *
from servetwin.engine.compiled.pricing import step_ns, unbook
from servetwin.engine.compiled.steps import log_step

compiled = numba.njit(cache=True, error_model="numpy")


@compiled
def coast(e, now, limit, state, prices, out):
    """Carry out steps in which all that run get a token and nobody ends, from the loop top at `now` on, as long as
    their outputs come before `limit` and no request has reached the engine; the loop top at which that is over."""
    engines, slots, running, batches, _ = state
    counters, gaps, booked = out[0], out[2], out[5]
    count, ahead = engines[e, RUNNING], engines[e, ROOM] - 1
    steps, context, most = _planned(e, engines, slots, running, batches)
    steps = 0 if out[6][0] else min(steps, len(gaps) - 8 * running.shape[1] - counters[GAPS])
    head = engines[e, INBOX_HEAD]
    until = slots[head, AT] if head >= 0 else NEVER
    timer = engines[e, TIMER]
    before = engines[e, STEP_NS] + engines[e, SEQ_NS] * count
    gap = engines[e, GAP_NS] + engines[e, GAP_SEQ_NS] * count
    flying_end, last_outputs, scheduled_at, begin, done = engines[e, LAST_END], engines[e, LAST_OUTPUTS_NS], now, now, 0
    while done < steps and now < until and not (ahead and flying_end >= limit):
        ns = step_ns(timer, 0, 0, 0, 0, count, context, most, prices, booked)
        if ns < 0:
            break
        begin = max(now + before, engines[e, DEVICE_FREE])
        end = begin + ns + gap
        following = flying_end if ahead else end
        if following >= limit:
            unbook(timer, count, context, most, prices, booked)
            break
        log_step(e, begin, end, 0, 0, 0, count, context, engines, out)
        gaps[counters[GAPS], 0], gaps[counters[GAPS], 1] = following - last_outputs, count
        counters[GAPS] += 1
        scheduled_at, now, last_outputs = now, following, following
        engines[e, DEVICE_FREE] = flying_end = end
        context, most, done = context + count, most + 1, done + 1
    if done:
        _carry_out(e, done, begin, scheduled_at, now, state)
        out[4][e, 12] = engines[e, USABLE] - engines[e, FREE]
    return now


@compiled
def _planned(e, engines, slots, running, batches):
    """How many such steps there can be, with the sum and the largest of the contexts before the first one."""
    count, ahead = engines[e, RUNNING], engines[e, ROOM] - 1
    nothing = 0, 0, 0
    if not count or count > engines[e, BUDGET] or engines[e, FLYING] != ahead or ahead > 1:
        return nothing
    if engines[e, WAITING] and count < engines[e, MAX_ACTIVE]:
        return nothing
    if ahead and batches[e, engines[e, OLDEST], ENTRIES] != count:
        return nothing
    steps, context, most = NEVER, 0, 0
    for i in range(count):
        slot = running[e, i]
        # Each has had a token with the last outputs, and has at most one in flight.
        if slots[slot, LAST_NS] != engines[e, LAST_OUTPUTS_NS] or slots[slot, IN_FLIGHT] != ahead:
            return nothing
        if slots[slot, PLACEHOLDERS] != ahead or slots[slot, KNOWN] + ahead - slots[slot, COMPUTED] != 1:
            return nothing
        left = min(slots[slot, MOST], slots[slot, STOP]) - slots[slot, OUTPUTS]
        steps = min(steps, left - 1, engines[e, MAX_MODEL_LEN] - slots[slot, KNOWN] - 1)
        context += slots[slot, COMPUTED]
        most = max(most, slots[slot, COMPUTED])
    enough = (engines[e, FREE] // count - 1) * engines[e, BLOCK_SIZE]
    return min(steps, enough), context, most


@compiled
def _carry_out(e, steps, begin, scheduled_at, now, state):
    """Leave engine and requests as so many single steps would have, the last outputs being those at `now`."""
    engines, slots, running, batches, entries = state
    count, ahead, size = engines[e, RUNNING], engines[e, ROOM] - 1, engines[e, BLOCK_SIZE]
    engines[e, SCHEDULED] += steps
    engines[e, PROCESSED] += steps
    engines[e, LAST_OUTPUTS_NS], engines[e, LAST_END] = now, engines[e, DEVICE_FREE]
    engines[e, UNFLUSHED] = 0
    place = engines[e, OLDEST] = (engines[e, OLDEST] + steps) % engines[e, ROOM]
    if ahead:
        batches[e, place, NUMBER], batches[e, place, ENTRIES] = engines[e, SCHEDULED], count
        batches[e, place, INDEX], batches[e, place, SCHEDULED_AT] = engines[e, STEPS] - 1, scheduled_at
        batches[e, place, BEGIN_NS], batches[e, place, END_NS] = begin, engines[e, DEVICE_FREE]
    for i in range(count):
        slot = running[e, i]
        computed = slots[slot, COMPUTED] = slots[slot, COMPUTED] + steps
        slots[slot, KNOWN] += steps
        slots[slot, OUTPUTS] += steps
        slots[slot, LAST_NS] = now
        short = -(-computed // size) - slots[slot, HELD]
        slots[slot, HELD] += short
        engines[e, FREE] -= short
        slots[slot, QUIET] = slots[slot, HELD] * size
        if engines[e, CACHING]:
            slots[slot, QUIET] -= 1
            # Scheduling ahead, a token is known when the step behind its own has ended.
            slots[slot, CACHED] = max(slots[slot, CACHED], (computed - ahead) // size)
        if ahead:
            entries[e, place, i, SLOT], entries[e, place, i, TOKENS] = slot, 1
            entries[e, place, i, BEFORE], entries[e, place, i, SAMPLES] = computed - 1, 1
