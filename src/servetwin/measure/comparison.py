"""A simulated run beside a real one: the figures, before anything is shown of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from rich.console import Console

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

METRICS = ("ttft_ms", "tpot_ms", "e2el_ms")
STATISTICS = ("mean", "median", "p90", "p95", "p99")
NAMED_MISMATCHES = 10


@dataclass(frozen=True)
class Pair:
    """A figure of the real and of the simulated run; None where a run does not have it."""

    real: float | None
    simulated: float | None

    @property
    def difference_percent(self) -> float | None:
        """100 (simulated - real) / real."""
        if self.real is None or self.simulated is None or not self.real:
            return None
        return 100 * (self.simulated - self.real) / self.real

    def as_dict(self) -> dict[str, float | None]:
        return {"real": self.real, "simulated": self.simulated, "difference_percent": self.difference_percent}


@dataclass(frozen=True)
class Matched:
    """Errors of single requests, 100 (simulated - real) / real: mean, median and P90 of their size, and their mean."""

    requests: int
    mape_percent: float
    median_ape_percent: float
    p90_ape_percent: float
    bias_percent: float


@dataclass(frozen=True)
class Metric:
    """One latency (ms): the populations of both runs, one entry a finished request, and the pairs that match."""

    real: Floats
    simulated: Floats
    pair_request: Ints
    pair_real: Floats
    pair_simulated: Floats

    @property
    def statistics(self) -> dict[str, Pair]:
        return {name: Pair(_statistic(name, self.real), _statistic(name, self.simulated)) for name in STATISTICS}

    @property
    def matched(self) -> Matched | None:
        known = self.pair_real > 0
        if not known.any():
            return None
        error = 100 * (self.pair_simulated[known] / self.pair_real[known] - 1)
        size = np.abs(error)
        figures = (size.mean(), np.median(size), np.percentile(size, 90), error.mean())
        return Matched(int(known.sum()), *(float(figure) for figure in figures))


def _statistic(name: str, values: Floats) -> float | None:
    if not len(values):
        return None
    if name == "mean":
        return float(values.mean())
    return float(np.percentile(values, 50 if name == "median" else int(name[1:])))


@dataclass(frozen=True)
class Report:
    """The comparison of one simulated with one real run."""

    run: str
    against: str
    source: str
    real_requests: int
    simulated_requests: int
    common_requests: int
    mismatches: list[dict[str, int]]
    """common requests whose lengths differ: `request` and input and output tokens of both runs"""
    totals: dict[str, Pair]
    metrics: dict[str, Metric]
    notes: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON, written as `validation.json`."""
        metrics: dict[str, Any] = {}
        for name, metric in self.metrics.items():
            matched = metric.matched
            metrics[name] = {
                **{statistic: pair.as_dict() for statistic, pair in metric.statistics.items()},
                "matched": vars(matched) if matched else None,
            }
        return {
            "run": self.run,
            "against": self.against,
            "source": self.source,
            "requests": {
                "real": self.real_requests,
                "simulated": self.simulated_requests,
                "common": self.common_requests,
                "length_mismatches": len(self.mismatches),
                "mismatched": self.mismatches[:NAMED_MISMATCHES],
            },
            "totals": {name: pair.as_dict() for name, pair in self.totals.items()},
            "metrics": metrics,
            "notes": self.notes,
        }

    def print(self, console: Console) -> None:
        """Two tables and what to know about them; plain text when `console` is no terminal."""
        from servetwin.measure.validation_text import print_report

        print_report(self, console)
