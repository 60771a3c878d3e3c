"""What a calibration found: the terms, the errors before and after, the overlay file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from servetwin import __version__
from servetwin.scenario import document
from servetwin.timing.overlay import Overlay

Floats = NDArray[np.float64]

METRICS = ("ttft", "tpot")


@dataclass(frozen=True)
class Errors:
    """Relative errors of the simulated figures of one latency, 100 (simulated / measured - 1): mean size and mean."""

    figures: int
    mape_percent: float
    bias_percent: float

    @classmethod
    def of(cls, simulated: Floats, measured: Floats) -> Errors | None:
        known = (measured > 0) & ~np.isnan(simulated)
        if not known.any():
            return None
        error = 100 * (simulated[known] / measured[known] - 1)
        return cls(int(known.sum()), float(np.abs(error).mean()), float(error.mean()))

    def as_dict(self) -> dict[str, float]:
        return {
            "figures": self.figures,
            "mape_percent": round(self.mape_percent, 2),
            "bias_percent": round(self.bias_percent, 2),
        }


@dataclass(frozen=True)
class Part:
    """The train part or the unseen one. `raw` and `calibrated` have the keys `ttft` and `tpot`, where measured."""

    runs: int
    raw: dict[str, Errors]
    calibrated: dict[str, Errors]

    def as_dict(self) -> dict[str, Any]:
        both = {"raw": self.raw, "calibrated": self.calibrated}
        errors = {name: {metric: found.as_dict() for metric, found in one.items()} for name, one in both.items()}
        return {"runs": self.runs, **errors}


@dataclass(frozen=True)
class FittedTerm:
    """`error` is its standard error, None where the term ended at a bound. Factors, or ns."""

    name: str
    start: float
    value: float
    error: float | None


@dataclass(frozen=True)
class Calibration:
    """A fitted overlay and what it is worth."""

    overlay: Overlay
    terms: list[FittedTerm]
    left_out: dict[str, str]
    """terms that were not asked for by name and are not fitted, and why"""
    train: Part
    unseen: Part
    iterations: int
    simulations: int
    notes: list[str] = field(default_factory=list)

    def text(self, files: Sequence[Mapping[str, str]] = ()) -> str:
        """The overlay file; `files` are those that it was fitted on. The same fit gives the same bytes."""
        terms = {name: value for name, value in vars(self.overlay).items() if value is not None}
        fitted = {
            "servetwin": __version__,
            "files": [dict(one) for one in files],
            "standard_errors": {term.name: term.error for term in self.terms},
            "train": self.train.as_dict(),
            "unseen": self.unseen.as_dict(),
        }
        return document.write({"overlay": 1, "terms": terms, "fitted": fitted})
