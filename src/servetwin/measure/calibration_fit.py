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
TUNING = 2.385
"""in standard deviations: Cauchy's weights with it lose 5 % of the precision where errors are normal (Holland and
Welsch 1977)"""
LEAST_SPREAD = 0.02
"""of relative differences: what repeats of one measurement differ by (SemiAnalysis InferenceX: median coefficient of
variation 1.9 % of TTFT, 0.3 % of TPOT)"""


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
    trust: Callable[[Floats], Floats] | None = None,
) -> Fit:
    """Lower the sum of squares of `residuals` (n,) between the bounds (k,); `slopes` gives their derivatives (n, k).

    `residuals` may return infinities where it cannot be computed; such a place is not taken. `trust` gives factors (n,)
    for residuals (iteratively reweighted least squares), which are renewed before each iteration. Deterministic.
    """
    at, raw, raw_slopes = start, residuals(start), first_slopes
    damping = 1e-3
    for iteration in range(1, MOST_ITERATIONS + 1):
        if iteration > 1:
            raw_slopes = slopes(at)
        factors = np.ones(len(raw)) if trust is None else trust(raw)
        found, jacobian = factors * raw, factors[:, None] * raw_slopes
        for _ in range(TRIES):
            step = _step(jacobian, found, damping, at, low, high)
            if _gain(found, found + jacobian @ step) < ENOUGH_GAIN:
                return Fit(at, found, jacobian, iteration)
            there = np.clip(at + step, low, high)
            new = residuals(there)
            weighed = factors * new
            if weighed @ weighed < found @ found:
                break
            damping = max(1e-2, damping) * 10
        else:
            return Fit(at, found, jacobian, iteration)
        gain, at, raw, damping = _gain(found, weighed), there, new, damping / 10
        if gain < ENOUGH_GAIN or weighed @ weighed < GOOD_ENOUGH**2:
            return Fit(at, weighed, jacobian, iteration)
    return Fit(at, weighed, jacobian, MOST_ITERATIONS)


def trust(differences: Floats, kinds: NDArray[np.int64]) -> Floats:
    """Factors (n,) for relative `differences` (n,), by which those far out of the usual of their kind weigh less.

    One faulty measurement (a node that was throttled, or busy with something else) is off by 50 % where the others are
    off by 3, and alone outweighs two hundred of them in a sum of squares. The squares of these factors are Cauchy's
    weights, 1 / (1 + (d / TUNING s)^2), s = 1.4826 x the median of |d| over the kind (`kinds`, (n,)).
    """
    spread = np.array([1.4826 * np.median(np.abs(differences[kinds == kind])) for kind in kinds])
    return np.asarray(1 / np.sqrt(1 + (differences / (TUNING * np.maximum(spread, LEAST_SPREAD))) ** 2))


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
