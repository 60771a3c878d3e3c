"""The measured mixture-of-experts block: time over (tokens, activated experts)."""

from __future__ import annotations

from collections.abc import Sequence

from servetwin.model.expert_placement import straggler
from servetwin.model.kernels import Experts
from servetwin.timing.layers.curve import EXTRAPOLATED, INTERPOLATED, MEASURED, Curve, bracket


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


class ExpertBlocks:
    """The expert blocks of a model on one rank, priced from the block that was measured whole and alone.

    In the table every token finds all its k experts on the rank. A rank that holds a part of the experts computes some
    number of pairs, over some number of distinct experts; as many pairs come from pairs / k tokens of the table's, so
    the block is looked up there, at the distinct experts it has. Both matter: pairs decide the time of the products
    once they are large, distinct experts the weights that are read. That misses how the rank's router, and the sums
    over a token's experts, run over more tokens than that with fewer pairs each; they are a small part of a block. Of
    an expert cut in width over w ranks, each has 1/w of the pairs' work and of the weights: beyond what was measured.
    """

    def __init__(self, table: ExpertTable, blocks: Sequence[tuple[Experts, Sequence[int]]], width: int) -> None:
        """`blocks`: the operator of each kind of block and how many of them each pipeline stage has; `width`: ranks
        that share the width of an expert."""
        self.table, self.blocks, self._width = table, blocks, width

    def price(self, op: Experts, tokens: int) -> tuple[int, int]:
        """(ns, how) of one block whose group sees `tokens` tokens, at the rank that takes longest."""
        how = MEASURED if op.local_experts == op.experts else INTERPOLATED
        if self._width > 1:
            how = EXTRAPOLATED

        def rank(pairs: float, active: float) -> int:
            nonlocal how
            ns, found = self.table.price(pairs / op.top_k / self._width, active / self._width)
            how = max(how, found)
            return ns

        return int(straggler(op.work_of(tokens), rank)), how
