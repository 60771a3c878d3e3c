"""A table that goes to disk while it grows: sorted parts, merged in bounded memory once it is whole (an external merge
sort: Knuth, The Art of Computer Programming 3, 5.4).

Each part is a Parquet file of its own, closed when written. Whatever ends the process, those in its folder can be read
(as one data set, with any reader of Parquet); lost is what was not yet part of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from servetwin.results.run import Ints

if TYPE_CHECKING:
    import pyarrow as pa

GROUP = 1 << 13
"""Rows of a row group of a part: of each part, merging reads only the groups that it needs."""


class Parts:
    """Parts of one table, each sorted by its first column (rows that agree in it stay in the order in which they came).

    Kept in memory: how often each value of the first column occurs in each part.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._schema: pa.Schema
        self._occurring: dict[int, tuple[Ints, Ints]] = {}
        """values of the first column and how often they occur, by part"""

    def put(self, number: int, table: pa.Table) -> None:
        """Write part `number`: the next one, or the last one once more when writing it was interrupted."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._folder.mkdir(parents=True, exist_ok=True)
        keys = table[0].to_numpy()
        ordered = _by_first_column(table)
        numbers = [field.name for field in table.schema if pa.types.is_integer(field.type)]
        pq.write_table(  # the quickest to write and read again: neighbours differ by little
            ordered,
            self._path(number),
            row_group_size=GROUP,
            compression="lz4",
            use_dictionary=False,
            column_encoding=dict.fromkeys(numbers, "DELTA_BINARY_PACKED"),
            write_statistics=False,
        )
        self._schema = table.schema
        self._occurring[number] = np.unique(keys, return_counts=True)

    def merged(self, rows: int) -> Iterator[pa.Table]:
        """The whole table, by the first column and then in the order in which rows came, `rows` at a time."""
        import pyarrow as pa

        numbers = sorted(self._occurring)
        values, counts = (np.concatenate([self._occurring[number][i] for number in numbers]) for i in (0, 1))
        part = np.repeat(np.arange(len(numbers)), [len(self._occurring[number][0]) for number in numbers])
        order = np.lexsort((part, values))
        counts, part = counts[order], part[order]
        ends = np.cumsum(counts)
        begins = ends - counts
        read = np.zeros(len(numbers), np.int64)
        lists = any(pa.types.is_nested(field.type) for field in self._schema)
        for first in range(0, int(ends[-1]), rows):
            # Rows first..last of the whole are, of each part, those behind the ones that were read.
            last = min(first + rows, int(ends[-1]))
            here = slice(np.searchsorted(ends, first, side="right"), np.searchsorted(begins, last))
            inside = np.minimum(ends[here], last) - np.maximum(begins[here], first)
            wanted = np.zeros(len(numbers), np.int64)
            np.add.at(wanted, part[here], inside)
            pieces = [self._read(numbers[i], int(read[i]), int(wanted[i])) for i in np.flatnonzero(wanted)]
            read += wanted
            together = pa.concat_tables(pieces).combine_chunks()
            ordered = _by_first_column(together)
            # Parquet has a name of its own for the items of a list.
            yield ordered.cast(self._schema) if lists else ordered

    def _read(self, number: int, first: int, rows: int) -> pa.Table:
        import pyarrow.parquet as pq

        groups = range(first // GROUP, (first + rows - 1) // GROUP + 1)
        with pq.ParquetFile(self._path(number)) as file:
            return file.read_row_groups(list(groups), use_threads=False).slice(first - groups[0] * GROUP, rows)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06}.parquet"


def _by_first_column(table: pa.Table) -> pa.Table:
    keys = table[0].to_numpy()
    if (keys[1:] >= keys[:-1]).all():  # as in a run with one engine
        return table
    return table.take(np.argsort(keys, kind="stable"))
