"""One kernel's time as a function of one size: through the measured points, never outside what they bound."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

How = Literal["measured", "interpolated", "extrapolated"]
Floats = NDArray[np.float64]
Sizes = Sequence[float] | Floats

HOWS: tuple[How, ...] = ("measured", "interpolated", "extrapolated")
"""From the best known to the worst, as the fields of a `Ledger` begin."""

_RANK: dict[How, int] = {"measured": 0, "interpolated": 1, "extrapolated": 2}


def worst(*hows: How) -> How:
    """How a time made of several parts is known: as badly as its worst part."""
    return max(hows, key=_RANK.__getitem__)


def _known(xs: list[float], limit: float, how: How) -> tuple[list[How], list[How]]:
    """How times are known at each point, and after it up to the next one; measured ones end with the point `limit`."""
    if limit not in xs:
        raise ValueError("the limit must be one of the points")
    at: list[How] = [how if x <= limit else "extrapolated" for x in xs]
    after: list[How] = [worst(how, "interpolated") if x < limit else "extrapolated" for x in xs]
    return at, after


class Curve:
    """Time in ns over a size: straight lines between the points.

    Straight lines keep the bounds of the points (positive, and monotone wherever the points are), are continuous, and
    are exact for the a + b*size that kernels follow away from their steps. Below the first point the time stays
    constant (a launch is a launch); above the last one it grows in proportion to the size, or along the last line when
    `affine` is set (a decode step, whose fixed part does not grow with the context).

    `shape_how` tells how the curve itself was come by; a look-up is never better known than its curve. Points beyond
    `limit`, itself a point, were filled in, not measured.
    """

    __slots__ = ("_after", "_at", "_places", "limit", "shape_how", "slopes", "xs", "ys")

    def __init__(
        self, xs: Sizes, ys: Sizes, how: How = "measured", affine: bool = False, limit: float | None = None
    ) -> None:
        x, y = np.asarray(xs, dtype=np.float64), np.asarray(ys, dtype=np.float64)
        if len(x) != len(y) or len(x) == 0 or not (y > 0).all() or not (np.diff(x) > 0).all():
            raise ValueError("a curve needs rising sizes and positive times")
        slopes = np.diff(y) / np.diff(x)
        if affine and len(x) > 1:
            tail = max(float(slopes[-1]), 0.0)
        else:
            tail = float(y[-1] / x[-1]) if x[-1] > 0 else 0.0
        self.xs: list[float] = x.tolist()
        self.ys: list[float] = y.tolist()
        self.slopes: list[float] = [*slopes.tolist(), tail]
        self.shape_how: How = how
        self.limit = self.xs[-1] if limit is None else limit
        self._at, self._after = _known(self.xs, self.limit, how)
        self._places: NDArray[np.int8] | None = None

    def price(self, size: float) -> tuple[float, How]:
        """Time in ns at one size, and whether it was measured, lies between measurements, or beyond them."""
        i = bisect_right(self.xs, size) - 1
        if i < 0:
            return self.ys[0], "extrapolated"
        beyond = size - self.xs[i]
        if beyond:
            return self.ys[i] + self.slopes[i] * beyond, self._after[i]
        return self.ys[i], self._at[i]

    def ns(self, size: float) -> float:
        """The time of `price`."""
        return self.price(size)[0]

    def how(self, size: float) -> How:
        """How that time is known."""
        return self.price(size)[1]

    def known(self, point: int) -> tuple[How, How]:
        """How times are known at a point, and between it and the next one."""
        return self._at[point], self._after[point]

    def many_prices(self, sizes: ArrayLike) -> tuple[Floats, NDArray[np.int8]]:
        """Times in ns at many sizes, and how each is known, as its place in HOWS: bit for bit those of `price`."""
        x = np.asarray(self.xs)
        at = np.asarray(sizes, dtype=np.float64)
        i = np.searchsorted(x, at, side="right") - 1
        inside = np.maximum(i, 0)
        beyond = at - x[inside]
        times: Floats = np.asarray(self.ys)[inside] + np.asarray(self.slopes)[inside] * beyond
        places = self._places
        if places is None:
            places = self._places = np.array(
                [[HOWS.index(h) for h in hows] for hows in (self._at, self._after)], np.int8
            )
        kinds = np.where(beyond != 0, places[1][inside], places[0][inside])
        if i.size and i.min() < 0:
            below = i < 0
            times[below] = self.ys[0]
            kinds[below] = HOWS.index("extrapolated")
        return times, kinds

    def many(self, sizes: ArrayLike) -> Floats:
        """Times in ns at many sizes, bit for bit those of `ns`."""
        x, y, slope = np.asarray(self.xs), np.asarray(self.ys), np.asarray(self.slopes)
        at = np.asarray(sizes, dtype=np.float64)
        i = np.searchsorted(x, at, side="right") - 1
        inside = np.maximum(i, 0)
        times: Floats = np.where(i < 0, y[0], y[inside] + slope[inside] * (at - x[inside]))
        return times


class PowerCurve:
    """Time in ns over an amount of work: a power law between neighbouring points.

    For times that change from flat (launch) to quadratic (attention over a prompt) within a few points, where a
    straight line would overshoot. Below the first point constant, above the last one in proportion to the work.
    """

    __slots__ = ("_after", "_at", "limit", "powers", "shape_how", "xs", "ys")

    def __init__(self, xs: Sizes, ys: Sizes, how: How = "measured", limit: float | None = None) -> None:
        x, y = np.asarray(xs, dtype=np.float64), np.asarray(ys, dtype=np.float64)
        if len(x) != len(y) or len(x) == 0 or not (y > 0).all() or not (np.diff(x) > 0).all() or x[0] <= 0:
            raise ValueError("a power curve needs rising positive work and positive times")
        self.xs: list[float] = x.tolist()
        self.ys: list[float] = y.tolist()
        self.powers: list[float] = [*(np.diff(np.log(y)) / np.diff(np.log(x))).tolist(), 1.0]
        self.shape_how: How = how
        self.limit = self.xs[-1] if limit is None else limit
        self._at, self._after = _known(self.xs, self.limit, how)

    def price(self, work: float) -> tuple[float, How]:
        """Time in ns for one amount of work, and whether it was measured, lies between measurements, or beyond them."""
        i = bisect_right(self.xs, work) - 1
        if i < 0:
            return self.ys[0], "extrapolated"
        known = self.xs[i]
        if work == known:
            return self.ys[i], self._at[i]
        return self.ys[i] * (work / known) ** self.powers[i], self._after[i]

    def ns(self, work: float) -> float:
        """The time of `price`."""
        return self.price(work)[0]

    def how(self, work: float) -> How:
        """How that time is known."""
        return self.price(work)[1]

    def known(self, point: int) -> tuple[How, How]:
        """How times are known at a point, and between it and the next one."""
        return self._at[point], self._after[point]


def bracket(values: Sequence[int], wanted: float) -> tuple[int, int, float]:
    """The two neighbours of `wanted` in a rising list, and the share (0..1) of the way to the upper one.

    Outside the list both neighbours are its end, with share 0.
    """
    i = bisect_right(values, wanted) - 1
    if i < 0:
        return values[0], values[0], 0.0
    if i == len(values) - 1 or values[i] == wanted:
        return values[i], values[i], 0.0
    return values[i], values[i + 1], (wanted - values[i]) / (values[i + 1] - values[i])
