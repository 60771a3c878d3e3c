"""A scheduler that checks the numbered invariants of its room and of the block pool whenever something has changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np

from servetwin.engine.batch import Batch
from servetwin.engine.request import Request, Status
from servetwin.engine.scheduler import Scheduler
from servetwin.memory.blocks import NULL, BlockPool
from servetwin.memory.counted import CountedKV
from servetwin.memory.full import FullKV
from servetwin.memory.tables import Table, TablePool


def free_list(pool: BlockPool) -> list[int]:
    """Free blocks in the order in which they would be taken."""
    return [block for block in pool._queue[pool._head :] if block != NULL]


def check_pool(pool: BlockPool, references: Counter[int]) -> None:
    """B1-B3, and that the count of each block is the number of its `references`."""
    indexed = [(block, key) for key, block in pool._index.items()]
    indexed += [(block, key) for key, blocks in pool._copies.items() for block in blocks]
    queued = pool._queue[pool._head :]
    places = {block: pool._base + pool._head + i for i, block in enumerate(queued) if block != NULL}
    assert places == pool._at, "the free list and the places in it"
    assert len(places) == len(queued) - queued.count(NULL), "B1: a block stands in the free list twice"
    by_block = dict(indexed)
    assert len(indexed) == len(by_block), "B2: a block stands in the index twice"
    for block in range(1, pool.usable + 1):
        assert pool.references(block) == references[block], f"block {block} is not counted as often as it is owned"
        assert (block in pool._at) == (pool.references(block) == 0), f"B1: block {block}"
        assert pool._key[block] == by_block.get(block), f"B2: block {block}"
    assert NULL not in pool._at, "B3"
    assert NULL not in pool._shared, "B3"
    assert NULL not in by_block, "B3"
    assert pool._key[NULL] is None, "B3"


def check_tables(pool: TablePool, held: Iterable[Table]) -> list[int]:
    """B1, B3 and B4, and that each block is counted as often as it stands in a table; the free blocks in the order in
    which they would be taken."""
    blocks = [block for table in held for block in table.blocks]
    references = np.bincount(np.array(blocks, np.int64), minlength=pool.usable + 1)
    queued = pool._queue[pool._head : pool._tail]
    free = queued[queued != NULL]
    assert pool._holes == len(queued) - len(free)
    assert pool.free == len(free) == len(np.unique(free)), "B1: a block stands in the free list twice"
    assert (pool._queue[pool._at[free]] == free).all()
    assert (pool._references[: pool.usable + 1] == references).all(), "a block is not counted as often as it is owned"
    assert np.array_equal(np.sort(free), 1 + np.flatnonzero(references[1:] == 0)), "B1"
    assert not references[NULL], "B3"
    assert pool._owner[NULL] == 0, "B3"
    parts = [part for known in pool._index.values() for part in (known if isinstance(known, list) else [known])]
    by_serial = {table.serial: table for table, _ in parts}
    for block in np.flatnonzero(pool._owner[: pool.usable + 1]).tolist():
        owner = by_serial[int(pool._owner[block])]
        assert block in owner.blocks[: owner.cached], f"B4: block {block}"
    return free.tolist()


class WatchedScheduler(Scheduler):
    """Checks S1-S5 and B1-B3, and counts tokens."""

    made: list[WatchedScheduler]

    def __init__(self, *parts: Any, **options: Any) -> None:
        super().__init__(*parts, **options)
        self.seen: list[Request] = []
        self.ends: Counter[int] = Counter()
        self.scheduled: Counter[int] = Counter()
        """tokens that were scheduled for each request"""
        self.due: Counter[int] = Counter()
        """tokens that each request had to have scheduled: what it computed less what it found, over all its lives"""
        self.preempted_in_vain = 0
        """preemptions in schedules that ended with nothing to run, and so with no step to be told of in"""
        self.last_schedule_ns = 0
        self.made.append(self)

    def add(self, request: Request) -> None:
        assert request.status == Status.WAITING, "S2: only a new request may be added"
        self.seen.append(request)
        super().add(request)

    def schedule(self, now: int) -> Batch:
        assert now >= self.last_schedule_ns, "C1: the clock went back"
        self.last_schedule_ns = now
        before = set(self.running)
        batch = super().schedule(now)
        assert len({*batch.requests, *batch.riding}) == len(batch), "a request stands in a batch twice"
        assert all(tokens >= 1 for tokens in batch.tokens)
        assert sum(batch.tokens) + batch.riders <= self.options.max_num_batched_tokens, "S1"
        if not len(batch):
            self.preempted_in_vain += len(batch.preempted)
        if batch.preempted:
            assert before.issuperset([*batch.requests, *batch.riding]), "S4: admitted in a step that preempted"
        assert not set(batch.requests) & set(batch.preempted)
        entries = batch.entries()
        assert len(entries) == len(batch)
        for request, tokens, start, drafts in entries:
            self.scheduled[request.row] += tokens
            if request not in before:
                self.due[request.row] -= start
            if request in batch.riding:
                assert tokens == self.riding.width
                assert start == request.base + self.riding.growth * (batch.number - 1)
            else:
                assert request.computed == start + tokens
            # Drafts whose fate a synchronous scheduler does not know yet have no placeholders.
            unknown = 0 if self.options.async_scheduling else drafts
            assert request.computed <= request.known + request.placeholders + unknown or request.joined, "S3"
        self.check()
        return batch

    def _preempt(self, request: Request) -> None:
        self.due[request.row] += request.computed
        super()._preempt(request)

    def _end(self, request: Request, status: Status, pin: bool) -> None:
        self.ends[request.row] += 1
        assert self.ends[request.row] == 1, "S5: ended twice"
        self.due[request.row] += request.computed
        super()._end(request, status, pin)

    def update(self, batch: Batch, now: int) -> list[Request]:
        ended = super().update(batch, now)
        assert all(request.finished and request.finish_ns == now for request in ended)
        self.check()
        return ended

    def check(self) -> None:
        assert len(self.running) <= min(self.options.max_num_seqs, self.max_active), "S1"
        places = Counter[Request](self.running)
        places.update(entry if isinstance(entry, Request) else entry[1] for entry in _entries(self.waiting))
        places.update(entry if isinstance(entry, Request) else entry[1] for entry in _entries(self.holding))
        for request in self.seen:
            assert places[request] + request.finished == 1, f"S2: request {request.row} is in {places[request]} places"
            assert (request in self.running) == (request.status == Status.RUNNING)
        if isinstance(self.kv, CountedKV):
            blocks = 0
            for request in self.running:
                lane = self.lanes[request.lane]
                if request.joined and lane.scheduled > request.joined:
                    slots = request.base + lane.growth * (lane.scheduled - 1) + lane.riders.slots
                    blocks += -(-slots // self.options.block_size)
                else:
                    blocks += self.kv.held[request.row]
            assert self.kv.pool.used == blocks
            return
        if isinstance(self.kv, FullKV):
            check_tables(self.kv.pool, self.kv.holdings.values())
            return
        owned = Counter[int]()
        for holding in self.kv.holdings.values():
            for table in holding.tables:
                owned.update(block for block in table if block != NULL)
        for _, blocks in self._deferred_frees:
            owned.update(block for block in blocks if block != NULL)
        check_pool(self.kv.pool, owned)

    def check_end(self) -> None:
        """After a run: everybody has ended, and all blocks are free again."""
        self.check()
        assert all(request.finished for request in self.seen)
        assert all(self.ends[request.row] == 1 for request in self.seen)
        assert not self.unfinished
        assert not self.pinned
        assert not (self.kv.held if isinstance(self.kv, CountedKV) else self.kv.holdings)
        assert self.kv.pool.free == self.options.usable_blocks
        if not self.options.speculative_tokens and not self.options.kv_consumer:
            assert self.scheduled == self.due, "tokens were lost or made"
            for request in self.seen:
                if request.status == Status.FINISHED and not request.preemptions:
                    spare = self.scheduled[request.row] - (request.prompt - request.cached_tokens + request.outputs - 1)
                    # Scheduling ahead, an end that nobody foresaw has let one more step (or a stage's) begin.
                    assert 0 <= spare <= (self.options.max_batches - 1 if request.reason == "stop" else 0)


def _entries(queue: Any) -> list[Any]:
    return list(queue) if hasattr(queue, "__iter__") else list(queue._heap)


@contextmanager
def watched(*modules: str) -> Iterator[list[WatchedScheduler]]:
    """Schedulers that `modules` make are watched; gives the list of them."""
    made: list[WatchedScheduler] = []
    watching = type("Watching", (WatchedScheduler,), {"made": made})
    patches = [patch(f"{module}.Scheduler", watching) for module in modules or ("servetwin.cluster.engines",)]
    for each in patches:
        each.start()
    try:
        yield made
    finally:
        for each in patches:
            each.stop()
