"""The KV cache of one engine while nobody could tell its blocks apart: then they need only be counted.

Which block a request gets can matter only to somebody who later finds it again. Where no two requests share a prefix,
that is a request which was preempted and finds what is left of its own blocks. Until the first one is (and for good,
when nothing is cached) two numbers a request are all there is to know; `told_apart` then makes the blocks that the
rules of `KVCache` would have brought about, up to their names. Free blocks are all alike at that moment: what they
cached belonged to requests that have ended, and nobody will look it up.
"""

from __future__ import annotations

from collections.abc import Hashable

from servetwin.memory.blocks import NULL, BlockPool
from servetwin.memory.kv import Chain, Hit, Holding, KVCache
from servetwin.memory.prefix import OwnChain


class Tally:
    """`BlockPool` by numbers alone."""

    __slots__ = ("free", "usable")

    def __init__(self, usable: int) -> None:
        self.usable = self.free = usable

    def find(self, key: Hashable) -> int:
        """Nothing is ever found."""
        return NULL

    @property
    def used(self) -> int:
        return self.usable - self.free


class CountedKV:
    """`KVCache` of one group of full attention, without the blocks. Methods and arguments are as there.

    `unkeyed_first` is the order of the pool that `told_apart` makes.
    """

    uniform = True
    groups = (None,)

    def __init__(self, usable: int, block_size: int, max_model_len: int, caching: bool, unkeyed_first: bool) -> None:
        self.pool = Tally(usable)
        self.block_size, self.max_model_len, self.caching = block_size, max_model_len, caching
        self.held: dict[int, int] = {}
        """blocks of each request"""
        self.cached: dict[int, int] = {}
        """how many of them, from the first on, hold keys"""
        self.miss = Hit(0, ([],))
        self._unkeyed_first = unkeyed_first

    def told_apart(self) -> KVCache:
        """The same state with blocks."""
        pool = BlockPool(self.pool.usable, self._unkeyed_first)
        kv = KVCache(pool, self.block_size, self.max_model_len, self.caching)
        for request, held in self.held.items():
            table, cached, chain = pool.take(held), self.cached[request], OwnChain(request)
            for i in range(cached):
                pool.cache(table[i], chain[i])
            kv.holdings[request] = Holding([table], [cached], ())
        return kv

    def lookup(self, chain: Chain, tokens: int) -> Hit:
        """Nothing is ever found."""
        return self.miss

    def blocks_needed(self, request: int, tokens: int, computed: int, hit: Hit, admission: bool = False) -> int:
        return max(0, -(-tokens // self.block_size) - self.held.get(request, 0))

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
        size, tokens, held, free = self.block_size, computed + new, self.held.get(request), self.pool.free
        slots = min(tokens + lookahead, self.max_model_len)
        if held is None:
            if whole_sequence and -(-min(known, self.max_model_len) // size) + watermark > free:
                return False
            short = -(-slots // size)
            if short + watermark > free - reserved:
                return False
            self.held[request] = short
            self.cached[request] = 0
            self.pool.free = free - short
        else:
            short = -(-slots // size) - held
            if short > 0:
                if short > free:
                    return False
                self.held[request] = held + short
                self.pool.free = free - short
        if cache:
            self.commit(request, min(tokens, known), chain)
        return True

    def commit(self, request: int, tokens: int, chain: Chain | None) -> None:
        full = tokens // self.block_size
        if self.caching and full > self.cached.get(request, full):
            self.cached[request] = full

    def settle(self, request: int, slots: int, certain: int) -> None:
        """`request` has grown to `slots` tokens unseen, with blocks taken from the tally as it went; the first
        `certain` of them may be cached."""
        self.held[request] = -(-slots // self.block_size)
        self.commit(request, certain, None)

    def quiet_tokens(self, request: int) -> int:
        held = self.held[request] * self.block_size
        return held - 1 if self.caching else held

    def free(self, request: int) -> None:
        self.pool.free += self.held.pop(request, 0)
        self.cached.pop(request, None)
