"""Mixture-of-experts layers: the grouped products of one rank over the tokens of its expert-parallel group."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from servetwin.timing.kernels.curve import Curve, Floats
from servetwin.timing.kernels.gemm import FORMATS
from servetwin.timing.kernels.profile import Columns, Device

SKEWS = {"balanced": 0, "power_law_1.01": 101, "power_law_1.2": 120}
"""How tokens fall on the experts: evenly, or by a power law of that exponent (kept as hundredths in the tables)."""


WEIGHT_ONLY_4_BIT = ("int4_wo", "w4a16_mxfp4")
"""Formats whose experts the Marlin kernel runs alike: 4-bit weights widened to 16 bits, 16-bit activations."""


class Experts(NamedTuple):
    """One rank's share of an expert layer: sizes of the model, tensor and expert parallel degrees, skew code."""

    hidden: int
    inter: int
    topk: int
    experts: int
    tp: int
    ep: int
    skew: int


ROW_PASSES = 3
"""How often the rows of a layer, one for each token and chosen expert, pass through memory at the model's full width:
gathered as input of the first product, written by the second, read to be summed. Tensor parallelism cuts the products,
not these. Marlin layers of Kimi-K2 on h200_sxm take 1.8 ms + 24.4 ms / tp at 8192 tokens; counting the rows lowers the
error of a layer from another model's in every table of H100, H200 and B200 (docs/silicon.md)."""


def roofline_ns(device: Device, dtype: str, shape: Experts, tokens: Floats) -> Floats:
    """Time in ns of one rank's layer at peak rates, balanced load: the larger of arithmetic and weight reading of three
    projections, and the rows that pass between them.

    Each rank sees all tokens of the group and computes those that chose one of its experts/ep experts; the weights
    of every expert that any token chose are read once.
    """
    form = FORMATS[dtype]
    peak = device.flops.get(form.peak, device.flops["bf16"])
    weights = 3.0 * shape.hidden * shape.inter / shape.tp
    chosen = tokens * shape.topk / shape.ep
    local = shape.experts / shape.ep
    touched = local * -np.expm1(chosen * np.log1p(-min(1 / local, 1 - 1e-9)))
    read = touched * weights * form.weight_bytes
    rows = tokens * shape.hidden * (form.activation_bytes + 2.0) + ROW_PASSES * chosen * shape.hidden * 2.0
    products = np.maximum(2.0 * chosen * weights / peak, read / device.memory_bandwidth)
    ideal: Floats = (products + rows / device.memory_bandwidth) * 1e9
    return ideal


def without_the_dip(shape: Experts, tokens: Floats, times: Floats) -> tuple[Floats, Floats]:
    """Sizes and times of a layer, less one size at which its skewed load is not that of the others.

    While experts are left out, a layer's time is that of reading the weights of the chosen ones, and of how many a
    given popularity has chosen the rise slows down with the tokens. Yet from the last size with no more rows (tokens x
    topk) than experts to the next the time leaps: there 85 of 100 layers with a skewed load lie below the line between
    their neighbours, on every device, for every number of experts, and 3 to 13 of 100 one size before or after, or
    with the balanced load. So the loads timed up to there choose fewer experts than those beyond
    (docs/silicon.md). A size below that line is left out.
    """
    at = int(np.searchsorted(tokens * shape.topk, shape.experts, side="right")) - 1
    if shape.skew == 0 or not 0 < at < len(tokens) - 1:
        return tokens, times
    if times[at] >= np.interp(tokens[at], tokens[[at - 1, at + 1]], times[[at - 1, at + 1]]):
        return tokens, times
    return np.delete(tokens, at), np.delete(times, at)


class MoeTable:
    """Measured expert layers of one number format, of one backend or of those that vLLM chose."""

    def __init__(self, columns: Columns, device: Device, dtype: str) -> None:
        self._device, self._dtype = device, dtype
        keys = np.stack([columns[name] for name in Experts._fields], axis=1)
        starts = np.flatnonzero(np.r_[True, (np.diff(keys, axis=0) != 0).any(axis=1)])
        ends = np.r_[starts[1:], len(keys)]
        self._keys = keys[starts].astype(np.float64)
        self._shapes = [Experts(*row) for row in keys[starts].tolist()]
        self._points = {
            shape: without_the_dip(
                shape, columns["tokens"][a:b].astype(np.float64), columns["ns"][a:b].astype(np.float64)
            )
            for shape, a, b in zip(self._shapes, starts.tolist(), ends.tolist(), strict=True)
        }
        self._curves: dict[tuple[Experts, str], Curve] = {}

    @property
    def shapes(self) -> list[Experts]:
        """Measured layers."""
        return self._shapes

    def curve(self, shape: Experts, dtype: str | None = None) -> Curve:
        """Time over the tokens of the whole expert-parallel group; prepared once, then kept.

        The layer was measured, or stands on the nearest that was. `dtype`: the weights are of this other format.
        """
        key = (shape, dtype or self._dtype)
        if key not in self._curves:
            if shape in self._points and key[1] == self._dtype:
                self._curves[key] = Curve(*self._points[shape])
            else:
                self._curves[key] = self.stand_in(shape, np.ones(len(self._shapes), dtype=bool), dtype)
        return self._curves[key]

    def stand_in(
        self, shape: Experts, among: np.ndarray[tuple[int], np.dtype[np.bool_]], dtype: str | None = None
    ) -> Curve:
        """The nearest layer marked in `among`, scaled at every size by the ratio of the two rooflines.

        Never less than the shortest time among these: launches and the sorting of tokens do not shrink with the layer.
        """
        nearest = self._shapes[int(np.argmin(np.where(among, self.distance(shape), np.inf)))]
        least = min(self._points[known][1].min() for known, there in zip(self._shapes, among, strict=True) if there)
        tokens, times = self._points[nearest]
        wanted = roofline_ns(self._device, dtype or self._dtype, shape, tokens)
        ratio = wanted / roofline_ns(self._device, self._dtype, nearest, tokens)
        return Curve(tokens, np.maximum(times * ratio, least), "extrapolated")

    def distance(self, shape: Experts) -> Floats:
        """How far each measured layer is, in the order of `shapes`: sum of the log ratios of what decides the time
        of one rank; the skew breaks ties."""
        hidden, inter, topk, experts, tp, ep, skew = self._keys.T
        here = Experts(*(float(v) for v in shape))  # type: ignore[arg-type]
        distance: Floats = (
            np.abs(np.log(hidden / here.hidden))
            + np.abs(np.log((inter / tp) / (here.inter / here.tp)))
            + np.abs(np.log((experts / ep) / (here.experts / here.ep)))
            + np.abs(np.log((topk / ep) / (here.topk / here.ep)))
            + np.abs(skew - here.skew) / 1000
        )
        return distance


def joined(parts: list[Columns]) -> Columns:
    """Tables of several backends as one, in file order."""
    if len(parts) == 1:
        return parts[0]
    both = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.lexsort([both[name] for name in reversed((*Experts._fields, "tokens"))])
    return {name: column[order] for name, column in both.items()}
