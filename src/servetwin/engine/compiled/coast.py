"""Many steps at once, compiled by numba: what `servetwin.engine.coast` does, over arrays.

While the batch does not change, a step needs nothing of its requests but the sum and the largest of their contexts.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, no-any-return"
from __future__ import annotations

import numba

from servetwin.engine.compiled.columns import *
from servetwin.engine.compiled.pricing import book_fixed, decode_attention, fixed_ns
from servetwin.engine.compiled.steps import log_step

compiled = numba.njit(cache=True, error_model="numpy")


@compiled
def coast(e, now, limit, state, prices, out):
    """Carry out steps in which all that run get a token and nobody ends, from the loop top at `now` on, as long as
    their outputs come before `limit` and no request has reached the engine; the loop top at which that is over."""
    engines, slots, running, batches, _ = state
    counters, _, gaps, _, last_rows, booked, expand = out
    timers, _, _, _, decode_line, decode_parts, _, _, lines, places = prices
    count, ahead, timer = engines[e, RUNNING], engines[e, ROOM] > 1, engines[e, TIMER]
    steps, context, most = _planned(e, engines, slots, running, batches)
    if steps < 2 or expand[0]:
        return now
    steps = min(steps, len(gaps) - 8 * running.shape[1] - counters[GAPS])
    fixed, known = fixed_ns(timer, count, prices), True
    linear, a_token = timers[timer, KIND] == LINEAR, timers[timer, A_CONTEXT_TOKEN]
    for part in range(0 if linear else timers[timer, DECODE_PARTS]):
        known = known and decode_line[timer, part, count] >= 0
    if fixed < 0 or not known:
        return now
    arrival = NEVER
    if engines[e, INBOX_HEAD] >= 0:
        arrival = slots[engines[e, INBOX_HEAD], AT]
    before = engines[e, STEP_NS] + engines[e, SEQ_NS] * count
    gap = engines[e, GAP_NS] + engines[e, GAP_SEQ_NS] * count
    free, last_outputs = engines[e, DEVICE_FREE], engines[e, LAST_OUTPUTS_NS]
    scheduled_at = begin = now
    first_begin = first_end = done = 0
    first_context, at_gaps = context, counters[GAPS]
    while done < steps and now < arrival and not (ahead and free >= limit):
        if linear:
            ns = a_token * (context + count)
            booked[timer, ANALYTIC_KIND] += ns
        else:
            ns = decode_attention(timer, count, context, most, decode_line, decode_parts, lines, places, booked, 1)
        ready = max(now + before, free)
        end = ready + fixed + ns + gap
        following = free if ahead else end
        if following >= limit:  # it happens, but is not over
            if linear:
                booked[timer, ANALYTIC_KIND] -= ns
            else:
                decode_attention(timer, count, context, most, decode_line, decode_parts, lines, places, booked, -1)
            break
        gaps[at_gaps, 0], gaps[at_gaps, 1] = following - last_outputs, count
        at_gaps += 1
        if not done:
            first_begin, first_end = ready, end
        begin, scheduled_at, now, last_outputs, free = ready, now, following, following, end
        context, most, done = context + count, most + 1, done + 1
    if done:
        counters[GAPS] = at_gaps
        book_fixed(timer, count, done, prices, booked)
        none = done - done  # a variable: for a literal, numba would compile `log_step` once more
        log_step(e, first_begin, first_end, none, none, none, count, first_context, engines, out)
        last_rows[e, 2] += done - 1
        engines[e, STEPS] += done - 1
        engines[e, DEVICE_FREE] = free
        _carry_out(e, done, begin, scheduled_at, now, state)
        last_rows[e, 4], last_rows[e, 12] = free, engines[e, USABLE] - engines[e, FREE]
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
