"""Multi-head latent attention, timed as a whole module (projections and attention of one layer)."""

from __future__ import annotations

import numpy as np

from servetwin.timing.kernels.attention import Surface, blend, surface_of
from servetwin.timing.kernels.curve import bracket
from servetwin.timing.kernels.profile import Columns


class MlaTable:
    """Measured modules of one phase and number format, by local heads."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self.heads: list[int] = np.unique(columns["heads"]).tolist()
        """measured"""

    def surface(self, heads: int) -> Surface:
        """The surface for a number of heads on this rank: measured, or linear between measured ones."""
        low, high, share = bracket(self.heads, heads)
        if share:
            return blend(self._measured(low), self._measured(high), share)
        nearest = self._measured(low)
        if heads == low:
            return nearest
        return nearest._replace(ns=nearest.ns * max(heads / low, 1.0), how="extrapolated")

    def _measured(self, heads: int) -> Surface:
        rows = self._columns["heads"] == heads
        return surface_of({name: column[rows] for name, column in self._columns.items()}, float)
