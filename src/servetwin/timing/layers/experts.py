"""The measured mixture-of-experts block: time over (tokens, activated experts)."""

from __future__ import annotations

from collections.abc import Sequence

from servetwin.timing.layers.curve import EXTRAPOLATED, Curve, bracket


class ExpertTable:
    """`rows`: columns (tokens, activated experts, ns), sorted by activated experts, then tokens."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        tokens, activated, times = rows
        points: dict[int, tuple[list[int], list[int]]] = {}
        for x, experts, ns in zip(tokens, activated, times, strict=True):
            xs, ts = points.setdefault(experts, ([], []))
            xs.append(x)
            ts.append(ns)
        self.activated = list(points)
        self._curves = [Curve(xs, ts) for xs, ts in points.values()]

    def price(self, tokens: float, activated: float) -> tuple[int, int]:
        """(ns, how) of one block: linear in tokens at the two nearest numbers of experts, linear between them."""
        around, how = bracket(self.activated, activated, beyond=True)
        time = sum([w * self._curves[i].at(tokens) for i, w in around])
        if how == EXTRAPOLATED:
            edge = bracket(self.activated, activated, beyond=False)[0]
            time = max(time, sum([w * self._curves[i].at(tokens) for i, w in edge]))
        how = max(how, *[self._curves[i].how(tokens) for i, _ in around])
        return max(1, int(time)), how


def expected_distinct(experts: int, top_k: int, tokens: int) -> float:
    """Expected distinct experts hit when each token picks `top_k` of `experts` evenly: E (1 - (1 - k/E)^T)."""
    return experts * (1.0 - (1.0 - top_k / experts) ** tokens)
