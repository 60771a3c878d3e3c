"""Dispatch of tokens to the ranks of their experts, and combination of what comes back."""

from __future__ import annotations

from math import log

import numpy as np

from servetwin.timing.kernels.curve import Curve
from servetwin.timing.kernels.profile import Columns


class AllToAllTable:
    """Measured curves of one backend and phase, by group size, hidden size, experts a token and experts."""

    def __init__(self, columns: Columns) -> None:
        keys = np.stack([columns[name] for name in ("ep", "hidden", "topk", "experts")], axis=1)
        starts = np.flatnonzero(np.r_[True, (np.diff(keys, axis=0) != 0).any(axis=1)]).tolist()
        self._curves: dict[tuple[int, ...], Curve] = {
            tuple(keys[a].tolist()): Curve(columns["tokens"][a:b].astype(float), columns["ns"][a:b].astype(float))
            for a, b in zip(starts, [*starts[1:], len(keys)], strict=True)
        }

    def curve(self, ep: int, hidden: int, topk: int, experts: int) -> Curve | None:
        """Time over the tokens of a rank: measured, or of the nearest shape by the bytes a token sends."""
        if (ep, hidden, topk, experts) in self._curves:
            return self._curves[ep, hidden, topk, experts]
        sent = hidden * topk
        near = [(abs(log(sent / (at[1] * at[2]))), abs(log(experts / at[3])), at) for at in self._curves if at[0] == ep]
        if not near:
            return None
        nearest = min(near)[2]
        base = self._curves[nearest]
        scale = max(sent / (nearest[1] * nearest[2]), 1.0)
        return Curve(base.xs, [time * scale for time in base.ys], "extrapolated")
