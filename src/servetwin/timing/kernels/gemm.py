"""Matrix products: measured curves over the rows m, and curves for shapes (n, k) that lie between measured ones."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from servetwin.timing.kernels.curve import Curve, Floats, How, bracket
from servetwin.timing.kernels.profile import Columns, Device


class Format(NamedTuple):
    """What a number format costs: which peak rate it runs at, bytes of one weight and of one activation."""

    peak: str
    weight_bytes: float
    activation_bytes: float


FORMATS: dict[str, Format] = {
    "bf16": Format("bf16", 2.0, 2.0),
    "fp8": Format("fp8", 1.0, 1.0),
    "fp8_block": Format("fp8", 1.0, 1.0),
    # 4-bit values with one 8-bit scale for each 16 (nvfp4) or 32 (mxfp4) of them; int4 groups of 32 with a 16-bit scale
    "nvfp4": Format("fp4", 0.5 + 1 / 16, 0.5 + 1 / 16),
    "int4_wo": Format("bf16", 0.5 + 2 / 32, 2.0),
    "w4a16_mxfp4": Format("bf16", 0.5 + 1 / 32, 2.0),
    "w4a8_mxfp4_mxfp8": Format("fp8", 0.5 + 1 / 32, 1.0 + 1 / 32),
}


def roofline_ns(device: Device, dtype: str, m: Floats, n: float, k: float) -> Floats:
    """The larger of arithmetic and memory time in ns of an m x k by k x n product with bf16 output, at peak rates."""
    form = FORMATS[dtype]
    peak = device.flops.get(form.peak, device.flops["bf16"])
    moved = form.weight_bytes * n * k + form.activation_bytes * m * k + 2.0 * m * n
    return np.maximum(2.0 * m * n * k / peak, moved / device.memory_bandwidth) * 1e9


class GemmTable:
    """All measured shapes of one number format.

    A shape between measured ones takes, at every measured m, the ratio time/roofline interpolated in (log n, log k)
    between its four neighbours: the ratio varies slowly where the time itself spans five decades. Beyond the
    measured shapes the ratio of the nearest edge holds (a vocabulary of 128k rows); below them the time of the least.
    """

    def __init__(self, columns: Columns, device: Device, dtype: str) -> None:
        self._device, self._dtype = device, dtype
        n, k, m, ns = (columns[name] for name in ("n", "k", "m", "ns"))
        starts = np.flatnonzero(np.r_[True, (np.diff(n) != 0) | (np.diff(k) != 0)])
        ends = np.r_[starts[1:], len(n)]
        self._points = {
            (int(n[a]), int(k[a])): (m[a:b].astype(np.float64), ns[a:b].astype(np.float64))
            for a, b in zip(starts, ends, strict=True)
        }
        self._ns = sorted({shape[0] for shape in self._points})
        self._ks = sorted({shape[1] for shape in self._points})
        self._curves: dict[tuple[int, int], Curve] = {}

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Measured (n, k)."""
        return list(self._points)

    def curve(self, n: int, k: int) -> Curve:
        """Time over m for one shape; prepared once, then kept."""
        if (n, k) not in self._curves:
            self._curves[n, k] = self._build(n, k)
        return self._curves[n, k]

    def _build(self, n: int, k: int) -> Curve:
        if (n, k) in self._points:
            return Curve(*self._points[n, k])
        how: How = "interpolated"
        if not (self._ns[0] <= n <= self._ns[-1] and self._ks[0] <= k <= self._ks[-1]):
            how = "extrapolated"
        n, k = max(n, self._ns[0]), max(k, self._ks[0])
        corners = self._corners(n, k)
        if not all(shape in self._points for shape, _ in corners):
            corners, how = [(self._nearest(n, k), 1.0)], "extrapolated"
        m = np.unique(np.concatenate([self._points[shape][0] for shape, _ in corners]))
        log_ratio = np.zeros(len(m))
        for shape, weight in corners:
            log_ratio += weight * np.interp(np.log(m), *self._log_ratio(shape))
        times = roofline_ns(self._device, self._dtype, m, n, k) * np.exp(log_ratio)
        return Curve(m, times, how)

    def _corners(self, n: int, k: int) -> list[tuple[tuple[int, int], float]]:
        """Measured neighbours and their weights, those of weight 0 left out."""
        n0, n1, _ = bracket(self._ns, n)
        k0, k1, _ = bracket(self._ks, k)
        u, v = _log_share(n0, n1, n), _log_share(k0, k1, k)
        weighted = [((n0, k0), (1 - u) * (1 - v)), ((n1, k0), u * (1 - v)), ((n0, k1), (1 - u) * v), ((n1, k1), u * v)]
        return [(shape, weight) for shape, weight in weighted if weight > 0]

    def _nearest(self, n: int, k: int) -> tuple[int, int]:
        return min(self._points, key=lambda shape: abs(np.log(shape[0] / n)) + abs(np.log(shape[1] / k)))

    def _log_ratio(self, shape: tuple[int, int]) -> tuple[Floats, Floats]:
        m, times = self._points[shape]
        return np.log(m), np.log(times / roofline_ns(self._device, self._dtype, m, *shape))


def device_time(own: Curve | None, other: Curve, host_ns: float, ratio: float) -> Curve:
    """A curve that timed the host's launches, brought down to the device's time.

    At sizes whose time is the host's (up to 1.25 `host_ns`) it takes that of a table of products with like device
    times, times the `ratio` of the two, where that is less. Extrapolated as soon as one size is replaced.
    """
    if own is None:
        return Curve(other.xs, ratio * np.array(other.ys), "extrapolated")
    times, better = np.array(own.ys), ratio * other.many(own.xs)
    replaced = (times <= 1.25 * host_ns) & (better < times)
    return Curve(own.xs, np.where(replaced, better, times), "extrapolated") if replaced.any() else own


def _log_share(low: int, high: int, wanted: int) -> float:
    return 0.0 if low == high else float(np.log(wanted / low) / np.log(high / low))
