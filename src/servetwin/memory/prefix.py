"""Names for prefixes: two requests share a KV block exactly when the whole prefix up to it is the same."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import chain

BlockKey = Callable[[int], Hashable]
"""Maps block i of a request to a key that two requests share exactly when the tokens of their blocks are the same."""


class PrefixChain:
    """Element i names the first i + 1 blocks of a request: the hash of element i - 1 and of the block's own key.

    Made block by block as needed, because outputs extend the sequence for as long as the request lives. Names are
    64-bit hashes; among a hundred million blocks the chance that any two prefixes collide is below 1 in 3000.
    """

    __slots__ = ("_key", "_links")

    def __init__(self, key: BlockKey) -> None:
        self._key, self._links = key, [0]

    def __getitem__(self, block: int) -> int:
        links, key = self._links, self._key
        while len(links) <= block + 1:
            links.append(hash((links[-1], key(len(links) - 1))))
        return links[block + 1]

    def names(self, first: int, last: int) -> Iterable[int]:
        """Elements `first` up to before `last`, each made when it is asked for."""
        return map(self.__getitem__, range(first, last))

    def runs(self, first: int, last: int) -> Iterable[tuple[int, int, int]]:
        """Each block is a segment of its own."""
        return ((self[block], block, block + 1) for block in range(first, last))


class SegmentChain:
    """The same for prompts in segments (see `RequestTable`), which need not be looked at block by block.

    Token j of a segment is the pair (seed, j), so two prefixes are the same exactly when their whole segments and the
    seed of the last, begun one are, and end at the same j. The name is a hash of the former plus the latter: the blocks
    that end in one segment have names a block size apart. As 64-bit hashes, they collide as rarely as those of
    `PrefixChain`.
    """

    __slots__ = ("_block_size", "_ends", "_hashes", "_seeds", "_starts")

    def __init__(self, prompt: Sequence[tuple[int, int]], output_seed: int, block_size: int) -> None:
        """The prompt's segments are followed by the output, a segment of `output_seed` without end."""
        self._block_size = block_size
        self._starts, self._ends, self._seeds = [], [], []
        at = 0
        for seed, length in prompt:
            if length:
                self._starts.append(at)
                at += length
                self._ends.append(at)
                self._seeds.append(seed)
        self._starts.append(at)
        self._ends.append(1 << 62)
        self._seeds.append(output_seed)
        self._hashes = [_hashed(0, self._seeds[0])]
        """what the names of each segment begin with, as far as somebody has asked"""

    def __getitem__(self, block: int) -> int:
        end = (block + 1) * self._block_size
        segment = bisect_left(self._ends, end)
        return self._hash(segment) + end - self._starts[segment]

    def names(self, first: int, last: int) -> Iterable[int]:
        """Elements `first` up to before `last`, those of a segment made when the first of them is asked for."""
        return chain.from_iterable(self._ranges(first, last))

    def _ranges(self, first: int, last: int) -> Iterable[range]:
        size, ends = self._block_size, self._ends
        end, stop = (first + 1) * size, last * size
        segment = bisect_left(ends, end)
        while end <= stop:
            upto = min(ends[segment], stop)
            if end <= upto:
                shift = self._hash(segment) - self._starts[segment]
                yield range(shift + end, shift + upto + 1, size)
                end += (upto - end) // size * size + size
            segment += 1

    def runs(self, first: int, last: int) -> Iterable[tuple[int, int, int]]:
        """Elements `first` up to before `last` by segments: (name of the first block that ends in the segment, first
        element, first element beyond the segment)."""
        size, ends, starts, hashes = self._block_size, self._ends, self._starts, self._hashes
        segment = bisect_left(ends, (first + 1) * size)
        while first < last:
            end = ends[segment] // size
            if first < end:
                whole = hashes[segment] if segment < len(hashes) else self._hash(segment)
                yield whole + size - starts[segment] % size, first, end
                first = end
            segment += 1

    def _hash(self, segment: int) -> int:
        hashes = self._hashes
        if segment >= len(hashes):  # whoever asks for one will ask for the others
            done, last = len(hashes) - 1, hashes[-1]
            for start, end, seed in zip(self._starts[done:], self._ends[done:], self._seeds[done + 1 :], strict=False):
                last = _hashed(hash((last, end - start)), seed)
                hashes.append(last)
        return hashes[segment]


def _hashed(before: int, seed: int) -> int:
    # Python's hashes of -1 and -2 are the same: seeds are folded onto whole numbers from 0.
    return hash((before, 2 * seed if seed >= 0 else -2 * seed - 1))


class OwnChain:
    """Names of the prefixes of a request that shares its prompt with nobody: no two requests have one in common."""

    __slots__ = ("_base",)

    def __init__(self, row: int) -> None:
        self._base = (row + 1) << 32

    def __getitem__(self, block: int) -> int:
        return self._base + block

    def names(self, first: int, last: int) -> Iterable[int]:
        return range(self._base + first, self._base + last)

    def runs(self, first: int, last: int) -> Iterable[tuple[int, int, int]]:
        """The request is one segment."""
        return ((self._base, first, 1 << 32),) if first < last else ()
