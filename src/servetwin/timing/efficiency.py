"""How much of its datasheet a device reaches: one law for each kind of kernel, fitted on measured tables.

    time = launch + fixed + sum(term x size) + ((compute)^s + (memory)^s)^(1/s)
    compute = (FLOPs + waves x FLOPs of one tile on every unit) / (peak x share of the peak)
    memory  = bytes / (bandwidth x share of the bandwidth)

Peak, bandwidth, launch latency and compute units are the device's own, from its datasheet row; everything else is the
same for every device and comes from `catalog/efficiency.yaml`, with what it was fitted on; how far it is off on devices
left out of the fit is in `catalog/efficiency_errors.yaml` (docs/roofline.md). The s-norm is a maximum with a rounded
corner.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import servetwin.catalog
from servetwin.catalog import Device
from servetwin.catalog.fields import read_yaml
from servetwin.model.kernels import AttentionKernel, Experts, Gemm, Operator, Shape

FILE = Path(servetwin.catalog.__file__).parent / "efficiency.yaml"
ERRORS = FILE.with_name("efficiency_errors.yaml")
TILE = 128
"""Rows, and columns, of the tile of a product that one compute unit works on at a time."""
USUAL_UNITS = 140
"""Compute units of a device whose datasheet gives none, or whose units are not those of a GPU (two cores of a TPU do
the work of many): the geometric mean of the devices fitted on."""
TERMS = {
    "gemm": ("depth", "input", "output"),
    "experts": ("experts", "passes"),
    "context_attention": ("tiles",),
    "generation_attention": ("groups",),
    "cast": ("bytes",),
    "small": ("bytes",),
}
"""What a law's linear terms multiply, by family of kernels; see `work`."""
OPERATORS = {"moe": "experts", "norm": "small", "elementwise": "small", "embedding": "small"}
"""Families of the kinds of operators that have another name."""

Number = Any
"""`float`, or an array of them"""


@dataclass(frozen=True, slots=True)
class Law:
    """The fitted numbers of one kind of kernel."""

    fixed_ns: float
    """beyond the launch latency"""
    compute: float
    """share of the peak that large work reaches"""
    memory: float
    """share of the memory bandwidth that long reads reach"""
    sharpness: float
    """s; 1 adds compute and memory up, large s takes the larger"""
    waves: float
    terms: tuple[float, ...]
    """ns for one of each of `TERMS`"""


class Work(NamedTuple):
    """Sizes of one call of a kernel, as its law wants them."""

    flops: Number
    tile: Number
    """FLOPs of one tile on every compute unit (of 128 rows in every expert)"""
    bytes: Number
    terms: tuple[Number, ...]


def family(kind: str) -> str:
    """`gemm` of `gemm_16bit`."""
    return kind.rsplit("_", 1)[0] if kind.endswith("bit") else kind.removesuffix("_weight_only")


def units_of(device: Device) -> int:
    """Compute units, or the usual number where the device's are unknown or not comparable."""
    return device.compute_units or USUAL_UNITS if device.kind == "gpu" else USUAL_UNITS


def work(operator: Operator, shape: Shape, units: int) -> Work:
    """The sizes of `operator` at `shape`, whose fields may be arrays.

    Linear terms, each over the compute units that share it: the depth of a product counts as the square root of k
    (units split a long sum among themselves); elements of its input and output that pass through a unit; experts with
    a token, and elements that pass between an expert's two products; tiles of 128 queries and head of a prefill;
    sequences times KV heads of a decode; bytes that a small kernel moves.
    """
    flops, moved = operator.flops(shape), operator.bytes_read(shape) + operator.bytes_written(shape)
    match operator:
        case Gemm():
            rows, n, k = operator.count(shape), operator.n, operator.k
            tile = 2 * TILE * TILE * k * units
            return Work(flops, tile, moved, (k**0.5, rows * k / units, rows * n / units))
        case Experts():
            touched, pairs = operator.touched(shape), operator.pairs(shape)
            a_row = operator.flops(shape) / pairs
            passed = pairs * (operator.hidden + operator.inter) / units
            return Work(flops, a_row * TILE * touched, moved, (touched / units, passed))
        case AttentionKernel() if operator.is_context:
            tiles = operator.heads * (shape.prefill_tokens / TILE + shape.prefill_seqs) / units
            return Work(flops, 0, moved, (tiles,))
        case AttentionKernel():
            return Work(flops, 0, moved, (shape.decode_seqs * operator.kv_heads / units,))
        case _:
            return Work(0, 0, moved, (moved / units,))


def law_ns(law: Law, work: Work, peak: float, bandwidth: float, launch_ns: float) -> Number:
    """Time in ns; `peak` in operations/s, `bandwidth` in B/s."""
    compute = (work.flops + law.waves * work.tile) / (peak * law.compute) * 1e9
    memory = work.bytes / (bandwidth * law.memory) * 1e9
    linear = sum(ns * size for ns, size in zip(law.terms, work.terms, strict=True))
    s = law.sharpness
    return launch_ns + law.fixed_ns + linear + (compute**s + memory**s) ** (1 / s)


@cache
def laws() -> dict[str, Law]:
    """The shipped laws by kind. Raises InputError when the file is damaged."""
    return laws_of(read_yaml(FILE)["laws"])


def laws_of(data: Mapping[str, Any]) -> dict[str, Law]:
    """Laws as the data file writes them."""
    return {
        kind: Law(
            float(entry["fixed_ns"]),
            float(entry["compute"]),
            float(entry["memory"]),
            float(entry["sharpness"]),
            float(entry["waves"]),
            tuple(float(entry["terms"][name]) for name in TERMS[family(kind)]),
        )
        for kind, entry in data.items()
    }


def kinds() -> tuple[str, ...]:
    """Kinds of kernels that have a law."""
    return tuple(laws())


def roofline_error(kind: str) -> tuple[float, float]:
    """Median and 90th percentile of the relative error on devices whose whole chip was left out of the fit, every
    device with equal weight.

    `kind` is a law's (`gemm_8bit`), or an operator's (`gemm`): then it is the middle one of its laws, the worse of two.
    What nobody measured (latent and linear attention, indexer, sampler) is taken to be as far off as the worst law.
    """
    wanted = OPERATORS.get(kind, kind)
    found = sorted(
        (float(entry["chip_out"]["median"]), float(entry["chip_out"]["p90"]))
        for name, entry in errors().items()
        if wanted in (name, family(name))
    )
    if found:
        return found[len(found) // 2]
    return max((float(entry["chip_out"]["median"]), float(entry["chip_out"]["p90"])) for entry in errors().values())


@cache
def errors() -> dict[str, Any]:
    """Errors of each kind's law on what was left out of its fit, as docs/roofline.md has them: `device_out` or
    `chip_out`, with `median`, `p90`, `bias` and the same by device and size."""
    found: dict[str, Any] = read_yaml(ERRORS)["errors"]
    return found
