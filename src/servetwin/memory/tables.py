"""The pool of `memory/blocks.py` for one group of full attention, by whole block tables instead of block by block.

A request's blocks are cached by its block table: blocks of a prompt that end in one segment of it are consecutive in
the table, so one entry of the index, from the segment's name to the table, stands for all of them. What is known of a
block is in arrays by its id, so that a thousand blocks are taken, cached, evicted or released with a few operations on
arrays. Evicting a block does not touch the index: it only takes the block from its table, and whoever looks it up sees
that it is no longer the table's. Order and results are those of `BlockPool` (tests/memory compares them).

Invariants (numbered; tested as properties in tests/memory): B1 to B3 of `BlockPool`, with "has a key" as
  B4  a block is cached exactly when it has an owner; it is then a block of the owner's table, and every segment with
      such blocks leads to that table in the index.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from servetwin.memory.blocks import NULL

Ints = npt.NDArray[np.int64]

NEVER = np.iinfo(np.int64).max
SWEEP = 4096
"""fewest entries of the index before those whose tables have lost all their blocks are dropped"""


class Runs(Protocol):
    """Identity of a request's full blocks, by segments (see `memory/prefix.py`)."""

    def runs(self, first: int, last: int, /) -> Iterable[tuple[Hashable, int, int]]:
        """Blocks `first` up to before `last`, in runs (name, first block, first block beyond the segment, perhaps after
        `last`). Where names are equal, so are prefixes: up to the first block that ends in the segment, and from there
        as far as the shorter of the two segments goes."""


class Table:
    """The blocks of one request, from its first token on; the first `cached` of them can be found."""

    __slots__ = ("blocks", "cached", "indexed", "serial")

    def __init__(self, blocks: array[int], serial: int) -> None:
        """`blocks`: adopted from other tables, which own what is cached in them."""
        self.blocks, self.cached, self.serial = blocks, len(blocks), serial
        self.indexed = 0
        """up to before this block it stands in the index already: the end of the segment of the last one cached"""


Part = tuple[Table, int]
"""A table that has cached blocks of a segment, and the first of its blocks beyond the segment."""


class TablePool:
    """`usable` blocks with ids 1..usable; block 0 is the null block. `unkeyed_first` as in `BlockPool`."""

    def __init__(self, usable: int, unkeyed_first: bool = True) -> None:
        self.usable = self.free = usable
        self.unkeyed_first = unkeyed_first
        self._queue: Ints = np.zeros(3 * usable + 2, np.int64)
        """the free list, from `_head` up to before `_tail`, with null blocks where one has left from the middle"""
        self._head, self._tail = usable + 1, 2 * usable + 1
        self._queue[self._head : self._tail] = np.arange(1, usable + 1)
        self._holes = 0
        self._at: Ints = np.arange(usable, 2 * usable + 1)
        """place in the queue of each free block"""
        self._references: Ints = np.zeros(usable + 1, np.int64)
        self._owner: Ints = np.zeros(usable + 1, np.int64)
        """serial number of the table that has cached each block; 0: none has"""
        self._order: Ints = np.zeros(usable + 1, np.int64)
        """when it was cached: the earliest of several blocks with one name is found"""
        self._clock = self._tables = 0
        self._index: dict[Hashable, Part | list[Part]] = {}
        self._sweep_at = SWEEP
        # Single items are read and written through these, at a third of an array's cost.
        self._each_queued, self._each_referenced = self._queue.data, self._references.data
        self._each_owner, self._each_order = self._owner.data, self._order.data

    @property
    def used(self) -> int:
        return self.usable - self.free

    def table(self, adopted: Iterable[int] = ()) -> Table:
        """A new table that begins with blocks of others, with one more reference to each."""
        blocks = array("q", adopted)
        if blocks:
            self._touch(_numbers(blocks))
        self._tables += 1
        return Table(blocks, self._tables)

    def free_among(self, blocks: array[int]) -> int:
        """How many of `blocks` are free."""
        return len(blocks) - int(np.count_nonzero(self._references[_numbers(blocks)])) if blocks else 0

    # The free list -------------------------------------------------------------------------------------------------

    def take(self, count: int, table: Table) -> None:
        """`count` blocks from the front of the free list for the end of `table`; what they cached is forgotten.

        The caller has checked that there are so many.
        """
        self.free -= count
        if count == 1:
            queued, head = self._each_queued, self._head
            while (block := queued[head]) == NULL:
                head += 1
                self._holes -= 1
            self._head = head + 1
            self._each_referenced[block] = 1
            self._each_owner[block] = 0
            table.blocks.append(block)
            return
        end = self._head + count
        taken = self._queue[self._head : end]
        if self._holes:
            taken = taken[taken != NULL]
            while (missing := count - len(taken)) > 0:
                more = self._queue[end : end + missing]
                taken = np.concatenate((taken, more[more != NULL]))
                end += missing
            self._holes -= end - self._head - count
        self._head = end
        self._references[taken] = 1
        self._owner[taken] = 0
        table.blocks.frombytes(taken.tobytes())

    def _touch(self, blocks: Ints) -> None:
        """One more reference to each block; a free one leaves the free list."""
        before = self._references[blocks]
        self._references[blocks] = before + 1
        revived = blocks[before == 0]
        self._queue[self._at[revived]] = NULL
        self._holes += len(revived)
        self.free -= len(revived)

    def release(self, table: Table) -> None:
        """One reference fewer to each block of an ended table. The last one is to be reused first, so that the tail of
        a prefix is evicted before its head."""
        if not table.blocks:
            return
        ended = _numbers(table.blocks)[::-1]
        left = self._references[ended] - 1
        self._references[ended] = left
        if left.any():
            ended = ended[left == 0]
        self.free += len(ended)
        if self.unkeyed_first:
            keyed = self._owner[ended] != 0
            if not keyed.all():
                self._put_first(ended[~keyed])
                ended = ended[keyed]
        if self._tail + len(ended) > len(self._queue):
            self._recentre()
        start, self._tail = self._tail, self._tail + len(ended)
        self._queue[start : self._tail] = ended
        self._at[ended] = np.arange(start, self._tail)

    def _put_first(self, blocks: Ints) -> None:
        if len(blocks) > self._head:
            self._recentre()
        end, self._head = self._head, self._head - len(blocks)
        self._queue[self._head : end] = blocks
        self._at[blocks] = np.arange(self._head, end)

    def _recentre(self) -> None:
        """Move the free list to the middle of its room: as many blocks as there are fit on both sides."""
        queued = self._queue[self._head : self._tail]
        queued = queued[queued != NULL]
        self._head, self._holes = self.usable + 1, 0
        self._tail = self._head + len(queued)
        self._queue[self._head : self._tail] = queued
        self._at[queued] = np.arange(self._head, self._tail)

    # The index -----------------------------------------------------------------------------------------------------

    def find(self, name: Hashable) -> int:
        """The block that holds the first block of a prompt, of which `name` is the name, or NULL."""
        found = self.find_run(name, 0, 1)
        return found[0] if found else NULL

    def knows(self, name: Hashable) -> bool:
        """Whether any block of a segment may be found; False is certain."""
        return name in self._index

    def owners(self, blocks: array[int]) -> bytes:
        """Which tables have cached them, in a form to be compared."""
        return self._owner[_numbers(blocks)].tobytes() if blocks else b""

    def find_run(self, name: Hashable, first: int, last: int) -> array[int]:
        """The blocks that hold a run of `Runs`, up to the first that nobody holds."""
        parts = self._index.get(name)
        if parts is None:
            return array("q")
        if isinstance(parts, list):
            return self._find_among(parts, first, last)
        table, end = parts
        found = table.blocks[first : min(end, last)]
        if found:
            own = self._owner[_numbers(found)] == table.serial
            end = own.argmin()
            if not own[end]:
                del found[end:]
        return found

    def _find_among(self, parts: list[Part], first: int, last: int) -> array[int]:
        """`find_run` where several tables have cached blocks of the run: of each, the one cached first."""
        found: Ints = np.zeros(last - first, np.int64)
        since: Ints = np.full(last - first, NEVER)
        for table, end in parts:
            part = table.blocks[first : min(end, last)]
            if part:
                blocks, n = _numbers(part), len(part)
                cached = np.where(self._owner[blocks] == table.serial, self._order[blocks], NEVER)
                found[:n] = np.where(cached < since[:n], blocks, found[:n])
                since[:n] = np.minimum(cached, since[:n])
        missing = since == NEVER
        return array("q", (found[: missing.argmax()] if missing.any() else found).tobytes())

    def cache(self, table: Table, full: int, names: Runs) -> None:
        """Make the first `full` blocks of `table` findable."""
        first = table.cached
        if full > table.indexed:
            self._enter(table, max(first, table.indexed), full, names)
        self._clock += 1
        if full - first == 1:
            block = table.blocks[first]
            self._each_owner[block], self._each_order[block] = table.serial, self._clock
        else:
            blocks = _numbers(table.blocks[first:full])
            self._owner[blocks], self._order[blocks] = table.serial, self._clock
        table.cached = full
        if len(self._index) > self._sweep_at:
            self._sweep()

    def _enter(self, table: Table, first: int, full: int, names: Runs) -> None:
        """Make `table` known for the segments in which its blocks `first` up to before `full` end."""
        index = self._index
        for name, _, end in names.runs(first, full):
            parts = index.get(name)
            if parts is None:
                index[name] = (table, end)
            else:
                # Tables that have lost all their blocks no longer count.
                left = [part for part in (parts if isinstance(parts, list) else [parts]) if self._owns(part[0])]
                index[name] = [*left, (table, end)] if left else (table, end)
            table.indexed = end

    def _owns(self, table: Table) -> bool:
        return bool((self._owner[_numbers(table.blocks)] == table.serial).any())

    def _sweep(self) -> None:
        """Drop entries of tables that have lost all their blocks; as often as the index has doubled."""
        owners = set(np.unique(self._owner).tolist())
        kept: dict[Hashable, Part | list[Part]] = {}
        for name, parts in self._index.items():
            if isinstance(parts, list):
                left = [part for part in parts if part[0].serial in owners]
                if left:
                    kept[name] = left if len(left) > 1 else left[0]
            elif parts[0].serial in owners:
                kept[name] = parts
        self._index = kept
        self._sweep_at = max(SWEEP, 2 * len(kept))


def _numbers(blocks: array[int]) -> Ints:
    """The same memory as an array of numpy's, which must not outlive the next change of length."""
    return np.frombuffer(blocks, np.int64)
