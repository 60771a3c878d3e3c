"""What a fit compares: latencies of measured and simulated runs, in figures that change smoothly with the terms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from servetwin.errors import InputError
from servetwin.measure.calibration_data import Ints, Mask, Observed
from servetwin.measure.calibration_result import METRICS
from servetwin.measure.calibration_runs import Replay

Floats = NDArray[np.float64]

GROUP = 10
"""Requests of one run are compared by the geometric mean of about ten of like prompt length. Where a single request
ends up depends on which step it just caught, and turns over with the slightest change of a term; means do not."""


@dataclass(frozen=True)
class Figure:
    """The geometric mean of one latency over some entries of an observed run."""

    run: int
    metric: int
    """0 TTFT, 1 TPOT"""
    entries: Ints
    log_ms: float
    """as measured"""
    weight: float = 1.0


def latencies_of(one: Observed | Replay) -> Floats:
    """TTFT and TPOT (ms), shape (2, entries)."""
    return np.stack([one.ttft_ms, one.tpot_ms])


def figures_of(observed: Sequence[Observed], train: Sequence[Mask]) -> list[Figure]:
    """The figures of the train part.

    The squares of their weights add up to 1: each source has the same share, of which TTFT and TPOT each have half,
    however many figures they are. Raises InputError when there are none.
    """
    found = []
    for run, (one, mask) in enumerate(zip(observed, train, strict=True)):
        latencies = latencies_of(one)
        for group in _groups(one, mask):
            for metric in range(len(METRICS)):
                entries = group[latencies[metric, group] > 0]
                if len(entries):
                    found.append(Figure(run, metric, entries, _log_mean(latencies[metric, entries])))
    if not found:
        raise InputError("nothing measured is in the train part", where="--real", allowed="a larger train part")
    kinds = [(observed[figure.run].source, figure.metric) for figure in found]
    counts = Counter(kinds)
    return [
        replace(figure, weight=(len(counts) * counts[kind]) ** -0.5) for figure, kind in zip(found, kinds, strict=True)
    ]


def _groups(one: Observed, mask: Mask) -> list[Ints]:
    entries = np.flatnonzero(mask)
    if one.input_tokens is None:
        return [entries]
    ordered = entries[np.argsort(one.input_tokens[entries], kind="stable")]
    return list(np.array_split(ordered, max(1, len(ordered) // GROUP)))


def differences(figures: Sequence[Figure], replays: Mapping[int, Replay]) -> Floats:
    """Weighted ln(simulated / measured) of each figure, shape (figures,); `replays` by run."""
    latencies = {run: latencies_of(replay) for run, replay in replays.items()}
    simulated = np.array([_log_mean(latencies[one.run][one.metric, one.entries]) for one in figures])
    measured = np.array([one.log_ms for one in figures])
    weights = np.array([one.weight for one in figures])
    return np.asarray(weights * (simulated - measured))


def _log_mean(values: Floats) -> float:
    return float(np.log(values).mean())
