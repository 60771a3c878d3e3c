"""Operators priced from measured kernel tables (`servetwin.timing.kernels`)."""

from __future__ import annotations

from servetwin.model.kernels import AttentionKernel, Collective, Experts, Gemm, Operator
from servetwin.model.sharding import Sharding
from servetwin.timing.kernels.curve import Curve
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
    """Prices kernels of one device from its tables: matrix products, attention, experts, collectives inside a node,
    and by the tables' own rule the small kernels between them. What has no table is left to other sources."""

    name = "silicon"

    def __init__(self, tables: KernelTables, sharding: Sharding) -> None:
        self.tables, self.sharding = tables, sharding

    def pricer(self, operator: Operator) -> Pricer | None:
        match operator:
            case Gemm():
                name = operator.dtype.name
                return _on_rows(self.tables.gemm_curve(GEMM_TABLES.get(name, name), operator.n, operator.k))
            case AttentionKernel():
                return self._attention(operator)
            case Experts():
                return self._experts(operator)
            case Collective():
                return self._collective(operator)
            case _ if operator.kind in ("norm", "elementwise", "embedding", "sampler"):
                return self._small(operator)
            case _:
                return None

    def _small(self, operator: Operator) -> Pricer:
        if operator.name.endswith("_quantise") or operator.name == "moe_sum":
            # Part of the product's, or the experts', measured time.
            return lambda rows: (0.0, "measured")
        size, tables = operator.read_a_row + operator.written_a_row, self.tables
        fixed = tables.elementwise_ns(0)
        a_row = tables.elementwise_ns(size) - fixed
        return lambda rows: (fixed + a_row * rows, "analytic")

    def _attention(self, op: AttentionKernel) -> Pricer | None:
        kv = "fp8" if op.dtype.bits <= 8 else "bf16"
        if op.kind in ("mla_context", "mla_generation"):
            return None
        if op.is_context:
            context = self.tables.context_attention(op.heads, op.kv_heads, op.qk_dim, op.window or 0, kv)
            if context is None:
                return None
            return lambda seqs, tokens, old, pairs: (
                context.ns(seqs, tokens, pairs),
                context.how(seqs, tokens, pairs),
            )
        generation = self.tables.generation_attention(op.heads, op.kv_heads, op.qk_dim, op.window or 0, kv)
        if generation is None:
            return None

        def price(seqs: int, tokens: int, context: int) -> Price:
            return generation.ns(seqs, context), generation.how(seqs, context)

        return price

    def _experts(self, op: Experts) -> Pricer | None:
        expert_ranks = op.experts // op.local_experts
        width = self.sharding.expert_tensor
        for name in EXPERT_TABLES.get(op.dtype.name, (op.dtype.name,)):
            curve = self.tables.moe_curve(name, op.hidden, op.inter * width, op.top_k, op.experts, width, expert_ranks)
            if curve is not None:
                data = op.data
                found = curve
                return lambda rows: (found.ns(rows * data), found.how(rows * data))
        return None

    def _collective(self, op: Collective) -> Pricer | None:
        match op.kind:
            case "allreduce":
                curve = self.tables.allreduce_curve(op.ranks)
            case "allgather":
                curve = self.tables.nccl_curve("all_gather", op.ranks)
            case "alltoall":
                curve = self.tables.nccl_curve("alltoall", op.ranks)
            case _:
                return None
        return _on_rows(curve, op.bytes_a_row)


def _on_rows(curve: Curve | None, scale: int = 1) -> Pricer | None:
    if curve is None:
        return None
    ns, how = curve.ns, curve.how
    if scale == 1:
        return lambda rows: (ns(rows), how(rows))
    return lambda rows: (ns(rows * scale), how(rows * scale))
