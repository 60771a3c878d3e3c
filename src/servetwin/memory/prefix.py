"""Names for prefixes: two requests share a KV block exactly when the whole prefix up to it is the same."""

from __future__ import annotations

from collections.abc import Callable, Hashable

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
