"""Any operator on any device, from the device's datasheet row.

    time = max(FLOPs / (peak x efficiency), bytes / (memory bandwidth x efficiency)) + launch

The efficiencies are plain round figures, the same for every device, and not fitted to any: what they price is marked as
assumed.
"""

from __future__ import annotations

from servetwin.catalog import Device
from servetwin.errors import InputError
from servetwin.model.dtypes import Dtype
from servetwin.model.kernels import AttentionKernel, Collective, Experts, Gemm, Indexer, Operator, Recurrence
from servetwin.timing.operators import Price, Pricer, needs
from servetwin.timing.shape import StepShape

COMPUTE_EFFICIENCY = 0.7
"""Of the dense peak, for large matrix products: the order that vendors' libraries reach on current devices. Assumed."""
MEMORY_EFFICIENCY = 0.8
"""Of the memory bandwidth: the order that streaming kernels reach. Assumed."""


class Roofline:
    """Prices kernels of one device; every price is assumed. Collectives are not its business."""

    name = "roofline"

    def __init__(self, device: Device, bandwidth: float | None = None) -> None:
        """`bandwidth` (B/s) replaces the catalogue's memory bandwidth."""
        self.device = device
        self._per_byte = 1e9 / ((bandwidth or device.memory_bandwidth) * MEMORY_EFFICIENCY)

    def pricer(self, operator: Operator) -> Pricer | None:
        if isinstance(operator, Collective):
            return None
        per_byte, launch = self._per_byte, float(self.device.launch_ns)
        per_flop = 1e9 / (self._peak(operator) * COMPUTE_EFFICIENCY)

        def price(shape: StepShape) -> Price:
            moved = operator.bytes_read(shape) + operator.bytes_written(shape)
            if not moved:
                return 0.0, "assumed"
            return max(moved * per_byte, operator.flops(shape) * per_flop) + launch, "assumed"

        match needs(operator):
            case "rows":
                if not isinstance(operator, Experts):
                    return self._linear(operator, per_byte, per_flop, launch)
                return lambda rows: price(_decodes(rows, rows, 0))
            case "prefills":
                return lambda seqs, tokens, context, pairs: price(
                    StepShape(seqs, tokens, context, pairs, 0, 0, 0, 0, 0)
                )
            case "decodes":
                return lambda seqs, tokens, context: price(_decodes(seqs, tokens, context))
            case _:
                return price

    @staticmethod
    def _linear(operator: Operator, per_byte: float, per_flop: float, launch: float) -> Pricer:
        """Kernels whose bytes and FLOPs are straight lines over their rows."""
        none, one = _decodes(0, 0, 0), _decodes(1, 1, 0)
        still = operator.bytes_read(none) + operator.bytes_written(none)
        a_row = operator.bytes_read(one) + operator.bytes_written(one) - still
        held, moved, worked = still * per_byte, a_row * per_byte, operator.flops(one) * per_flop
        if not still and not a_row:
            return lambda rows: (0.0, "assumed")
        return lambda rows: (max(held + rows * moved, rows * worked) + launch, "assumed")

    def _peak(self, operator: Operator) -> float:
        """Dense operations per second in the number format that the operator computes in."""
        match operator:
            case Gemm() | Experts():
                return peak_of(self.device, operator.dtype)
            case AttentionKernel() | Recurrence() | Indexer():
                return peak_of(self.device, operator.dtype if operator.dtype.bits >= 16 else None)
            case _:
                return peak_of(self.device, None)


def _decodes(seqs: int, tokens: int, context: int) -> StepShape:
    return StepShape(0, 0, 0, 0, seqs, tokens, context, 0, 0)


def peak_of(device: Device, dtype: Dtype | None) -> float:
    """The device's dense peak for a format; where it has none, for the 16-bit format that it would be widened to."""
    peak = device.peak
    wide = peak.get("bf16") or peak.get("fp16") or peak.get("fp32")
    if wide is None:
        raise InputError("the device states no peak for bf16, fp16 or fp32", where=f"device {device.id}", field="peak")
    if dtype is None:
        return wide
    return peak.get({"nvfp4": "fp4", "mxfp4": "fp4"}.get(dtype.compute, dtype.compute), wide)
