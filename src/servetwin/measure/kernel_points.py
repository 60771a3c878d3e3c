"""The measured kernels of a device as points for fitting: what was computed, and how long it took."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from servetwin import catalog
from servetwin.catalog import Device
from servetwin.model.dtypes import BF16, DTYPES, Dtype
from servetwin.model.kernels import AttentionKernel, Experts, Gemm, Operator
from servetwin.timing.efficiency import Work, units_of, work
from servetwin.timing.kernels.profile import Columns
from servetwin.timing.kernels.tables import KernelTables
from servetwin.timing.roofline import peak_of
from servetwin.timing.shape import StepShape

Floats = NDArray[np.float64]

TABLES: dict[str, dict[str, Dtype]] = {
    "small": {"quantize_static": DTYPES["fp8"]},
    "cast": {"quantize_dynamic": DTYPES["fp8"]},
    "gemm_16bit": {"gemm_bf16": BF16},
    "gemm_8bit": {"gemm_fp8": DTYPES["fp8"]},
    "gemm_4bit": {"gemm_nvfp4": DTYPES["nvfp4"]},
    "experts_16bit": {"moe_bf16": BF16},
    "experts_8bit": {"moe_fp8_block": DTYPES["fp8_block"]},
    "experts_4bit": {"moe_nvfp4": DTYPES["nvfp4"]},
    "experts_weight_only": {"moe_int4_wo": DTYPES["int4"], "moe_w4a16_mxfp4": DTYPES["mxfp4"]},
    "context_attention_16bit": {"context_attention_bf16": BF16},
    "context_attention_8bit": {"context_attention_fp8": DTYPES["fp8"]},
    "generation_attention_16bit": {"generation_attention_bf16": BF16},
    "generation_attention_8bit": {"generation_attention_fp8": DTYPES["fp8"]},
}
"""The tables behind each law, and the format that they were timed in; experts have one for each engine kernel
(`moe_bf16_triton`). Not taken: block-scaled products, whose tables timed the host (docs/silicon.md), and experts with
one scale a tensor, whose kernel takes eight times the reading of their weights on Hopper."""
LEAST_PRODUCT = 2**16
"""n x k of the smallest products taken: smaller ones are no layer of a model, and tell of nothing but the launch."""
LEAST_LENGTH = 64
"""Shortest sequences of attention taken; those of a few tokens are no traffic, and half of the tables."""
WIDEST_HEAD = 256
"""Head dimensions of 512 were timed too, on kernels that take twice the usual time."""
LEAST_WIDTH = 128
"""Narrowest share of an expert taken; 16 columns were timed too."""
SKEW = 120
"""Load of the experts: the power law of exponent 1.2 that tables are looked up with. Of expert-parallel groups the
tables hold a busy rank, with several times its even share; the laws are those of one rank with all experts."""
LIMITS = {"gemm": (256, 1024), "experts": (256, 1024), "context": (512, 4096), "generation": (2**14, 2**17)}
"""Up to which and from which size a point counts as small (decode-like) and large (prefill-like): rows, tokens of the
group, new tokens, keys of the batch."""


class Points(NamedTuple):
    """Measured calls of one kind of kernel on one device, shape (points,) each."""

    work: Work
    peak: float
    cast: Work | None
    """the cast that the measured time holds too"""
    size: Floats
    windowed: NDArray[np.bool_]
    """of attention over a sliding window: told of in the errors, not fitted on"""
    ns: Floats
    left_out: int
    """points faster than their bytes over the datasheet's bandwidth: their operands lay in a cache"""


def points_of(device: Device, tables: KernelTables, kind: str, most: int) -> Points | None:
    """At most about `most` evenly drawn points a table; None when the device has no table of that kind."""
    found = [
        part
        for name in tables_used(tables)
        if (dtype := TABLES[kind].get(_format(name))) is not None
        and (columns := tables.profile.columns(name)) is not None
        for part in _kernels(name, dtype, columns)
    ]
    if not found:
        return None
    units = units_of(device)
    loads = [work(operator, shape, units) for operator, shape, _, _ in found]
    lengths = [len(ns) for _, _, _, ns in found]
    joined = _join(loads, lengths)
    ns, size = (np.concatenate([part[i] for part in found]).astype(float) for i in (3, 2))
    cached = ns < joined.bytes / device.memory_bandwidth * 1e9
    kept = np.flatnonzero(~cached)
    kept = kept[:: max(1, len(kept) // most)]
    cast = None
    if kind in ("gemm_8bit", "gemm_4bit"):
        cast = pick(_join([work(_cast_of(op), shape, units) for op, shape, _, _ in found], lengths), kept)
    compute = next(iter(TABLES[kind].values()))
    peak = peak_of(device, None if "attention" in kind or kind in ("small", "cast") else compute)
    windowed = np.concatenate([np.full(len(part[3]), getattr(part[0], "window", None) is not None) for part in found])
    return Points(pick(joined, kept), peak, cast, size[kept], windowed[kept], ns[kept], int(cached.sum()))


def tables_used(tables: KernelTables) -> dict[str, str]:
    """The tables of a device that some law is fitted on, and their sha256."""
    known = [name for kind in TABLES.values() for name in kind]
    return {
        name: entry["sha256"]
        for name, entry in tables.profile.tables.items()
        if _format(name) in known and "host_bound" not in entry["quality"]["flags"]
    }


def fitted_devices() -> list[str]:
    """Devices with kernel tables of their own, but those whose tables timed the host throughout."""
    names = sorted(path.parent.name for path in (catalog.profiles.packaged_folder() / "kernels").glob("*/profile.yaml"))
    return [name for name in names if not _host_bound(KernelTables.for_device(name))]


def _host_bound(tables: KernelTables) -> bool:
    return "host_bound" in tables.profile.tables["gemm_bf16"]["quality"]["flags"]


Part = tuple[Operator, StepShape, NDArray[np.int64], NDArray[np.int64]]


def _format(table: str) -> str:
    """`moe_bf16` of `moe_bf16_triton`: the longest known name that it starts with."""
    known = [name for tables in TABLES.values() for name in tables if f"{table}_".startswith(f"{name}_")]
    return max(known, key=len, default="")


def _kernels(table: str, dtype: Dtype, columns: Columns) -> Iterator[Part]:
    """Every kernel of a table: operator, shapes of its calls (fields are arrays), sizes and times."""
    match table.split("_")[0]:
        case "quantize":
            for k, m, ns in _split(columns, ("k",), ("m", "ns")):
                yield _move(int(k[0]), dtype), _rows(m), m, ns
        case "gemm":
            for n, k, m, ns in _split(columns, ("n", "k"), ("m", "ns")):
                if n[0] * k[0] >= LEAST_PRODUCT:
                    yield Gemm(name=table, n=int(n[0]), k=int(k[0]), dtype=dtype), _rows(m), m, ns
        case "moe":
            keys = ("skew", "hidden", "inter", "topk", "experts", "tp", "ep")
            for skew, hidden, inter, topk, experts, tp, ep, tokens, ns in _split(columns, keys, ("tokens", "ns")):
                if skew[0] != SKEW or ep[0] > 1 or inter[0] < LEAST_WIDTH * tp[0] or inter[0] % tp[0]:
                    continue
                operator = Experts(
                    name=table,
                    experts=int(experts[0]),
                    local_experts=int(experts[0]),
                    top_k=int(topk[0]),
                    hidden=int(hidden[0]),
                    inter=int(inter[0] // tp[0]),
                    dtype=dtype,
                )
                yield operator, _rows(tokens), tokens, ns
        case "context" | "generation":
            layout = ("head_dim", "window", "kv_heads", "heads")
            long = columns["length"] >= LEAST_LENGTH
            columns = {name: column[long & (columns["head_dim"] <= WIDEST_HEAD)] for name, column in columns.items()}
            for dim, window, kv, heads, batch, length, ns in _split(columns, layout, ("batch", "length", "ns")):
                attention = AttentionKernel(
                    name=table,
                    kind="context_attention" if table.startswith("context") else "generation_attention",
                    heads=int(heads[0]),
                    kv_heads=int(kv[0]),
                    qk_dim=int(dim[0]),
                    v_dim=int(dim[0]),
                    kv_token_bytes=dtype.bytes(2 * int(kv[0]) * int(dim[0])),
                    window=int(window[0]) or None,
                    dtype=dtype,
                )
                none = np.zeros_like(batch)
                if attention.is_context:
                    pairs = batch * (length * (length + 1) // 2)
                    shape = StepShape(batch, batch * length, none, pairs, none, none, none, none, none)  # type: ignore[arg-type]
                else:
                    shape = StepShape(none, none, none, none, batch, batch, batch * (length - 1), none, none)  # type: ignore[arg-type]
                yield attention, shape, batch * length, ns


def _split(columns: Columns, keys: tuple[str, ...], rest: tuple[str, ...]) -> Iterator[tuple[NDArray[np.int64], ...]]:
    table = np.stack([columns[name] for name in (*keys, *rest)])
    order = np.lexsort(table[: len(keys)][::-1])
    table = table[:, order]
    new = (np.diff(table[: len(keys)], axis=1) != 0).any(axis=0)
    for part in np.split(table, np.flatnonzero(new) + 1, axis=1):
        yield tuple(part)


def _rows(rows: NDArray[np.int64]) -> StepShape:
    none = np.zeros_like(rows)
    return StepShape(none, none, none, none, rows, rows, none, none, none)  # type: ignore[arg-type]


def _move(k: int, dtype: Dtype) -> Operator:
    return Operator(name="cast", kind="elementwise", read_a_row=BF16.bytes(k), written_a_row=dtype.bytes(k))


def _cast_of(operator: Operator) -> Operator:
    assert isinstance(operator, Gemm)
    return _move(operator.k, operator.dtype)


def _join(loads: list[Work], lengths: list[int]) -> Work:
    def whole(parts: list[object]) -> Floats:
        pairs = zip(parts, lengths, strict=True)
        return np.concatenate([np.broadcast_to(np.asarray(part, dtype=float), (length,)) for part, length in pairs])

    terms = tuple(whole(list(term)) for term in zip(*(load.terms for load in loads), strict=True))
    flops, tile, moved = (whole([load[i] for load in loads]) for i in range(3))
    return Work(flops, tile, moved, terms)


def pick(load: Work, kept: NDArray[np.int64]) -> Work:
    return Work(load.flops[kept], load.tile[kept], load.bytes[kept], tuple(term[kept] for term in load.terms))
