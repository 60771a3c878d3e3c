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
        """The prompt is the literal `ids` followed by the segments of `prompt` (in a table: one or the other).

        Of an output whose ids are known they stand in `ids` as well; `output_seed` is that of what comes after.
        """
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


def shares_prompts(table: RequestTable) -> bool:
    """Whether any two requests of `table` may have tokens in common."""
    return table.segments is not None or table.token_ids is not None or table.extends is not None


def prompt_of(table: RequestTable, request: int) -> list[Segment]:
    """The whole prompt of a request as segments, those of the turns that it extends included (not of `token_ids`).

    An output is quoted at its length in the workload. Where a run cuts it short, at the longest sequence that an engine
    takes, the quoted tokens beyond stand for nothing that was ever computed, so nothing of them is found in a cache.
    """
    pieces: list[Sequence[Segment]] = []
    extends = table.extends
    row = request
    while row >= 0:
        before = -1 if extends is None else int(extends[row])
        if table.segments is not None:
            pieces.append(table.segments[row])
        else:
            quoted = 0 if before < 0 else int(table.input_tokens[before] + table.output_tokens[before])
            pieces.append([(own_seed(row), int(table.input_tokens[row]) - quoted)])
        if before >= 0:
            pieces.append([(table.output_seed(before), int(table.output_tokens[before]))])
        row = before
    return [segment for piece in reversed(pieces) for segment in piece]


def keys_of(table: RequestTable, request: int, block_size: int) -> BlockKeys:
    """The block keys of one request of `table`. Raises ValueError when its prompt does not add up to `input_tokens`."""
    output_seed = table.output_seed(request)
    tokens = int(table.input_tokens[request])
    if table.token_ids is not None:
        ids = np.asarray(table.token_ids[request], np.int32)
        given = len(ids)
        if table.output_ids is not None:
            ids = np.concatenate((ids, np.asarray(table.output_ids[request], np.int32)))
        keys = BlockKeys((), output_seed, block_size, ids)
    else:
        keys = BlockKeys(prompt_of(table, request), output_seed, block_size)
        given = keys.prompt_tokens
    if given != tokens:
        raise ValueError(f"request {request} has {given} tokens in its prompt, but input_tokens says {tokens}")
    return keys
