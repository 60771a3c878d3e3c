"""Any operator on any device, from the device's datasheet row and laws fitted on other devices (`efficiency`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from servetwin.catalog import Device
from servetwin.errors import InputError
from servetwin.model.dtypes import Dtype
from servetwin.model.expert_placement import straggler
from servetwin.model.kernels import AttentionKernel, Collective, Experts, Gemm, Indexer, Operator, Recurrence
from servetwin.timing.efficiency import Law, family, laws, units_of, work
from servetwin.timing.operators import Price, Pricer, needs
from servetwin.timing.shape import StepShape

MEMORY_EFFICIENCY = 0.8
"""Share of the memory bandwidth that streaming kernels reach, where no law was fitted. Assumed: the laws for products
have 0.84 and 0.91."""
UNFITTED_COMPUTE = 0.5
"""Share of the peak for kernels that nobody measured (recurrences, the indexer). Assumed: that of prefill attention."""


class Roofline:
    """Prices kernels of one device: analytic where a law was fitted for the kind of kernel, else assumed. Collectives
    are not its business."""

    name = "roofline"

    def __init__(self, device: Device, bandwidth: float | None = None, fitted: Mapping[str, Law] | None = None) -> None:
        """`bandwidth` (B/s) replaces the catalogue's memory bandwidth, `fitted` the shipped laws."""
        self.device = device
        self.bandwidth = bandwidth or device.memory_bandwidth
        self._laws = laws() if fitted is None else fitted
        self._units = units_of(device)

    def pricer(self, operator: Operator) -> Pricer | None:
        if isinstance(operator, Collective):
            return None
        if operator.name.endswith("_quantise"):
            return self._linear(operator, "cast", "analytic")
        match operator:
            case Gemm():
                kind, how = self._product(operator.dtype)
                return self._linear(operator, f"gemm_{kind}", how)
            case Experts():
                kind, how = self._product(operator.dtype)
                return self._experts(operator, f"experts_{kind}", how)
            case AttentionKernel():
                return self._attention(operator)
            case Indexer() | Recurrence():
                return self._unfitted(operator)
            case _ if operator.name == "moe_sum":
                return lambda rows: (0.0, "analytic")  # in the experts' measured time
            case _:
                return self._linear(operator, "small", "assumed" if operator.kind == "sampler" else "analytic")

    def _product(self, dtype: Dtype) -> tuple[str, str]:
        """The law for products with weights of a format, and how well it is known there."""
        compute = {"nvfp4": "fp4"}.get(dtype.compute, dtype.compute)
        if dtype.bits < 16 and compute in self.device.peak and compute in ("fp8", "int8", "fp4"):
            return ("4bit" if compute == "fp4" else "8bit"), "analytic"
        if dtype.bits < 16:
            return "weight_only", "analytic"
        return "16bit", "analytic" if dtype.bits == 16 else "assumed"

    def _law(self, kind: str) -> Law:
        # No product with only its weights quantised was measured: such a product multiplies as a 16-bit one does.
        return self._laws["gemm_16bit" if kind == "gemm_weight_only" else kind]

    def _linear(self, operator: Operator, kind: str, how: str) -> Pricer:
        """Kernels whose sizes are straight lines over their rows."""
        law, launch = self._law(kind), float(self.device.launch_ns)
        if kind == "gemm_weight_only":
            how = "assumed"
        none, one = (work(operator, _rows(rows), self._units) for rows in (0, 1))
        per_byte = 1e9 / (self.bandwidth * law.memory)
        held, moved = none.bytes * per_byte, (one.bytes - none.bytes) * per_byte
        if not held and not moved:
            return lambda rows: (0.0, how)
        linear = [sum(ns * size for ns, size in zip(law.terms, at.terms, strict=True)) for at in (none, one)]
        fixed, a_row = launch + law.fixed_ns + linear[0], linear[1] - linear[0]
        if family(kind) != "gemm":
            fixed, a_row = fixed + held, a_row + moved
            return lambda rows: (fixed + rows * a_row if rows else 0.0, how)
        per_flop = 1e9 / (self._peak(operator) * law.compute)
        tile, worked = law.waves * one.tile * per_flop, one.flops * per_flop
        s, root = law.sharpness, 1 / law.sharpness

        def price(rows: int) -> Price:
            if not rows:
                return 0.0, how
            return fixed + rows * a_row + ((tile + rows * worked) ** s + (held + rows * moved) ** s) ** root, how

        return price

    def _experts(self, operator: Experts, kind: str, how: str) -> Pricer:
        """Kernels whose weights are read as far as some token wants them. Rows are the tokens of the whole group."""
        law = self._law(kind)
        at = work(replace(operator, rows="tokens", parts=1), _rows(1), self._units)
        touched, pairs = operator.touched_by(1), operator.pairs_of(1)
        per_byte = 1e9 / (self.bandwidth * law.memory)
        per_flop = 1e9 / (self._peak(operator) * law.compute)
        weights = operator.weight_bytes / operator.local_experts
        worked, tile = at.flops * per_flop, law.waves * at.tile / touched * per_flop
        moved, held = (at.bytes - touched * weights) * per_byte, weights * per_byte
        an_expert, a_row = law.terms[0] / self._units, law.terms[1] * at.terms[1]
        fixed, s, root = self.device.launch_ns + law.fixed_ns, law.sharpness, 1 / law.sharpness
        local, missed = operator.local_experts, 1 - operator.top_k / (operator.experts + operator.redundant)
        if not pairs:
            return lambda rows: (0.0, how)

        def even(rows: float, used: float) -> float:
            """With as many pairs as `rows` tokens give this rank when routed evenly, over `used` experts."""
            compute, memory = rows * worked + used * tile, rows * moved + used * held
            ns: float = fixed + used * an_expert + rows * a_row + (compute**s + memory**s) ** root
            return ns

        def price(rows: int) -> Price:
            if not rows:
                return 0.0, how
            if operator.routing is None:
                return even(rows, local * (1 - missed**rows)), how
            return straggler(operator.work_of(rows), lambda work, used: even(work / pairs, used)), how

        return price

    def _attention(self, operator: AttentionKernel) -> Pricer:
        """Latent attention takes the laws of the usual kind; nobody fitted them on it."""
        phase = "context" if operator.is_context else "generation"
        law = self._laws[f"{phase}_attention_{'16bit' if operator.dtype.bits >= 16 else '8bit'}"]
        how = "assumed" if operator.kind.startswith("mla") else "analytic"
        launch, bandwidth, units = float(self.device.launch_ns), self.bandwidth, self._units
        per_flop, per_byte = 1e9 / (self._peak(operator) * law.compute), 1e9 / (bandwidth * law.memory)
        s, root, fixed = law.sharpness, 1 / law.sharpness, launch + law.fixed_ns
        width = operator.qk_dim + operator.v_dim
        a_pair = 2 * operator.heads * width * per_flop
        a_token = operator.activation.bytes(operator.heads * width) * per_byte
        a_key = operator.kv_token_bytes * per_byte
        window = operator.window
        if operator.is_context:
            tile = law.terms[0] * operator.heads / units
            rebuilt = operator.expand * per_flop

            def prefill(seqs: int, tokens: int, context: int, pairs: int) -> Price:
                if not seqs:
                    return 0.0, how
                keys = context + tokens
                if window is not None:
                    pairs = operator.pairs(StepShape(seqs, tokens, context, pairs, 0, 0, 0, 0, 0))
                    keys = min(keys, seqs * (window - 1) + tokens)
                compute = pairs * a_pair + context * rebuilt
                memory = keys * a_key + tokens * a_token
                return fixed + tile * (tokens / 128 + seqs) + (compute**s + memory**s) ** root, how

            return prefill
        group = law.terms[0] * operator.kv_heads / units

        def decode(seqs: int, tokens: int, context: int) -> Price:
            if not seqs:
                return 0.0, how
            keys = context + tokens
            pairs = tokens * (2 * context + tokens + seqs) / (2 * seqs)
            if window is not None:
                keys, pairs = min(keys, seqs * (window - 1) + tokens), min(pairs, tokens * window)
            compute, memory = pairs * a_pair, keys * a_key + tokens * a_token
            return fixed + group * seqs + (compute**s + memory**s) ** root, how

        return decode

    def _unfitted(self, operator: Operator) -> Pricer:
        """Kernels of which there is no measurement: the larger of arithmetic and memory time."""
        per_flop = 1e9 / (self._peak(operator) * UNFITTED_COMPUTE)
        per_byte, launch = 1e9 / (self.bandwidth * MEMORY_EFFICIENCY), float(self.device.launch_ns)

        def price(shape: StepShape) -> Price:
            moved = operator.bytes_read(shape) + operator.bytes_written(shape)
            if not moved:
                return 0.0, "assumed"
            return launch + max(moved * per_byte, operator.flops(shape) * per_flop), "assumed"

        assert needs(operator) == "step"
        return price

    def _peak(self, operator: Operator) -> float:
        """Dense operations per second in the number format that the operator computes in."""
        match operator:
            case Gemm() | Experts():
                return peak_of(self.device, operator.dtype)
            case _:
                return peak_of(self.device, operator.dtype if operator.dtype.bits >= 16 else None)


def _rows(rows: int) -> StepShape:
    return StepShape(0, 0, 0, 0, rows, rows, 0, 0, 0)


def peak_of(device: Device, dtype: Dtype | None) -> float:
    """The device's dense peak for a format; where it has none, for the 16-bit format that it would be widened to."""
    peak = device.peak
    wide = peak.get("bf16") or peak.get("fp16") or peak.get("fp32")
    if wide is None:
        raise InputError("the device states no peak for bf16, fp16 or fp32", where=f"device {device.id}", field="peak")
    if dtype is None:
        return wide
    return peak.get({"nvfp4": "fp4", "mxfp4": "fp4"}.get(dtype.compute, dtype.compute), wide)
