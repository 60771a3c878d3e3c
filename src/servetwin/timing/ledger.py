"""Where priced time came from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Ledger:
    """Device time priced so far, in integer ns, by the kind of knowledge behind it.

    measured: read off a measurement; interpolated: between measurements; extrapolated: beyond them; analytic: from a
    formula. `assumed` is the part of `analytic` which rests on numbers that nobody has fitted to a measurement.
    """

    measured: int = 0
    interpolated: int = 0
    extrapolated: int = 0
    analytic: int = 0
    assumed: int = 0
