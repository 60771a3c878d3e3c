"""The operators that layers are made of: matrix products, dense MLPs, and small kernels that only move bytes."""

from __future__ import annotations

from collections.abc import Iterator

from servetwin.model.dtypes import Dtypes
from servetwin.model.kernels import Gemm, Kind, Operator
from servetwin.model.weights import Weight


def dense(prefix: str, dtypes: Dtypes, held: dict[str, Weight]) -> Iterator[Operator]:
    """A dense MLP, of the weights whose names begin with `prefix`."""
    a = dtypes.activation
    up = held.get(f"{prefix}gate_up_proj") or held[f"{prefix}up_proj"]
    down = held[f"{prefix}down_proj"]
    yield from product(up, dtypes)
    yield move(f"{prefix}activation", "elementwise", a.bytes(up.n), a.bytes(down.k))
    yield from product(down, dtypes)


def product(weight: Weight, dtypes: Dtypes) -> Iterator[Operator]:
    """The product, and before it the quantisation of its input where it runs in fewer bits than the activations."""
    small = dtypes.of(weight.part)
    if small.compute in ("fp8", "int8", "nvfp4"):
        a = dtypes.activation
        bits = small.bits if small.compute == "nvfp4" else 8
        yield move(f"{weight.name}_quantise", "elementwise", a.bytes(weight.k), -int(-weight.k * bits // 8))
    yield Gemm(name=weight.name, n=weight.n, k=weight.k, dtype=small, activation=dtypes.activation)


def move(name: str, kind: Kind, read: int, written: int) -> Operator:
    """A kernel that reads and writes so many bytes a row."""
    return Operator(name=name, kind=kind, read_a_row=read, written_a_row=written)
