"""The loop of `Engine` and the rules of `Scheduler` over arrays, compiled by numba.

For engines whose KV blocks are only counted (`CountedKV`), with requests that come, run and end, and nothing else: see
`fleet.fits`. Whatever else comes up (a request has to give way, or can never be served), it stops before that decision,
and the engine goes on in Python. What a step does and why is told where Python's form does it; names of columns are
those of `columns`.

What the functions hand on to each other: `state` = (engines, slots, running, batches, entries), of shapes (engines,
ENGINE_COLUMNS), (requests, SLOT_COLUMNS), (engines, most that run) with slots in it, (engines, places, BATCH_COLUMNS)
and (engines, places, most that run, ENTRY_COLUMNS); `prices` = `Prices.tables`; `out` = (counters, rows, gaps, ends,
last rows, ns booked, whether each step has a row of its own), as `Fleet` keeps them.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, no-any-return"
from __future__ import annotations

import numba

from servetwin.engine.compiled.coast import coast
from servetwin.engine.compiled.columns import *
from servetwin.engine.compiled.pricing import fixed_ns
from servetwin.engine.compiled.steps import launch, schedule, update

compiled = numba.njit(cache=True, error_model="numpy")


@compiled
def advance(limit, number, stops_at_end, wakes, dues, state, prices, out):
    """Bring engines forward, up to before engine `number` at time `limit`; with `stops_at_end`, in the order of time
    and then number, and no further than the wake in which the first request ends.

    `wakes` (engines,): the next loop top of each engine, ns. `dues` (engines,): a time before which no request of it
    can end. Nobody looks at anything else, so that an engine may stay behind until then, and make up for it in few
    strides. Returns DONE, ONE_ENDED, PRICE, LEAVE or FULL.
    """
    counters = out[0]
    if not stops_at_end:
        for e in range(len(dues)):
            while dues[e] < limit:
                if _nearly_full(out):
                    return FULL
                code = _wake(e, wakes[e], limit, stops_at_end, wakes, state, prices, out)
                if code != DONE:
                    counters[CURRENT] = e
                    return code
                dues[e] = _due(e, wakes[e], state, prices)
        return DONE
    while True:
        e = dues.argmin()  # the first of equals
        if dues[e] > limit or dues[e] == NEVER or (dues[e] == limit and e >= number):
            return DONE
        if _nearly_full(out):
            return FULL
        others = limit
        for other in range(len(dues)):
            if other != e:
                others = min(others, dues[other])
        code = _wake(e, wakes[e], others, stops_at_end, wakes, state, prices, out)
        counters[CURRENT] = e
        if code != DONE:
            return code
        dues[e] = _due(e, wakes[e], state, prices)
        if counters[ENDS]:
            return ONE_ENDED


@compiled
def _due(e, wake, state, prices):
    """A time before which no request of an engine that waits until `wake` can end.

    Where all that are there only decode, and have blocks for it, no batch is smaller, and none takes less than what
    does not depend on the contexts. Batches in flight may.
    """
    engines, slots, running, _, _ = state
    count = engines[e, RUNNING]
    if not count or engines[e, WAITING] or engines[e, INBOX_HEAD] >= 0:
        return wake
    outputs = NEVER
    for i in range(count):
        slot = running[e, i]
        if slots[slot, COMPUTED] < slots[slot, PROMPT]:
            return wake
        left = min(slots[slot, MOST], slots[slot, STOP]) - slots[slot, OUTPUTS]
        outputs = min(outputs, left, engines[e, MAX_MODEL_LEN] - slots[slot, KNOWN])
    outputs = min(outputs, (engines[e, FREE] // count - 1) * engines[e, BLOCK_SIZE])
    if outputs <= engines[e, ROOM] or count > engines[e, BUDGET]:
        return wake
    return wake + (outputs - engines[e, ROOM]) * max(0, fixed_ns(engines[e, TIMER], count, prices))


@compiled
def push(e, at, row, prompt, most, stop, engines, wakes, dues, slots, counters):
    """A request is on its way to engine `e`, which it reaches at `at`; False when no slot is free."""
    slot = counters[FREE_SLOT]
    if slot < 0:
        return False
    request = slots[slot]
    counters[FREE_SLOT] = request[NEXT]
    request[:] = 0
    request[ROW], request[PROMPT], request[MOST], request[STOP], request[AT] = row, prompt, most, stop, at
    request[KNOWN] = prompt
    request[SCHEDULED_NS] = request[FIRST_NS] = request[LAST_NS] = -1
    tail = engines[e, INBOX_TAIL]
    if tail < 0 or slots[tail, AT] < at or (slots[tail, AT] == at and slots[tail, ROW] < row):
        request[NEXT] = -1
        if tail < 0:
            engines[e, INBOX_HEAD] = slot
        else:
            slots[tail, NEXT] = slot
        engines[e, INBOX_TAIL] = slot
    else:
        before, behind = -1, engines[e, INBOX_HEAD]
        while slots[behind, AT] < at or (slots[behind, AT] == at and slots[behind, ROW] < row):
            before, behind = behind, slots[behind, NEXT]
        request[NEXT] = behind
        if before < 0:
            engines[e, INBOX_HEAD] = slot
        else:
            slots[before, NEXT] = slot
    if not engines[e, AWAITING] and not engines[e, FLYING] and at < wakes[e]:
        wakes[e] = at
    dues[e] = max(wakes[e], min(dues[e], at))
    return True


@compiled
def _nearly_full(out):
    """Whether one more wake might find no room for what it has to say."""
    counters, rows, gaps, ended, _, _, _ = out
    most = len(ended) // 2
    return (
        counters[ROWS] + 16 > len(rows) or counters[GAPS] + 4 * most > len(gaps) or counters[ENDS] + most > len(ended)
    )


@compiled
def _wake(e, now, limit, stops_at_end, wakes, state, prices, out):
    """`Engine.wake`, or the rest of it behind a price that was missing. Nothing from outside comes before `limit`."""
    engines, slots, _, batches, _ = state
    room = engines[e, ROOM]
    while True:
        ran = True
        if not engines[e, UNPRICED]:
            if engines[e, AWAITING]:
                oldest = engines[e, OLDEST]
                if batches[e, oldest, END_NS] > now:
                    wakes[e] = batches[e, oldest, END_NS]
                    return DONE
                if batches[e, oldest, NUMBER]:
                    update(e, oldest, now, state, out)
                engines[e, OLDEST] = (oldest + 1) % room
                engines[e, FLYING] -= 1
                engines[e, AWAITING] = 0
            _open_inbox(e, now, engines, slots)
            if not (stops_at_end and out[0][ENDS]):  # then another request may come in its place
                now = coast(e, now, limit, state, prices, out)
                _open_inbox(e, now, engines, slots)
            if not (engines[e, RUNNING] or engines[e, WAITING] or engines[e, UNFLUSHED]):
                if engines[e, FLYING]:
                    engines[e, AWAITING] = 1
                    continue
                head = engines[e, INBOX_HEAD]
                wakes[e] = NEVER if head < 0 else slots[head, AT]
                return DONE
            wakes[e] = now
            place = (engines[e, OLDEST] + engines[e, FLYING]) % room
            if not schedule(e, place, now, state):
                return LEAVE
            engines[e, UNPRICED] = 1
        place = (engines[e, OLDEST] + engines[e, FLYING]) % room
        if batches[e, place, NUMBER]:
            if not launch(e, place, state, prices, out):
                return PRICE
        else:
            ran = False
            batches[e, place, END_NS] = max(now, engines[e, LAST_END])
        engines[e, UNPRICED] = 0
        engines[e, FLYING] += 1
        if engines[e, FLYING] < room and (ran or engines[e, RUNNING] or engines[e, WAITING] or engines[e, UNFLUSHED]):
            continue
        engines[e, AWAITING] = 1


@compiled
def _open_inbox(e, now, engines, slots):
    slot = engines[e, INBOX_HEAD]
    while slot >= 0 and slots[slot, AT] <= now:
        behind = slots[slot, NEXT]
        slots[slot, NEXT] = -1
        if engines[e, WAITING]:
            slots[engines[e, WAITING_TAIL], NEXT] = slot
        else:
            engines[e, WAITING_HEAD] = slot
        engines[e, WAITING_TAIL] = slot
        engines[e, WAITING] += 1
        slot = behind
    engines[e, INBOX_HEAD] = slot
    if slot < 0:
        engines[e, INBOX_TAIL] = -1
