"""Names for prefixes: two requests share a KV block exactly when the whole prefix up to it is the same."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate

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


class OwnChain:
    """Names of the prefixes of a request that shares its prompt with nobody: no two requests have one in common."""

    __slots__ = ("_base",)

    def __init__(self, row: int) -> None:
        self._base = (row + 1) << 32

    def __getitem__(self, block: int) -> int:
        return self._base + block


def segment_key(segments: Sequence[tuple[int, int]], output_seed: int, block_size: int) -> BlockKey:
    """Block keys of a prompt given as segments `(seed, length)`, followed by outputs `(output_seed, 0..)`.

    Token j of a segment with seed s is the pair (s, j); the key of a block is the tuple of the pieces
    (seed, first j, length) that cover it.
    """
    ends = list(accumulate(length for _, length in segments))
    prompt = ends[-1] if ends else 0

    def key(block: int) -> Hashable:
        at, stop = block * block_size, (block + 1) * block_size
        pieces: list[tuple[int, int, int]] = []
        while at < min(stop, prompt):
            i = bisect_right(ends, at)
            seed, length = segments[i]
            start = ends[i] - length
            upto = min(stop, ends[i])
            piece = (seed, at - start, upto - at)
            # Two neighbouring pieces of one run are one piece, so that equal tokens have equal keys.
            if pieces and pieces[-1][0] == seed and pieces[-1][1] + pieces[-1][2] == piece[1]:
                piece = (seed, pieces[-1][1], pieces[-1][2] + piece[2])
                pieces.pop()
            pieces.append(piece)
            at = upto
        if stop > prompt:
            start = max(at, prompt) - prompt
            pieces.append((output_seed, start, stop - max(at, prompt)))
        return tuple(pieces)

    return key
