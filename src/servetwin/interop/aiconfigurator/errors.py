"""Leave-one-out error of the look-ups: predict each measured point from its neighbours, axis by axis."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from servetwin.timing.kernels.attention import causal_pairs
from servetwin.timing.kernels.gemm import roofline_ns
from servetwin.timing.kernels.moe import MoeTable
from servetwin.timing.kernels.profile import LAYOUTS, Columns, Device

Floats = NDArray[np.float64]
Errors = dict[str, Floats]


def leave_one_out(kind: str, dtype: str, columns: Columns, device: Device) -> dict[str, dict[str, float]]:
    """`{axis: {median, p90, points}}` of |predicted/measured - 1| by the law with which the look-up fills that axis."""
    laws: dict[str, Callable[[], Errors]] = {
        "gemm": lambda: _gemm(columns, device, dtype),
        "moe": lambda: _moe(columns, device, dtype),
        "context_attention": lambda: _attention(columns, prefill=True),
        "generation_attention": lambda: _attention(columns, prefill=False),
    }
    found = laws.get(kind, lambda: _plain(kind, columns))()
    return {axis: _summary(errors) for axis, errors in found.items() if len(errors)}


def _summary(errors: Floats) -> dict[str, float]:
    return {
        "median": round(float(np.median(errors)), 4),
        "p90": round(float(np.quantile(errors, 0.9)), 4),
        "points": len(errors),
    }


def _middle(times: Floats, sizes: Floats, axis: int) -> Floats:
    """Errors of every inner point along `axis` against the straight line between its two neighbours."""
    values = np.moveaxis(times, axis, 0)
    share = (sizes[1:-1] - sizes[:-2]) / (sizes[2:] - sizes[:-2])
    share = share.reshape(-1, *[1] * (values.ndim - 1))
    predicted = values[:-2] + share * (values[2:] - values[:-2])
    return _relative(predicted, values[1:-1])


def _relative(predicted: Floats, measured: Floats) -> Floats:
    errors: Floats = np.abs(predicted / measured - 1).ravel()
    return errors[np.isfinite(errors)]


def _grid(columns: Columns, names: tuple[str, ...]) -> tuple[Floats, list[Floats]]:
    """Times as an array over the named columns (NaN where not measured), and the values of each."""
    places = [np.unique(columns[name], return_inverse=True) for name in names]
    times = np.full([len(values) for values, _ in places], np.nan)
    times[tuple(index for _, index in places)] = columns["ns"]
    return times, [values.astype(np.float64) for values, _ in places]


def _gemm(columns: Columns, device: Device, dtype: str) -> Errors:
    times, (n, k, m) = _grid(columns, ("n", "k", "m"))
    ideal = np.array([[roofline_ns(device, dtype, m, a, b) for b in k] for a in n])
    ratio = np.log(times / ideal)
    shape = np.concatenate([_log_middle(ratio, n, 0), _log_middle(ratio, k, 1)])
    return {"m": _middle(times, m, 2), "shape": shape}


def _log_middle(logs: Floats, sizes: Floats, axis: int) -> Floats:
    """As `_middle`, of the logarithms of times (or ratios) over those of sizes."""
    values, at = np.moveaxis(logs, axis, 0), np.log(sizes)
    share = ((at[1:-1] - at[:-2]) / (at[2:] - at[:-2])).reshape(-1, 1, 1)
    errors: Floats = np.abs(np.expm1(values[:-2] + share * (values[2:] - values[:-2]) - values[1:-1])).ravel()
    return errors[np.isfinite(errors)]


def _attention(columns: Columns, prefill: bool) -> Errors:
    found: dict[str, list[Floats]] = {"batch": [], "length": [], "heads": []}
    lanes = np.unique(np.c_[columns["head_dim"], columns["window"], columns["kv_heads"]], axis=0)
    for dim, window, kv_heads in lanes.tolist():
        rows = (columns["head_dim"] == dim) & (columns["window"] == window) & (columns["kv_heads"] == kv_heads)
        part = {name: column[rows] for name, column in columns.items()}
        times, (heads, batches, lengths) = _grid(part, ("heads", "batch", "length"))
        found["heads"].append(_middle(times, heads, 0))
        found["batch"].append(_middle(times, batches, 1))
        if prefill:
            work = np.array([causal_pairs(length, window) for length in lengths])
            found["length"].append(_log_middle(np.log(times), work, 2))
        else:
            found["length"].append(_middle(times, lengths, 2))
    return {axis: np.concatenate(parts) for axis, parts in found.items()}


def _moe(columns: Columns, device: Device, dtype: str) -> Errors:
    """Over the tokens, and of standing in for a whole model by the nearest other one."""
    table = MoeTable(columns, device, dtype)
    models = np.array([shape[:4] for shape in table.shapes])
    tokens: list[Floats] = []
    stand_in: list[Floats] = []
    for shape in table.shapes:
        curve = table.curve(shape)
        sizes, times = np.array(curve.xs), np.array(curve.ys)
        tokens.append(_middle(times, sizes, 0))
        others = (models != np.array(shape[:4])).any(axis=1)
        if others.any():
            stand_in.append(_relative(table.stand_in(shape, others).many(sizes), times))
    found = {"tokens": np.concatenate(tokens)}
    return {**found, "stand_in": np.concatenate(stand_in)} if stand_in else found


def _plain(kind: str, columns: Columns) -> Errors:
    """Straight lines along every axis and over the key."""
    layout = LAYOUTS[kind]
    names = (*layout.keys, *layout.axes)
    times, sizes = _grid(columns, names)
    return {
        name: _middle(times, at, axis)
        for axis, (name, at) in enumerate(zip(names, sizes, strict=True))
        if len(at) > 2 and name != "gpus"
    }
