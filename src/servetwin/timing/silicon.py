"""Operators priced from measured kernel tables (`servetwin.timing.kernels`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from servetwin.model.expert_placement import straggler
from servetwin.model.kernels import AttentionKernel, Collective, ExpertExchange, Experts, Gemm, Operator
from servetwin.model.sharding import Sharding, split
from servetwin.timing.kernels.attention import ContextAttention, GenerationAttention
from servetwin.timing.kernels.curve import Curve
from servetwin.timing.kernels.latent import DEEPSEEK
from servetwin.timing.kernels.tables import KernelTables
from servetwin.timing.operators import Price, Pricer

GEMM_TABLES = {"fp16": "bf16", "int8_weight": "int8_wo", "int4": "int4_wo"}
"""Number formats whose tables have another name. 16-bit formats run at the same rate."""
EXPERT_TABLES = {
    "fp16": ("bf16",),
    "int4": ("int4_wo",),
    "mxfp4": ("w4a8_mxfp4_mxfp8", "w4a16_mxfp4"),
}
"""Tables for expert weights of a format, the one that a newer device would use first."""


class Silicon:
    """Prices kernels of one device from its tables: matrix products, attention, experts, collectives inside a node, and
    analytically the small kernels between them. What has no table is left to other sources."""

    name = "silicon"

    def __init__(self, tables: KernelTables, sharding: Sharding, moe_backend: str = "auto") -> None:
        """`moe_backend` names the kernel of the experts as in vLLM; `auto` is what vLLM chose when they were timed."""
        self.tables, self.sharding = tables, sharding
        self.moe_backend = None if moe_backend == "auto" else moe_backend

    def pricer(self, operator: Operator) -> Pricer | None:
        match operator:
            case Gemm():
                name = operator.dtype.name
                return _on_rows(self.tables.gemm_curve(GEMM_TABLES.get(name, name), operator.n, operator.k))
            case AttentionKernel(kind="mla_context" | "mla_generation"):
                return self._latent(operator)
            case AttentionKernel():
                return self._attention(operator)
            case Experts():
                return self._experts(operator)
            case ExpertExchange():
                return self._exchange(operator)
            case Collective():
                return self._collective(operator)
            case _ if operator.kind in ("norm", "elementwise", "embedding", "sampler"):
                return self._small(operator)
            case _:
                return None

    def _small(self, operator: Operator) -> Pricer:
        narrow = any(name.startswith(("gemm_fp8", "gemm_nvfp4")) for name in self.tables.profile.tables)
        if operator.name == "moe_sum" or (narrow and operator.name.endswith("_quantise")):
            # Part of the product's, or the experts', measured time.
            return lambda rows: (0.0, "measured")
        size, tables = operator.read_a_row + operator.written_a_row, self.tables
        fixed = tables.elementwise_ns(0)
        a_row = tables.elementwise_ns(size) - fixed
        return lambda rows: (fixed + a_row * rows, "analytic")

    def _attention(self, op: AttentionKernel) -> Pricer | None:
        layout = (op.heads, op.kv_heads, op.qk_dim, op.window or 0, _kv(op))
        if op.is_context:
            context = self.tables.context_attention(*layout)
            if context is None:
                return None
            return Prompts(context)
        generation = self.tables.generation_attention(*layout)
        if generation is None:
            return None
        return Decodes(generation)

    def _latent(self, op: AttentionKernel) -> Pricer | None:
        """The part of the timed modules that is neither a projection nor a small kernel, for which a step has operators
        of their own. None for other widths than the modules', and for sparse attention."""
        widths = DEEPSEEK.context_widths if op.is_context else DEEPSEEK.generation_widths
        if (op.qk_dim, op.v_dim) != widths or op.window is not None:
            return None
        if not op.is_context:
            generation = self.tables.latent_generation(op.heads, _kv(op))
            return None if generation is None else Decodes(generation)
        context = self.tables.latent_context(op.heads, _kv(op))
        expand = self.tables.gemm_curve("bf16", *DEEPSEEK.kv_up(op.heads))
        if context is None or expand is None:
            return None

        def price(seqs: int, tokens: int, old: int, pairs: int) -> Price:
            ns, how = context.price(seqs, tokens, pairs)
            # Keys and values of what is in the cache are rebuilt from their latents.
            return (ns + expand.ns(old) if old else ns), how

        return price

    def _experts(self, op: Experts) -> Pricer | None:
        """Tables count the tokens of the whole expert-parallel group, as the operator does.

        Under a routing law the time is scaled by the ratio of two rooflines at peak rates, that of the straggler's
        pairs and experts over that of even routing: nothing was timed for a given load of a rank.
        """
        ranks, width = self.sharding.expert, self.sharding.expert_tensor
        shape = (op.hidden, op.inter * width, op.top_k, op.experts, width, ranks)
        names = EXPERT_TABLES.get(op.dtype.name, (op.dtype.name,))
        curves = [self.tables.moe_curve(name, *shape, backend=self.moe_backend) for name in names]
        found = [curve for curve in curves if curve is not None]
        measured = [curve for curve in found if curve.shape_how == "measured"]
        curve = next(iter(measured + found), None)
        if curve is None or op.routing is None:
            return _on_rows(curve)
        price, ideal = curve.price, self._ideal(op)
        timed = replace(op, redundant=0, local_experts=split(op.experts, ranks))

        def scaled(rows: int) -> Price:
            even = ideal(timed.pairs_of(rows), timed.touched_by(rows))
            ns, _ = price(rows)
            return ns * (straggler(op.work_of(rows), ideal) / even if even else 1.0), "extrapolated"

        return scaled

    def _ideal(self, op: Experts) -> Callable[[float, float], float]:
        """The larger of arithmetic and memory time, at peak rates, for (pairs, experts with a token)."""
        device, compute = self.tables.device, {"nvfp4": "fp4"}.get(op.dtype.compute, op.dtype.compute)
        an_expert = op.weight_bytes / op.local_experts / device.memory_bandwidth
        peak = device.flops.get(compute, device.flops["bf16"])
        a_pair = 2 * op.hidden * op.inter * (3 if op.gated else 2) / peak
        return lambda pairs, used: max(pairs * a_pair, used * an_expert)

    def _exchange(self, op: ExpertExchange) -> Pricer | None:
        """The quicker of DeepEP's two kernels, for low latency and for high throughput: an engine runs the one that
        suits its step. Groups of a size that was not timed are priced as a plain all-to-all."""
        found = [
            self.tables.alltoall_curve(op.phase, op.ranks, op.hidden, op.top_k, op.experts, backend)
            for backend in ("deepep_ll", "deepep_ht")
        ]
        curves = [curve for curve in found if curve is not None]
        if not curves:
            return self._collective(op)
        return lambda rows: min(curve.price(rows) for curve in curves)

    def _collective(self, op: Collective) -> Pricer | None:
        match op.kind:
            case "allreduce":
                curve = self.tables.allreduce_curve(op.ranks)
            case "allgather":
                curve = self.tables.nccl_curve("all_gather", op.ranks)
            case "reducescatter":
                curve = self.tables.nccl_curve("reduce_scatter", op.ranks)
            case "alltoall":
                curve = self.tables.nccl_curve("alltoall", op.ranks)
            case _:
                return None
        return _on_rows(curve, op.bytes_a_row)


class Prompts:
    """Prefill attention from a table, times a factor."""

    def __init__(self, context: ContextAttention, factor: float = 1.0) -> None:
        self.context, self.factor = context, factor

    def scaled(self, factor: float) -> Prompts:
        return Prompts(self.context, self.factor * factor)

    def __call__(self, seqs: int, tokens: int, old: int, pairs: int) -> Price:
        ns, how = self.context.price(seqs, tokens, pairs)
        return ns * self.factor, how


class Decodes:
    """Decode attention from a table, times a factor."""

    def __init__(self, generation: GenerationAttention, factor: float = 1.0) -> None:
        self.generation, self.factor = generation, factor

    def scaled(self, factor: float) -> Decodes:
        return Decodes(self.generation, self.factor * factor)

    def __call__(self, seqs: int, tokens: int, context: int) -> Price:
        ns, how = self.generation.price(seqs, context)
        return ns * self.factor, how

    def few(
        self, seqs: int, tokens: int, context: int, longest: int, steps: int, uneven: float, calls: float
    ) -> tuple[list[int], Sequence[tuple[int, str]]]:
        return self.generation.few_wholes(seqs, context, longest, steps, uneven, self.factor, calls)

    def many(self, seqs: int, tokens: int, context: int, steps: int) -> tuple[NDArray[np.float64], NDArray[np.int8]]:
        ns, kinds = self.generation.run_prices(seqs, context, steps)
        return ns * self.factor, kinds


def _kv(op: AttentionKernel) -> str:
    return "fp8" if op.dtype.bits <= 8 else "bf16"


def _on_rows(curve: Curve | None, scale: int = 1) -> Pricer | None:
    if curve is None:
        return None
    price = curve.price
    if scale == 1:
        return price
    return lambda rows: price(rows * scale)
