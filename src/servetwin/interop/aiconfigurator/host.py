"""Matrix-product tables that timed the host: what launching the kernels took, not what the device took to run them.

A product of tiny matrices takes a device a few microseconds. In some tables it takes 60 to 400, for every shape until
the device's own time passes that: the kernels were launched one by one, and the host was the slower. A serving engine
replays them from a CUDA graph, where this time does not arise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from servetwin.interop.aiconfigurator.clean import Columns

TINY_SHAPE = 2**20
"""n*k of a tiny product: 1 MB of fp8 weights, read in under a microsecond by most devices"""
TINY_ROWS = 64
DEVICE_NS = 15_000
"""Longer than any device here takes for a tiny product in the tables that were replayed from graphs (11 us at most)."""
STAND_INS = {"gemm_fp8_block": "gemm_fp8"}
"""A table of products whose device times are alike: same operands, other scales."""


def host_bound(columns: Columns) -> int | None:
    """The time (ns) that the host takes at most (95th percentile over tiny products); None when the device is timed."""
    tiny = columns["ns"][(columns["n"] * columns["k"] <= TINY_SHAPE) & (columns["m"] <= TINY_ROWS)]
    if len(tiny) == 0 or np.median(tiny) <= DEVICE_NS:
        return None
    return round(float(np.quantile(tiny, 0.95)))


def host_entry(name: str, columns: Columns, tables: dict[str, Columns]) -> dict[str, Any] | None:
    """What the look-up needs to do better: the host's time, the table to stand in, and the ratio of the two where
    both time the device (median over sizes at over twice the host's time; 1 when there are none)."""
    host = host_bound(columns)
    if host is None:
        return None
    entry: dict[str, Any] = {"host_ns": host}
    other = tables.get(STAND_INS.get(name, ""))
    if other is not None:
        ours, theirs = _matched(columns, other)
        device = ours > 2 * host
        ratio = float(np.median(ours[device] / theirs[device])) if device.any() else 1.0
        entry |= {"stand_in": STAND_INS[name], "ratio": round(ratio, 4)}
    return entry


def _matched(a: Columns, b: Columns) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Times of the sizes that both tables hold, in the same order."""
    codes_a, codes_b = (t["n"] << 40 | t["k"] << 20 | t["m"] for t in (a, b))
    _, at_a, at_b = np.intersect1d(codes_a, codes_b, return_indices=True)
    return a["ns"][at_a].astype(np.float64), b["ns"][at_b].astype(np.float64)
