"""Where priced time came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

KINDS = ("measured", "interpolated", "extrapolated", "analytic", "assumed")
_PLACE = {kind: place for place, kind in enumerate(KINDS)}


class RunShares(NamedTuple):
    """What the steps of a run add to a ledger, kept step by step: not all of them may happen.

    `fixed`: ns by kind that every step adds. `parts`: what changes from step to step, each as ns by step, and (first
    step, kind) of each change of kind.
    """

    fixed: Sequence[int]
    parts: Sequence[tuple[Sequence[int], Sequence[tuple[int, str]]]]

    def between(self, first: int, last: int) -> list[int]:
        """ns by kind of the steps `first` up to before `last`."""
        shares = [ns * (last - first) for ns in self.fixed]
        for wholes, changes in self.parts:
            upto = last
            for start, kind in reversed(changes):
                if start < upto:
                    shares[_PLACE[kind]] += sum(wholes[max(start, first) : upto])
                    upto = start
                    if start <= first:
                        break
        return shares


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
