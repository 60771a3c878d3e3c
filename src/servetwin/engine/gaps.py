"""How often each gap between two tokens of a request occurred: an exact multiset in little memory."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import repeat
from operator import sub

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

PENDING = 1 << 18
"""Entries that are noted before equal gaps are put together, at least."""


class Gaps:
    """Gaps are noted as they come, and put together now and then: an entry for each different gap is all that stays.

    They are put together when there are half as many again as different ones, so that all of it takes time in
    proportion to the gaps noted (and a logarithm).
    """

    def __init__(self) -> None:
        self._ns, self._times = array("q"), array("q")
        self._known: tuple[Ints, Ints] = np.empty(0, np.int64), np.empty(0, np.int64)

    def add(self, ns: int, times: int) -> None:
        """A gap of `ns` occurred so many times."""
        self._ns.append(ns)
        self._times.append(times)
        if len(self._ns) >= PENDING and len(self._ns) >= len(self._known[0]) // 2:
            self._put_together()

    def add_all(self, before: int, outputs_ns: Sequence[int], times: int) -> None:
        """So many requests had a token at `before` and at each of `outputs_ns`."""
        self._ns.extend(map(sub, outputs_ns, (before, *outputs_ns)))
        self._times.extend(repeat(times, len(outputs_ns)))
        if len(self._ns) >= PENDING and len(self._ns) >= len(self._known[0]) // 2:
            self._put_together()

    def take(self, pairs: Ints) -> None:
        """Gaps (ns) and how often each occurred, shape (gaps, 2)."""
        self._ns.frombytes(pairs[:, 0].tobytes())
        self._times.frombytes(pairs[:, 1].tobytes())
        if len(self._ns) >= PENDING and len(self._ns) >= len(self._known[0]) // 2:
            self._put_together()

    def counts(self) -> tuple[Ints, Ints]:
        """All gaps (ns) in rising order, and how often each occurred."""
        self._put_together()
        return self._known

    def _put_together(self) -> None:
        ns, times = np.frombuffer(self._ns, np.int64), np.frombuffer(self._times, np.int64)
        ns = ns[: len(times)]  # an interrupt may have come between the two
        known, empty = merged([self._known, (ns, times)]), (array("q"), array("q"))
        self._known, (self._ns, self._times) = known, empty


def merged(parts: Sequence[tuple[Ints, Ints]]) -> tuple[Ints, Ints]:
    """Gaps and their counts of several parts, each gap once, in rising order."""
    ns, times = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    if not len(ns):
        return ns, times
    order = np.argsort(ns, kind="stable")
    ns, times = ns[order], times[order]
    first = np.flatnonzero(np.concatenate(([True], ns[1:] != ns[:-1])))
    return ns[first], np.add.reduceat(times, first)
