"""Bounded nonlinear least squares, for few parameters and costly residuals (Levenberg 1944, Marquardt 1963)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MOST_ITERATIONS = 8
ENOUGH_GAIN = 0.02
"""the fit ends once an iteration lowers the sum of squares, or the slopes promise to, by less than this share"""
GOOD_ENOUGH = 1e-3
"""or once the root of the sum of squares is below this"""
TRIES = 6


@dataclass(frozen=True)
class Fit:
    """Where the fit ended. `slopes` (n, k) were taken just before."""

    at: Floats
    residuals: Floats
    slopes: Floats
    iterations: int

    def standard_errors(self) -> Floats:
        """Standard errors (k,), from the residuals as they are (White 1980, with the n/(n - k) correction)."""
        n, k = self.slopes.shape
        inverse = np.linalg.pinv(self.slopes.T @ self.slopes)
        spread = self.slopes * self.residuals[:, None]
        covariance = inverse @ (spread.T @ spread) @ inverse * n / max(1, n - k)
        return np.asarray(np.sqrt(np.diag(covariance)))


def minimise(
    start: Floats,
    low: Floats,
    high: Floats,
    residuals: Callable[[Floats], Floats],
    slopes: Callable[[Floats], Floats],
    first_slopes: Floats,
) -> Fit:
    """Lower the sum of squares of `residuals` (n,) between the bounds (k,); `slopes` gives their derivatives (n, k).

    `residuals` may return infinities where it cannot be computed; such a place is not taken. Deterministic.
    """
    at, found, jacobian = start, residuals(start), first_slopes
    damping = 1e-3
    for iteration in range(1, MOST_ITERATIONS + 1):
        if iteration > 1:
            jacobian = slopes(at)
        for _ in range(TRIES):
            step = _step(jacobian, found, damping, at, low, high)
            if _gain(found, found + jacobian @ step) < ENOUGH_GAIN:
                return Fit(at, found, jacobian, iteration)
            there = np.clip(at + step, low, high)
            new = residuals(there)
            if new @ new < found @ found:
                break
            damping = max(1e-2, damping) * 10
        else:
            return Fit(at, found, jacobian, iteration)
        gain, at, found, damping = _gain(found, new), there, new, damping / 10
        if gain < ENOUGH_GAIN or found @ found < GOOD_ENOUGH**2:
            return Fit(at, found, jacobian, iteration)
    return Fit(at, found, jacobian, MOST_ITERATIONS)


def _gain(before: Floats, after: Floats) -> float:
    """The share by which the sum of squares falls."""
    return float(1 - (after @ after) / (before @ before))


def _step(slopes: Floats, residuals: Floats, damping: float, at: Floats, low: Floats, high: Floats) -> Floats:
    """The damped step to the minimum of the linear model; what it would drive across a bound goes to the bound."""
    step = np.zeros(len(at))
    free = np.ones(len(at), dtype=bool)
    while free.any():
        matrix = slopes[:, free]
        normal = matrix.T @ matrix
        target = residuals + slopes[:, ~free] @ step[~free]
        step[free] = -np.linalg.solve(normal + damping * np.diag(np.diag(normal)), matrix.T @ target)
        beyond = free & ((at + step < low) | (at + step > high))
        if not beyond.any():
            break
        step[beyond] = np.clip(at + step, low, high)[beyond] - at[beyond]
        free &= ~beyond
    return step
