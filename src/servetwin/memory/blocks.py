"""The pool of physical KV blocks: reference counts, the free list, the index of cached blocks.

Invariants (numbered; tested as properties in tests/memory):
  B1  a block is free (no reference, in the free list) or owned (referenced, not in it), never both;
  B2  a block is in the index exactly when it has a key, whether it is free or owned;
  B3  the null block (id 0) is never handed out, counted or indexed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

NULL = 0
"""Stands in a block table for a block that is no longer (or was never) needed."""

COMPACT = 4096
"""Entries at the front of the free list that are no longer in use before they are dropped."""


class BlockPool:
    """`usable` blocks with ids 1..usable; block 0 is the null block.

    The free list is ordered as vLLM orders it: blocks are taken from its front; a block released with a cached key goes
    to the back (least recently used is evicted first), one without a key goes to the front. `unkeyed_first` False is
    the older rule, under which every released block goes to the back.

    It is a list with a head, so that a thousand blocks are taken or released with a few operations on slices. A block
    that leaves from the middle (a hit) leaves a null block behind.
    """

    def __init__(self, usable: int, unkeyed_first: bool = True) -> None:
        self.usable = usable
        self.unkeyed_first = unkeyed_first
        self._queue = list(range(1, usable + 1))
        self._head = 0
        self._base = 0
        """position of the first entry of the queue: positions of blocks stay when entries before them are dropped"""
        self._at = {block: block - 1 for block in self._queue}
        """position of each free block"""
        self._shared: dict[int, int] = {}
        """references of the blocks that have more than one"""
        self._key: list[Hashable | None] = [None] * (usable + 1)
        self._index: dict[Hashable, int] = {}
        """the block that holds each key: the one cached first, where several do"""
        self._copies: dict[Hashable, list[int]] = {}
        """the others, in the order in which they were cached"""

    @property
    def free(self) -> int:
        return len(self._at)

    @property
    def used(self) -> int:
        return self.usable - len(self._at)

    def find(self, key: Hashable) -> int:
        """The block that holds `key` (the one cached first, when several do), or NULL."""
        return self._index.get(key, NULL)

    def find_all(self, keys: Iterable[Hashable]) -> list[int]:
        """The blocks that hold `keys`, up to the first that nobody holds."""
        find, found = self._index.get, []
        for key in keys:
            block = find(key)
            if block is None:
                break
            found.append(block)
        return found

    def is_free(self, block: int) -> bool:
        return block in self._at

    def free_among(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` are free."""
        return sum(map(self._at.__contains__, blocks))

    def references(self, block: int) -> int:
        return 0 if block in self._at or block == NULL else self._shared.get(block, 1)

    def take(self, count: int) -> list[int]:
        """`count` blocks from the front of the free list, with one reference each; what they cached is forgotten.

        The caller has checked that there are so many.
        """
        queue, head = self._queue, self._head
        taken = queue[head : head + count]
        head += count
        while NULL in taken:
            taken = [block for block in taken if block != NULL]
            missing = count - len(taken)
            taken += queue[head : head + missing]
            head += missing
        self._head = head
        if head > COMPACT and 2 * head > len(queue):
            del queue[:head]
            self._base += head
            self._head = 0
        at, keys, index, copies = self._at, self._key, self._index, self._copies
        for block in taken:
            del at[block]
            key = keys[block]
            if key is not None:
                keys[block] = None
                if copies and key in copies:
                    self._forget_copy(block, key)
                else:
                    del index[key]
        return taken

    def touch(self, blocks: Iterable[int]) -> None:
        """One more reference to each block (null blocks aside); a free one leaves the free list."""
        at, shared = self._at, self._shared
        for block in blocks:
            if block in at:
                self._queue[at.pop(block) - self._base] = NULL
            elif block != NULL:
                shared[block] = shared.get(block, 1) + 1

    def release(self, blocks: Iterable[int]) -> None:
        """One reference fewer to each block, in the order in which they should be reused."""
        keys, shared = self._key, self._shared
        ended = [block for block in blocks if block != NULL]
        if shared:
            still = [block for block in ended if block in shared]
            if still:
                ended = [block for block in ended if block not in shared]
                for block in still:
                    shared[block] -= 1
                    if shared[block] == 1:
                        del shared[block]
        if self.unkeyed_first:
            unkeyed = [block for block in ended if keys[block] is None]
            if unkeyed:
                ended = [block for block in ended if keys[block] is not None]
                self._put_first(unkeyed)
        end = self._base + len(self._queue)
        self._queue += ended
        self._at.update(zip(ended, range(end, end + len(ended)), strict=True))

    def _put_first(self, blocks: list[int]) -> None:
        if self._head >= len(blocks):
            self._head -= len(blocks)
            self._queue[self._head : self._head + len(blocks)] = blocks
        else:
            self._queue[: self._head] = blocks
            self._base -= len(blocks) - self._head
            self._head = 0
        start = self._base + self._head
        self._at.update(zip(blocks, range(start, start + len(blocks)), strict=True))

    def cache(self, block: int, key: Hashable) -> None:
        """Make an owned block findable by `key`; several blocks may share one."""
        self.cache_all((block,), (key,))

    def cache_all(self, blocks: Sequence[int], keys: Iterable[Hashable]) -> None:
        """`cache` for each block and its key."""
        key_of, index = self._key, self._index
        for block, key in zip(blocks, keys, strict=True):
            key_of[block] = key
            if index.setdefault(key, block) != block:
                self._copies.setdefault(key, []).append(block)

    def _forget_copy(self, block: int, key: Hashable) -> None:
        """One of several blocks that hold `key` no longer does."""
        copies = self._copies[key]
        if self._index[key] == block:
            self._index[key] = copies.pop(0)
        else:
            copies.remove(block)
        if not copies:
            del self._copies[key]
