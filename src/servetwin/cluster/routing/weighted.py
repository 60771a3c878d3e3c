"""Weighted sums of scores, as the endpoint picker of llm-d forms them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from servetwin.cluster.routing.candidates import Candidates, Floats, Ints
from servetwin.cluster.routing.policies import first_of_least
from servetwin.cluster.routing.prefix import PrefixIndex, new_index
from servetwin.engine.request import Request

Signal = Callable[[Candidates], Ints]

FEWER_IS_BETTER: Mapping[str, Signal] = {
    "queue": lambda candidates: candidates.waiting,
    "running": lambda candidates: candidates.running,
    "load": lambda candidates: candidates.load,
    "in_flight": lambda candidates: candidates.in_flight,
}


class Weighted:
    """The engine with the largest sum of weight x score; engines that are equal take turns. Scores are from 0 to 1:

    queue, running, load, in_flight   (most - own) / (most - least) over the candidates; 1 when all are equal
    kv_usage                          1 - the part of the KV blocks in use
    prefix                            the part of the prompt's whole blocks that is cached
    session                           1 for the engine that the session's latest request went to
    """

    def __init__(self, scorers: Mapping[str, float], index: PrefixIndex = "exact") -> None:
        self._scorers = dict(scorers)
        self._index = new_index(index) if "prefix" in scorers else None
        self._start = 0
        self._latest: dict[int, int] = {}

    def choose(self, request: Request, candidates: Candidates, now: int) -> int:
        total = np.zeros(len(candidates))
        for name, weight in self._scorers.items():
            total -= weight * self._scores(name, request, candidates)
        chosen = first_of_least(total, self._start)
        self._start = (chosen + 1) % len(candidates)
        if request.session >= 0 and "session" in self._scorers:
            self._latest[request.session] = chosen
        if self._index is not None:
            self._index.sent(request, candidates, chosen)
        return chosen

    def _scores(self, name: str, request: Request, candidates: Candidates) -> Floats:
        if name == "kv_usage":
            return 1 - candidates.kv_usage
        if name == "prefix":
            assert self._index is not None
            whole = request.prompt // candidates.block_size
            scores: Floats = self._index.cached_tokens(request, candidates) / candidates.block_size
            return scores / np.maximum(1, whole)
        if name == "session":
            scores = np.zeros(len(candidates))
            latest = self._latest.get(request.session)
            if latest is not None:
                scores[latest] = 1
            return scores
        values = FEWER_IS_BETTER[name](candidates)
        most, least = values.max(), values.min()
        return (most - values) / (most - least) if most > least else np.ones(len(candidates))
