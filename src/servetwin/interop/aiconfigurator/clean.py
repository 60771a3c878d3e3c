"""Checks and repairs of a table: units, duplicates, holes, and times that fall as the work grows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from servetwin.errors import InputError
from servetwin.timing.kernels.profile import LAYOUTS

Ints = NDArray[np.int64]
Columns = dict[str, Ints]

WIGGLE = 1.5
"""A point is out of line when some larger size of the same kernel takes less than 1/1.5 of its time."""
FAILED_SHARE = 0.5
"""A matrix-product table fails when this share of its large shapes has a point out of line at m <= 64."""
LARGE_SHAPE = 2e7
"""Shapes n*k above this count for the check: below it the launch hides the rest."""
PLAUSIBLE_NS = (100, 2**31)
"""Kernel times outside of this (0.1 us to 2 s) are in the wrong unit."""


def to_nanoseconds(name: str, kind: str, columns: dict[str, NDArray[Any]]) -> tuple[Columns, int]:
    """Columns in file order, sorted by key and axes, with whole `ns`; times of a size measured twice are their median.

    The tables give milliseconds. Returns the columns and the number of rows merged away; `InputError` when times
    are not positive or cannot be milliseconds.
    """
    layout = LAYOUTS[kind]
    names = (*layout.keys, *layout.axes)
    keys = np.stack([columns[column] for column in names], axis=1)
    times = columns["ms"] * 1e6
    if not np.isfinite(times).all() or (times < PLAUSIBLE_NS[0]).any() or (times > PLAUSIBLE_NS[1]).any():
        found = f"{times.min():g} to {times.max():g} ns"
        raise InputError("times that cannot be milliseconds of one kernel", where=name, field="latency", found=found)
    order = np.lexsort((times, *keys.T[::-1]))
    keys, times = keys[order], times[order]
    starts = np.flatnonzero(np.r_[True, (np.diff(keys, axis=0) != 0).any(axis=1)])
    ends = np.r_[starts[1:], len(keys)]
    middle = (times[(starts + ends - 1) // 2] + times[(starts + ends) // 2]) / 2
    result = {column: keys[starts, i] for i, column in enumerate(names)}
    result["ns"] = np.rint(middle).astype(np.int64)
    return result, len(keys) - len(starts)


def curves(kind: str, columns: Columns) -> list[tuple[int, int]]:
    """Row ranges of one kernel shape over its last axis."""
    layout = LAYOUTS[kind]
    fixed = np.stack([columns[name] for name in (*layout.keys, *layout.axes[:-1])], axis=1)
    starts = np.flatnonzero(np.r_[True, (np.diff(fixed, axis=0) != 0).any(axis=1)]).tolist()
    return list(zip(starts, [*starts[1:], len(fixed)], strict=True))


def holes(kind: str, columns: Columns) -> int:
    """Sizes missing from the grid that a kernel's axes span, over all shapes measured."""
    layout = LAYOUTS[kind]
    shapes = len(np.unique(np.stack([columns[name] for name in layout.keys], axis=1), axis=0))
    grid = int(np.prod([len(np.unique(columns[name])) for name in layout.axes]))
    return shapes * grid - len(columns["ns"])


def floor_of_larger(times: Ints) -> Ints:
    """For each point the least time of it and all larger sizes: what it would cost padded to the best of them."""
    least: Ints = np.minimum.accumulate(times[::-1])[::-1]
    return least


def wiggle(kind: str, columns: Columns) -> float:
    """Share of kernel shapes with a point out of line (see `WIGGLE`) along the last axis.

    Matrix products: at m <= 64 of shapes above `LARGE_SHAPE`, all when there are none.
    """
    ranges = curves(kind, columns)
    last = LAYOUTS[kind].axes[-1]
    if kind == "gemm":
        large = [(a, b) for a, b in ranges if columns["n"][a] * columns["k"][a] > LARGE_SHAPE]
        small = [(a, a + int(np.searchsorted(columns[last][a:b], 64, side="right"))) for a, b in large or ranges]
        ranges = [(a, b) for a, b in small if b > a]
    out = [bool((columns["ns"][a:b] > WIGGLE * floor_of_larger(columns["ns"][a:b])).any()) for a, b in ranges]
    return float(np.mean(out))


def monotone(kind: str, columns: Columns) -> Columns:
    """The table with every time lowered to that of its cheapest larger size."""
    times = columns["ns"].copy()
    for a, b in curves(kind, columns):
        times[a:b] = floor_of_larger(times[a:b])
    return {**columns, "ns": times}


def must_clean(kind: str, share: float) -> bool:
    """Only matrix products are repaired: for these, serving measurements side with the repaired table."""
    return kind == "gemm" and share > FAILED_SHARE
