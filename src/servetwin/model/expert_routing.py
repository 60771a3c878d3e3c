"""Routing laws: which experts the tokens of a step pick, and how often (docs/experts.md).

A law answers for a number of tokens how many pick each expert and which experts some token picks. What that means for
the ranks is `expert_placement`'s business.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from servetwin.errors import InputError, nearest

Floats = NDArray[np.float64]

LAWS = ("balanced", "random", "zipf", "measured")
GROUP = "servetwin.expert_routing"
"""Entry points under which a user's own laws are found: name -> callable(experts=, top_k=, layer=, seed=) -> law."""
OUTCOMES = 8
"""Outcomes that a sampled law draws for a number of tokens; the price is their mean. Together with the layers of a
model, which all see the same mean, that holds its error near the spread of a real step over its layers."""
PAIRS_TO_SAMPLE = 32
"""Expected pairs an expert up to which tokens are sampled one by one; beyond, counts are nearly normal."""


class ExpertLoad(NamedTuple):
    """One outcome, by expert: `pairs`, the tokens that pick it (they sum to tokens x top_k), and `active`, the chance
    that some token does (0 or 1 where it is known)."""

    pairs: Floats
    active: Floats


class ExpertLaw(Protocol):
    """How tokens fall on the experts of a layer. Deterministic: equal numbers of tokens give equal outcomes."""

    def outcomes(self, tokens: int) -> Sequence[ExpertLoad]:
        """One or more equally likely outcomes for `tokens` tokens; a single one is an expectation."""


class Independent:
    """Tokens pick alike and independently, expert i with probability p_i (they sum to top_k): in expectation T p_i
    tokens pick it, and some does with 1 - (1 - p_i)^T. Exact for any way of picking that has these probabilities."""

    def __init__(self, inclusion: Floats) -> None:
        self.inclusion = inclusion

    def outcomes(self, tokens: int) -> Sequence[ExpertLoad]:
        return [ExpertLoad(tokens * self.inclusion, 1 - (1 - self.inclusion) ** tokens)]


class Sampled:
    """Every token picks `top_k` different experts at random, all alike: real counts, with their spread."""

    def __init__(self, experts: int, top_k: int, layer: int, seed: int) -> None:
        self.experts, self.top_k, self._key = experts, top_k, (seed, layer)

    def outcomes(self, tokens: int) -> Sequence[ExpertLoad]:
        seed, layer = self._key
        random = _stream(seed, f"expert routing {layer} {tokens}")
        return [self._outcome(random, tokens) for _ in range(OUTCOMES)]

    def _outcome(self, random: np.random.Generator, tokens: int) -> ExpertLoad:
        share = self.top_k / self.experts
        if tokens * share <= PAIRS_TO_SAMPLE or share == 1:
            picks = picked(random, np.ones(self.experts), self.top_k, tokens)
            pairs = np.bincount(picks.ravel(), minlength=self.experts).astype(np.float64)
            return ExpertLoad(pairs, np.minimum(pairs, 1.0))
        # The counts' exact covariance: T p (1-p) each, with a sum that does not vary.
        noise = random.standard_normal(self.experts)
        spread = (tokens * share * (1 - share) * self.experts / (self.experts - 1)) ** 0.5
        pairs = np.maximum(tokens * share + spread * (noise - noise.mean()), 0.0)
        return ExpertLoad(pairs * (tokens * self.top_k / pairs.sum()), (pairs > 0).astype(np.float64))


def picked(random: np.random.Generator, weights: Floats, top_k: int, tokens: int) -> NDArray[np.int64]:
    """(tokens, top_k) different experts for each token, drawn one after another with chances in proportion to
    `weights` among those left (successive sampling), by the clocks of `inclusion_of`."""
    clocks = random.exponential(size=(tokens, len(weights))) / weights
    return np.argpartition(clocks, top_k - 1, axis=1)[:, :top_k]


def inclusion_of(weights: Floats, top_k: int) -> Floats:
    """Chance that each expert is among `top_k` drawn by successive sampling: 1 - exp(-c w_i), with c such that they sum
    to top_k.

    Give expert i an exponential clock of rate w_i: the first `top_k` to ring are a successive sample. With many experts
    the time c of the last ring hardly varies, and each rings before it independently (Rosén, J. Statist. Plann.
    Inference 62, 1997, order sampling). Exact for equal weights and for top_k = 1 in the limit of many experts; within
    0.02 of the truth for Zipf laws up to exponent 1.2 over 32 to 256 experts (tested by Monte Carlo).
    """
    if top_k >= len(weights):
        return np.ones(len(weights))
    if np.all(weights == weights[0]):
        return np.full(len(weights), top_k / len(weights))
    low, high = 0.0, 1.0 / float(weights.max())
    while -np.expm1(-high * weights).sum() < top_k:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if -np.expm1(-middle * weights).sum() < top_k:
            low = middle
        else:
            high = middle
    found = -np.expm1(-high * weights)
    return cast(Floats, found * (top_k / found.sum()))


def zipf(experts: int, top_k: int, exponent: float, layer: int, seed: int) -> Independent:
    """The r-th most popular expert is drawn with weight r^-exponent; which expert is which is drawn at random, once for
    each `layer`."""
    weights = np.arange(1, experts + 1, dtype=np.float64) ** -exponent
    order = _stream(seed, f"expert popularity {layer}").permutation(experts)
    return Independent(np.minimum(inclusion_of(weights, top_k), 1.0)[order])


def measured(popularity: Sequence[float], top_k: int) -> Independent:
    """Tokens pick expert i in proportion to its share of the pairs that were counted, at most once each: the excess
    over one goes to the others in proportion."""
    counts = np.asarray(popularity, dtype=np.float64)
    chances = np.zeros(len(counts))
    free = np.ones(len(counts), dtype=bool)
    while True:
        chances[free] = counts[free] * ((top_k - (~free).sum()) / counts[free].sum())
        over = free & (chances > 1)
        if not over.any():
            return Independent(chances)
        chances[over], free[over] = 1.0, False


def read_popularity(path: Path, experts: int, top_k: int) -> list[list[float]]:
    """Counts (or shares) of the pairs by expert, for one layer that stands for all, or for each expert layer.

    The file is JSON or YAML: a list of numbers, or a list of such lists. Raises InputError for anything else.
    """
    import yaml

    try:
        data: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"neither JSON nor YAML: {error}", where=str(path)) from None
    layers = data if isinstance(data, list) and data and isinstance(data[0], list) else [data]
    for number, layer in enumerate(layers):
        where = f"layer {number} of {len(layers)}"
        if not isinstance(layer, list) or len(layer) != experts:
            found = f"{len(layer)} numbers" if isinstance(layer, list) else type(layer).__name__
            raise InputError(
                f"{where}: not a number for each expert", where=str(path), found=found, allowed=str(experts)
            )
        for value in layer:
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise InputError(f"{where}: not a count", where=str(path), found=value, allowed="a number >= 0")
        if sum(value > 0 for value in layer) < top_k:
            message = f"{where}: a token picks {top_k} experts, and fewer have a count"
            raise InputError(message, where=str(path), found=sum(value > 0 for value in layer), allowed=f">= {top_k}")
    return [[float(value) for value in layer] for layer in layers]


def own_laws() -> dict[str, Any]:
    """Laws of installed packages by name, not loaded yet."""
    return {point.name: point for point in entry_points(group=GROUP)}


def own_law(name: str) -> Callable[..., ExpertLaw]:
    """What makes the law that a package offers as `name`. InputError when none does."""
    found = own_laws()
    if name not in found:
        names = [*LAWS, *found]
        message = "no such routing law"
        raise InputError(
            message, field="experts.routing", found=name, allowed=", ".join(names), hint=nearest(name, names)
        )
    make = found[name].load()

    def checked(*, experts: int, top_k: int, layer: int, seed: int) -> ExpertLaw:
        return _Checked(name, make(experts=experts, top_k=top_k, layer=layer, seed=seed), experts, top_k)

    return checked


class _Checked:
    """A law from outside, whose answers are looked at before they are used."""

    def __init__(self, name: str, law: ExpertLaw, experts: int, top_k: int) -> None:
        self._name, self._law, self._experts, self._top_k = name, law, experts, top_k

    def outcomes(self, tokens: int) -> Sequence[ExpertLoad]:
        found = [ExpertLoad(*(np.asarray(x, dtype=np.float64) for x in load)) for load in self._law.outcomes(tokens)]
        for pairs, active in found:
            right = (
                pairs.shape == active.shape == (self._experts,)
                and bool(np.all((pairs >= 0) & (active >= 0) & (active <= 1)))
                and abs(float(pairs.sum()) - tokens * self._top_k) <= 1e-6 * tokens * self._top_k
            )
            if not right:
                break
        else:
            if found:
                return found
        raise InputError(
            f"the routing law gives no load of {self._experts} experts for {tokens} tokens",
            field="experts.routing",
            found=self._name,
            allowed=f"pairs >= 0 that sum to {tokens * self._top_k}, and active from 0 to 1, for every expert",
        )


def _stream(seed: int, name: str) -> np.random.Generator:
    """The random stream of this name (any order of asking gives the same numbers)."""
    digest = hashlib.sha256(name.encode()).digest()
    words = [int.from_bytes(digest[at : at + 4], "little") for at in range(0, 16, 4)]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *words])))
