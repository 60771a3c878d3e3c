"""Engines that compiled code steps, until something comes up that only Python's form can do.

`Engine` and `Scheduler` say what an engine does. Where nothing of it is asked for but the most common part (see
`fits`), a fleet does the same a hundred times as fast, over arrays, with the same results to the last bit. An engine in
which a request has to give way, or can never be served, leaves the fleet for good: its `Engine` takes over the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from servetwin.engine.batch import Batch
from servetwin.engine.compiled import columns as c
from servetwin.engine.compiled.kept import throw_away_older
from servetwin.engine.compiled.kernel import advance, push
from servetwin.engine.compiled.prices import Prices, tells_all
from servetwin.engine.engine import Engine
from servetwin.engine.log import COLUMNS, PACKED, StepLog
from servetwin.engine.request import Request, Status
from servetwin.memory.counted import CountedKV
from servetwin.timing.protocol import StepTimer
from servetwin.timing.shape import StepShape

Ints = NDArray[np.int64]

WITHOUT_LIMIT = c.NEVER // 2
"""More tokens than any request has."""


def fits(engine: Engine) -> bool:
    """Whether a fleet can do all that `engine` is asked for, but for requests that give way."""
    scheduler = engine.scheduler
    options = scheduler.options
    return (
        type(engine) is Engine
        and isinstance(scheduler.kv, CountedKV)
        and scheduler.rides
        and options.pipeline == 1
        and not options.speculative_tokens
        and scheduler.connector is None
        and not options.priority
        and options.prefill_schedule_interval == 1
        and not (options.lookahead_tokens or options.kv_consumer or options.kv_producer)
        and tells_all(engine.timer)
    )


class Left(NamedTuple):
    """An engine that has left, the time at which its loop goes on, and what was on its way: (arrival, request)."""

    engine: Engine
    now: int
    coming: list[tuple[int, Request]]


class Fleet:
    """All engines of a cluster, by number. Requests are sent by `send`, and end in `advance`."""

    def __init__(self, engines: Sequence[Engine], log: StepLog) -> None:
        throw_away_older()
        self._engines, self._log = engines, log
        self._requests: dict[int, Request] = {}
        """those that are in an engine or on their way, by row"""
        self.holds = [True] * len(engines)
        """which engines have not left"""
        count, all_options = len(engines), [engine.scheduler.options for engine in engines]
        most = max(engine.scheduler.max_active for engine in engines)
        timers: list[StepTimer] = list({id(engine.timer): engine.timer for engine in engines}.values())
        self._prices = Prices(timers, max(options.max_num_batched_tokens for options in all_options), most)
        places = max(options.max_batches for options in all_options)
        self._state = np.zeros((count, c.ENGINE_COLUMNS), np.int64)
        self._wakes, self._dues = np.full(count, c.NEVER), np.full(count, c.NEVER)
        self._slots = np.zeros((0, c.SLOT_COLUMNS), np.int64)
        self._running = np.zeros((count, most), np.int64)
        self._batches = np.zeros((count, places, c.BATCH_COLUMNS), np.int64)
        self._entries = np.zeros((count, places, most, c.ENTRY_COLUMNS), np.int64)
        self._counters = np.zeros(c.COUNTERS, np.int64)
        self._counters[c.FREE_SLOT] = -1
        self._rows = np.zeros((PACKED, len(COLUMNS)), np.int64)
        self._gaps = np.zeros((max(PACKED, 8 * most), 2), np.int64)
        self._ends = np.zeros((2 * most, c.END_COLUMNS), np.int64)
        self._last_rows = np.zeros((count, len(COLUMNS)), np.int64)
        """the last row of each engine's steps, which may still grow; without steps: none"""
        self._last_rows[:, 0] = np.arange(count)
        self._expand = np.array([log.expand], np.int64)
        for number, engine in enumerate(engines):
            self._prepare(number, engine, timers.index(engine.timer))
        self._more_slots()

    def _prepare(self, number: int, engine: Engine, timer: int) -> None:
        options, host, state = engine.scheduler.options, engine.host, self._state[number]
        state[c.TIMER], state[c.ROOM], state[c.BUDGET] = timer, options.max_batches, options.max_num_batched_tokens
        state[c.MAX_ACTIVE], state[c.MAX_MODEL_LEN] = engine.scheduler.max_active, options.max_model_len
        state[c.BLOCK_SIZE], state[c.USABLE] = options.block_size, options.usable_blocks
        state[c.WATERMARK], state[c.THRESHOLD] = engine.scheduler.watermark, options.long_prefill_token_threshold
        state[c.ADAPTIVE] = options.long_prefill_token_threshold_adaptive
        state[c.LONE_UNLIMITED], state[c.CHUNKED] = options.lone_prefill_unlimited, options.enable_chunked_prefill
        state[c.RESERVES_ALL], state[c.ASYNCHRONOUS] = options.scheduler_reserve_full_isl, options.async_scheduling
        state[c.CACHING] = options.enable_prefix_caching
        state[c.STEP_NS], state[c.SEQ_NS] = host.step_ns, host.seq_ns
        state[c.GAP_NS], state[c.GAP_SEQ_NS] = host.gap_ns, host.gap_seq_ns
        state[c.FREE] = options.usable_blocks
        state[[c.WAITING_HEAD, c.WAITING_TAIL, c.INBOX_HEAD, c.INBOX_TAIL]] = -1

    def _more_slots(self) -> None:
        """Twice as many slots; those that are new are free."""
        old, known = self._slots, len(self._slots)
        self._slots = np.zeros((max(256, 2 * known), c.SLOT_COLUMNS), np.int64)
        self._slots[:known] = old
        self._slots[known:, c.NEXT] = np.arange(known + 1, len(self._slots) + 1)
        self._slots[-1, c.NEXT] = self._counters[c.FREE_SLOT]
        self._counters[c.FREE_SLOT] = known

    def send(self, request: Request, engine: int, at: int) -> None:
        """`request` reaches `engine` at `at`."""
        self._requests[request.row] = request
        stop = WITHOUT_LIMIT if request.stop_after is None else request.stop_after
        numbers = request.row, request.prompt, request.max_tokens, stop
        while not push(engine, at, *numbers, self._state, self._wakes, self._dues, self._slots, self._counters):
            self._more_slots()

    def advance(self, limit: int, number: int, stops_at_end: bool) -> tuple[list[Request], list[Left]]:
        """Go on up to before the wake of engine `number` at `limit` (see the kernel); the requests that have ended on
        the way, each with what is known of it, and the engines that have left.

        With `stops_at_end` it goes no further than the wake in which the first one ends or an engine leaves.
        """
        ended: list[Request] = []
        left: list[Left] = []
        out = self._counters, self._rows, self._gaps, self._ends, self._last_rows, self._prices.booked, self._expand
        while True:
            state = self._state, self._slots, self._running, self._batches, self._entries
            code = advance(limit, number, stops_at_end, self._wakes, self._dues, state, self._prices.tables, out)
            if code != c.PRICE and self._counters[c.ENDS]:
                ended += self._take_ended()
            if code == c.FULL:  # mostly one of the two
                if self._counters[c.ROWS] > PACKED // 2:
                    self._take_rows()
                if self._counters[c.GAPS] > len(self._gaps) // 2:
                    self._take_gaps()
            elif code == c.PRICE:
                current = int(self._counters[c.CURRENT])
                self._prices.learn(int(self._state[current, c.TIMER]), self._unpriced(current))
            elif code == c.LEAVE:
                left.append(self._leave(int(self._counters[c.CURRENT])))
                if stops_at_end:
                    break
            else:
                break
        return ended, left

    def _take_ended(self) -> list[Request]:
        ended = []
        for row, scheduled, first, finish, outputs, stopped in self._ends[: self._counters[c.ENDS]].tolist():
            request = self._requests.pop(row)
            request.scheduled_ns, request.first_token_ns = scheduled, first
            request.last_token_ns = request.finish_ns = finish
            request.outputs, request.known = outputs, request.prompt + outputs
            request.status, request.reason = Status.FINISHED, "stop" if stopped else "length"
            ended.append(request)
        self._counters[c.ENDS] = 0
        return ended

    def _take_rows(self) -> None:
        """Hand over what was gathered of steps. A row that the log did not take yet is not forgotten."""
        if self._counters[c.ROWS]:
            self._log.take(self._rows[: self._counters[c.ROWS]].copy())
            self._counters[c.ROWS] = 0

    def _take_gaps(self) -> None:
        self._engines[0].scheduler.riding.gaps.take(self._gaps[: self._counters[c.GAPS]])
        self._counters[c.GAPS] = 0

    def _unpriced(self, e: int) -> StepShape:
        """The shape of the batch that an engine waits to launch."""
        state = self._state[e]
        batch = Batch(0)
        place = (state[c.OLDEST] + state[c.FLYING]) % state[c.ROOM]
        entries = self._entries[e, place, : self._batches[e, place, c.ENTRIES]]
        batch.tokens, batch.before = entries[:, c.TOKENS].tolist(), entries[:, c.BEFORE].tolist()
        batch.drafts, batch.requests = [0] * len(entries), [Request(0, 0, 0, 0)] * len(entries)
        return batch.measure()

    # An engine leaves ----------------------------------------------------------------------------------------------

    def _leave(self, e: int) -> Left:
        now, engine = int(self._wakes[e]), self._engines[e]
        self._take_rows()
        self._close_rows(e)
        self._wakes[e] = self._dues[e] = c.NEVER
        self.holds[e] = False
        state = self._state[e].tolist()
        running = [self._take_back(slot) for slot in self._running[e, : state[c.RUNNING]].tolist()]
        for request in running:
            request.status = Status.RUNNING
        waiting = [request for _, request in self._listed(state[c.WAITING_HEAD])]
        coming = self._listed(state[c.INBOX_HEAD])
        flying = [self._batch(e, (state[c.OLDEST] + i) % state[c.ROOM], running, state) for i in range(state[c.FLYING])]
        scheduler = engine.scheduler
        scheduler.prefix_queries = state[c.QUERIES]
        scheduler.riding.resume(flying, state[c.SCHEDULED], state[c.PROCESSED], state[c.LAST_OUTPUTS_NS])
        scheduler.resume(running, waiting, bool(state[c.UNFLUSHED]))
        engine.resume(flying, state[c.STEPS], state[c.DEVICE_FREE], state[c.LAST_END])
        return Left(engine, now, coming)

    def _take_back(self, slot: int) -> Request:
        """The request in a slot, which it leaves, with what became of it in its own fields."""
        numbers = self._slots[slot].tolist()
        row = numbers[c.ROW]
        request = self._requests.pop(row)
        request.known, request.computed, request.outputs = (numbers[i] for i in (c.KNOWN, c.COMPUTED, c.OUTPUTS))
        request.placeholders, request.in_flight = numbers[c.PLACEHOLDERS], numbers[c.IN_FLIGHT]
        request.scheduled_ns, request.first_token_ns = numbers[c.SCHEDULED_NS], numbers[c.FIRST_NS]
        request.last_token_ns = numbers[c.LAST_NS]
        request.prefilling = request.computed < request.known + request.placeholders
        kv = self._engines[request.engine].scheduler.kv
        assert isinstance(kv, CountedKV)
        if numbers[c.HELD]:
            kv.held[row], kv.cached[row] = numbers[c.HELD], numbers[c.CACHED]
            kv.pool.free -= numbers[c.HELD]
        return request

    def _listed(self, slot: int) -> list[tuple[int, Request]]:
        """The requests of a list that begins with `slot`, and when they reach their engine; they leave their slots."""
        found = []
        while slot >= 0:
            found.append((int(self._slots[slot, c.AT]), self._take_back(slot)))
            slot = int(self._slots[slot, c.NEXT])
        return found

    def _batch(self, e: int, place: int, running: list[Request], state: list[int]) -> Batch:
        """A batch in flight. Who has ended is in none that matters any more, but may still be listed."""
        numbers = self._batches[e, place].tolist()
        batch = Batch(numbers[c.SCHEDULED_AT])
        by_row = {request.row: (order, request) for order, request in enumerate(running, 1)}
        batch.number, batch.index = numbers[c.NUMBER], numbers[c.INDEX] if numbers[c.NUMBER] else -1
        batch.begin_ns, batch.end_ns = numbers[c.BEGIN_NS], numbers[c.END_NS]
        for slot, tokens, before, samples in self._entries[e, place, : numbers[c.ENTRIES]].tolist():
            row = int(self._slots[slot, c.ROW])
            order, request = by_row.get(row, (0, None))
            if request is None:
                request = Request(row, 0, 0, 0)
                request.status, request.in_flight = Status.FINISHED, tokens
            request.order = order
            batch.add(request, tokens, before, 0)
            batch.samples.append(bool(samples))
        return batch

    # The end -------------------------------------------------------------------------------------------------------

    def _close_rows(self, e: int) -> None:
        last = self._last_rows[e]
        if last[2]:
            self._log.add(last.tolist())
            last[2] = 0

    def settle(self) -> None:
        """Hand over all that was gathered, and tell engines and timers what they would know themselves."""
        self._take_rows()
        self._take_gaps()
        self._prices.settle()
        for e, engine in enumerate(self._engines):
            self._close_rows(e)
            if self.holds[e]:
                engine.steps = int(self._state[e, c.STEPS])
                engine.scheduler.prefix_queries = int(self._state[e, c.QUERIES])
