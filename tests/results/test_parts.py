"""A table in sorted parts, merged: what a stable sort of the whole would give."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from servetwin.results.parts import Parts

keys = st.lists(st.lists(st.integers(0, 5), max_size=30), min_size=1, max_size=6).filter(any)


def table_of(keys: list[int], first: int) -> pa.Table:
    numbers = np.arange(first, first + len(keys))
    lists = pa.LargeListArray.from_arrays(pa.array(np.arange(len(keys) + 1)), pa.array(numbers))
    columns = {"engine": pa.array(keys, pa.int64()), "number": pa.array(numbers)}
    return pa.table(columns | {"reason": pa.array([f"row {n}" for n in numbers], pa.string()), "token_ns": lists})


@settings(deadline=None, max_examples=60)
@given(keys, st.integers(1, 40))
def test_merging_is_a_stable_sort(parts: list[list[int]], rows: int) -> None:
    tables, first = [], 0
    for part in parts:
        tables.append(table_of(part, first))
        first += len(part)
    with TemporaryDirectory() as folder, patch("servetwin.results.parts.GROUP", 4):
        stored = Parts(Path(folder) / "steps")
        for number, table in enumerate(tables):
            stored.put(number, table)
        merged = list(stored.merged(rows))
    whole = pa.concat_tables(tables).combine_chunks()
    assert [len(table) for table in merged[:-1]] == [rows] * (len(merged) - 1)
    assert (
        pa.concat_tables(merged)
        .combine_chunks()
        .equals(whole.take(np.argsort(whole["engine"].to_numpy(), kind="stable")))
    )


def test_a_part_that_is_put_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    stored = Parts(tmp_path / "steps")
    stored.put(0, table_of([2, 1], 0))
    stored.put(1, table_of([1], 2))
    stored.put(1, table_of([1, 0], 2))
    (merged,) = stored.merged(100)
    assert merged["number"].to_pylist() == [3, 1, 2, 0]


def test_parts_are_one_data_set_at_any_time(tmp_path: Path) -> None:
    stored = Parts(tmp_path / "steps")
    stored.put(0, table_of([2, 1], 0))
    stored.put(1, table_of([1], 2))
    assert sorted(pq.read_table(tmp_path / "steps")["number"].to_pylist()) == [0, 1, 2]
