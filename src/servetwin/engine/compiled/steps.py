"""A step: which requests run in it, what it costs, and what comes of it. Compiled by numba; see `kernel`."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, no-any-return"
from __future__ import annotations

import numba

from servetwin.engine.compiled.columns import *
from servetwin.engine.compiled.pricing import step_ns

compiled = numba.njit(cache=True, error_model="numpy")


@compiled
def schedule(e, place, now, state):
    """`Scheduler.schedule`; False, with nothing changed, when a request would have to give way or nothing could run."""
    engines, slots, running, batches, entries = state
    budget, size, longest = engines[e, BUDGET], engines[e, BLOCK_SIZE], engines[e, MAX_MODEL_LEN]
    threshold = _prefill_threshold(e, engines)
    count = short = 0
    for i in range(engines[e, RUNNING]):
        if budget <= 0:
            break
        slot = running[e, i]
        computed, placeholders = slots[slot, COMPUTED], slots[slot, PLACEHOLDERS]
        if placeholders and computed + 2 - placeholders >= slots[slot, PROMPT] + slots[slot, MOST]:
            continue
        tokens = min(_at_most(slots[slot, KNOWN] + placeholders - computed, threshold), budget, longest - 1 - computed)
        if tokens <= 0:
            continue
        if computed + tokens > slots[slot, QUIET]:
            short += max(0, -(-min(computed + tokens, longest) // size) - slots[slot, HELD])
        entries[e, place, count, SLOT], entries[e, place, count, TOKENS] = slot, tokens
        entries[e, place, count, BEFORE] = computed
        count += 1
        budget -= tokens
    if short > engines[e, FREE]:
        return False
    for i in range(count):
        slot, tokens = entries[e, place, i, SLOT], entries[e, place, i, TOKENS]
        if slots[slot, COMPUTED] + tokens > slots[slot, QUIET]:
            _take_blocks(e, engines, slots, slot, slots[slot, COMPUTED] + tokens)
    while budget > 0 and engines[e, RUNNING] < engines[e, MAX_ACTIVE] and engines[e, WAITING]:
        slot = engines[e, WAITING_HEAD]
        tokens = _at_most(slots[slot, KNOWN], threshold)
        watermark = engines[e, WATERMARK] if engines[e, RUNNING] else 0
        whole = -(-min(slots[slot, KNOWN], longest) // size)
        too_long = engines[e, CHUNKED] == 0 and tokens > budget
        tokens = min(tokens, budget)
        needed = whole if engines[e, RESERVES_ALL] else -(-min(tokens, longest) // size)
        if too_long or needed + watermark > engines[e, FREE]:
            if not engines[e, RUNNING]:
                return False
            break
        _take_blocks(e, engines, slots, slot, tokens)
        engines[e, QUERIES] += slots[slot, KNOWN]
        engines[e, WAITING_HEAD] = slots[slot, NEXT]
        engines[e, WAITING] -= 1
        running[e, engines[e, RUNNING]] = slot
        engines[e, RUNNING] += 1
        slots[slot, SCHEDULED_NS] = now
        entries[e, place, count, SLOT], entries[e, place, count, TOKENS] = slot, tokens
        entries[e, place, count, BEFORE] = 0
        count += 1
        budget -= tokens
    batches[e, place, NUMBER], batches[e, place, ENTRIES], batches[e, place, SCHEDULED_AT] = 0, count, now
    engines[e, UNFLUSHED] = 0
    if count:
        engines[e, SCHEDULED] += 1
        batches[e, place, NUMBER] = engines[e, SCHEDULED]
    for i in range(count):
        slot, tokens = entries[e, place, i, SLOT], entries[e, place, i, TOKENS]
        slots[slot, COMPUTED] += tokens
        slots[slot, IN_FLIGHT] += tokens
        samples = slots[slot, COMPUTED] >= slots[slot, KNOWN] + slots[slot, PLACEHOLDERS]
        entries[e, place, i, SAMPLES] = samples
        if samples and engines[e, ASYNCHRONOUS]:
            slots[slot, PLACEHOLDERS] += 1
    return True


@compiled
def _prefill_threshold(e, engines):
    threshold, others = engines[e, THRESHOLD], engines[e, RUNNING] + engines[e, WAITING]
    if threshold and not (others <= 1 and engines[e, LONE_UNLIMITED]):
        return max(threshold, engines[e, BUDGET] // max(1, others)) if engines[e, ADAPTIVE] else threshold
    return 0


@compiled
def _at_most(tokens, threshold):
    return min(tokens, threshold) if threshold > 0 else tokens


@compiled
def _take_blocks(e, engines, slots, slot, tokens):
    """`CountedKV.allocate` for `tokens` in all; the blocks are there. Divisions take time: up to QUIET tokens there is
    nothing to do."""
    size = engines[e, BLOCK_SIZE]
    short = -(-min(tokens, engines[e, MAX_MODEL_LEN]) // size) - slots[slot, HELD]
    if short > 0:
        slots[slot, HELD] += short
        engines[e, FREE] -= short
    slots[slot, QUIET] = slots[slot, HELD] * size
    if engines[e, CACHING]:
        slots[slot, QUIET] -= 1
        slots[slot, CACHED] = max(slots[slot, CACHED], min(tokens, slots[slot, KNOWN]) // size)


@compiled
def launch(e, place, state, prices, out):
    """`Engine._launch`; False when the tables lack a price."""
    engines, _, _, batches, entries = state
    prefills = prefill_tokens = prefill_context = pairs = decodes = context = most = 0
    for i in range(batches[e, place, ENTRIES]):
        new, old = entries[e, place, i, TOKENS], entries[e, place, i, BEFORE]
        if new == 1:
            decodes += 1
            context += old
            most = max(most, old)
        else:
            prefills += 1
            prefill_tokens += new
            prefill_context += old
            pairs += new * old + new * (new + 1) // 2
    shape = prefills, prefill_tokens, prefill_context, pairs, decodes, context, most
    ns = step_ns(engines[e, TIMER], *shape, prices, out[5])
    if ns < 0:
        return False
    seqs = prefills + decodes
    ns += engines[e, GAP_NS] + engines[e, GAP_SEQ_NS] * seqs
    begin = max(
        batches[e, place, SCHEDULED_AT] + engines[e, STEP_NS] + engines[e, SEQ_NS] * seqs, engines[e, DEVICE_FREE]
    )
    batches[e, place, BEGIN_NS], batches[e, place, END_NS] = begin, begin + ns
    batches[e, place, INDEX] = engines[e, STEPS]
    engines[e, DEVICE_FREE] = engines[e, LAST_END] = begin + ns
    log_step(e, begin, begin + ns, prefills, prefill_tokens, prefill_context, decodes, context, engines, out)
    return True


@compiled
def log_step(e, begin, end, prefills, prefill_tokens, prefill_context, decodes, context, engines, out):
    """`StepLog.step`, the columns in the order of `COLUMNS` there; the engine's next step has the next number."""
    counters, rows, last_rows, expand = out[0], out[1], out[4], out[6]
    used = engines[e, USABLE] - engines[e, FREE]
    engines[e, STEPS] += 1
    if (
        last_rows[e, 2]
        and last_rows[e, 9] + last_rows[e, 2] * last_rows[e, 8] == context
        and last_rows[e, 8] == decodes
        and not (last_rows[e, 5] or prefills)
        and last_rows[e, 10] == engines[e, RUNNING]
        and last_rows[e, 11] == engines[e, WAITING]
        and not expand[0]
    ):
        last_rows[e, 2] += 1
        last_rows[e, 4], last_rows[e, 12] = end, used
        return
    if last_rows[e, 2]:
        for column in range(rows.shape[1]):
            rows[counters[ROWS], column] = last_rows[e, column]
        counters[ROWS] += 1
    last_rows[e, 1], last_rows[e, 2], last_rows[e, 3], last_rows[e, 4] = engines[e, STEPS] - 1, 1, begin, end
    last_rows[e, 5], last_rows[e, 6], last_rows[e, 7] = prefills, prefill_tokens, prefill_context
    last_rows[e, 8], last_rows[e, 9] = decodes, context
    last_rows[e, 10], last_rows[e, 11], last_rows[e, 12] = engines[e, RUNNING], engines[e, WAITING], used


@compiled
def update(e, place, now, state, out):
    """`Scheduler.update`."""
    engines, slots, running, batches, entries = state
    counters, _, gaps, ended, _, _, _ = out
    longest, size = engines[e, MAX_MODEL_LEN], engines[e, BLOCK_SIZE]
    usual_gap, usual = now - engines[e, LAST_OUTPUTS_NS], 0
    engines[e, PROCESSED] += 1
    engines[e, LAST_OUTPUTS_NS] = now
    some_ended = False
    for i in range(batches[e, place, ENTRIES]):
        slot = entries[e, place, i, SLOT]
        slots[slot, IN_FLIGHT] -= entries[e, place, i, TOKENS]
        if not entries[e, place, i, SAMPLES] or slots[slot, ENDED]:
            if slots[slot, ENDED] and not slots[slot, IN_FLIGHT]:
                slots[slot, NEXT] = counters[FREE_SLOT]
                counters[FREE_SLOT] = slot
            continue
        last = slots[slot, MOST] - slots[slot, OUTPUTS] <= 1 or longest - slots[slot, KNOWN] <= 1
        stopped = slots[slot, STOP] - slots[slot, OUTPUTS] <= 1
        placeholders = slots[slot, PLACEHOLDERS]
        slots[slot, OUTPUTS] += 1
        slots[slot, KNOWN] += 1
        if placeholders:
            slots[slot, PLACEHOLDERS] -= 1
        if slots[slot, FIRST_NS] < 0:
            slots[slot, FIRST_NS] = now
        elif now - slots[slot, LAST_NS] == usual_gap:
            usual += 1
        else:
            gaps[counters[GAPS], 0], gaps[counters[GAPS], 1] = now - slots[slot, LAST_NS], 1
            counters[GAPS] += 1
        slots[slot, LAST_NS] = now
        if placeholders and engines[e, CACHING]:
            certain = slots[slot, COMPUTED] - slots[slot, IN_FLIGHT]
            if certain >= (slots[slot, CACHED] + 1) * size and certain % size == 0:
                slots[slot, CACHED] = max(slots[slot, CACHED], certain // size)
        if last or stopped:
            some_ended = True
            slots[slot, ENDED] = 1
            engines[e, FREE] += slots[slot, HELD]
            engines[e, UNFLUSHED] = 1
            end = ended[counters[ENDS]]
            counters[ENDS] += 1
            end[END_ROW], end[END_SCHEDULED], end[END_FIRST] = (
                slots[slot, ROW],
                slots[slot, SCHEDULED_NS],
                slots[slot, FIRST_NS],
            )
            end[END_FINISH], end[END_OUTPUTS], end[END_STOPPED] = now, slots[slot, OUTPUTS], stopped
            if not slots[slot, IN_FLIGHT]:
                slots[slot, NEXT] = counters[FREE_SLOT]
                counters[FREE_SLOT] = slot
    if usual:
        gaps[counters[GAPS], 0], gaps[counters[GAPS], 1] = usual_gap, usual
        counters[GAPS] += 1
    if some_ended:
        kept = 0
        for i in range(engines[e, RUNNING]):
            slot = running[e, i]
            if not slots[slot, ENDED]:
                running[e, kept] = slot
                kept += 1
        engines[e, RUNNING] = kept
