"""The KV cache of one engine whose layers are one group of full attention and whose requests share prefixes.

The rules are those of `KVCache`, which keeps them block by block and for any groups; here they work on whole block
tables (see `memory/tables.py`), as a request then only ever adds blocks. Results are the same to the bit.
"""

from __future__ import annotations

from array import array

from servetwin.memory.kv import Chain, Hit
from servetwin.memory.tables import Table, TablePool


class FullKV:
    """Methods and arguments are those of `KVCache`."""

    uniform = caching = True
    groups = (None,)

    def __init__(self, pool: TablePool, block_size: int, max_model_len: int) -> None:
        self.pool, self.block_size, self.max_model_len = pool, block_size, max_model_len
        self.holdings: dict[int, Table] = {}
        self.miss = Hit(0, (array("q"),))

    def lookup(self, chain: Chain, tokens: int) -> Hit:
        """The longest run of cached full blocks among the first `tokens` tokens."""
        found: array[int] = array("q")
        blocks = tokens // self.block_size
        for name, first, end in chain.runs(0, blocks):
            found += self.pool.find_run(name, first, min(end, blocks))
            if len(found) < end:
                break
        return Hit(len(found) * self.block_size, (found,)) if found else self.miss

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
        pool, holding, hit = self.pool, self.holdings.get(request), hit or self.miss
        total = computed + hit.tokens + external
        if whole_sequence:
            need = self.blocks_needed(request, min(known, self.max_model_len), total, hit)
            if need + watermark > pool.free:
                return False
        slots = min(total + new + lookahead, self.max_model_len)
        if holding is None:
            if self.blocks_needed(request, slots, total, hit) + watermark > pool.free - reserved:
                return False
            holding = self.holdings[request] = pool.table(hit.blocks[0])
        short = -(-slots // self.block_size) - len(holding.blocks)
        if short > 0:
            if short + watermark > pool.free - reserved:
                return False
            pool.take(short, holding)
        if cache:
            full = min(total + new, known) // self.block_size
            if full > holding.cached:
                assert chain is not None
                pool.cache(holding, full, chain)
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
