"""Measured kernel times of one device: the look-ups that a step's price is made of."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from servetwin.catalog.profiles import by_id, read_profile
from servetwin.errors import InputError, nearest
from servetwin.timing.kernels.alltoall import AllToAllTable
from servetwin.timing.kernels.attention import (
    AttentionTable,
    ContextAttention,
    GenerationAttention,
    causal_pairs,
)
from servetwin.timing.kernels.curve import Curve, How
from servetwin.timing.kernels.gemm import GemmTable, device_time, roofline_ns
from servetwin.timing.kernels.keyed import KeyedTable
from servetwin.timing.kernels.latent import attention_part
from servetwin.timing.kernels.mla import MlaTable
from servetwin.timing.kernels.moe import SKEWS, WEIGHT_ONLY_4_BIT, Experts, MoeTable, joined
from servetwin.timing.kernels.profile import Columns, Device, KernelProfile

Time = tuple[float, How]
"""A time in ns, and how it is known."""

Table = TypeVar("Table")

CAST_BYTES = 3
"""moved by a cast of one element from bf16 to fp8: two read, one written"""
UNCACHED = 200_000_000
"""bytes that no cache of these devices holds (RTX PRO 6000 has the largest, 128 MB)"""


class KernelTables:
    """Look-ups over one kernel profile.

    A `*_curve` look-up, or one of attention, returns a prepared object for one kernel shape, to be kept and asked many
    times. Every look-up returns None when the device has no such table. Number formats are `bf16`, `fp8`,
    `fp8_static` (products only), `fp8_block` (128-wide scales), `nvfp4`, `int4_wo`, `w4a16_mxfp4` and
    `w4a8_mxfp4_mxfp8` (experts only); KV formats `bf16`, `fp8`.
    Sizes are counts and bytes, times nanoseconds, of one device and one layer.
    """

    def __init__(self, profile: KernelProfile) -> None:
        self.profile = profile
        self._tables: dict[str, Any] = {}

    @classmethod
    def load(cls, folder: Path | str) -> KernelTables:
        """Tables of a profile folder. Only the header is read now. Raises `InputError` when it is not one."""
        return cls(KernelProfile(read_profile(Path(folder))))

    @classmethod
    def for_device(cls, device: str) -> KernelTables:
        """Tables of a device: the user's, else those of the package. `InputError` names the profiles there are."""
        return cls(KernelProfile(by_id(f"kernels/{device}")))

    @property
    def device(self) -> Device:
        """Peak rates against which shapes are scaled."""
        return self.profile.device

    def errors(self, table: str) -> dict[str, tuple[float, float]] | None:
        """Median and 90th percentile of the relative error of leaving one point out, by axis, of a table.

        Leaving a point out doubles the distance to its neighbours, so these bound the error between points.
        """
        entry = self.profile.tables.get(table)
        return None if entry is None else {axis: (e["median"], e["p90"]) for axis, e in entry["error"].items()}

    def gemm_curve(self, dtype: str, n: int, k: int) -> Curve | None:
        """Time over m of an (m x k)(k x n) product, as the engine's linear layer runs it.

        Activations come in as bf16: the cast is part of the time, as AIConfigurator's own estimator takes these tables.
        `fp8_static` is `fp8` less the search for a scale, for checkpoints that bring activation scales. Tables that
        timed the host's launches (`fp8_block`) are corrected, see docs/silicon.md.
        """
        if dtype == "fp8_static":
            return self._static_scale_curve(n, k)
        if "stand_in" in self.profile.tables.get(f"gemm_{dtype}", {}).get("host", {}):
            return self._device_curve(dtype, n, k)
        return self._gemm(dtype, n, k)

    def _gemm(self, dtype: str, n: int, k: int) -> Curve | None:
        table = self._table(f"gemm_{dtype}", lambda columns: GemmTable(columns, self.device, dtype))
        return None if table is None else table.curve(n, k)

    def gemm(self, dtype: str, m: int, n: int, k: int) -> Time | None:
        """Time of one product."""
        return _at(self.gemm_curve(dtype, n, k), m)

    def context_attention(
        self, heads: int, kv_heads: int, head_dim: int, window: int = 0, kv_dtype: str = "bf16"
    ) -> ContextAttention | None:
        """Prefill attention for the heads on one rank; `window` 0 is full attention."""
        table = self._table(f"context_attention_{kv_dtype}", lambda columns: AttentionTable(columns, causal_pairs))
        if table is None:
            return None
        surface, measured = table.find(heads, kv_heads, head_dim, window)
        return ContextAttention(surface, window, measured)

    def generation_attention(
        self, heads: int, kv_heads: int, head_dim: int, window: int = 0, kv_dtype: str = "bf16"
    ) -> GenerationAttention | None:
        """Decode attention for the heads on one rank; `window` 0 is full attention."""
        table = self._table(
            f"generation_attention_{kv_dtype}", lambda columns: AttentionTable(columns, lambda length, _: length)
        )
        if table is None:
            return None
        surface, measured = table.find(heads, kv_heads, head_dim, window)
        return GenerationAttention(surface, window, measured)

    def moe_curve(
        self,
        dtype: str,
        hidden: int,
        inter: int,
        topk: int,
        experts: int,
        moe_tp: int = 1,
        moe_ep: int = 1,
        distribution: str = "power_law_1.2",
        backend: str | None = None,
    ) -> Curve | None:
        """Time of one rank's expert products over the tokens of the whole expert-parallel group.

        `inter` is the width of one expert before it is cut in `moe_tp`. Routing, dispatch and combine are not part.
        `backend` names the kernel as vLLM does (`marlin`, `triton`, `flashinfer_trtllm`, `flashinfer_cutlass`); None
        is what vLLM chose for the measured layer. A layer that was not measured stands on the nearest one of the
        format, with the Marlin backend also on one of the other 4-bit weight format.
        `InputError` for an unknown distribution of tokens over the experts.
        """
        if distribution not in SKEWS:
            hint = nearest(distribution, SKEWS)
            raise InputError(
                "no such load", field="distribution", found=distribution, allowed=", ".join(SKEWS), hint=hint
            )
        shape = Experts(hidden, inter, topk, experts, moe_tp, moe_ep, SKEWS[distribution])
        own = self._moe(dtype, backend)
        if own is not None and shape in own.shapes:
            return own.curve(shape)
        found = [own] if own is not None else []
        if backend == "marlin" and dtype in WEIGHT_ONLY_4_BIT:
            others = [self._moe(other, backend) for other in WEIGHT_ONLY_4_BIT if other != dtype]
            found += [table for table in others if table is not None]
        if not found:
            return None
        nearest_curve = min(found, key=lambda table: float(table.distance(shape).min())).curve(shape, dtype)
        other = self._moe(dtype, None)
        if other is not None and shape in other.shapes:
            return _anchored(nearest_curve, other.curve(shape))
        return nearest_curve

    def moe(
        self,
        dtype: str,
        tokens: int,
        hidden: int,
        inter: int,
        topk: int,
        experts: int,
        moe_tp: int = 1,
        moe_ep: int = 1,
        distribution: str = "power_law_1.2",
        backend: str | None = None,
    ) -> Time | None:
        """Time of one expert layer; arguments as in `moe_curve`."""
        return _at(self.moe_curve(dtype, hidden, inter, topk, experts, moe_tp, moe_ep, distribution, backend), tokens)

    def _moe(self, dtype: str, backend: str | None) -> MoeTable | None:
        """The layers of a format timed with a backend; with None those of all, of which no size was timed with two."""
        key = f"moe {dtype} {backend}"
        if key not in self._tables:
            entries = self.profile.tables.items()
            names = [
                name
                for name, entry in entries
                if entry.get("dtype") == dtype and entry["kind"] == "moe" and backend in (None, entry["backend"])
            ]
            parts = [columns for name in names if (columns := self.profile.columns(name)) is not None]
            self._tables[key] = MoeTable(joined(parts), self.device, dtype) if parts else None
        table: MoeTable | None = self._tables[key]
        return table

    def mla_context(self, heads: int, dtype: str = "bf16", kv_dtype: str = "bf16") -> ContextAttention | None:
        """Prefill of a DeepSeek-V3 latent-attention module with `heads` heads on this rank, projections in `dtype`."""
        table = self._table(f"mla_context_{dtype}_{kv_dtype}", MlaTable)
        return None if table is None else ContextAttention(table.surface(heads), 0, 0)

    def mla_generation(self, heads: int, dtype: str = "bf16", kv_dtype: str = "bf16") -> GenerationAttention | None:
        """Decode of the same module."""
        table = self._table(f"mla_generation_{dtype}_{kv_dtype}", MlaTable)
        return None if table is None else GenerationAttention(table.surface(heads), 0, 0)

    def latent_context(self, heads: int, kv_dtype: str = "bf16") -> ContextAttention | None:
        """The attention alone of prefills of that module, without its projections and small kernels."""
        surface = attention_part(self, "context", heads, kv_dtype)
        return None if surface is None else ContextAttention(surface, 0, 0)

    def latent_generation(self, heads: int, kv_dtype: str = "bf16") -> GenerationAttention | None:
        """The same of decodes."""
        surface = attention_part(self, "generation", heads, kv_dtype)
        return None if surface is None else GenerationAttention(surface, 0, 0)

    def mla_bmm_curve(self, heads: int, post: bool = False) -> Curve | None:
        """Time over tokens of the batched product before or after absorbed latent attention (part of the modules)."""
        return self._keyed("mla_bmm_post" if post else "mla_bmm_pre", "heads", "tokens", heads)

    def allreduce_curve(self, gpus: int, graph: bool = True) -> Curve | None:
        """Time over bytes of vLLM's all-reduce inside a node, replayed from a CUDA graph or launched one by one."""
        return self._collective("allreduce_graph" if graph else "allreduce_eager", gpus)

    def allreduce(self, gpus: int, size: int, graph: bool = True) -> Time | None:
        """Time to all-reduce `size` bytes over `gpus` devices of one node; 0 for one device."""
        return (0.0, "measured") if gpus == 1 else _at(self.allreduce_curve(gpus, graph), size)

    def nccl_curve(self, op: str, gpus: int) -> Curve | None:
        """Time over bytes of `all_reduce`, `all_gather`, `reduce_scatter` or `alltoall` inside a node.

        Bytes are those of the whole vector: the gathered output, or the input to be scattered.
        """
        return self._collective(f"nccl_{op}", gpus)

    def nccl(self, op: str, gpus: int, size: int) -> Time | None:
        """Time of one collective of `size` bytes; 0 for one device."""
        return (0.0, "measured") if gpus == 1 else _at(self.nccl_curve(op, gpus), size)

    def alltoall_curve(
        self, phase: str, ep: int, hidden: int, topk: int, experts: int, backend: str = "deepep_ll"
    ) -> Curve | None:
        """Time over a rank's tokens of `dispatch` or `combine` in an expert-parallel group of one node.

        Backends: `deepep_ll` (low latency, decode), `deepep_ht` (high throughput, prefill), on h100_sxm also
        `deepep_v2_generation` and `deepep_v2_context`. Other sizes stand on the nearest measured one, scaled by
        the bytes sent (hidden x topk). None for a group size that was not measured.
        """
        table = self._table(f"alltoall_{backend}_{phase}", AllToAllTable)
        return None if table is None else table.curve(ep, hidden, topk, experts)

    def quantize_curve(self, k: int, dynamic: bool = False) -> Curve | None:
        """Time over rows m of casting an (m, k) bf16 matrix to fp8 with a given scale.

        With `dynamic` a scale is found for each row first.
        """
        return self._keyed("quantize_dynamic" if dynamic else "quantize_static", "k", "m", k)

    def quantize(self, m: int, k: int, dynamic: bool = False) -> Time | None:
        """Time of one cast to fp8."""
        return _at(self.quantize_curve(k, dynamic), m)

    def elementwise_ns(self, size: float) -> float:
        """Analytic time of a small kernel (norm, rotary, KV write, activation, sampling) that moves `size` bytes.

        One of them was timed, the cast to fp8: a launch, its least time (1.4 to 2.1 us), plus bytes over the bandwidth
        that it reaches beyond its launch where it moves more than caches hold (`UNCACHED`; the median). On a device
        without it AIConfigurator's rule for memory-bound operations: 3 us and 0.8 of the bandwidth, 0.5 on Arc Pro B60
        (`mem_empirical_constant_latency`, `mem_bw_empirical_scaling_factor` of its system files).
        """
        return size * self._ns_a_byte + self._launch_ns

    @cached_property
    def _ns_a_byte(self) -> float:
        cast = self.profile.columns("quantize_static")
        if cast is None:
            return 1e9 / (self.device.memory_efficiency * self.device.memory_bandwidth)
        moved = CAST_BYTES * cast["k"] * cast["m"]
        rates = (cast["ns"] - self._launch_ns) / moved
        return float(np.median(rates[moved >= UNCACHED]))

    @cached_property
    def _launch_ns(self) -> float:
        cast = self.profile.columns("quantize_static")
        return self.device.launch_ns if cast is None else float(cast["ns"].min())

    def streaming_curve(self) -> Curve | None:
        """Time over bytes moved of the one element-wise kernel that was timed: (m, 8192) of bf16 cast to fp8.

        A stand-in, hence extrapolated, for other kernels that stream once through their operands.
        """
        cast = self.quantize_curve(8192)
        return None if cast is None else Curve([CAST_BYTES * 8192 * m for m in cast.xs], cast.ys, "extrapolated")

    def _table(self, name: str, build: Callable[[Columns], Table]) -> Table | None:
        if name not in self._tables:
            columns = self.profile.columns(name)
            self._tables[name] = None if columns is None else build(columns)
        table: Table | None = self._tables[name]
        return table

    def _device_curve(self, dtype: str, n: int, k: int) -> Curve | None:
        entry = self.profile.tables[f"gemm_{dtype}"]
        host, sparse = entry["host"], "sparse" in entry["quality"]["flags"]
        own = None if sparse else self._gemm(dtype, n, k)
        other = self._gemm(host["stand_in"].removeprefix("gemm_"), n, k)
        return own if other is None else device_time(own, other, host["host_ns"], host["ratio"])

    def _static_scale_curve(self, n: int, k: int) -> Curve | None:
        whole, found, given = self.gemm_curve("fp8", n, k), self.quantize_curve(k, True), self.quantize_curve(k)
        if whole is None or found is None or given is None:
            return None
        least = roofline_ns(self.device, "fp8", np.array(whole.xs), n, k)
        return Curve(
            whole.xs, np.maximum(whole.ys - found.many(whole.xs) + given.many(whole.xs), least), whole.shape_how
        )

    def _collective(self, name: str, gpus: int) -> Curve | None:
        """None also beyond the devices of one node, where nothing was measured."""
        table = self._table(name, lambda columns: KeyedTable(columns, "gpus", "bytes"))
        return None if table is None or gpus > table.values[-1] else table.curve(gpus)

    def _keyed(self, name: str, key: str, axis: str, wanted: int) -> Curve | None:
        table = self._table(name, lambda columns: KeyedTable(columns, key, axis))
        return None if table is None else table.curve(wanted)


def _anchored(stand_in: Curve, measured: Curve) -> Curve:
    """The time of a layer with one kernel, from another layer with that kernel and this layer with another kernel.

    With a single token both kernels do little but read the same weights of this layer, so there the measured time
    holds. From there on the stand-in tells how much faster its kernel's time grows.
    """
    sizes = sorted({*stand_in.xs, *measured.xs})
    start = stand_in.ns(sizes[0]) / measured.ns(sizes[0])
    times = [measured.ns(x) * max(1.0, stand_in.ns(x) / measured.ns(x) / start) for x in sizes]
    return Curve(sizes, times, "extrapolated", limit=min(stand_in.limit, measured.limit))


def _at(curve: Curve | None, size: float) -> Time | None:
    return None if curve is None else (curve.ns(size), curve.how(size))
