"""Attention over a batch: prefill (context) by query-key pairs, decode (generation) by keys read."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from servetwin.timing.kernels.curve import Curve, Floats, How, PowerCurve, bracket, worst
from servetwin.timing.kernels.profile import Columns

Ints = NDArray[np.int64]


class Surface(NamedTuple):
    """Times over (batch, length) without holes: `ns[i, j]` belongs to `batches[i]` and `lengths[j]`.

    `limits[i]` is the longest length that was measured at `batches[i]`; times beyond it were filled in.
    """

    batches: list[int]
    lengths: list[int]
    ns: Floats
    limits: list[int]
    how: How


def causal_pairs(length: float, window: int = 0) -> float:
    """Query-key pairs of a prompt of `length` tokens; with a sliding window each query sees at most `window` keys."""
    if window and length > window:
        return window * (window + 1) / 2 + (length - window) * window
    return length * (length + 1) / 2


class Prefills(NamedTuple):
    """A batch of prefills as equal sequences with the same sums: pairs of each, and of its two bounds."""

    pairs: float
    fresh: float
    """pairs if the new tokens had nothing before them"""
    whole: float
    """pairs if all tokens, old and new, were computed"""


def prefills(seqs: int, tokens: int, pairs: int, window: int = 0) -> Prefills:
    """Query-key pairs a sequence of a batch of prefills.

    `tokens` is the sum of new tokens q, `pairs` the sum of q*c + q(q+1)/2 over the sequences (c: tokens already
    there), both without regard to a window, as in `StepShape`.
    """
    new = tokens / seqs
    before = max(pairs / tokens - (new + 1) / 2, 0.0)
    whole = causal_pairs(before + new, window)
    spent = whole - causal_pairs(before, window) if window else pairs / seqs
    return Prefills(spent, causal_pairs(new, window), whole)


class ContextAttention:
    """Prefill attention of one head layout (or of a latent-attention module).

    Only whole prompts were timed. A batch of q new tokens each after c old ones lies between a prompt of q tokens and
    one of c + q: it takes the time of the first, plus the same share of the difference as it computes of the
    difference in query-key pairs. Without old tokens that is the measured prompt; unequal lengths count as
    the equal ones with the same sums. Linear over the batch, a power law over pairs between measured prompts.
    """

    def __init__(self, surface: Surface, window: int, measured_window: int) -> None:
        self._surface, self.window, self._measured_window = surface, window, measured_window
        self._works = [causal_pairs(length, measured_window) for length in surface.lengths]
        self._curves: dict[int, PowerCurve] = {}

    def price(self, seqs: int, tokens: int, pairs: int) -> tuple[float, How]:
        """Time in ns of one layer over a batch of prefills (see `prefills` for the three sums), and how it is known:
        with old tokens, or unequal lengths, at best interpolated."""
        curve = self._curves.get(seqs) or self.curve(seqs)
        spent, alone, whole = prefills(seqs, tokens, pairs, self.window)
        fresh, how = curve.price(alone)
        if spent <= alone:
            return fresh, how
        full, how_full = curve.price(whole)
        known: How = "extrapolated" if "extrapolated" in (how, how_full) else "interpolated"
        return fresh + (full - fresh) * (spent - alone) / (whole - alone), known

    def ns(self, seqs: int, tokens: int, pairs: int) -> float:
        """The time of `price`."""
        return self.price(seqs, tokens, pairs)[0]

    def how(self, seqs: int, tokens: int, pairs: int) -> How:
        """How that time is known."""
        return self.price(seqs, tokens, pairs)[1]

    def curve(self, seqs: int) -> PowerCurve:
        """Time over the query-key pairs of one sequence, for one batch size."""
        if seqs not in self._curves:
            times, limit, how = at_batch(self._surface, seqs)
            self._curves[seqs] = PowerCurve(self._works, times, how, causal_pairs(limit, self._measured_window))
        return self._curves[seqs]


class GenerationAttention:
    """Decode attention of one head layout: linear over the batch and over the mean number of keys a sequence."""

    def __init__(self, surface: Surface, window: int, measured_window: int) -> None:
        self._surface = surface
        self.clip = 0 if window == measured_window else window
        """most keys that a token sees, where the table does not know of it; 0: all of them"""
        self._curves: dict[int, Curve] = {}

    def price(self, seqs: int, context_sum: int) -> tuple[float, How]:
        """Time in ns of one layer for one new token in each of `seqs` sequences, and how it is known.

        `context_sum` is the sum of their tokens before the step; each new token adds one key.
        """
        keys = context_sum / seqs + 1.0
        if self.clip and keys > self.clip:
            keys = self.clip
        return (self._curves.get(seqs) or self.curve(seqs)).price(keys)

    def ns(self, seqs: int, context_sum: int) -> float:
        """The time of `price`."""
        return self.price(seqs, context_sum)[0]

    def how(self, seqs: int, context_sum: int) -> How:
        """How that time is known."""
        return self.price(seqs, context_sum)[1]

    def run(self, seqs: int, context_sum: int, steps: int) -> Floats:
        """Times in ns, shape (steps,), of consecutive decode steps of an unchanged batch; each equals `ns`."""
        return self.curve(seqs).many(self._keys(seqs, context_sum, steps))

    def run_prices(self, seqs: int, context_sum: int, steps: int) -> tuple[Floats, NDArray[np.int8]]:
        """`run`, and how each time is known, as its place in HOWS."""
        return self.curve(seqs).many_prices(self._keys(seqs, context_sum, steps))

    def _keys(self, seqs: int, context_sum: int, steps: int) -> Floats:
        keys: Floats = (context_sum + seqs * np.arange(steps, dtype=np.int64)) / seqs + 1.0
        return np.minimum(keys, self.clip) if self.clip else keys

    def few_wholes(
        self, seqs: int, context_sum: int, longest: int, steps: int, uneven: float, factor: float, calls: float
    ) -> tuple[list[int], list[tuple[int, How]]]:
        """ns of `calls` layers in consecutive decode steps of an unchanged batch, without the cost of arrays.

        Each is `int(calls * t)` of the time t of `price` times `factor`, plus `uneven` times what contexts as long as
        the longest would take more. With them: how they are known, as (first step, how) of each change.
        """
        curve = self._curves.get(seqs) or self.curve(seqs)
        clip = self.clip or math.inf
        xs, ys, slopes = curve.xs, curve.ys, curve.slopes
        differ = longest * seqs > context_sum
        wholes: list[int] = []
        changes: list[tuple[int, How]] = []
        known: How | None = None
        upto = upto_longest = -math.inf  # where the straight lines end that the last step was on
        x = y = slope = x2 = y2 = slope2 = 0.0
        at: How = curve.shape_how
        after = at
        for context in range(context_sum, context_sum + steps * seqs, seqs):
            keys = context / seqs + 1.0
            if keys > clip:
                keys = clip
            if keys >= upto:
                i = bisect_right(xs, keys) - 1
                if i < 0:
                    x, y, slope, upto = keys, ys[0], 0.0, xs[0]
                    at = after = "extrapolated"
                else:
                    x, y, slope = xs[i], ys[i], slopes[i]
                    at, after = curve.known(i)
                    upto = xs[i + 1] if i + 1 < len(xs) else math.inf
            beyond = keys - x
            ns = (y + slope * beyond) * factor
            if differ:
                longest += 1
                keys = float(longest)
                if keys > clip:
                    keys = clip
                if keys >= upto_longest:
                    i = bisect_right(xs, keys) - 1
                    if i < 0:
                        x2, y2, slope2, upto_longest = keys, ys[0], 0.0, xs[0]
                    else:
                        x2, y2, slope2 = xs[i], ys[i], slopes[i]
                        upto_longest = xs[i + 1] if i + 1 < len(xs) else math.inf
                ns += uneven * ((y2 + slope2 * (keys - x2)) * factor - ns)
            how = after if beyond else at
            if how != known:
                changes.append((len(wholes), how))
                known = how
            wholes.append(int(ns * calls))
        return wholes, changes

    def curve(self, seqs: int) -> Curve:
        """Time over the mean number of keys (context + 1), for one batch size."""
        if seqs not in self._curves:
            times, limit, how = at_batch(self._surface, seqs)
            self._curves[seqs] = Curve(self._surface.lengths, times, how, affine=True, limit=limit)
        return self._curves[seqs]


class AttentionTable:
    """Measured surfaces of one phase and KV format, by head dimension, window, KV heads and query heads."""

    def __init__(self, columns: Columns, work: Callable[[float, int], float]) -> None:
        self._columns, self._work = columns, work
        self._codes = columns["head_dim"] << 32 | columns["window"]
        self._lanes: dict[tuple[int, int], _Lane | None] = {
            (code >> 32, code & 0xFFFFFFFF): None for code in np.unique(self._codes).tolist()
        }

    def find(self, heads: int, kv_heads: int, head_dim: int, window: int = 0) -> tuple[Surface, int]:
        """The surface of a head layout and the window with which it was measured.

        A head dimension that was not timed takes the next larger one (kernels pad to it); a window that was not timed
        takes full attention at as many pairs or keys; both count as extrapolated.
        """
        dims = sorted({dim for dim, _ in self._lanes})
        dim = next((d for d in dims if d >= head_dim), dims[-1])
        how: How = "measured" if dim == head_dim else "extrapolated"
        scale = max(1.0, head_dim / dim)
        measured = window if (dim, window) in self._lanes else 0
        if measured != window:
            how = "extrapolated"
        surface = _layout(self._lane(dim, measured), heads, kv_heads)
        return surface._replace(ns=surface.ns * scale, how=worst(how, surface.how)), measured

    def _lane(self, dim: int, window: int) -> _Lane:
        lane = self._lanes[dim, window]
        if lane is None:
            rows = self._codes == (dim << 32 | window)
            lane = _Lane({name: column[rows] for name, column in self._columns.items()}, partial(self._work_in, window))
            self._lanes[dim, window] = lane
        return lane

    def _work_in(self, window: int, length: float) -> float:
        return self._work(length, window)


class _Lane:
    """The head layouts measured at one head dimension and window, on a common grid of batches and lengths."""

    def __init__(self, columns: Columns, work: Callable[[float], float]) -> None:
        self._work = work
        self._batches, row = np.unique(columns["batch"], return_inverse=True)
        self._lengths, column = np.unique(columns["length"], return_inverse=True)
        codes, plane = np.unique(columns["kv_heads"] << 32 | columns["heads"], return_inverse=True)
        self._times = np.full((len(codes), len(self._batches), len(self._lengths)), np.nan)
        self._times[plane, row, column] = columns["ns"]
        self.layouts = {(code >> 32, code & 0xFFFFFFFF): i for i, code in enumerate(codes.tolist())}
        """(KV heads, query heads) -> plane"""

    def __getitem__(self, layout: tuple[int, int]) -> Surface:
        return _surface(self._times[self.layouts[layout]], self._batches, self._lengths, self._work)


def surface_of(columns: Columns, work: Callable[[float], float]) -> Surface:
    """One surface from the `batch`, `length`, `ns` columns of a single kernel shape, holes filled by `fill`."""
    batches, row = np.unique(columns["batch"], return_inverse=True)
    lengths, column = np.unique(columns["length"], return_inverse=True)
    times = np.full((len(batches), len(lengths)), np.nan)
    times[row, column] = columns["ns"]
    return _surface(times, batches, lengths, work)


def _surface(times: Floats, batches: Ints, lengths: Ints, work: Callable[[float], float]) -> Surface:
    measured = ~np.isnan(times)
    limits = np.where(measured, lengths, 0).max(axis=1)
    return Surface(batches.tolist(), lengths.tolist(), fill(times, batches, lengths, work), limits.tolist(), "measured")


def fill(times: Floats, batches: Ints, lengths: Ints, work: Callable[[float], float]) -> Floats:
    """Give the sizes that were not timed (large batch x long context) a time.

    From half the batch in proportion to the batch; in the first row from the next shorter length in proportion to the
    work. These are beyond the measurements, so the time may only grow.
    """
    full = times.copy()
    for i, j in np.argwhere(np.isnan(full)):
        if i > 0:
            full[i, j] = full[i - 1, j] * batches[i] / batches[i - 1]
        elif j > 0:
            full[i, j] = full[i, j - 1] * work(float(lengths[j])) / work(float(lengths[j - 1]))
        else:
            full[i, j] = np.nanmin(full)
    return full


def _layout(lane: _Lane, heads: int, kv_heads: int) -> Surface:
    """Surface of a head layout: measured, between two measured ones, or scaled from the nearest."""
    if (kv_heads, heads) in lane.layouts:
        return lane[kv_heads, heads]
    same_kv = sorted(h for kv, h in lane.layouts if kv == kv_heads)
    if same_kv and same_kv[0] <= heads <= same_kv[-1]:
        low, high, share = bracket(same_kv, heads)
        return blend(lane[kv_heads, low], lane[kv_heads, high], share)
    group = heads // kv_heads
    same_group = sorted(kv for kv, h in lane.layouts if h == kv * group)
    if same_group and same_group[0] <= kv_heads <= same_group[-1]:
        low, high, share = bracket(same_group, kv_heads)
        return blend(lane[low, low * group], lane[high, high * group], share)
    kv, h = min(lane.layouts, key=lambda at: (abs(np.log(at[0] / kv_heads)) + abs(np.log(at[1] / heads)), at))
    scale = max(kv_heads / kv, heads / h)
    nearest = lane[kv, h]
    return nearest._replace(ns=nearest.ns * scale, how="extrapolated")


def blend(low: Surface, high: Surface, share: float) -> Surface:
    """The surface a `share` of the way from one to the other."""
    limits = [min(pair) for pair in zip(low.limits, high.limits, strict=True)]
    return low._replace(ns=low.ns + share * (high.ns - low.ns), limits=limits, how="interpolated")


def at_batch(surface: Surface, seqs: int) -> tuple[Floats, float, How]:
    """Times over the lengths for a batch of `seqs`, the longest measured length, and how they are known.

    Between two measured batches on a straight line; beyond the largest in proportion.
    """
    low, high, share = bracket(surface.batches, seqs)
    i, j = surface.batches.index(low), surface.batches.index(high)
    if share:
        times = surface.ns[i] + share * (surface.ns[j] - surface.ns[i])
        return times, min(surface.limits[i], surface.limits[j]), worst(surface.how, "interpolated")
    if seqs == low:
        return surface.ns[i], surface.limits[i], surface.how
    return surface.ns[i] * max(seqs / low, 1.0), surface.limits[i], "extrapolated"
