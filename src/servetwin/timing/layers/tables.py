"""The Parquet tables of a profile of kind `layers`: columns, order, reading and writing (docs/profiles.md)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from servetwin.catalog.profiles import Profile
from servetwin.errors import InputError

_SHOT = ("t_mean_ns", "t_max_ns", "t_skew_ns")
COLUMNS: dict[str, tuple[str, ...]] = {
    "dense": ("tensor", "layer", "tokens", "time_ns"),
    "per_sequence": ("tensor", "layer", "sequences", "time_ns"),
    "attention": ("tensor", "chunk", "decodes", "history", "context", "time_ns"),
    "moe": ("tensor", "activated", "tokens", "time_ns"),
    "skew": ("tensor", "chunk", "history", "decodes", "longest", "mean", "shortest", *_SHOT),
}
"""Columns of each table; the rows are sorted by all of them, from left to right."""


def write_table(path: Path, name: str, rows: Sequence[tuple[int | str, ...]]) -> dict[str, str]:
    """Write `rows` sorted; returns the entry for the header: file name and sha256."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = zip(*sorted(rows), strict=True)
    kinds = [pa.string() if column == "layer" else pa.int64() for column in COLUMNS[name]]
    arrays = [pa.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
    pq.write_table(pa.table(arrays, names=list(COLUMNS[name])), path, compression="zstd", write_statistics=False)
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def read_table(profile: Profile, name: str, tensor: int) -> Mapping[str, list[Any]]:
    """The columns of a table (without `tensor`) for one tensor-parallel degree, as Python lists.

    Raises InputError when the profile has no such table, it was changed, or lacks a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if name not in profile.tables:
        raise InputError("the profile has no such table", where=str(profile.folder), field="tables", found=name)
    path = profile.table(name)
    try:
        table = pq.ParquetFile(path).read()
        degrees = table.column("tensor").to_numpy()
        start, stop = (int(degrees.searchsorted(tensor, side)) for side in ("left", "right"))
        part = table.slice(start, stop - start)
        columns: dict[str, list[Any]] = {}
        for column in COLUMNS[name][1:]:
            values = part.column(column)
            columns[column] = values.to_pylist() if column == "layer" else values.to_numpy().tolist()
        return columns
    except (KeyError, pa.ArrowException) as error:
        raise InputError(f"not a table of columns {', '.join(COLUMNS[name])}: {error}", where=str(path)) from None
