"""Which KV blocks hold the same tokens, without ever writing the tokens down.

A token is the pair (seed, j) of the segment it stands in, or a literal id. A block then is a few *pieces*
(seed, start, length), and two blocks are equal exactly when their pieces are: a piece breaks only where the seed
changes or j does not go on counting, and as every segment counts from 0, neighbouring segments never join into one
piece.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from servetwin.workload.table import RequestTable, Segment

FIRST_OWN_SEED = 1 << 40


def own_seed(request: int) -> int:
    """Seed of prompt tokens that only `request` has (above all seeds of shared segments)."""
    return FIRST_OWN_SEED + request


def _folded(seed: int) -> int:
    """Seeds onto whole numbers from 0, because Python's hashes of -1 and -2 are the same."""
    return 2 * seed if seed >= 0 else -2 * seed - 1


class BlockKeys:
    """Keys of the KV blocks of one request: `key(a) == key(b)` exactly when both blocks hold the same tokens.

    Block i holds the tokens i·block_size … (i+1)·block_size - 1 of the prompt followed by the generated output, of
    which there is no end. Keys are comparable between requests of one table; they name the tokens of the block alone,
    not what stands before them.
    """

    __slots__ = ("_ids", "_seeds", "_starts", "block_size")

    def __init__(
        self, prompt: Sequence[Segment], output_seed: int, block_size: int, ids: NDArray[np.int32] | None = None
    ) -> None:
        """The prompt is the literal `ids` followed by the segments of `prompt` (in a table: one or the other)."""
        self.block_size = block_size
        self._ids = ids
        at = 0 if ids is None else len(ids)
        self._starts: list[int] = []  # position of the first token of each segment; the output is the last segment
        self._seeds: list[int] = []
        for seed, length in prompt:
            if length:
                self._starts.append(at)
                self._seeds.append(_folded(seed))
                at += length
        self._starts.append(at)
        self._seeds.append(_folded(output_seed))

    @property
    def prompt_tokens(self) -> int:
        return self._starts[-1]

    def key(self, i: int) -> Hashable:
        """Key of block i >= 0: bytes of literal ids, a flat tuple (folded seed, start, length, …), or both."""
        begin = i * self.block_size
        end = begin + self.block_size
        starts = self._starts
        if begin >= starts[0]:
            at = bisect_right(starts, begin) - 1
            if at + 1 == len(starts) or end <= starts[at + 1]:
                return (self._seeds[at], begin - starts[at], self.block_size)
            return self._pieces(at, begin, end)
        assert self._ids is not None
        if end <= starts[0]:
            return self._ids[begin:end].tobytes()
        return (self._ids[begin:].tobytes(), *self._pieces(0, starts[0], end))

    def _pieces(self, at: int, begin: int, end: int) -> tuple[int, ...]:
        """The tokens begin … end-1, of which the first lies in segment `at`."""
        starts = self._starts
        pieces: list[int] = []
        while begin < end:
            stop = min(end, starts[at + 1]) if at + 1 < len(starts) else end
            pieces += (self._seeds[at], begin - starts[at], stop - begin)
            begin, at = stop, at + 1
        return tuple(pieces)


def keys_of(table: RequestTable, request: int, block_size: int) -> BlockKeys:
    """The block keys of one request of `table`. Raises ValueError when its prompt does not add up to `input_tokens`."""
    output_seed = table.output_seed(request)
    tokens = int(table.input_tokens[request])
    if table.token_ids is not None:
        keys = BlockKeys((), output_seed, block_size, np.asarray(table.token_ids[request], np.int32))
    elif table.segments is not None:
        keys = BlockKeys(table.segments[request], output_seed, block_size)
    else:
        keys = BlockKeys(((own_seed(request), tokens),), output_seed, block_size)
    if keys.prompt_tokens != tokens:
        raise ValueError(
            f"request {request} has {keys.prompt_tokens} tokens in its prompt, but input_tokens says {tokens}"
        )
    return keys
