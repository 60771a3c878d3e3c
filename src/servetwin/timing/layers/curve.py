"""One measured axis: a piecewise linear curve with a defined continuation on both sides."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

MEASURED, INTERPOLATED, EXTRAPOLATED = 0, 1, 2
HOW = ("measured", "interpolated", "extrapolated")
"""How a time came about, ordered so that the `max` over the parts is the verdict on the whole."""


class Curve:
    """Time in ns over one axis: linear between the measured points, and beyond them as follows.

    Above the last point the curve goes on with the least-squares slope over the upper half of the axis (points at half
    the last coordinate or more), never downwards: the last two points alone are noise where kernels run in waves.
    Below the first point it goes straight to `at_zero` at coordinate 0 (default: it stays at the first time).

    `xs` must rise; `ts` are times in ns.
    """

    __slots__ = ("first", "last", "slopes", "ts", "xs")

    def __init__(self, xs: Sequence[int], ts: Sequence[float], at_zero: float | None = None) -> None:
        self.first, self.last = xs[0], xs[-1]
        self.xs, self.ts = list(xs), list(ts)
        if self.first > 0:
            self.xs.insert(0, 0)
            self.ts.insert(0, self.ts[0] if at_zero is None else at_zero)
        steps = range(len(self.xs) - 1)
        self.slopes = [(self.ts[i + 1] - self.ts[i]) / (self.xs[i + 1] - self.xs[i]) for i in steps]
        self.slopes.append(_upper_slope(xs, ts))

    def at(self, x: float) -> float:
        """The time at `x` >= 0."""
        i = bisect_right(self.xs, x) - 1
        return self.ts[i] + (x - self.xs[i]) * self.slopes[i]

    def how(self, x: float) -> int:
        """Whether `x` is a measured point, lies between two, or outside."""
        if x < self.first or x > self.last:
            return EXTRAPOLATED
        return MEASURED if self.xs[bisect_right(self.xs, x) - 1] == x else INTERPOLATED


def _upper_slope(xs: Sequence[int], ts: Sequence[float]) -> float:
    top = max(0, min(len(xs) - 2, bisect_left(xs, xs[-1] / 2)))
    n = len(xs) - top
    if n < 2:
        return 0.0
    mean_x, mean_t = sum(xs[top:]) / n, sum(ts[top:]) / n
    square = slope = 0.0
    for i in range(top, len(xs)):
        square += (xs[i] - mean_x) ** 2
        slope += (xs[i] - mean_x) * (ts[i] - mean_t)
    return max(0.0, slope / square)


def bracket(axis: Sequence[int], x: float, beyond: bool) -> tuple[tuple[tuple[int, float], ...], int]:
    """Indices into `axis` and their weights (they sum to 1) for linear interpolation at `x`, and how.

    Below the first value the weight is all on it. Above the last: the line through the last value and the largest one
    not above its half (so that it spans half the axis), or the last value alone when `beyond` is false.
    """
    i = bisect_left(axis, x)
    if i == len(axis):
        low = bisect_right(axis, axis[-1] / 2) - 1
        if not beyond or low < 0 or axis[low] == axis[-1]:
            return ((i - 1, 1.0),), EXTRAPOLATED
        w = (x - axis[-1]) / (axis[-1] - axis[low])
        return ((low, -w), (i - 1, 1.0 + w)), EXTRAPOLATED
    if axis[i] == x:
        return ((i, 1.0),), MEASURED
    if i == 0:
        return ((0, 1.0),), EXTRAPOLATED
    w = (x - axis[i - 1]) / (axis[i] - axis[i - 1])
    return ((i - 1, 1.0 - w), (i, w)), INTERPOLATED
