"""The segments of many prompts, in three arrays instead of a list of tuples a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from servetwin.workload.dependence import Ints
from servetwin.workload.table import Segment


class SegmentRows(Sequence[list[Segment]]):
    """Row r holds the segments `(seeds[i], lengths[i])` for i from `offsets[r]` to `offsets[r + 1]`.

    16 bytes a segment and 8 a row; as tuples they take ten times as much.
    """

    def __init__(self, offsets: Ints, seeds: Ints, lengths: Ints) -> None:
        self._offsets, self._seeds, self._lengths = offsets, seeds, lengths

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, row: int) -> list[Segment]: ...
    @overload
    def __getitem__(self, row: slice) -> list[list[Segment]]: ...
    def __getitem__(self, row: int | slice) -> list[Segment] | list[list[Segment]]:
        if isinstance(row, slice):
            return [self[at] for at in range(*row.indices(len(self)))]
        part = slice(self._offsets[row], self._offsets[row + 1])
        return list(zip(self._seeds[part].tolist(), self._lengths[part].tolist(), strict=True))
