"""Which engine a request goes to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from servetwin.engine.engine import Engine


class Router(Protocol):
    """A routing policy."""

    def choose(self, engines: Sequence[Engine]) -> Engine:
        """One of `engines` (never empty), at the moment of an arrival."""


class RoundRobin:
    """Each engine in turn."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, engines: Sequence[Engine]) -> Engine:
        engine = engines[self._next % len(engines)]
        self._next += 1
        return engine


class LeastLoaded:
    """The engine with the fewest requests, running and waiting; among equals the first."""

    def choose(self, engines: Sequence[Engine]) -> Engine:
        return min(engines, key=lambda engine: sum(engine.load))


class Random:
    """Any engine, equally likely."""

    def __init__(self, stream: np.random.Generator) -> None:
        self._stream = stream

    def choose(self, engines: Sequence[Engine]) -> Engine:
        return engines[int(self._stream.integers(len(engines)))]
