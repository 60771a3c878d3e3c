"""Decodes with unequal contexts: how far their attention call lies above one with equal contexts.

The cause is the longest sequence. In a mixed call (with a prefill) one thread block walks the whole context of a
sequence, so a call ends no earlier than its longest walk, and the walk that is longer than the average sticks out at
the end of an otherwise balanced call. In a pure-decode call the kernel may split long contexts over thread blocks,
which removes most of it for few sequences. Hence, with t_mean and t_max the times of the same call with all contexts
at the mean and at the longest, and walk(x) = a + b x the time of one walk over x tokens:

    t = t_mean + clip(mixed, 0, t_max - t_mean)
    mixed = m1 * lag + m2 * tail + m3 * walk_excess     (with a prefill of `chunk` tokens on `history`)
    pure  = p1 * room + p2 * room * log2(n) + p3 * walk_excess

    room = t_max - t_mean                          walk_excess = walk(max) - walk(mean)
    lag  = walk(max(max, chunk + history)) - t_mean
    tail = walk(max(max, chunk + history)) - walk(max(mean, chunk + history))

with lag, tail and walk_excess cut to [0, room]. Every term is continuous in every coordinate, so there is no jump when
a chunk changes by a token. a and b come from the measured calls of a single decode beside the shortest chunk; m and p
are fitted to the skew measurements of the profile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Columns = dict[str, NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class SkewModel:
    """`walk`: ns and ns a token; `mixed`, `pure`: the weights above; `first_chunk`: shortest chunk of the mixed shots;
    `most`: largest number of sequences in the shots (pure weights are not extrapolated beyond it)."""

    walk: tuple[float, float]
    mixed: tuple[float, ...]
    pure: tuple[float, ...]
    first_chunk: int
    most: int

    def excess(
        self, chunk: int, history: float, decodes: int, mean: float, longest: float, t_mean: float, t_max: float
    ) -> float:
        """Time above `t_mean` in ns, from 0 to `t_max - t_mean`."""
        room = t_max - t_mean
        if room <= 0.0 or decodes < 2 or longest <= mean:
            return 0.0
        start, slope = self.walk
        over = min(room, slope * (longest - mean))
        mixed = pure = 0.0
        if chunk > 0:
            own = chunk + history
            top = longest if longest > own else own
            lag = min(room, max(0.0, start + slope * top - t_mean))
            tail = min(room, slope * (top - (mean if mean > own else own)))
            m1, m2, m3 = self.mixed
            mixed = min(room, max(0.0, m1 * lag + m2 * tail + m3 * over))
            if chunk >= self.first_chunk:
                return mixed
        doublings = math.log2(min(decodes, self.most))
        p1, p2, p3 = self.pure
        pure = min(room, max(0.0, (p1 + p2 * doublings) * room + p3 * over))
        share = chunk / self.first_chunk if chunk else 0.0  # a chunk shorter than any measured: between the two kinds
        return pure + share * (mixed - pure)

    def header(self) -> dict[str, Any]:
        """As it stands in `profile.yaml`."""
        return {
            "model": "longest-sequence",
            "walk_ns": [float(x) for x in self.walk],
            "mixed": [float(x) for x in self.mixed],
            "pure": [float(x) for x in self.pure],
            "first_chunk": self.first_chunk,
            "most_decodes": self.most,
        }

    @classmethod
    def from_header(cls, header: dict[str, Any]) -> SkewModel:
        """The model written by `header`; raises KeyError, TypeError or ValueError when it is malformed."""
        a, b = (float(x) for x in header["walk_ns"])
        mixed, pure = (tuple(float(x) for x in header[name]) for name in ("mixed", "pure"))
        if (len(mixed), len(pure)) != (3, 3) or header["model"] != "longest-sequence":
            raise ValueError("3 mixed and 3 pure weights of the model 'longest-sequence'")
        return cls((a, b), mixed, pure, max(1, int(header["first_chunk"])), max(2, int(header["most_decodes"])))


def fit_walk(contexts: Sequence[int], times: Sequence[int]) -> tuple[float, float]:
    """Least-squares line (ns, ns a token) through the calls of a single decode beside the shortest chunk."""
    import numpy as np

    if len(contexts) < 2:
        return float(times[0]) if times else 0.0, 0.0
    slope, start = np.polyfit(contexts, times, 1)
    return float(start), max(0.0, float(slope))


def fit(shots: Columns, walk: tuple[float, float]) -> tuple[SkewModel, dict[str, Any]]:
    """Fit the weights to measured calls and say how well they do.

    `shots` holds float columns chunk, history, decodes, longest, mean, t_mean, t_max, t_skew (times in ns, on the same
    scale as `walk`). The weights minimise the sum of relative errors of the time (iteratively reweighted least squares,
    so that outliers do not rule). Returns the model fitted to all shots and the statistics: of a fit to four fifths of
    the shots on the fifth left out (`holdout`: every fifth shot), of the final fit on all of them (`all`), and of
    taking all contexts as equal (`equal_contexts`).
    """
    import numpy as np

    every = np.arange(len(shots["t_mean"]))
    left_out = every % 5 == 4
    first = int(min(shots["chunk"][shots["chunk"] > 0], default=1))
    most = int(max(shots["decodes"], default=2))

    def fitted(use: NDArray[np.bool_]) -> SkewModel:
        mixed, pure = _features(shots, walk, most)
        chunked = shots["chunk"] > 0
        return SkewModel(
            walk, _weights(mixed, shots, use & chunked), _weights(pure, shots, use & ~chunked), first, most
        )

    final = fitted(np.ones_like(left_out))
    nothing = SkewModel(walk, (0.0,) * 3, (0.0,) * 3, first, most)
    return final, {
        "shots": len(every),
        "holdout": _statistics(fitted(~left_out), shots, left_out),
        "all": _statistics(final, shots, np.ones_like(left_out)),
        "equal_contexts": _statistics(nothing, shots, np.ones_like(left_out)),
    }


def _features(shots: Columns, walk: tuple[float, float], most: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    import numpy as np

    start, slope = walk
    t_mean, room = shots["t_mean"], np.maximum(0.0, shots["t_max"] - shots["t_mean"])
    own = shots["chunk"] + shots["history"]
    top = np.maximum(shots["longest"], own)
    over = np.clip(slope * (shots["longest"] - shots["mean"]), 0, room)
    lag = np.clip(start + slope * top - t_mean, 0, room)
    tail = np.clip(slope * (top - np.maximum(shots["mean"], own)), 0, room)
    doublings = np.log2(np.clip(shots["decodes"], 1, most))
    return np.stack([lag, tail, over], 1), np.stack([room, room * doublings, over], 1)


def _weights(features: NDArray[np.float64], shots: Columns, use: NDArray[np.bool_]) -> tuple[float, ...]:
    import numpy as np

    use = use & (shots["t_max"] > shots["t_mean"])
    if not use.any():
        return tuple([0.0] * features.shape[1])
    scaled = features[use] / shots["t_skew"][use, None]
    target = (shots["t_skew"] - shots["t_mean"])[use] / shots["t_skew"][use]
    weights = np.linalg.lstsq(scaled, target, rcond=None)[0]
    for _ in range(20):
        # Errors below 2 % count as noise of the measurement and are weighted as in least squares.
        pull = 1 / np.sqrt(np.maximum(np.abs(scaled @ weights - target), 0.02))
        weights = np.linalg.lstsq(scaled * pull[:, None], target * pull, rcond=None)[0]
    return tuple(float(f"{w:.6g}") for w in weights)


def _statistics(model: SkewModel, shots: Columns, use: NDArray[np.bool_]) -> dict[str, float]:
    """Relative error of the time: median and 90th percentile of its size, and its signed mean."""
    import numpy as np

    names = ("chunk", "history", "decodes", "mean", "longest", "t_mean", "t_max")
    rows = zip(*[shots[name][use].tolist() for name in names], strict=True)
    times = np.array([row[5] + model.excess(int(row[0]), row[1], int(row[2]), *row[3:]) for row in rows])
    if not len(times):
        return {}
    error = times / shots["t_skew"][use] - 1
    p50, p90 = np.quantile(np.abs(error), [0.5, 0.9])
    return {"p50": round(float(p50), 4), "p90": round(float(p90), 4), "signed_mean": round(float(error.mean()), 4)}
