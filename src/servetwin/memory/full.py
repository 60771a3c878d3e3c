"""The KV cache of one engine whose layers are one group of full attention and whose requests share prefixes.

The rules are those of `KVCache`, which keeps them block by block and for any groups; here they work on whole block
tables (see `memory/tables.py`), as a request then only ever adds blocks. Results are the same to the bit.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable
from typing import NamedTuple

from servetwin.memory.kv import Chain, Hit
from servetwin.memory.tables import Table, TablePool


class _Look(NamedTuple):
    """What somebody was told who looked for `chain`."""

    chain: Chain
    tokens: int
    hit: Hit
    missing: Hashable
    """name of the segment in which it ended"""
    found: array[int]
    owners: bytes
    """tables of the blocks that were found"""


class FullKV:
    """Methods and arguments are those of `KVCache`."""

    uniform = caching = True
    groups = (None,)

    def __init__(self, pool: TablePool, block_size: int, max_model_len: int) -> None:
        self.pool, self.block_size, self.max_model_len = pool, block_size, max_model_len
        self.holdings: dict[int, Table] = {}
        self.miss = Hit(0, (array("q"),))
        self._last: _Look | None = None

    def lookup(self, chain: Chain, tokens: int) -> Hit:
        """The longest run of cached full blocks among the first `tokens` tokens.

        Whoever waits at the head of the queue asks again in every step. What was found is found again as long as the
        blocks belong to the same tables, as what others cache later comes after it; and no more is found as long as
        nobody has cached a block of the segment that was missing.
        """
        pool, last = self.pool, self._last
        asked = last is not None and last.chain is chain and last.tokens == tokens
        if last is not None and asked and not pool.knows(last.missing) and pool.owners(last.found) == last.owners:
            return last.hit
        found: array[int] = array("q")
        missing: Hashable = None
        blocks = tokens // self.block_size
        for name, first, end in chain.runs(0, blocks):
            found += pool.find_run(name, first, min(end, blocks))
            if len(found) < end:
                missing = name
                break
        hit = Hit(len(found) * self.block_size, (found,)) if found else self.miss
        self._last = _Look(chain, tokens, hit, missing, found, pool.owners(found))
        return hit

    def refuses(self, chain: Chain, known: int, watermark: int) -> bool:
        """Whether `allocate`, asked for the whole of a prompt of `known` tokens, is sure to say no; False: look it up.

        It would where `lookup` can find no more than the last time, and the blocks beyond that are more than are free.
        """
        last = self._last
        if last is None or last.chain is not chain or last.tokens != known - 1 or self.pool.knows(last.missing):
            return False
        fresh = -(-min(known, self.max_model_len) // self.block_size) - len(last.hit.blocks[0])
        return fresh + watermark > self.pool.free

    def blocks_needed(self, request: int, tokens: int, computed: int, hit: Hit, admission: bool = False) -> int:
        """Blocks that must leave the free list for `request` to have slots for `tokens` tokens."""
        required, holding = -(-tokens // self.block_size), self.holdings.get(request)
        if holding is not None:
            return max(required - len(holding.blocks), 0)
        # A hit block that nobody owns counts too: adopting it takes it from the free list.
        adopted = hit.blocks[0]
        assert isinstance(adopted, array)
        return max(required - len(adopted), 0) + self.pool.free_among(adopted)

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
        pool, size, holding = self.pool, self.block_size, self.holdings.get(request)
        if holding is not None and not reserved and not watermark and not whole_sequence:
            return self._grow(holding, computed + new, lookahead, known if cache else 0, chain)
        hit = hit or self.miss
        total, room = computed + hit.tokens + external, pool.free - watermark
        if whole_sequence and self.blocks_needed(request, min(known, self.max_model_len), total, hit) > room:
            return False
        slots = min(total + new + lookahead, self.max_model_len)
        if holding is None:
            if self.blocks_needed(request, slots, total, hit) > room - reserved:
                return False
            holding = self.holdings[request] = pool.table(hit.blocks[0])
        short = max(-(-slots // size) - len(holding.blocks), 0)
        if short > room - reserved:
            return False
        if short:
            pool.take(short, holding)
        full = min(total + new, known) // size
        if full > holding.cached and cache:
            assert chain is not None
            pool.cache(holding, full, chain)
        return True

    def extend(self, request: int, tokens: int, known: int, chain: Chain | None) -> None:
        """`allocate` for somebody who has blocks and for whom enough are free: slots up to `tokens` tokens."""
        self._grow(self.holdings[request], tokens, 0, known, chain)

    def _grow(self, holding: Table, tokens: int, lookahead: int, known: int, chain: Chain | None) -> bool:
        """`allocate` for the common case: a request that has blocks."""
        size = self.block_size
        short = -(-min(tokens + lookahead, self.max_model_len) // size) - len(holding.blocks)
        if short > 0:
            if short > self.pool.free:
                return False
            self.pool.take(short, holding)
        full = min(tokens, known) // size
        if full > holding.cached:
            assert chain is not None
            self.pool.cache(holding, full, chain)
        return True

    def commit(self, request: int, tokens: int, chain: Chain) -> None:
        """Make the full blocks among the first `tokens` tokens findable."""
        full, holding = tokens // self.block_size, self.holdings.get(request)
        if holding is not None and full > holding.cached:
            self.pool.cache(holding, full, chain)

    def quiet_tokens(self, request: int) -> int:
        """Tokens up to which `request` can grow with nothing for the cache to do: no block to take or to cache."""
        return len(self.holdings[request].blocks) * self.block_size - 1

    def free(self, request: int) -> None:
        """Give back all blocks of `request`."""
        holding = self.holdings.pop(request, None)
        if holding is not None:
            self.pool.release(holding)
