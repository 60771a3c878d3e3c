"""Where priced time came from."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("measured", "interpolated", "extrapolated", "analytic", "assumed")


@dataclass(slots=True)
class Ledger:
    """Device time priced so far, in integer ns, by the kind of knowledge behind it.

    measured: read off a measurement; interpolated: between measurements; extrapolated: beyond them; analytic: from a
    formula whose numbers were fitted or published; assumed: from a formula with numbers that nobody has fitted. The
    five add up to the time priced, exactly.
    """

    measured: int = 0
    interpolated: int = 0
    extrapolated: int = 0
    analytic: int = 0
    assumed: int = 0

    def add(self, shares: tuple[int, ...], times: int = 1) -> None:
        """Book `shares`, ns by kind in the order of the fields (missing ones are 0), `times` over."""
        for kind, ns in zip(KINDS, shares, strict=False):
            setattr(self, kind, getattr(self, kind) + ns * times)

    def book(self, shares: list[int]) -> None:
        """Book ns by kind, in the order of the fields."""
        measured, interpolated, extrapolated, analytic, assumed = shares
        self.measured += measured
        self.interpolated += interpolated
        self.extrapolated += extrapolated
        self.analytic += analytic
        self.assumed += assumed

    def less(self, earlier: Ledger) -> Ledger:
        """The difference, kind by kind, from an earlier state."""
        return Ledger(
            self.measured - earlier.measured,
            self.interpolated - earlier.interpolated,
            self.extrapolated - earlier.extrapolated,
            self.analytic - earlier.analytic,
            self.assumed - earlier.assumed,
        )

    def copy(self) -> Ledger:
        return Ledger(self.measured, self.interpolated, self.extrapolated, self.analytic, self.assumed)

    def restore(self, earlier: Ledger) -> None:
        """Back to an earlier state, for time that was priced but not used."""
        for kind in KINDS:
            setattr(self, kind, getattr(earlier, kind))
