"""The terms of a calibration as numbers to fit, and whether data can hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from servetwin.errors import InputError, nearest
from servetwin.timing.host import HostOverhead
from servetwin.timing.overlay import Overlay

Floats = NDArray[np.float64]

FIGURES_A_TERM = 3
"""figures (a mean TTFT or TPOT) that a term needs in the train part"""
VISIBLE = 0.002
"""a term's step must move the figures by so much (root mean square of relative changes) to be fitted"""
CONDITION = 20.0
"""largest condition index of the slopes, columns scaled to length 1. Dependencies are weak up to 10 and strong from 30
on (Belsley, Kuh, Welsch: Regression Diagnostics, 1980, section 3.2); terms that many runs tell apart have 2 or 3."""


@dataclass(frozen=True)
class Term:
    """How a term is fitted. Factors are fitted as their logarithm, times (ns) as they are."""

    name: str
    step: float
    """by how much it is changed to see its effect: relative for a factor, ns for a time"""
    low: float
    high: float
    needs: str
    """runs that show it"""

    @property
    def is_factor(self) -> bool:
        return self.name.endswith("_factor")

    def inner(self, value: float) -> float:
        """The value as the fit sees it: steps of size 1 are alike for all terms."""
        return math.log(value) / math.log1p(self.step) if self.is_factor else value / self.step

    def value(self, inner: float) -> float:
        """The other way round, as it is written: factors to 4 decimals, times to whole ns."""
        if self.is_factor:
            return round(math.exp(inner * math.log1p(self.step)), 4)
        return round(inner * self.step)

    def error(self, value: float, inner_error: float) -> float:
        """A standard error, in the term's own unit."""
        if self.is_factor:
            return round(value * math.log1p(self.step) * inner_error, 4)
        return round(self.step * inner_error)


FITTED: tuple[Term, ...] = (
    Term("prefill_factor", 0.05, 0.3, 3.0, "several prompt lengths"),
    Term("gap_ns", 250_000, 0, 50_000_000, "steps of different lengths"),
    Term("request_ns", 5_000_000, 0, 1_000_000_000, "several prompt lengths, arrivals at the client"),
    Term("decode_factor", 0.05, 0.3, 3.0, "decodes of different cost: tensor parallelism, contexts, concurrencies"),
    Term("attention_factor", 0.05, 0.3, 3.0, "decodes of several context lengths, priced operator by operator"),
    Term("gap_seq_ns", 5_000, 0, 1_000_000, "several concurrencies"),
    Term("kv_factor", 0.05, 0.5, 2.0, "runs limited by KV blocks, their number not set in the scenario"),
    Term("request_token_ns", 1_000, 0, 100_000, "prompts of several lengths, arrivals at the client"),
    Term("step_ns", 250_000, 0, 50_000_000, "steps that the host delays"),
)
"""In the order in which they are taken when none are named."""
BY_NAME = {term.name: term for term in FITTED}


def terms_named(names: Sequence[str]) -> list[Term]:
    """The terms of these names. Raises InputError."""
    if not names:
        raise InputError("names no term", where="--terms", allowed=", ".join(BY_NAME))
    for at, name in enumerate(names):
        if name not in BY_NAME:
            hint = nearest(name, BY_NAME)
            raise InputError("unknown term", where="--terms", found=name, allowed=", ".join(BY_NAME), hint=hint)
        if name in names[:at]:
            raise InputError("stands twice", where="--terms", found=name)
    return [BY_NAME[name] for name in names]


def start_values(overlay: Overlay, host: HostOverhead) -> dict[str, float]:
    """Every term before the fit: as the overlay states it, else a factor 1 or the engine version's host time."""
    values: dict[str, float] = {}
    for name in BY_NAME:
        stated = getattr(overlay, name)
        values[name] = stated if stated is not None else 1.0 if name.endswith("_factor") else getattr(host, name)
    return values


def with_values(overlay: Overlay, values: Mapping[str, Any]) -> Overlay:
    """`overlay` with these terms in place of its own."""
    return replace(overlay, **values)


def check_count(terms: Sequence[Term], figures: int) -> None:
    """Raises InputError when the train part is too small for so many terms."""
    most = figures // FIGURES_A_TERM
    if len(terms) > most:
        allowed = f"{FIGURES_A_TERM} for each term, so at most {most} terms, or more measurements"
        found = f"{len(terms)} terms, {figures} figures (a mean TTFT or TPOT each) in the train part"
        raise InputError("more terms than the data can hold", where="--terms", found=found, allowed=allowed)


def unseen_by(slopes: Floats) -> NDArray[np.bool_]:
    """Which columns of `slopes` (weighted effects of one step of each term, squares of weights adding up to 1) are
    too small to be fitted."""
    return np.asarray(np.linalg.norm(slopes, axis=0) < VISIBLE)


def confused(slopes: Floats) -> list[int]:
    """Columns of `slopes` (none of them 0) that cannot be told apart, empty when all can.

    By the condition index of the scaled columns and the shares of variance that belong to it (as CONDITION).
    """
    scaled = slopes / np.linalg.norm(slopes, axis=0)
    _, sizes, directions = np.linalg.svd(scaled, full_matrices=False)
    if len(sizes) == slopes.shape[1] and sizes[-1] * CONDITION >= sizes[0]:
        return []
    if len(sizes) < slopes.shape[1] or sizes[-1] < 1e-9 * sizes[0]:
        null = np.linalg.svd(scaled)[2][-1]
        return [int(i) for i in np.flatnonzero(np.abs(null) > 0.1)]
    variances = (directions.T / sizes) ** 2
    shares = variances[:, -1] / variances.sum(axis=1)
    return [int(i) for i in np.flatnonzero(shares > 0.5)]


def check_told_apart(terms: Sequence[Term], slopes: Floats) -> None:
    """Raises InputError naming the terms that the train part does not show, or cannot tell apart."""
    for term, hidden in zip(terms, unseen_by(slopes), strict=True):
        if hidden:
            message = "the train part does not depend on this term"
            raise InputError(message, where="--terms", found=term.name, allowed=f"leave it out, or add {term.needs}")
    alike = [terms[i] for i in confused(slopes)]
    if alike:
        message = "the train part cannot tell these terms apart"
        names = ", ".join(term.name for term in alike)
        needs = "; ".join(f"{term.name}: {term.needs}" for term in alike)
        raise InputError(message, where="--terms", found=names, allowed=f"one of them, or more runs ({needs})")


def choose(slopes: Floats, figures: int, candidates: Sequence[Term]) -> tuple[list[int], dict[str, str]]:
    """Indices of the `candidates` that the data can hold, taken in their order, and why the others are left out.

    Raises InputError when there is none.
    """
    chosen: list[int] = []
    left: dict[str, str] = {}
    hidden = unseen_by(slopes)
    for i, term in enumerate(candidates):
        if hidden[i]:
            left[term.name] = "the train part does not depend on it"
        elif len(chosen) >= figures // FIGURES_A_TERM:
            left[term.name] = f"{figures} figures hold no more terms ({FIGURES_A_TERM} for each)"
        elif alike := confused(slopes[:, [*chosen, i]]):
            others = ", ".join(candidates[[*chosen, i][k]].name for k in alike if k < len(chosen))
            left[term.name] = f"cannot be told apart from {others}" if others else "cannot be told apart from the rest"
        else:
            chosen.append(i)
    if not chosen:
        raise InputError(
            "the train part can hold no term", where="--real", found=f"{figures} figures", allowed="more measurements"
        )
    return chosen, left
