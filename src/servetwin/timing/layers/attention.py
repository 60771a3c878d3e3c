"""The measured attention table: time of one varlen attention call over (chunk, history, decodes, context).

A row of the table is one kernel launch: one prefill of `chunk` new tokens on `history` computed tokens beside
`decodes` sequences that each read `context` computed tokens. In this data layout (and the linear blending inside the
grid) we follow LLMServingSim 2.0; outside the grid and where a (chunk, decodes) slice was not measured the rules are
our own, see docs/profiles.md.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from servetwin.timing.layers.curve import EXTRAPOLATED, INTERPOLATED, MEASURED, Curve, bracket

Terms = list[tuple[float, Curve]]
"""A time as a weighted sum of curves over the context of the decodes."""


class Slice:
    """The measurements at one (chunk, decodes): a curve over the context for every history."""

    __slots__ = ("curves", "histories")

    def __init__(self, histories: list[int], curves: list[Curve]) -> None:
        self.histories, self.curves = histories, curves


class AttentionTable:
    """`rows`: columns (chunk, history, decodes, context, ns), sorted by chunk, decodes, history, context."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self._slices = _build(rows)
        self._chunks = list(self._slices)
        self._prefill_only = [chunk for chunk in self._chunks if chunk > 0 and self._slices[chunk][0][0] == 0]
        self.shortest = float(min(rows[4]))
        self._launch = Curve([0], [self.shortest])
        self._decode_terms: dict[int, tuple[Terms, int]] = {}

    def price(self, chunk: int, history: float, decodes: int, mean: float, longest: float) -> tuple[float, float, int]:
        """Times in ns (not rounded) with all contexts at `mean` and at `longest`, and how (the worst part).

        `history` may be negative: several prefills in one step have fewer query-key pairs than one of their length.
        """
        if chunk == 0:
            terms, how = self._decode_terms.get(decodes) or self._blend(decodes)
        else:
            terms, how = self._terms(chunk, history, decodes, beyond=True)
        t_mean, t_longest, how_contexts = _sum(terms, mean, longest)
        if how == EXTRAPOLATED and chunk:
            # Beyond the grid a time is not below the one at its edge (a negative history is no edge).
            edge = self._terms(chunk, history, decodes, beyond=False)[0] if history >= 0 else []
            edge_mean, edge_longest, _ = _sum(edge, mean, longest)
            return max(self.shortest, t_mean, edge_mean), max(self.shortest, t_longest, edge_longest), how
        return t_mean, t_longest, how if how > how_contexts or not decodes else how_contexts

    def _terms(self, chunk: int, history: float, decodes: int, *, beyond: bool) -> tuple[Terms, int]:
        last = self._chunks[-1]
        if chunk > last:
            # Causal attention over a long chunk has the query-key pairs of chunk/last chunks of the longest measured
            # length at the mean of their histories, launched once; the decodes run beside one of them.
            if not beyond:
                return self._terms(last, history, decodes, beyond=False)
            middle = history + (chunk - last) / 2
            terms = self._terms(last, middle, decodes, beyond=True)[0]
            rest = self._terms(last, middle, 0, beyond=True)[0] if self._prefill_only else terms
            more = chunk / last - 1
            return [*terms, *[(more * w, curve) for w, curve in rest], (-more, self._launch)], EXTRAPOLATED
        if history < 0:
            # The slope over the history is the price of a pair: the pairs that are missing are taken off at that price.
            here = self._terms(chunk, 0, decodes, beyond=beyond)[0]
            mirrored = self._terms(chunk, -history, decodes, beyond=beyond)[0]
            return [(2 * w, curve) for w, curve in here] + [(-w, curve) for w, curve in mirrored], EXTRAPOLATED
        axis = (self._prefill_only or self._chunks) if decodes == 0 else self._chunks
        corners, how = bracket(axis, chunk, beyond)
        terms = []
        counts: list[int] = []
        histories: list[int] = []
        around: tuple[tuple[int, float], ...] = ()
        pairs: tuple[tuple[int, float], ...] = ()
        for i, chunk_weight in corners:
            measured, slices = self._slices[axis[i]]
            if measured is not counts:
                counts = measured
                pairs, how_decodes = bracket(counts, decodes, beyond)
                how = max(how, how_decodes)
            for j, weight in pairs:
                part = slices[j]
                if axis[i] == 0:  # no prefill, no history
                    histories, around = [], ((0, 1.0),)
                elif part.histories is not histories:
                    histories = part.histories
                    around, how_history = bracket(histories, history, beyond)
                    how = max(how, how_history)
                for k, history_weight in around:
                    terms.append((chunk_weight * weight * history_weight, part.curves[k]))
        return terms, how

    def _blend(self, decodes: int) -> tuple[Terms, int]:
        """A pure-decode step with that many sequences as one curve over the context."""
        terms, how = self._terms(0, 0, decodes, beyond=True)
        edge = self._terms(0, 0, decodes, beyond=False)[0]
        xs = sorted({x for _, curve in terms for x in curve.xs})
        ts = [sum([w * curve.at(x) for w, curve in terms]) for x in xs]
        if how == EXTRAPOLATED:
            ts = [max(t, sum([w * curve.at(x) for w, curve in edge])) for x, t in zip(xs, ts, strict=True)]
        blended = Curve(xs, ts)
        blended.first = max(curve.first for _, curve in terms)
        blended.last = min(curve.last for _, curve in terms)
        return self._decode_terms.setdefault(decodes, ([(1.0, blended)], how))


def _sum(terms: Terms, mean: float, longest: float) -> tuple[float, float, int]:
    """The weighted sums at two contexts, and how the contexts lie. Curves that share their points are searched once."""
    t_mean = t_longest = 0.0
    how = MEASURED
    xs: list[int] = []
    for w, curve in terms:
        if curve.xs is not xs:
            xs = curve.xs
            i = bisect_right(xs, mean) - 1
            past = mean - xs[i]
            j, far = i, past
            if longest > mean:
                j = bisect_right(xs, longest) - 1
                far = longest - xs[j]
            if mean < curve.first or longest > curve.last:
                how = EXTRAPOLATED
            elif how == MEASURED and (past or far):
                how = INTERPOLATED
        t_mean += w * (curve.ts[i] + past * curve.slopes[i])
        t_longest += w * (curve.ts[j] + far * curve.slopes[j])
    return t_mean, t_longest, how


def _build(rows: Sequence[Sequence[int]]) -> dict[int, tuple[list[int], list[Slice]]]:
    """chunk -> (numbers of decodes, their slices). Equal axes become one object, so that they are searched once."""
    chunks, histories, counts, contexts, times = rows
    axes: dict[tuple[int, ...], list[int]] = {}
    found: dict[int, tuple[list[int], list[Slice]]] = {}
    alone: dict[tuple[int, int], int] = {}
    """time of the prefill without decodes, by (chunk, history)"""
    start, end = 0, len(times)
    while start < end:
        chunk, history, count = chunks[start], histories[start], counts[start]
        stop = start + 1
        while stop < end and histories[stop] == history and counts[stop] == count and chunks[stop] == chunk:
            stop += 1
        xs, ts = contexts[start:stop], times[start:stop]
        if count == 0:
            alone[chunk, history] = ts[0]
        curve = Curve(xs, ts, _at_zero(xs, ts, alone.get((chunk, history), 0)))
        curve.xs = axes.setdefault((curve.first, *curve.xs), curve.xs)
        measured, slices = found.setdefault(chunk, ([], []))
        if not measured or measured[-1] != count:
            measured.append(count)
            slices.append(Slice([], []))
        slices[-1].histories.append(history)
        slices[-1].curves.append(curve)
        start = stop
    for chunk, (measured, slices) in found.items():
        found[chunk] = axes.setdefault(tuple(measured), measured), slices
        for part in slices:
            part.histories = axes.setdefault(tuple(part.histories), part.histories)
    return found


def _at_zero(xs: Sequence[int], ts: Sequence[int], alone: int) -> float:
    """Where the line through the first two contexts reaches 0: from the prefill alone up to the first time."""
    if len(xs) < 2:
        return ts[0]
    line = ts[0] - xs[0] * (ts[1] - ts[0]) / (xs[1] - xs[0])
    return min(float(ts[0]), max(line, float(alone), 1.0))
