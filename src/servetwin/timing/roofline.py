"""Any operator on any device, from the device's datasheet row.

    time = max(FLOPs / (peak x efficiency), bytes / (memory bandwidth x efficiency)) + launch

The efficiencies are plain round figures, the same for every device, and not fitted to any: what they price is marked as
assumed.
"""

from __future__ import annotations

from servetwin.catalog import Device
from servetwin.errors import InputError
from servetwin.model.dtypes import Dtype
from servetwin.model.kernels import AttentionKernel, Experts, Gemm, Indexer, Operator, Recurrence
from servetwin.timing.shape import StepShape

COMPUTE_EFFICIENCY = 0.7
"""Of the dense peak, for large matrix products: the order that vendors' libraries reach on current devices. Assumed."""
MEMORY_EFFICIENCY = 0.8
"""Of the memory bandwidth: the order that streaming kernels reach. Assumed."""


class Roofline:
    """Prices operators of one device; every price is assumed."""

    def __init__(self, device: Device, bandwidth: float | None = None) -> None:
        """`bandwidth` (B/s) replaces the catalogue's memory bandwidth."""
        self.device = device
        self._bytes_per_ns = (bandwidth or device.memory_bandwidth) * MEMORY_EFFICIENCY / 1e9

    def ns(self, operator: Operator, shape: StepShape) -> float:
        """Time of one call of `operator` in a step of `shape`."""
        moved = operator.bytes_read(shape) + operator.bytes_written(shape)
        if not moved:
            return 0.0
        time = moved / self._bytes_per_ns
        flops = operator.flops(shape)
        if flops:
            time = max(time, flops / (self._peak(operator) * COMPUTE_EFFICIENCY / 1e9))
        return time + self.device.launch_ns

    def _peak(self, operator: Operator) -> float:
        """Dense operations per second in the number format that the operator computes in."""
        match operator:
            case Gemm() | Experts():
                return peak_of(self.device, operator.dtype)
            case AttentionKernel() | Recurrence() | Indexer():
                return peak_of(self.device, operator.dtype if operator.dtype.bits >= 16 else None)
            case _:
                return peak_of(self.device, None)


def peak_of(device: Device, dtype: Dtype | None) -> float:
    """The device's dense peak for a format; weights stored in fewer bits than it computes in are widened first."""
    peak = device.peak
    wide = peak.get("bf16") or peak.get("fp16") or peak.get("fp32")
    if wide is None:
        raise InputError("the device states no peak for bf16, fp16 or fp32", where=f"device {device.id}", field="peak")
    if dtype is None:
        return wide
    return peak.get({"nvfp4": "fp4", "mxfp4": "fp4"}.get(dtype.compute, dtype.compute), wide)
