"""Which rank holds which experts, and so what each rank has to do under a routing law."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from servetwin.model.expert_routing import ExpertLaw, ExpertLoad, Floats

WINDOW = 16_384
"""Tokens from whose load experts are placed: of the order of what vLLM's window of 1,000 steps counts. Laws that are
expectations give the same placement for any number."""


class RankLoads:
    """What every rank has to do in one expert layer: a routing law and a placement of experts.

    An expert with c copies gives each an equal share of its pairs (vLLM picks a copy by the position of the token, as
    good as at random), and a copy stays without a token with the c-th root of the chance that the expert does, as
    independent picks do.
    """

    def __init__(self, law: ExpertLaw, experts: Sequence[int], rank: Sequence[int], ranks: int) -> None:
        """`experts` and `rank`, by slot: the expert in it, and the rank that has it."""
        self._law, self._experts, self._ranks = law, np.asarray(experts), ranks
        self._rank = np.asarray(rank)
        self._copies = np.bincount(self._experts)[self._experts].astype(np.float64)
        self._known: dict[int, list[list[tuple[float, float]]]] = {}

    def of(self, tokens: int) -> list[list[tuple[float, float]]]:
        """(pairs, experts with a token) of each rank, in each outcome of the law, for the `tokens` of all ranks."""
        found = self._known.get(tokens)
        if found is None:
            found = self._known[tokens] = [self._ranks_of(load) for load in self._law.outcomes(tokens)]
        return found

    def _ranks_of(self, load: ExpertLoad) -> list[tuple[float, float]]:
        pairs = load.pairs[self._experts] / self._copies
        active = load.active[self._experts]
        if self._copies.max() > 1:
            active = np.minimum(1 - (1 - active) ** (1 / self._copies), np.maximum(pairs, active / self._copies))
        sums = [np.bincount(self._rank, weights=what, minlength=self._ranks).tolist() for what in (pairs, active)]
        return list(zip(*sums, strict=True))


def straggler(outcomes: Sequence[Sequence[tuple[float, float]]], price: Callable[[float, float], float]) -> float:
    """Time until the last rank is done, the mean over the outcomes: all ranks meet again right after the experts.
    `price` is that of (pairs, experts with a token)."""
    return sum(max(price(*work) for work in set(ranks)) for ranks in outcomes) / len(outcomes)


def in_order(experts: int, ranks: int) -> tuple[list[int], list[int]]:
    """Expert and rank of every slot as vLLM deals them out without EPLB: runs of experts, the first ranks one more
    where they do not divide (`determine_expert_map`)."""
    each, left = divmod(experts, ranks)
    rank = [r for r in range(ranks) for _ in range(each + (r < left))]
    return list(range(experts)), rank


def by_load(load: Floats, redundant: int, ranks: int, nodes: int = 1, groups: int = 1) -> tuple[list[int], list[int]]:
    """Expert and rank of every slot as vLLM's EPLB deals them out for the load seen, `redundant` copies included.

    With `groups` of experts that divide over the nodes: groups go to nodes, then each node copies the experts that are
    heaviest a copy, then its slots go to its ranks, each time the heaviest first to the lightest place with room
    (DeepSeek's EPLB, github.com/deepseek-ai/EPLB; vLLM `DefaultEplbPolicy`). Else the cluster counts as one node. The
    slots, experts + redundant, must divide over the ranks.
    """
    if groups % nodes or ranks % nodes or redundant % nodes:
        nodes = groups = 1
    size = len(load) // groups
    home = _pack(load.reshape(groups, size).sum(axis=1), nodes)
    slots, places = [], []
    for node in range(nodes):
        held = np.concatenate([np.arange(g * size, (g + 1) * size) for g in np.flatnonzero(home == node)])
        chosen = _with_copies(load[held], redundant // nodes)
        packed = _pack((load[held] / np.bincount(chosen))[chosen], ranks // nodes)
        slots += held[chosen].tolist()
        places += (packed + node * (ranks // nodes)).tolist()
    return slots, places


def _with_copies(load: Floats, extra: int) -> NDArray[np.int64]:
    """Every expert once, then `extra` copies, each of the expert that is then heaviest a copy."""
    chosen, copies = list(range(len(load))), np.ones(len(load))
    for _ in range(extra):
        heaviest = int(np.argmax(load / copies))
        chosen.append(heaviest)
        copies[heaviest] += 1
    return np.array(chosen)


def _pack(load: Floats, places: int) -> NDArray[np.int64]:
    """The place of each item, equally many in each: heaviest first, to the lightest place that has room."""
    room, weight = [len(load) // places] * places, [0.0] * places
    found = np.zeros(len(load), dtype=np.int64)
    for item in np.argsort(-load, kind="stable").tolist():
        place = min((p for p in range(places) if room[p]), key=lambda p: weight[p])
        found[item] = place
        room[place] -= 1
        weight[place] += float(load[item])
    return found
