"""The tables of a result folder as Arrow and Parquet: the types of their columns, and how they are written and read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from servetwin.errors import InputError
from servetwin.results.run import TEXT_COLUMNS, Columns, Ints

if TYPE_CHECKING:
    import pyarrow as pa

ROW_GROUP = 1 << 18
"""Rows of a row group, whatever the table; its last one has what is left. A bounded part of a table can be read."""


def arrow_table(columns: Columns, names: Sequence[str], token_ns: Sequence[Ints] | None = None) -> pa.Table:
    """The columns `names`, and behind them a column `token_ns` of lists where it is given."""
    import pyarrow as pa

    made = {name: pa.array(_plain(columns[name], name), type=_type(name)) for name in names}
    if token_ns is not None:
        ends = np.cumsum([0, *(len(tokens) for tokens in token_ns)])
        flat = np.concatenate([np.empty(0, dtype=np.int64), *token_ns])
        made["token_ns"] = pa.LargeListArray.from_arrays(pa.array(ends), pa.array(flat))
    return pa.table(made)


def _type(name: str) -> Any:
    import pyarrow as pa

    return pa.string() if name in TEXT_COLUMNS else pa.float64() if name == "utilization" else pa.int64()


def _plain(column: Any, name: str) -> Any:
    """What Arrow takes: a list of text, or an array."""
    if name in TEXT_COLUMNS:
        return list(column)
    return np.asarray(column, dtype=np.float64 if name == "utilization" else np.int64)


def write_parquet(tables: Iterable[pa.Table], path: Path) -> None:
    """Write `tables` (at least one; all but the last of ROW_GROUP rows, or a single one of any length) as one file."""
    import pyarrow.parquet as pq

    writer = None
    try:
        for table in tables:
            if writer is None:
                writer = pq.ParquetWriter(path, table.schema, version="2.6", compression="zstd", compression_level=3)
            writer.write_table(table, row_group_size=ROW_GROUP)
    finally:
        if writer is not None:
            writer.close()


def read_parquet(path: Path, names: Sequence[str]) -> pa.Table:
    """A whole table. Raises InputError when it is damaged, or a column of `names` is missing or of another type."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise InputError("no such file; the folder is not a complete result folder", where=str(path))
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError("cannot be read as Parquet: truncated or damaged", where=str(path)) from error
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise InputError("a column is missing", where=str(path), field=missing[0], allowed=", ".join(names))
    for name in names:
        found = table.schema.field(name).type
        if found != _type(name):
            raise InputError(f"must be {_type(name)}", where=str(path), field=name, found=str(found))
        if table.column(name).null_count:
            raise InputError("has empty values", where=str(path), field=name)
    return table


def columns_of(table: pa.Table, names: Sequence[str]) -> dict[str, Any]:
    """Text as lists of str, everything else as arrays."""
    return {name: table[name].to_pylist() if name in TEXT_COLUMNS else table[name].to_numpy() for name in names}


class StoredColumns(Mapping[str, Any]):
    """The columns `names` of a Parquet file, each read when it is asked for, and not held: ask once, not in a loop."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path, self._names = path, names

    def __getitem__(self, name: str) -> Any:
        import pyarrow.parquet as pq

        if name not in self._names:
            raise KeyError(name)
        with pq.ParquetFile(self.path) as file:
            return columns_of(file.read(columns=[name], use_threads=False), [name])[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
