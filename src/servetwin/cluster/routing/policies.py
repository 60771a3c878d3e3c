"""Policies that look at load, at KV usage, at the session, or at nothing.

A policy is any class with `choose`; the loop keeps one object of it for each model. docs/routing.md says what each is
for and where it comes from.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from servetwin.cluster.routing.candidates import Candidates
from servetwin.engine.request import Request


class Policy(Protocol):
    """How to choose among the engines that serve a model."""

    def choose(self, request: Request, candidates: Candidates, now: int) -> int:
        """The position in `candidates` of the engine that `request` goes to; `now` in ns.

        Called once for each request, when it is sent. Nothing may be changed but what belongs to the policy.
        """


def first_of_least(scores: NDArray[Any], start: int) -> int:
    """The position of the smallest of `scores`; among equals the first one from `start` on, cyclically."""
    after = start + int(scores[start:].argmin())
    if not start:
        return after
    before = int(scores[:start].argmin())
    return before if scores[before] < scores[after] else after


class RoundRobin:
    """Each engine in turn."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, request: Request, candidates: Candidates, now: int) -> int:
        chosen = self._next
        self._next = (chosen + 1) % len(candidates)
        return chosen


class Random:
    """Any engine, equally likely."""

    def __init__(self, stream: np.random.Generator) -> None:
        self._stream = stream

    def choose(self, request: Request, candidates: Candidates, now: int) -> int:
        return int(self._stream.integers(len(candidates)))


class LeastLoaded:
    """The engine with the fewest requests, running and waiting; among equals the first."""

    def choose(self, request: Request, candidates: Candidates, now: int) -> int:
        return int(candidates.load.argmin())


class JoinShortestQueue:
    """The engine with the fewest requests, running and waiting; engines that are equal take turns."""

    def __init__(self) -> None:
        self._start = 0

    def choose(self, request: Request, candidates: Candidates, now: int) -> int:
        chosen = first_of_least(candidates.load, self._start)
        self._start = (chosen + 1) % len(candidates)
        return chosen


def looks_at_engines(policy: Policy) -> bool:
    """Whether `policy` may read more of the engines than how many requests the router has in them."""
    if type(policy) is SessionAffinity:
        return looks_at_engines(policy.fallback)
    return type(policy) not in (RoundRobin, Random, LeastLoaded, JoinShortestQueue, PowerOfTwo, ConsistentHash)


class LeastKVUsage:
    """The engine that has the smallest part of its KV blocks in use; engines that are equal take turns."""

    def __init__(self) -> None:
        self._start = 0

    def choose(self, request: Request, candidates: Candidates, now: int) -> int:
        chosen = first_of_least(candidates.kv_usage, self._start)
        self._start = (chosen + 1) % len(candidates)
        return chosen


class PowerOfTwo:
    """Of two engines drawn at random, the one with fewer requests, running and waiting; of equals the first drawn.

    Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", IEEE TPDS 12(10), 2001.
    """

    def __init__(self, stream: np.random.Generator) -> None:
        self._stream = stream

    def choose(self, request: Request, candidates: Candidates, now: int) -> int:
        count = len(candidates)
        if count == 1:
            return 0
        one, other = int(self._stream.integers(count)), int(self._stream.integers(count - 1))
        other += other >= one
        load = candidates.load
        return other if load[other] < load[one] else one


class LLMServingSimLoad:
    """LLMServingSim's LOAD rule (serving/core/router.py): the smallest (4 waiting + running) / max_num_seqs, searched
    from a start that moves on by one with each request; among equals the first."""

    def __init__(self) -> None:
        self._start = 0

    def choose(self, request: Request, candidates: Candidates, now: int) -> int:
        scores = (4 * candidates.waiting + candidates.running) / candidates.max_num_seqs
        chosen = first_of_least(scores, self._start)
        self._start = (self._start + 1) % len(candidates)
        return chosen


class VllmDataParallel:
    """How a vLLM front end chooses among its data-parallel engines: the smallest of

        max(clients x own in flight, waiting + running) + 6 waiting max(0, KV usage - 0.5),

    searched from a start that moves on by one with each request; among equals the first. A front end knows how many of
    its own requests are in flight, and takes it that each of the `clients` front ends has as many; here that estimate
    is taken to be right: all that is in flight.
    """

    def __init__(self) -> None:
        self._start = 0

    def choose(self, request: Request, candidates: Candidates, now: int) -> int:
        requests = np.maximum(candidates.in_flight, candidates.load)
        scores = requests + candidates.waiting * 6 * np.maximum(0.0, candidates.kv_usage - 0.5)
        chosen = first_of_least(scores, self._start)
        self._start = (self._start + 1) % len(candidates)
        return chosen


class ConsistentHash:
    """The engine that the request's session hashes to; requests without a session are each their own.

    Rendezvous hashing (Thaler and Ravishankar, "Using Name-Based Mappings to Increase Hit Rates", IEEE/ACM ToN 6(1),
    1998): every engine has a weight for each session, and the heaviest is chosen. With an engine more, only the
    sessions move that it takes over; with the last one fewer, only those that it had.
    """

    def __init__(self) -> None:
        self._names = np.zeros(0, np.uint64)

    def choose(self, request: Request, candidates: Candidates, now: int) -> int:
        if len(self._names) != len(candidates):
            self._names = _mixed(np.arange(len(candidates), dtype=np.uint64))
        session = 2 * request.session + 1 if request.session >= 0 else 2 * request.row
        return int(_mixed(self._names ^ _mixed(np.array([session], np.uint64))).argmax())


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64, a bijection of 64-bit words (Steele, Lea and Flood, OOPSLA 2014)."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


class SessionAffinity:
    """The engine to which the session's first request went, which `fallback` chose; requests without a session go
    where `fallback` says."""

    def __init__(self, fallback: Policy) -> None:
        self.fallback, self._engine_of = fallback, dict[int, int]()

    def choose(self, request: Request, candidates: Candidates, now: int) -> int:
        chosen = self._engine_of.get(request.session)
        if chosen is None:
            chosen = self.fallback.choose(request, candidates, now)
            if request.session >= 0:
                self._engine_of[request.session] = chosen
        return chosen
