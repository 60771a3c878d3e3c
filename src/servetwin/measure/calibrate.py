"""Fitting a handful of physical terms to measured runs, and how far off the runs are that the fit did not see."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from servetwin.errors import InputError
from servetwin.measure.calibration_data import Mask, Observed
from servetwin.measure.calibration_figures import differences, figures_of, latencies_of
from servetwin.measure.calibration_fit import Fit, minimise, trust
from servetwin.measure.calibration_result import METRICS, Calibration, Errors, FittedTerm, Part
from servetwin.measure.calibration_runs import Replay, Runs
from servetwin.measure.calibration_terms import (
    BY_NAME,
    FITTED,
    Term,
    check_count,
    check_told_apart,
    choose,
    start_values,
    terms_named,
    with_values,
)
from servetwin.scenario.resolve import resolve
from servetwin.timing.choose import host_of
from servetwin.timing.overlay import Overlay, read_overlay

Floats = NDArray[np.float64]
Progress = Callable[[int, float | None], None]


def calibrate(
    observed: Sequence[Observed],
    train: Sequence[Mask],
    terms: Sequence[str] | None = None,
    *,
    workers: int = 1,
    progress: Progress | None = None,
) -> Calibration:
    """Fit `terms` (None: those that the data can hold, see `calibration_terms.FITTED`) to the train part.

    `train` has a mask for each of `observed`: which of its entries are fitted. Terms start from the scenarios' own
    overlay or engine version; what the overlay states beyond the fitted terms stays. What is minimised is the root
    mean square of ln(simulated / measured) over the figures of the train part, weighted as in `figures_of`, figures
    that are far off what is usual less (`calibration_fit.trust`).
    `progress(simulations so far, that figure for the train part or None)` is called now and then.

    Raises:
        InputError: the train part cannot hold the terms, or a run cannot be simulated.
    """
    return _Calibrating(observed, train, workers, progress).calibrate(terms)


class _Calibrating:
    def __init__(
        self, observed: Sequence[Observed], train: Sequence[Mask], workers: int, progress: Progress | None
    ) -> None:
        first = observed[0].scenario
        if any(one.scenario.timing.source == "linear" for one in observed):
            allowed = "auto, profile, silicon or roofline"
            raise InputError(
                "has nothing to calibrate: its law is stated", field="timing.source", found="linear", allowed=allowed
            )
        if len({one.scenario.timing.overlay for one in observed}) > 1:
            raise InputError("the scenarios name different overlays", field="timing.overlay")
        named = first.timing.overlay
        self.overlay = read_overlay(observed[0].base / named) if named else Overlay()
        self.start = start_values(self.overlay, host_of(resolve(first, observed[0].base).pools[0]))
        self.observed, self.train = observed, train
        self.fitted_runs = [i for i, mask in enumerate(train) if mask.any()]
        self.figures = figures_of(observed, train)
        self.progress, self.cost = progress, None if progress is None else float("nan")
        self.runs = Runs(observed, workers, self._tell)
        self.simulations = 0

    def _tell(self, simulations: int) -> None:
        self.simulations = simulations
        if self.progress is not None:
            self.progress(simulations, self.cost)

    def calibrate(self, names: Sequence[str] | None) -> Calibration:
        candidates = list(FITTED) if names is None else terms_named(names)
        if names is not None:
            check_count(candidates, len(self.figures))
        with self.runs:
            raw = self.runs(self.fitted_runs, [self.overlay])[0]
            left: dict[str, str] = {}
            if not any(replay.kv_limited for replay in raw) and BY_NAME["kv_factor"] in candidates:
                if names is not None:
                    allowed = f"leave it out, or add {BY_NAME['kv_factor'].needs}"
                    message = "no run of the train part is limited by KV blocks"
                    raise InputError(message, where="--terms", found="kv_factor", allowed=allowed)
                candidates.remove(BY_NAME["kv_factor"])
                left["kv_factor"] = "no run of the train part is limited by KV blocks"
            terms = candidates
            slopes = self._slopes(terms, self._inner(terms))
            if names is None:
                chosen, more = choose(slopes, len(self.figures), terms)
                terms, slopes, left = [terms[i] for i in chosen], slopes[:, chosen], left | more
            else:
                check_told_apart(terms, slopes)
            fit = self._fit(terms, slopes)
            return self._calibration(terms, fit, left)

    def _inner(self, terms: Sequence[Term]) -> Floats:
        return np.array([term.inner(min(max(self.start[term.name], term.low), term.high)) for term in terms])

    def _overlay(self, terms: Sequence[Term], inner: Floats) -> Overlay:
        values = {term.name: term.value(float(x)) for term, x in zip(terms, inner, strict=True)}
        return with_values(self.overlay, values)

    def _differences(self, replays: Sequence[Replay]) -> Floats:
        return differences(self.figures, dict(zip(self.fitted_runs, replays, strict=True)))

    def _slopes(self, terms: Sequence[Term], at: Floats) -> Floats:
        """Effects (n, k) of one step of each term, by simulating short forms of the runs with and without it."""
        signs = [1 if x + 1 <= term.inner(term.high) else -1 for term, x in zip(terms, at, strict=True)]
        moved = [self._overlay(terms, at + sign * np.eye(len(terms))[k]) for k, sign in enumerate(signs)]
        base, *others = self.runs(self.fitted_runs, [self._overlay(terms, at), *moved], short=True)
        before = self._differences(base)
        return np.stack(
            [(self._differences(one) - before) * sign for one, sign in zip(others, signs, strict=True)], axis=1
        )

    def _fit(self, terms: Sequence[Term], first_slopes: Floats) -> Fit:
        def residuals(at: Floats) -> Floats:
            try:
                found = self._differences(self.runs(self.fitted_runs, [self._overlay(terms, at)])[0])
            except InputError:  # too few KV blocks for a request; the start itself has been simulated
                return np.full(len(first_slopes), np.inf)
            if self.cost is not None:
                self.cost = float(np.sqrt(found @ found))
            return found

        low = np.array([term.inner(term.low) for term in terms])
        high = np.array([term.inner(term.high) for term in terms])
        weights = np.array([figure.weight for figure in self.figures])
        metrics = np.array([figure.metric for figure in self.figures])
        return minimise(
            self._inner(terms),
            low,
            high,
            residuals,
            lambda at: self._slopes(terms, at),
            first_slopes,
            lambda found: trust(found / weights, metrics),
        )

    def _calibration(self, terms: Sequence[Term], fit: Fit, left: dict[str, str]) -> Calibration:
        overlay = self._overlay(terms, fit.at)
        everything = range(len(self.observed))
        raw, calibrated = self.runs(everything, [self.overlay, overlay])
        found, notes, idle = [], [], []
        for term, x, error in zip(terms, fit.at, fit.standard_errors(), strict=True):
            start, value = self.start[term.name], term.value(float(x))
            at_bound = value <= term.low or value >= term.high
            known_to = None if at_bound else term.error(value, float(error))
            found.append(FittedTerm(term.name, start, value, known_to))
            if known_to is None:
                notes.append(f"{term.name} ended at its bound, {value:g}: it may stand for something else")
            elif abs(value - start) < 2 * known_to:
                idle.append(term.name)
        if idle:
            notes.append(f"changed by less than two standard errors, so perhaps not at all: {', '.join(idle)}")
        unseen = self._part(raw, calibrated, seen=False)
        worse = [
            metric.upper() for metric, errors in unseen.calibrated.items() if not _better(errors, unseen.raw[metric])
        ]
        if worse:
            notes.append(f"on the unseen part {' and '.join(worse)} came out no better than before")
        return Calibration(
            overlay=overlay,
            terms=found,
            left_out=left,
            train=self._part(raw, calibrated, seen=True),
            unseen=unseen,
            iterations=fit.iterations,
            simulations=self.simulations,
            notes=notes,
        )

    def _part(self, raw: Sequence[Replay], calibrated: Sequence[Replay], seen: bool) -> Part:
        masks = [mask == seen for mask in self.train]

        def errors(replays: Sequence[Replay]) -> dict[str, Errors]:
            measured = np.hstack([latencies_of(one)[:, mask] for one, mask in zip(self.observed, masks, strict=True)])
            simulated = np.hstack([latencies_of(one)[:, mask] for one, mask in zip(replays, masks, strict=True)])
            found = {metric: Errors.of(simulated[k], measured[k]) for k, metric in enumerate(METRICS)}
            return {metric: errors for metric, errors in found.items() if errors is not None}

        return Part(sum(bool(mask.any()) for mask in masks), errors(raw), errors(calibrated))


def _better(one: Errors, other: Errors) -> bool:
    return one.mape_percent < other.mape_percent
