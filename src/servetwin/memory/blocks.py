"""The pool of physical KV blocks: reference counts, the free list, the index of cached blocks.

Invariants (numbered; tested as properties in tests/memory):
  B1  a block is free (reference count 0, in the free list) or owned (count > 0, not in it), never both;
  B2  a block is in the index exactly when it has a key, whether it is free or owned;
  B3  the null block (id 0) is never handed out, counted or indexed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable

NULL = 0
"""Stands in a block table for a block that is no longer (or was never) needed."""


class BlockPool:
    """`usable` blocks with ids 1..usable; block 0 is the null block.

    The free list is ordered as vLLM orders it: blocks are taken from its front; a block released with a cached key goes
    to the back (least recently used is evicted first), one without a key goes to the front. `unkeyed_first` False is
    the older rule, under which every released block goes to the back.
    """

    def __init__(self, usable: int, unkeyed_first: bool = True) -> None:
        self.usable = usable
        self.unkeyed_first = unkeyed_first
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, usable + 1))
        self._count = [0] * (usable + 1)
        self._key: list[Hashable | None] = [None] * (usable + 1)
        self._index: dict[Hashable, list[int]] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.usable - len(self._free)

    def find(self, key: Hashable) -> int:
        """The block that holds `key` (the one cached first, when several do), or NULL."""
        found = self._index.get(key)
        return found[0] if found else NULL

    def is_free(self, block: int) -> bool:
        return self._count[block] == 0

    def take(self, count: int) -> list[int]:
        """`count` blocks from the front of the free list, with one reference each; what they cached is forgotten.

        The caller has checked that there are so many.
        """
        free, keys, counts = self._free, self._key, self._count
        taken = []
        for _ in range(count):
            block = free.popitem(last=False)[0]
            if keys[block] is not None:
                self._forget(block)
            counts[block] = 1
            taken.append(block)
        return taken

    def touch(self, blocks: Iterable[int]) -> None:
        """One more reference to each block (null blocks aside); a free one leaves the free list."""
        counts = self._count
        for block in blocks:
            if block != NULL:
                if counts[block] == 0:
                    del self._free[block]
                counts[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One reference fewer to each block, in the order in which they should be reused."""
        counts, keys, free = self._count, self._key, self._free
        unkeyed = []
        for block in blocks:
            if block == NULL:
                continue
            counts[block] -= 1
            if counts[block] == 0:
                free[block] = None
                if keys[block] is None:
                    unkeyed.append(block)
        if self.unkeyed_first:
            for block in reversed(unkeyed):
                free.move_to_end(block, last=False)

    def cache(self, block: int, key: Hashable) -> None:
        """Make an owned block findable by `key`; several blocks may share one."""
        self._key[block] = key
        self._index.setdefault(key, []).append(block)

    def _forget(self, block: int) -> None:
        key = self._key[block]
        self._key[block] = None
        holders = self._index[key]
        holders.remove(block)
        if not holders:
            del self._index[key]
