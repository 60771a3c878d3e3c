"""The loop of `Engine` and the rules of `Scheduler` over arrays, compiled by numba.

For engines whose KV blocks are only counted (`CountedKV`), with requests that come, run and end, and nothing else: see
`fleet.fits`. It is the scheduler without riders and without runs: it looks at every request in every step. Whatever
else comes up (a request has to give way, or can never be served), it stops before that decision, and the engine goes
on in Python. Column names are those of `columns`; what a step does and why is told where Python's form does it.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped, no-any-return"
from __future__ import annotations

import numba

from servetwin.engine.compiled.columns import *  # noqa: F403

compiled = numba.njit(cache=True, error_model="numpy")


@compiled
def advance(limit, number, stops_at_end, engines, wakes, slots, running, batches, entries, prices, out):
    """Wake engines, in the order of time and then number, up to before engine `number` at time `limit`; or, unless
    `stops_at_end`, every engine up to before `limit` on its own, as nobody looks at what ends until then.

    Arrays: `engines` (engines, ENGINE_COLUMNS), `wakes` (engines,) ns, `slots` (requests, SLOT_COLUMNS), `running`
    (engines, most that run) slots, `batches` (engines, places, BATCH_COLUMNS), `entries` (engines, places, most that
    run, ENTRY_COLUMNS); `prices` and `out`: see `Prices.tables` and `Fleet`. Returns DONE, ONE_ENDED, PRICE, LEAVE or
    FULL.
    """
    counters, rows, gaps, ended = out[0], out[1], out[2], out[3]
    if not stops_at_end:
        for e in range(len(wakes)):
            while wakes[e] < limit:
                if _nearly_full(counters, rows, gaps, ended):
                    return FULL
                code = _wake(e, wakes[e], engines, wakes, slots, running, batches, entries, prices, out)
                if code != DONE:
                    counters[CURRENT] = e
                    return code
        return DONE
    while True:
        e = 0
        for other in range(1, len(wakes)):
            if wakes[other] < wakes[e]:
                e = other
        if wakes[e] > limit or wakes[e] == NEVER or (wakes[e] == limit and e >= number):
            return DONE
        if _nearly_full(counters, rows, gaps, ended):
            return FULL
        code = _wake(e, wakes[e], engines, wakes, slots, running, batches, entries, prices, out)
        counters[CURRENT] = e
        if code != DONE:
            return code
        if counters[ENDS]:
            return ONE_ENDED


@compiled
def push(e, at, row, prompt, most, stop, engines, wakes, slots, counters):
    """A request is on its way to engine `e`, which it reaches at `at`; False when no slot is free."""
    slot = counters[FREE_SLOT]
    if slot < 0:
        return False
    request, engine = slots[slot], engines[e]
    counters[FREE_SLOT] = request[NEXT]
    request[:] = 0
    request[ROW], request[PROMPT], request[MOST], request[STOP], request[AT] = row, prompt, most, stop, at
    request[KNOWN] = prompt
    request[SCHEDULED_NS] = request[FIRST_NS] = request[LAST_NS] = -1
    tail = engine[INBOX_TAIL]
    if tail < 0 or slots[tail, AT] < at or (slots[tail, AT] == at and slots[tail, ROW] < row):
        request[NEXT] = -1
        if tail < 0:
            engine[INBOX_HEAD] = slot
        else:
            slots[tail, NEXT] = slot
        engine[INBOX_TAIL] = slot
    else:
        before, behind = -1, engine[INBOX_HEAD]
        while slots[behind, AT] < at or (slots[behind, AT] == at and slots[behind, ROW] < row):
            before, behind = behind, slots[behind, NEXT]
        request[NEXT] = behind
        if before < 0:
            engine[INBOX_HEAD] = slot
        else:
            slots[before, NEXT] = slot
    if not engine[AWAITING] and not engine[FLYING] and at < wakes[e]:
        wakes[e] = at
    return True


@compiled
def _nearly_full(counters, rows, gaps, ended):
    """Whether one more wake might find no room for what it has to say."""
    most = len(ended) // 2
    return (
        counters[ROWS] + 16 > len(rows) or counters[GAPS] + 4 * most > len(gaps) or counters[ENDS] + most > len(ended)
    )


@compiled
def _wake(e, now, engines, wakes, slots, running, batches, entries, prices, out):
    """`Engine.wake`, or the rest of it behind a price that was missing."""
    engine = engines[e]
    room = engine[ROOM]
    while True:
        ran = True
        if not engine[UNPRICED]:
            if engine[AWAITING]:
                oldest = engine[OLDEST]
                if batches[e, oldest, END_NS] > now:
                    wakes[e] = batches[e, oldest, END_NS]
                    return DONE
                if batches[e, oldest, NUMBER]:
                    _update(e, engine, batches[e, oldest], entries[e, oldest], now, slots, running, out)
                engine[OLDEST] = (oldest + 1) % room
                engine[FLYING] -= 1
                engine[AWAITING] = 0
            _open_inbox(engine, now, slots)
            if not (engine[RUNNING] or engine[WAITING] or engine[UNFLUSHED]):
                if engine[FLYING]:
                    engine[AWAITING] = 1
                    continue
                head = engine[INBOX_HEAD]
                wakes[e] = NEVER if head < 0 else slots[head, AT]
                return DONE
            place = (engine[OLDEST] + engine[FLYING]) % room
            if not _schedule(e, engine, batches[e, place], entries[e, place], now, slots, running):
                return LEAVE
            engine[UNPRICED] = 1
        place = (engine[OLDEST] + engine[FLYING]) % room
        if batches[e, place, NUMBER]:
            if not _launch(e, engine, batches[e, place], entries[e, place], prices, out):
                return PRICE
        else:
            ran = False
            batches[e, place, END_NS] = max(now, engine[LAST_END])
        engine[UNPRICED] = 0
        engine[FLYING] += 1
        if engine[FLYING] < room and (ran or engine[RUNNING] or engine[WAITING] or engine[UNFLUSHED]):
            continue
        engine[AWAITING] = 1


@compiled
def _open_inbox(engine, now, slots):
    slot = engine[INBOX_HEAD]
    while slot >= 0 and slots[slot, AT] <= now:
        behind = slots[slot, NEXT]
        slots[slot, NEXT] = -1
        if engine[WAITING]:
            slots[engine[WAITING_TAIL], NEXT] = slot
        else:
            engine[WAITING_HEAD] = slot
        engine[WAITING_TAIL] = slot
        engine[WAITING] += 1
        slot = behind
    engine[INBOX_HEAD] = slot
    if slot < 0:
        engine[INBOX_TAIL] = -1


@compiled
def _schedule(e, engine, batch, entries, now, slots, running):
    """`Scheduler.schedule`; False, with nothing changed, when a request would have to give way or nothing could run."""
    budget, size, longest = engine[BUDGET], engine[BLOCK_SIZE], engine[MAX_MODEL_LEN]
    threshold = _prefill_threshold(engine)
    count = short = 0
    for i in range(engine[RUNNING]):
        if budget <= 0:
            break
        request = slots[running[e, i]]
        computed, placeholders = request[COMPUTED], request[PLACEHOLDERS]
        if placeholders and computed + 2 - placeholders >= request[PROMPT] + request[MOST]:
            continue
        tokens = min(_at_most(request[KNOWN] + placeholders - computed, threshold), budget, longest - 1 - computed)
        if tokens <= 0:
            continue
        short += max(0, -(-min(computed + tokens, longest) // size) - request[HELD])
        entry = entries[count]
        entry[SLOT], entry[TOKENS], entry[BEFORE] = running[e, i], tokens, computed
        count += 1
        budget -= tokens
    if short > engine[FREE]:
        return False
    for i in range(count):
        request, tokens = slots[entries[i, SLOT]], entries[i, TOKENS]
        _take_blocks(engine, request, request[COMPUTED] + tokens)
    while budget > 0 and engine[RUNNING] < engine[MAX_ACTIVE] and engine[WAITING]:
        slot = engine[WAITING_HEAD]
        request = slots[slot]
        tokens = _at_most(request[KNOWN], threshold)
        watermark = engine[WATERMARK] if engine[RUNNING] else 0
        whole = -(-min(request[KNOWN], longest) // size)
        too_long = engine[CHUNKED] == 0 and tokens > budget
        tokens = min(tokens, budget)
        needed = whole if engine[RESERVES_ALL] else -(-min(tokens, longest) // size)
        if too_long or needed + watermark > engine[FREE]:
            if not engine[RUNNING]:
                return False
            break
        _take_blocks(engine, request, tokens)
        engine[QUERIES] += request[KNOWN]
        engine[WAITING_HEAD] = request[NEXT]
        engine[WAITING] -= 1
        running[e, engine[RUNNING]] = slot
        engine[RUNNING] += 1
        request[SCHEDULED_NS] = now
        entry = entries[count]
        entry[SLOT], entry[TOKENS], entry[BEFORE] = slot, tokens, 0
        count += 1
        budget -= tokens
    batch[NUMBER], batch[ENTRIES], batch[SCHEDULED_AT] = 0, count, now
    engine[UNFLUSHED] = 0
    if count:
        engine[SCHEDULED] += 1
        batch[NUMBER] = engine[SCHEDULED]
    for i in range(count):
        request, tokens = slots[entries[i, SLOT]], entries[i, TOKENS]
        request[COMPUTED] += tokens
        request[IN_FLIGHT] += tokens
        samples = request[COMPUTED] >= request[KNOWN] + request[PLACEHOLDERS]
        entries[i, SAMPLES] = samples
        if samples and engine[ASYNCHRONOUS]:
            request[PLACEHOLDERS] += 1
    return True


@compiled
def _prefill_threshold(engine):
    threshold, others = engine[THRESHOLD], engine[RUNNING] + engine[WAITING]
    if threshold and not (others <= 1 and engine[LONE_UNLIMITED]):
        return max(threshold, engine[BUDGET] // max(1, others)) if engine[ADAPTIVE] else threshold
    return 0


@compiled
def _at_most(tokens, threshold):
    return min(tokens, threshold) if threshold > 0 else tokens


@compiled
def _take_blocks(engine, request, tokens):
    """`CountedKV.allocate` for `tokens` in all; the blocks are there."""
    size = engine[BLOCK_SIZE]
    short = -(-min(tokens, engine[MAX_MODEL_LEN]) // size) - request[HELD]
    if short > 0:
        request[HELD] += short
        engine[FREE] -= short
    if engine[CACHING]:
        request[CACHED] = max(request[CACHED], min(tokens, request[KNOWN]) // size)


@compiled
def _launch(e, engine, batch, entries, prices, out):
    """`Engine._launch`; False when the tables lack a price."""
    prefills = prefill_tokens = prefill_context = pairs = decodes = context = most = 0
    for i in range(batch[ENTRIES]):
        new, old = entries[i, TOKENS], entries[i, BEFORE]
        if new == 1:
            decodes += 1
            context += old
            most = max(most, old)
        else:
            prefills += 1
            prefill_tokens += new
            prefill_context += old
            pairs += new * old + new * (new + 1) // 2
    ns = _price(engine[TIMER], prefills, prefill_tokens, prefill_context, pairs, decodes, context, most, prices, out)
    if ns < 0:
        return False
    seqs = prefills + decodes
    ns += engine[GAP_NS] + engine[GAP_SEQ_NS] * seqs
    begin = max(batch[SCHEDULED_AT] + engine[STEP_NS] + engine[SEQ_NS] * seqs, engine[DEVICE_FREE])
    batch[BEGIN_NS], batch[END_NS], batch[INDEX] = begin, begin + ns, engine[STEPS]
    engine[DEVICE_FREE] = engine[LAST_END] = begin + ns
    engine[STEPS] += 1
    _log(e, engine, batch, prefills, prefill_tokens, prefill_context, decodes, context, out)
    return True


@compiled
def _log(e, engine, batch, prefills, prefill_tokens, prefill_context, decodes, context, out):
    """`StepLog.step`, the columns in the order of `COLUMNS` there."""
    counters, rows, last = out[0], out[1], out[4][e]
    used = engine[USABLE] - engine[FREE]
    if (
        last[2]
        and last[9] + last[2] * last[8] == context
        and last[8] == decodes
        and not (last[5] or prefills)
        and last[10] == engine[RUNNING]
        and last[11] == engine[WAITING]
        and not out[6][0]
    ):
        last[2] += 1
        last[4], last[12] = batch[END_NS], used
        return
    if last[2]:
        rows[counters[ROWS]] = last
        counters[ROWS] += 1
    last[1], last[2], last[3], last[4] = batch[INDEX], 1, batch[BEGIN_NS], batch[END_NS]
    last[5], last[6], last[7], last[8], last[9] = prefills, prefill_tokens, prefill_context, decodes, context
    last[10], last[11], last[12] = engine[RUNNING], engine[WAITING], used


@compiled
def _update(e, engine, batch, entries, now, slots, running, out):
    """`Scheduler.update`."""
    counters, gaps, ended = out[0], out[2], out[3]
    longest, size = engine[MAX_MODEL_LEN], engine[BLOCK_SIZE]
    usual_gap, usual = now - engine[LAST_OUTPUTS_NS], 0
    engine[PROCESSED] += 1
    engine[LAST_OUTPUTS_NS] = now
    some_ended = False
    for i in range(batch[ENTRIES]):
        slot = entries[i, SLOT]
        request = slots[slot]
        request[IN_FLIGHT] -= entries[i, TOKENS]
        if not entries[i, SAMPLES] or request[ENDED]:
            if request[ENDED] and not request[IN_FLIGHT]:
                request[NEXT] = counters[FREE_SLOT]
                counters[FREE_SLOT] = slot
            continue
        last = request[MOST] - request[OUTPUTS] <= 1 or longest - request[KNOWN] <= 1
        stopped = request[STOP] - request[OUTPUTS] <= 1
        placeholders = request[PLACEHOLDERS]
        request[OUTPUTS] += 1
        request[KNOWN] += 1
        if placeholders:
            request[PLACEHOLDERS] -= 1
        if request[FIRST_NS] < 0:
            request[FIRST_NS] = now
        elif now - request[LAST_NS] == usual_gap:
            usual += 1
        else:
            gaps[counters[GAPS], 0], gaps[counters[GAPS], 1] = now - request[LAST_NS], 1
            counters[GAPS] += 1
        request[LAST_NS] = now
        if placeholders and engine[CACHING]:
            certain = request[COMPUTED] - request[IN_FLIGHT]
            if certain % size == 0:
                request[CACHED] = max(request[CACHED], certain // size)
        if last or stopped:
            some_ended = True
            request[ENDED] = 1
            engine[FREE] += request[HELD]
            engine[UNFLUSHED] = 1
            end = ended[counters[ENDS]]
            counters[ENDS] += 1
            end[END_ROW], end[END_SCHEDULED], end[END_FIRST] = request[ROW], request[SCHEDULED_NS], request[FIRST_NS]
            end[END_FINISH], end[END_OUTPUTS], end[END_STOPPED] = now, request[OUTPUTS], stopped
            end[END_ENGINE] = e
            if not request[IN_FLIGHT]:
                request[NEXT] = counters[FREE_SLOT]
                counters[FREE_SLOT] = slot
    if usual:
        gaps[counters[GAPS], 0], gaps[counters[GAPS], 1] = usual_gap, usual
        counters[GAPS] += 1
    if some_ended:
        kept = 0
        for i in range(engine[RUNNING]):
            slot = running[e, i]
            if not slots[slot, ENDED]:
                running[e, kept] = slot
                kept += 1
        engine[RUNNING] = kept


@compiled
def _price(timer, prefills, prefill_tokens, prefill_context, pairs, decodes, context, most, prices, out):
    """`StepTimer.step_ns` of the shape, booked; -1 when the tables lack something (see `Prices`)."""
    timers, padded, dense, head, decode_line, decode_parts, prefill_line, prefill_parts, lines = prices
    shares = out[5][timer]
    law = timers[timer]
    if law[KIND] == LINEAR:
        tokens = prefill_context + prefill_tokens + context + decodes
        ns = law[BASE] + law[A_PREFILL_TOKEN] * prefill_tokens + law[A_DECODE] * decodes + law[A_CONTEXT_TOKEN] * tokens
        shares[ANALYTIC_KIND] += ns
        return ns
    rows, logits = padded[timer, prefill_tokens + decodes], prefills + decodes
    on_tokens, on_logits = dense[timer, rows], head[timer, logits]
    if on_tokens[0] < 0 or on_logits[0] < 0:
        return -1
    for part in range(law[DECODE_PARTS] if decodes else 0):
        if decode_line[timer, part, decodes] < 0:
            return -1
    for part in range(law[PREFILL_PARTS] if prefills else 0):
        if prefill_line[timer, part, prefills] < 0:
            return -1
    total = 0
    for kind in range(len(shares)):
        share = on_tokens[kind] + on_logits[kind]
        shares[kind] += share
        total += share
    for part in range(law[PREFILL_PARTS] if prefills else 0):
        factor, calls, window, _ = prefill_parts[timer, part]
        curve = lines[prefill_line[timer, part, prefills]]
        ns, kind = _context_attention(prefills, prefill_tokens, pairs, window, curve)
        whole = int(ns * factor * calls)
        shares[kind] += whole
        total += whole
    if decodes:
        differ = most * decodes > context
        for part in range(law[DECODE_PARTS]):
            factor, calls, clip, uneven = decode_parts[timer, part]
            line = lines[decode_line[timer, part, decodes]]
            ns, kind = _on_line(line, min(context / decodes + 1.0, clip))
            ns *= factor
            if differ:
                longest, _ = _on_line(line, min(most * decodes / decodes + 1.0, clip))
                ns += uneven * (longest * factor - ns)
            whole = int(ns * calls)
            shares[kind] += whole
            total += whole
    return total


@compiled
def _point(xs, at):
    """The last of the rising `xs` that is not beyond `at`, -1 before the first: `bisect_right(xs, at) - 1`."""
    low, high = 0, len(xs)
    while low < high:
        middle = (low + high) // 2
        if at < xs[middle]:
            high = middle
        else:
            low = middle + 1
    return low - 1


@compiled
def _on_line(line, at):
    """`Curve.price`; a line is (xs, ys, slopes, kinds at points, kinds behind them), xs filled up with infinity."""
    i = _point(line[0], at)
    if i < 0:
        return line[1, 0], EXTRAPOLATED_KIND
    beyond = at - line[0, i]
    if beyond:
        return line[1, i] + line[2, i] * beyond, int(line[4, i])
    return line[1, i], int(line[3, i])


@compiled
def _on_curve(curve, at):
    """`PowerCurve.price`, laid out as a line, with powers for slopes."""
    i = _point(curve[0], at)
    if i < 0:
        return curve[1, 0], EXTRAPOLATED_KIND
    known = curve[0, i]
    if at == known:
        return curve[1, i], int(curve[3, i])
    return curve[1, i] * (at / known) ** curve[2, i], int(curve[4, i])


@compiled
def _causal_pairs(length, window):
    if window and length > window:
        return window * (window + 1) / 2 + (length - window) * window
    return length * (length + 1) / 2


@compiled
def _context_attention(seqs, tokens, pairs, window, curve):
    """`ContextAttention.price`."""
    new = tokens / seqs
    before = max(pairs / tokens - (new + 1) / 2, 0.0)
    whole = _causal_pairs(before + new, window)
    spent = whole - _causal_pairs(before, window) if window else pairs / seqs
    alone = _causal_pairs(new, window)
    fresh, how = _on_curve(curve, alone)
    if spent <= alone:
        return fresh, how
    full, how_full = _on_curve(curve, whole)
    kind = EXTRAPOLATED_KIND if how == EXTRAPOLATED_KIND or how_full == EXTRAPOLATED_KIND else 1
    return fresh + (full - fresh) * (spent - alone) / (whole - alone), kind
