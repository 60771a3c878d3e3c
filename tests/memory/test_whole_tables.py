"""The KV cache by whole block tables against the one block by block: the same blocks, in the same order, to the bit."""

from __future__ import annotations

from random import Random
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from running import run, scenario_of
from servetwin.engine.options import SchedulerOptions
from servetwin.memory.blocks import NULL, BlockPool
from servetwin.memory.full import FullKV
from servetwin.memory.kv import Chain, KVCache
from servetwin.memory.prefix import OwnChain, PrefixChain, SegmentChain
from servetwin.memory.tables import TablePool
from servetwin.workload.identity import BlockKeys
from servetwin.workload.table import RequestTable
from watching import check_tables, free_list
from workloads import engines, tables

SIZE = 4
LONGEST = 400
"""tokens of a request"""


class Both:
    """Asks a cache of each kind the same, and compares what they answer and what they have become."""

    def __init__(self, usable: int, unkeyed_first: bool) -> None:
        self.single = KVCache(BlockPool(usable, unkeyed_first), SIZE, LONGEST, True)
        self.whole = FullKV(TablePool(usable, unkeyed_first), SIZE, LONGEST)

    def ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        said, expected = (getattr(kv, method)(*arguments, **options) for kv in (self.whole, self.single))
        assert said == expected, method
        self.check()
        return said

    def lookup(self, chain: Chain, tokens: int) -> tuple[Any, Any]:
        """Twice, as nothing is to come of it."""
        hits = [self.whole.lookup(chain, tokens), self.single.lookup(chain, tokens)]
        for hit in (hits[0], self.whole.lookup(chain, tokens)):
            assert hit.tokens == hits[1].tokens
            assert list(hit.blocks[0]) == hits[1].blocks[0]
        name: Any = chain[0]
        assert self.whole.pool.find(name) == self.single.pool.find(name)
        return hits[0], hits[1]

    def admit(self, row: int, chain: Chain, **options: Any) -> tuple[bool, int]:
        """Whether there was room, and tokens found."""
        refused = "whole_sequence" in options and self.whole.refuses(chain, options["known"], options["watermark"])
        hits = self.lookup(chain, options["known"] - 1)
        new = options.pop("new")
        done = [
            kv.allocate(row, computed=0, new=max(1, new - hit.tokens), chain=chain, hit=hit, **options)
            for kv, hit in zip((self.whole, self.single), hits, strict=True)
        ]
        assert done[0] == done[1]
        assert not (done[0] and refused and options["whole_sequence"])
        self.check()
        return done[0], hits[0].tokens

    def check(self) -> None:
        ours = {row: list(table.blocks) for row, table in self.whole.holdings.items()}
        assert ours == {row: holding.tables[0] for row, holding in self.single.holdings.items()}
        whole, single = self.whole.pool, self.single.pool
        assert (whole.free, whole.used) == (single.free, single.used)
        assert check_tables(whole, self.whole.holdings.values()) == free_list(single), "another order of reuse"
        cached = {block for block, key in enumerate(single._key) if key is not None}
        assert set(np.flatnonzero(whole._owner).tolist()) == cached
        for row in ours:
            assert self.whole.quiet_tokens(row) == self.single.quiet_tokens(row)


def _chain(random: Random, row: int) -> Chain:
    """Segments of few kinds and lengths, so that prefixes meet and part at all places."""
    segments = [(random.randrange(2), random.choice([1, 3, 8, 16, 30])) for _ in range(random.randrange(5))]
    kind = random.choice(["segments"] * 4 + ["blocks", "own"])
    if kind == "own":
        return OwnChain(random.randrange(3))
    quoted = -1 - random.randrange(row + 1)
    if random.random() < 0.3:
        segments.append((quoted, 13))
    return SegmentChain(segments, -1 - row, SIZE) if kind == "segments" else _by_block(segments, row)


def _by_block(segments: list[tuple[int, int]], row: int) -> Chain:
    return PrefixChain(BlockKeys(segments, -1 - row, SIZE).key)


@pytest.mark.parametrize("sweep", [0, 4096])
@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), usable=st.sampled_from([3, 12, 40, 150]), unkeyed_first=st.booleans())
def test_whatever_is_asked(sweep: int, seed: int, usable: int, unkeyed_first: bool) -> None:
    random = Random(seed)
    with patch("servetwin.memory.tables.SWEEP", sweep):
        both = Both(usable, unkeyed_first)
        chains: dict[int, Chain] = {}
        computed: dict[int, int] = {}
        waiting: tuple[Chain, int] | None = None
        """who was refused last"""
        for row in range(random.choice([5, 40, 120])):
            what = random.random()
            if what < 0.4 or not computed:
                if waiting is not None and random.random() < 0.7:
                    chain, known = waiting
                else:
                    old = chains and random.random() < 0.3
                    chain = random.choice(list(chains.values())) if old else _chain(random, row)
                    known = random.randrange(1, min(LONGEST, 6 * SIZE * usable // 4) + 1)
                new = random.choice([known, random.randrange(1, known + 1)])
                done, found = both.admit(
                    row,
                    chain,
                    new=new,
                    known=known,
                    watermark=random.choice([0, 0, 2]),
                    reserved=random.choice([0, 0, 3]),
                    whole_sequence=random.random() < 0.5,
                    lookahead=random.choice([0, 0, 5]),
                    external=random.choice([0, 0, 0, 7]),
                    cache=random.random() < 0.8,
                )
                waiting = None if done else (chain, known)
                chains[row] = chain
                if done:
                    computed[row] = found + max(1, new - found)
            elif what < 0.7:
                row = random.choice(list(computed))
                new = min(random.choice([1, 1, 1, 2, 30]), LONGEST - computed[row])
                known = computed[row] + random.choice([0, new, 1, 20])
                if both.ask(
                    "allocate", row, computed=computed[row], new=new, known=known, chain=chains[row],
                    lookahead=random.choice([0, 0, 3]), cache=random.random() < 0.9,
                    whole_sequence=random.random() < 0.1,
                    watermark=random.choice([0, 0, 0, 4]), reserved=random.choice([0, 0, 0, 4]),
                ):  # fmt: skip
                    computed[row] += new
            elif what < 0.8:
                row = random.choice(list(computed))
                both.ask("commit", row, random.randrange(computed[row] + 1), chains[row])
            elif what < 0.85:
                row = random.choice([*chains, 10_000])
                both.lookup(chains.get(row, OwnChain(10_000)), random.randrange(1, LONGEST))
                hits = both.lookup(chains.get(row, OwnChain(10_000)), 60)
                needed = [
                    kv.blocks_needed(row, 60, hit.tokens, hit)
                    for kv, hit in zip((both.whole, both.single), hits, strict=True)
                ]
                assert needed[0] == needed[1]
            else:
                both.ask("free", random.choice([*computed, 10_000]))
                computed = {row: n for row, n in computed.items() if row in both.whole.holdings}
        for row in list(computed):
            both.ask("free", row)
        assert both.whole.pool.used == 0


def test_a_copy_cached_between_the_blocks_of_another_table_is_found_in_its_turn() -> None:
    """Of each name the block that was cached first, though it is now this table's and now that one's."""
    both = Both(40, True)
    chain, same = SegmentChain([(1, 100)], -1, SIZE), SegmentChain([(1, 100)], -2, SIZE)
    assert both.admit(1, OwnChain(9), new=1, known=1)[0]
    for row in (2, 3):
        assert both.ask("allocate", row, computed=0, new=32, known=0, chain=chain)
    both.ask("commit", 2, 8, chain)
    both.ask("commit", 3, 24, same)
    both.ask("commit", 2, 32, chain)
    first, second = (list(both.whole.holdings[row].blocks) for row in (2, 3))
    assert list(both.whole.lookup(chain, 40).blocks[0]) == first[:2] + second[2:6] + first[6:8]
    both.lookup(chain, 40)


def test_who_is_refused_again_is_looked_for_only_when_more_may_be_found() -> None:
    kv = FullKV(TablePool(10), SIZE, LONGEST)
    waits = SegmentChain([(1, 8), (2, 30)], -1, SIZE)
    assert kv.allocate(1, computed=0, new=8, known=8, chain=SegmentChain([(1, 8)], -2, SIZE))
    assert kv.allocate(2, computed=0, new=25, known=25, chain=OwnChain(2))
    assert not kv.refuses(waits, 38, 0), "nobody has looked"
    assert kv.lookup(waits, 37).tokens == 8
    assert kv.refuses(waits, 38, 0), "of 10 blocks 2 are found, 8 are missing, 1 is free"
    assert not kv.refuses(waits, 12, 0), "that is another question"
    kv.free(1)
    assert kv.refuses(waits, 38, 0), "what was found is free itself"
    same = SegmentChain([(1, 8), (2, 14)], -3, SIZE)
    assert kv.allocate(3, computed=0, new=4, known=12, chain=same, hit=kv.lookup(same, 11))
    assert kv.lookup(waits, 1).tokens == 0
    assert kv.lookup(waits, 37).tokens == 12, "one block more"
    assert kv.refuses(waits, 38, 0) is False, "part of the segment is known: whoever extends it is not noticed"
    kv.free(2)
    assert kv.allocate(4, computed=0, new=38 - 12, known=38, chain=waits, hit=kv.lookup(waits, 37), whole_sequence=True)


def test_a_refusal_ends_when_somebody_caches_what_was_missing() -> None:
    kv = FullKV(TablePool(10), SIZE, LONGEST)
    waits, same = SegmentChain([(1, 38)], -1, SIZE), SegmentChain([(1, 14)], -3, SIZE)
    assert kv.allocate(2, computed=0, new=28, known=28, chain=OwnChain(2))
    assert kv.lookup(waits, 37).tokens == 0
    assert kv.refuses(waits, 38, 0), "10 blocks of 3"
    assert kv.allocate(3, computed=0, new=8, known=8, chain=same)
    kv.free(2)
    assert not kv.refuses(waits, 38, 0), "8 of 8, as the first 2 are there"
    hit = kv.lookup(waits, 37)
    assert kv.allocate(1, computed=0, new=30, known=38, chain=waits, hit=hit, whole_sequence=True)


def test_the_index_forgets_tables_that_have_lost_all_blocks() -> None:
    kv = FullKV(TablePool(64), SIZE, LONGEST)
    with patch("servetwin.memory.tables.SWEEP", 0):
        kv.pool._sweep_at = 0
        for row in range(500):
            for one in (row, -1 - row):  # the same blocks twice
                assert kv.allocate(one, computed=0, new=64, known=64, chain=OwnChain(row))
            kv.free(row)
            kv.free(-1 - row)
            assert len(kv.pool._index) <= 10
    assert kv.lookup(OwnChain(499), 64).tokens == 64
    assert kv.pool.find(OwnChain(0)[0]) == NULL


def _block_by_block(options: SchedulerOptions, shared: bool = True) -> KVCache:
    pool = BlockPool(options.usable_blocks, options.unkeyed_blocks_first)
    return KVCache(pool, options.block_size, options.max_model_len, options.enable_prefix_caching)


@settings(max_examples=80, deadline=None)
@given(tables(), engines, st.sampled_from(["round_robin", "prefix_aware", "least_kv_usage"]))
def test_runs_are_the_same(table: RequestTable, engine: dict[str, Any], routing: str) -> None:
    """With shared prefixes, preemptions and aborts, whatever the scheduler's options."""
    scenario = scenario_of(engine | {"enable_prefix_caching": True}, replicas=2, routing=routing)
    ours = run(scenario, table).everything()
    with patch.object(SchedulerOptions, "new_kv_cache", _block_by_block):
        theirs = run(scenario, table).everything()
    for name in ours:
        assert ours[name] == theirs[name], name
