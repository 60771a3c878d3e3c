"""The KV cache against a naive model of it: lists and dictionaries, and prefixes written out token by token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servetwin.memory.blocks import NULL, BlockPool
from servetwin.memory.kv import Chain, Group, KVCache, groups_for
from servetwin.memory.prefix import OwnChain, PrefixChain, SegmentChain
from servetwin.workload.identity import BlockKeys
from watching import check_pool, free_list

SIZE = 4
"""tokens in a block"""

Segments = list[tuple[int, int]]


def tokens_of(segments: Segments, output_seed: int, length: int) -> list[tuple[int, int]]:
    prompt = [(seed, j) for seed, n in segments for j in range(n)]
    return (prompt + [(output_seed, j) for j in range(length)])[:length]


Make = Callable[..., Chain]


def chain_of(segments: Segments, output_seed: int, size: int = SIZE) -> Chain:
    return PrefixChain(BlockKeys(segments, output_seed, size).key)


def by_segments(segments: Segments, output_seed: int, size: int = SIZE) -> Chain:
    return SegmentChain(segments, output_seed, size)


MAKES = pytest.mark.parametrize("make", [chain_of, by_segments])


class PlainChain:
    """Whole prefixes as their own names."""

    def __init__(self, tokens: list[Any]) -> None:
        self.tokens = tokens

    def __getitem__(self, block: int) -> Hashable:
        return tuple(self.tokens[: (block + 1) * SIZE])

    def names(self, first: int, last: int) -> list[Hashable]:
        return [self[block] for block in range(first, last)]


segments_strategy = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), max_size=5)


@MAKES
@settings(max_examples=150, deadline=None)
@given(prompts=st.lists(segments_strategy, min_size=2, max_size=4), size=st.integers(1, 5))
def test_chains_are_equal_exactly_where_prefixes_are(make: Make, prompts: list[Segments], size: int) -> None:
    length = 8 * size
    chains = [make(prompt, -1 - i, size) for i, prompt in enumerate(prompts)]
    texts = [tokens_of(prompt, -1 - i, length) for i, prompt in enumerate(prompts)]
    for each in chains:
        assert [list(each.names(i, 8)) for i in range(9)] == [[each[j] for j in range(i, 8)] for i in range(9)]
    for a, text in zip(chains, texts, strict=True):
        for b, other in zip(chains, texts, strict=True):
            for block in range(8):
                end = (block + 1) * size
                assert (a[block] == b[block]) == (text[:end] == other[:end])


@MAKES
def test_chains_know_a_quoted_answer(make: Make) -> None:
    """A later prompt that repeats prompt and answer of request 0 names the same blocks."""
    first, second = make([(7, 10)], -1), make([(7, 10), (-1, 20)], -2)
    assert [first[i] for i in range(7)] == [second[i] for i in range(7)]
    assert first[7] != second[7], "the answer goes on, the quotation does not"


@MAKES
def test_chains_may_be_asked_in_any_order(make: Make) -> None:
    one, other = make([(1, 40)], -1), make([(1, 40)], -1)
    assert [one[i] for i in (9, 0, 5)] == [[other[i] for i in range(10)][at] for at in (9, 0, 5)]


def test_own_chains_have_nothing_in_common() -> None:
    assert len({OwnChain(row)[block] for row in range(50) for block in range(50)}) == 2500


class NaiveCache:
    """Full attention: what the cache should do, as plainly as it can be said."""

    def __init__(self, usable: int, unkeyed_first: bool) -> None:
        self.free = list(range(1, usable + 1))
        self.unkeyed_first = unkeyed_first
        self.key: dict[int, Hashable] = {}
        self.order: list[int] = []
        """cached blocks, in the order in which they were cached"""
        self.owners: Counter[int] = Counter()
        self.tables: dict[int, list[int]] = {}

    def find(self, name: Hashable) -> int | None:
        return next((block for block in self.order if self.key[block] == name), None)

    def hit(self, chain: PlainChain, tokens: int) -> list[int]:
        found: list[int] = []
        for i in range(tokens // SIZE):
            block = self.find(chain[i])
            if block is None:
                break
            found.append(block)
        return found

    def allocate(self, request: int, chain: PlainChain, tokens: int, hit: list[int], slots: int) -> bool:
        """Slots for `slots` tokens, of which `tokens` may be cached."""
        table = self.tables.get(request, hit)
        fresh = max(0, -(-slots // SIZE) - len(table))
        revived = [] if request in self.tables else [block for block in hit if block in self.free]
        if fresh + len(revived) > len(self.free):
            return False
        if request not in self.tables:
            self.owners.update(hit)
            self.free = [block for block in self.free if block not in revived]
            self.tables[request] = table = list(hit)
        for block in self.free[:fresh]:
            if block in self.key:
                del self.key[block]
                self.order.remove(block)
            self.owners[block] = 1
            table.append(block)
        self.free = self.free[fresh:]
        for i in range(tokens // SIZE):
            if table[i] not in self.key:
                self.key[table[i]] = chain[i]
                self.order.append(table[i])
        return True

    def release(self, request: int) -> None:
        table = self.tables.pop(request, [])
        self.owners.subtract(table)
        ended = [block for block in reversed(table) if self.owners[block] == 0]
        if self.unkeyed_first:
            new = [block for block in ended if block not in self.key]
            self.free = new + self.free + [block for block in ended if block in self.key]
        else:
            self.free += ended


operations = st.lists(
    st.one_of(
        st.tuples(st.just("admit"), st.lists(st.integers(0, 1), min_size=1, max_size=6), st.integers(1, 6)),
        st.tuples(st.just("grow"), st.integers(0, 5), st.integers(1, 9)),
        st.tuples(st.just("free"), st.integers(0, 5), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(operations, st.integers(1, 14), st.booleans(), st.booleans())
def test_same_blocks_as_the_naive_model(script: list[Any], usable: int, unkeyed_first: bool, caching: bool) -> None:
    pool = BlockPool(usable, unkeyed_first)
    cache, naive = KVCache(pool, SIZE, 10_000, caching), NaiveCache(usable, unkeyed_first)
    texts: dict[int, list[Any]] = {}
    computed: dict[int, int] = {}
    for number, (what, which, amount) in enumerate(script):
        if what == "admit":
            # Blocks of two kinds, so that prefixes meet; then a few tokens that are nobody else's.
            text = [(kind, j) for kind in which for j in range(SIZE)] + [(f"own {number}", j) for j in range(amount)]
            chain = PlainChain(text)
            hit = cache.lookup(chain, len(text) - 1)
            expected = naive.hit(chain, len(text) - 1) if caching else []
            assert hit.blocks == (expected,)
            assert hit.tokens == SIZE * len(expected) < len(text)
            done = cache.allocate(
                number, computed=0, new=len(text) - hit.tokens, known=len(text), chain=chain, prompt=len(text), hit=hit
            )
            assert done == naive.allocate(number, chain, len(text) if caching else 0, expected, len(text))
            if done:
                texts[number], computed[number] = text, len(text)
        elif texts:
            request = list(texts)[which % len(texts)]
            chain = PlainChain(texts[request])
            if what == "grow":
                texts[request] += [(f"output {request}", len(texts[request]) + j) for j in range(amount)]
                known = len(texts[request])
                done = cache.allocate(request, computed=computed[request], new=amount, known=known, chain=chain)
                assert done == naive.allocate(request, chain, known if caching else 0, [], known)
                if done:
                    computed[request] = known
                else:
                    del texts[request][-amount:]
            else:
                cache.free(request)
                naive.release(request)
                del texts[request], computed[request]
        assert {request: holding.tables[0] for request, holding in cache.holdings.items()} == naive.tables
        assert free_list(pool) == naive.free, "blocks would be reused in another order"
        check_pool(pool, Counter(block for table in naive.tables.values() for block in table))
        assert (pool.free, pool.used) == (len(naive.free), usable - len(naive.free))


windows_strategy = st.sampled_from([(None,), (8,), (5,), (9, None), (None, 12), (6, 6, None), (4, 16, None), (6, 14)])


@settings(max_examples=300, deadline=None)
@given(windows_strategy, st.integers(0, 12), st.data())
def test_hits_of_windows_and_of_several_groups(
    windows: tuple[int | None, ...], blocks: int, data: st.DataObject
) -> None:
    """The longest prefix from which every group can go on: all its blocks, or those in its window, are cached."""
    cached = [data.draw(st.lists(st.booleans(), min_size=blocks, max_size=blocks)) for _ in windows]
    cache = KVCache(BlockPool(200), SIZE, 10_000, True, groups_for(windows, SIZE, 1, 64, 10_000))
    chain = OwnChain(3)
    holds: list[dict[int, int]] = []
    for group, have in enumerate(cached):
        held = {i: cache.pool.take(1)[0] for i in range(blocks) if have[i]}
        for i, block in held.items():
            cache.pool.cache(block, cache._key(group, chain[i]))
        holds.append(held)

    def goes_on(length: int) -> bool:
        for window, held in zip(windows, holds, strict=True):
            first = 0 if window is None else max(0, length * SIZE - (window - 1)) // SIZE
            if any(i not in held for i in range(first, length)):
                return False
        return True

    longest = max(length for length in range(blocks + 1) if goes_on(length))
    hit = cache.lookup(chain, blocks * SIZE + data.draw(st.integers(0, SIZE - 1)))
    assert hit.tokens == longest * SIZE
    for window, held, found in zip(windows, holds, hit.blocks, strict=True):
        assert len(found) == longest
        first = 0 if window is None else max(0, longest * SIZE - (window - 1)) // SIZE
        assert found[first:] == [held[i] for i in range(first, longest)]
        assert all(block in (NULL, held.get(i)) for i, block in enumerate(found))


class TestAllocation:
    def cache(self, usable: int = 10, **options: Any) -> KVCache:
        return KVCache(BlockPool(usable), SIZE, options.pop("max_model_len", 1000), True, **options)

    def test_duplicates_live_side_by_side_and_the_first_is_found(self) -> None:
        cache = self.cache()
        for request in (1, 2):  # both were scheduled before either could be found
            assert cache.allocate(request, computed=0, new=9, known=9, chain=OwnChain(0))
        tables = {request: holding.tables[0] for request, holding in cache.holdings.items()}
        assert tables == {1: [1, 2, 3], 2: [4, 5, 6]}
        assert cache.lookup(OwnChain(0), 9).blocks == ([1, 2],)
        cache.free(1)
        assert cache.lookup(OwnChain(0), 9).blocks == ([1, 2],), "freed, but still there"
        assert cache.allocate(3, computed=0, new=28, known=28, chain=OwnChain(9))
        assert cache.lookup(OwnChain(0), 9).blocks == ([4, 5],), "the copy outlives it"

    def test_a_tail_is_evicted_before_its_head(self) -> None:
        cache = self.cache(usable=4)
        cache.allocate(1, computed=0, new=16, known=16, chain=OwnChain(0))
        cache.free(1)
        for fresh, left in ((1, 3), (2, 2), (3, 1)):
            cache.allocate(10 + fresh, computed=0, new=4, known=0, chain=OwnChain(fresh))
            assert len(cache.lookup(OwnChain(0), 16).blocks[0]) == left

    def test_refusal_changes_nothing(self) -> None:
        cache = self.cache(usable=3)
        cache.allocate(1, computed=0, new=8, known=8, chain=OwnChain(1))
        cache.free(1)
        free = free_list(cache.pool)
        hit = cache.lookup(OwnChain(1), 8)
        assert not cache.allocate(2, computed=0, new=9, known=17, chain=OwnChain(1), hit=hit)
        assert free_list(cache.pool) == free
        assert cache.holdings == {}

    @pytest.mark.parametrize(("left", "done"), [(2, True), (3, False)])
    @pytest.mark.parametrize("kind", ["watermark", "reserved"])
    def test_blocks_to_leave_free(self, kind: str, left: int, done: bool) -> None:
        cache = self.cache(usable=10)
        assert cache.allocate(1, computed=0, new=32, known=32, chain=OwnChain(1), **{kind: left}) is done

    def test_the_whole_sequence_must_fit_when_asked(self) -> None:
        cache = self.cache(usable=4)
        asked: dict[str, Any] = {"computed": 0, "new": 4, "known": 20, "chain": OwnChain(1)}
        assert not cache.allocate(1, whole_sequence=True, **asked)
        assert cache.allocate(1, **asked)

    def test_nothing_beyond_the_context(self) -> None:
        cache = self.cache(max_model_len=10)
        assert cache.allocate(1, computed=0, new=10, known=10, chain=OwnChain(1), lookahead=50)
        assert len(cache.holdings[1].tables[0]) == 3

    def test_only_certain_tokens_are_cached(self) -> None:
        cache = self.cache()
        cache.allocate(1, computed=0, new=12, known=7, chain=OwnChain(1))
        assert cache.lookup(OwnChain(1), 12).tokens == 4
        cache.commit(1, 12, OwnChain(1))
        assert cache.lookup(OwnChain(1), 12).tokens == 12

    def test_a_sliding_request_gives_back_what_has_left_its_window(self) -> None:
        cache = self.cache(usable=20, groups=(Group(window=6),))
        cache.allocate(1, computed=0, new=20, known=20, chain=OwnChain(1), prompt=20)
        assert cache.pool.used == 5
        cache.allocate(1, computed=20, new=1, known=21, chain=OwnChain(1))
        # Token 20 sees tokens 15 to 20: blocks 0 to 2 are below.
        assert cache.holdings[1].tables[0][:3] == [NULL] * 3
        assert cache.pool.used == 3
        cache.free(1)
        assert cache.pool.used == 0
        check_pool(cache.pool, Counter())

    def test_a_recurrent_state_takes_one_block(self) -> None:
        cache = self.cache(usable=20, groups=groups_for((None, "state"), SIZE, 1, 64, 1000))
        cache.allocate(1, computed=0, new=30, known=30, chain=OwnChain(1))
        assert [len(table) for table in cache.holdings[1].tables] == [8, 1]
        assert cache.lookup(OwnChain(1), 30).tokens == 0, "and it cannot be resumed"
