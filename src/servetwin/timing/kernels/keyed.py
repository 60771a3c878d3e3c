"""Tables of curves that differ in one number: heads, devices, or the width of a matrix."""

from __future__ import annotations

from servetwin.timing.kernels.curve import Curve, bracket
from servetwin.timing.kernels.profile import Columns


class KeyedTable:
    """Measured curves over `axis`, one for each value of `key`."""

    def __init__(self, columns: Columns, key: str, axis: str) -> None:
        keys = columns[key]
        self.values: list[int] = sorted(set(keys.tolist()))
        self._curves = {
            value: Curve(columns[axis][keys == value].astype(float), columns["ns"][keys == value].astype(float))
            for value in self.values
        }

    def curve(self, value: int) -> Curve:
        """The curve of one key: measured, linear between its neighbours, in proportion beyond the largest one."""
        if value in self._curves:
            return self._curves[value]
        low, high, share = bracket(self.values, value)
        first, second = self._curves[low], self._curves[high]
        if share:
            points = sorted({*first.xs, *second.xs})
            return Curve(points, [(1 - share) * first.ns(x) + share * second.ns(x) for x in points], "interpolated")
        return Curve(first.xs, [time * max(value / low, 1.0) for time in first.ys], "extrapolated")
