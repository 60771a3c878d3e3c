"""The KV cache of one engine: block tables of its requests over one pool, with prefix caching and KV groups.

A *KV group* is a set of layers that keep the same tokens: all of them (full attention) or the last `window`
(sliding window). Each group has its own block table per request; all take blocks from the same pool.
The rules are those of vLLM's V1 KV cache manager.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from servetwin.memory.blocks import NULL, BlockPool


class Chain(Protocol):
    """Identity of a request's full blocks: element i names the whole prefix up to block i."""

    def __getitem__(self, block: int, /) -> Hashable: ...

    def names(self, first: int, last: int, /) -> Iterable[Hashable]:
        """Elements `first` up to before `last`."""

    def runs(self, first: int, last: int, /) -> Iterable[tuple[Hashable, int, int]]:
        """The same by segments (see `tables.Runs`)."""


@dataclass(slots=True)
class Holding:
    """The blocks of one request: a table and a count of cached blocks for each group."""

    tables: list[list[int]]
    cached: list[int]
    resumes: tuple[int, ...]
    """token positions at which a later request with the same prefix can resume (see `KVCache.replay_tails`)"""


@dataclass(frozen=True, slots=True)
class Hit:
    """Cached blocks that a request may adopt: one list a group (sliding groups start with null blocks)."""

    tokens: int
    blocks: tuple[Sequence[int], ...]
    junction: int = 0
    """end of a shared prefix that full attention has and a sliding group has not kept; 0: there is none"""


@dataclass(frozen=True)
class Group:
    """`window` None = full attention. `admission_cap`: most blocks that a request of a sliding group ever holds.
    `state`: layers that keep one recurrent state a sequence, in one block, however long it gets."""

    window: int | None = None
    admission_cap: int | None = None
    state: bool = False

    def skipped(self, computed: int) -> int:
        """Tokens below the window of the next token, after `computed` tokens."""
        return max(0, computed - self.window + 1) if self.window else 0


def groups_for(
    windows: Sequence[int | Literal["state"] | None],
    block_size: int,
    batches_in_flight: int,
    budget: int,
    max_model_len: int,
) -> tuple[Group, ...]:
    """Groups with the admission caps that vLLM gives them: a sliding request holds at most its window and the tokens
    of all batches in flight, plus one block because the window need not start at a block boundary."""

    def group(window: int | Literal["state"] | None) -> Group:
        if window == "state":
            return Group(state=True)
        if window is None:
            return Group()
        return Group(window, -(-min(window - 1 + batches_in_flight * budget, max_model_len) // block_size) + 1)

    return tuple(group(window) for window in windows)


@dataclass
class KVCache:
    """Block tables, allocation and prefix look-up for the requests of one engine.

    `replay_tails`: a sliding group keeps findable only the window before each position at which a later request is
    likely to resume: the end of the prompt, and the end of a prefix that two prompts were seen to share. False (older
    engines): every full block.
    """

    pool: BlockPool
    block_size: int
    max_model_len: int
    caching: bool
    groups: tuple[Group, ...] = (Group(),)
    replay_tails: bool = True
    holdings: dict[int, Holding] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._one_full = len(self.groups) == 1 and self.groups[0].window is None and not self.groups[0].state
        if any(group.state for group in self.groups):
            self.caching = False  # a state holds a whole prefix: it cannot be resumed block by block
        self._windows = tuple(i for i, group in enumerate(self.groups) if group.window is not None)
        # Full attention first: its hits are the tightest bound, and any prefix of a hit of theirs is a hit.
        self._by_kind = sorted(range(len(self.groups)), key=lambda i: self.groups[i].window is not None)
        self.miss = Hit(0, tuple([] for _ in self.groups))

    @property
    def uniform(self) -> bool:
        """One group of full attention: a request then only ever adds blocks."""
        return self._one_full

    # Looking up ----------------------------------------------------------------------------------------------------

    def lookup(self, chain: Chain, tokens: int) -> Hit:
        """The longest run of cached full blocks among the first `tokens` tokens that every group can start from."""
        if not self.caching:
            return self.miss
        if self._one_full:
            hit = self.pool.find_all(chain.names(0, tokens // self.block_size))
            return Hit(len(hit) * self.block_size, (hit,)) if hit else self.miss
        length, found = tokens // self.block_size, list(self.miss.blocks)
        looked_up: set[int] = set()
        farthest = 0
        while True:
            longest = length
            for i in self._by_kind:
                if self.groups[i].window is None:
                    if i not in looked_up:  # any prefix of a full-attention hit is one: look once, then cut
                        looked_up.add(i)
                        found[i] = self._full_hit(i, chain, length)
                    length = min(length, len(found[i]))
                else:
                    found[i] = self._sliding_hit(i, chain, length)
                    length = len(found[i])
                farthest = max(farthest, length)
            if length == longest:  # every group can start from there
                break
        several_kinds = len({group.window for group in self.groups}) > 1
        junction = farthest if several_kinds and farthest > length else 0
        blocks = tuple(blocks[:length] for blocks in found)
        return Hit(length * self.block_size, blocks, junction * self.block_size)

    def _full_hit(self, group: int, chain: Chain, blocks: int) -> list[int]:
        return self.pool.find_all(self._key(group, link) for link in chain.names(0, blocks))

    def _sliding_hit(self, group: int, chain: Chain, blocks: int) -> list[int]:
        """From the right: the first run of cached blocks that covers a window; else the run at the very start."""
        window = self.groups[group].window
        assert window is not None
        needed, run = -(-(window - 1) // self.block_size), 0
        hit = [NULL] * blocks
        for i in range(blocks - 1, -1, -1):
            block = self.pool.find(self._key(group, chain[i]))
            if block == NULL:
                run = 0
                continue
            hit[i] = block
            run += 1
            if run >= needed:
                return hit[: i + run]
        return hit[:run]

    def _key(self, group: int, link: Hashable) -> Hashable:
        return link if len(self.groups) == 1 else (group, link)

    # Allocating ----------------------------------------------------------------------------------------------------

    def blocks_needed(self, request: int, tokens: int, computed: int, hit: Hit, admission: bool = False) -> int:
        """Blocks that must leave the free list for `request` to have slots for `tokens` tokens, `computed` of which
        are there already (own, hit or to be loaded)."""
        holding, needed = self.holdings.get(request), 0
        for i, group in enumerate(self.groups):
            required = 1 if group.state else -(-tokens // self.block_size)
            if admission and group.admission_cap is not None:
                required = min(required, group.admission_cap)
            if holding is not None:
                needed += max(required - len(holding.tables[i]), 0)
                continue
            skipped = group.skipped(computed) // self.block_size
            adopted = hit.blocks[i]
            needed += max(required - max(skipped, len(adopted)), 0)
            # A hit block that nobody owns counts too: adopting it takes it from the free list.
            if adopted:
                needed += self.pool.free_among(adopted[skipped:])
        return needed

    def allocate(
        self,
        request: int,
        *,
        computed: int,
        new: int,
        known: int,
        prompt: int = 0,
        chain: Chain | None = None,
        in_flight: int = 0,
        lookahead: int = 0,
        hit: Hit | None = None,
        external: int = 0,
        whole_sequence: bool = False,
        watermark: int = 0,
        reserved: int = 0,
        cache: bool = True,
    ) -> bool:
        """Slots for `new` tokens after `computed` ones (and `external` ones, which a connector will load); False, and
        no change but freed window blocks, when the pool is short.

        `known`: tokens of the request whose identity is certain (prompt and outputs, no drafts): only these are
        cached. `in_flight`: computed tokens whose step has not ended. `hit`: cached blocks to adopt (first allocation).
        `whole_sequence`: refuse unless all `known` tokens would fit. `watermark`, `reserved`: blocks to leave free.
        """
        holding = self.holdings.get(request)
        if holding is not None and self._one_full and not reserved and not watermark and not whole_sequence:
            return self._grow(holding, computed + new, lookahead, known if cache else 0, chain)
        hit = hit or self.miss
        total = computed + hit.tokens + external
        if whole_sequence:
            need = self.blocks_needed(request, min(known, self.max_model_len), total, hit, admission=True)
            if need + watermark > self.pool.free:
                return False
        if self._windows:
            self.drop_skipped(request, min(total, self.max_model_len) - in_flight)
        slots = min(total + new + lookahead, self.max_model_len)
        need = self.blocks_needed(request, slots, total, hit)
        if need + watermark > self.pool.free - reserved:
            return False
        if holding is None:
            holding = self._adopt(request, hit, total, prompt)
            if external:
                # All groups adopt before any takes blocks, so that no hit is evicted by another group's load.
                for i, group in enumerate(self.groups):
                    if total - group.skipped(total) > 0:
                        self._extend(holding.tables[i], total)
        for group, table in zip(self.groups, holding.tables, strict=True):
            self._extend(table, min(slots, 1) if group.state else slots)
        if cache and self.caching:
            assert chain is not None
            self.commit(request, min(total + new, known), chain)
        return True

    def _grow(self, holding: Holding, tokens: int, lookahead: int, known: int, chain: Chain | None) -> bool:
        """`allocate` for the common case: a request that has blocks, one group, full attention."""
        table = holding.tables[0]
        short = -(-min(tokens + lookahead, self.max_model_len) // self.block_size) - len(table)
        if short > 0:
            if short > self.pool.free:
                return False
            table += self.pool.take(short)
        if self.caching and known:
            full, cached = min(tokens, known) // self.block_size, holding.cached[0]
            if full > cached:
                assert chain is not None
                self.pool.cache_all(table[cached:full], chain.names(cached, full))
                holding.cached[0] = full
        return True

    def _adopt(self, request: int, hit: Hit, total: int, prompt: int) -> Holding:
        tables = []
        for i, group in enumerate(self.groups):
            skipped = group.skipped(total) // self.block_size
            kept = list(hit.blocks[i][skipped:])
            self.pool.touch(kept)
            tables.append([NULL] * skipped + kept)
        resumes = (prompt - 1, hit.junction) if hit.junction else (prompt - 1,)
        holding = self.holdings[request] = Holding(tables, [len(table) for table in tables], resumes)
        return holding

    def _extend(self, table: list[int], tokens: int) -> None:
        short = -(-tokens // self.block_size) - len(table)
        if short > 0:
            table += self.pool.take(short)

    def commit(self, request: int, tokens: int, chain: Chain) -> None:
        """Make the full blocks among the first `tokens` tokens findable."""
        full, holding = tokens // self.block_size, self.holdings.get(request)
        if holding is None or not self.caching:
            return
        if self._one_full:
            cached = holding.cached[0]
            if full > cached:
                self.pool.cache_all(holding.tables[0][cached:full], chain.names(cached, full))
                holding.cached[0] = full
            return
        for i, table in enumerate(holding.tables):
            window = self.groups[i].window
            for j in range(holding.cached[i], full):
                if table[j] != NULL and (window is None or self._worth_keeping(window, j, holding.resumes)):
                    self.pool.cache(table[j], self._key(i, chain[j]))
            holding.cached[i] = max(holding.cached[i], full)

    def _worth_keeping(self, window: int, block: int, resumes: tuple[int, ...]) -> bool:
        """Whether a request that resumes at one of `resumes` (rounded down to a block) needs `block` in its window."""
        if not self.replay_tails:
            return True
        needed = -(-(window - 1) // self.block_size)
        return any(end // self.block_size - needed <= block < end // self.block_size for end in resumes)

    def quiet_tokens(self, request: int) -> int:
        """Tokens up to which `request` can grow with nothing for the cache to do: no block to take, drop or cache."""
        if not self._one_full:
            return 0
        held = len(self.holdings[request].tables[0]) * self.block_size
        return held - 1 if self.caching else held

    # Freeing -------------------------------------------------------------------------------------------------------

    def drop_skipped(self, request: int, processed: int) -> None:
        """Give back blocks wholly below the window of token `processed` (steps that have ended only)."""
        holding = self.holdings.get(request)
        if holding is None:
            return
        for i in self._windows:
            table = holding.tables[i]
            last = min(self.groups[i].skipped(max(0, processed)) // self.block_size, len(table))
            dropped = []
            for j in range(last - 1, -1, -1):
                if table[j] == NULL:
                    break
                dropped.append(table[j])
                table[j] = NULL
            self.pool.release(dropped)

    def free(self, request: int) -> None:
        """Give back all blocks of `request`, last one first, so that the tail of a prefix is evicted before its
        head."""
        for table in self.pop(request):
            self.pool.release(reversed(table))

    def pop(self, request: int) -> list[list[int]]:
        """Forget `request` but keep its blocks out of the pool; the caller releases them later."""
        holding = self.holdings.pop(request, None)
        return holding.tables if holding else []
