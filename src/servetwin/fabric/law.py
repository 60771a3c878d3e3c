"""What schedules cost on a topology: time and bytes on each link, as laws of the message size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from servetwin.fabric.schedules import Round, Schedule
from servetwin.fabric.topology import Topology


class Line(NamedTuple):
    """Time of a round as one flow sees it: `latency_ns` + `chunks` over a link of `bandwidth` B/s."""

    latency_ns: float
    chunks: int
    bandwidth: float


class PricedSchedule:
    """A schedule run at once by every group of `members` (device numbers by rank).

    A round takes as long as its slowest flow: the latency of its path, and all bytes that the round puts on the busiest
    link of that path, since flows over one link share it (Hockney's alpha-beta law with contention). The next round
    begins when it ends. `limit` is the message size from which the schedule is not to be used.
    """

    def __init__(
        self, schedule: Schedule, topology: Topology, members: Sequence[Sequence[int]], limit: float = float("inf")
    ) -> None:
        self.schedule, self.limit = schedule, limit
        self._topology, self._members = topology, members
        self.rounds = [(r.times, self._lines(r)) for r in schedule.rounds]

    def ns(self, size: float) -> float:
        """Time for a message of `size` bytes."""
        chunk, total = size / self.schedule.chunks, 0.0
        for times, lines in self.rounds:
            total += times * max([at + n * chunk / bandwidth * 1e9 for at, n, bandwidth in lines])
        return total

    def many(self, sizes: NDArray[np.float64]) -> NDArray[np.float64]:
        """The same for an array of sizes."""
        chunk, total = sizes / self.schedule.chunks, np.zeros(len(sizes))
        for times, lines in self.rounds:
            slowest = lines[0].latency_ns + lines[0].chunks * chunk / lines[0].bandwidth * 1e9
            for at, n, bandwidth in lines[1:]:
                slowest = np.maximum(slowest, at + n * chunk / bandwidth * 1e9)
            total += times * slowest
        return total

    @cached_property
    def chunks_on(self) -> dict[int, int]:
        """Chunks that cross each link (by number) in all."""
        crossed: Counter[int] = Counter()
        for r in self.schedule.rounds:
            for link, chunks in self._load(r).items():
                crossed[link] += r.busy * chunks
        return dict(crossed)

    def _flows(self, r: Round) -> list[tuple[int, int, int]]:
        return [(ranks[a], ranks[b], chunks) for ranks in self._members for a, b, chunks in r.flows]

    def _load(self, r: Round) -> Counter[int]:
        load: Counter[int] = Counter()
        for a, b, chunks in self._flows(r):
            for link in self._topology.path(a, b):
                load[link] += chunks
        return load

    def _lines(self, r: Round) -> tuple[Line, ...]:
        load, links = self._load(r), self._topology.links
        found: set[Line] = set()
        for a, b, _ in self._flows(r):
            path = self._topology.path(a, b)
            busiest = max(path, key=lambda i: load[i] / links[i].bandwidth)
            found.add(Line(self._topology.latency_ns(a, b), load[busiest], links[busiest].bandwidth))
        # A line below another one everywhere is never the slowest.
        lines: list[Line] = []
        steepest = -1.0
        for line in sorted(found, key=lambda li: (-li.latency_ns, -li.chunks / li.bandwidth)):
            if line.chunks / line.bandwidth > steepest:
                steepest = line.chunks / line.bandwidth
                lines.append(line)
        return tuple(lines)


class Law:
    """The quickest of some schedules for each message size, plus `overhead_ns` for each call."""

    def __init__(self, choices: Sequence[PricedSchedule], overhead_ns: float = 0) -> None:
        self.choices, self.overhead_ns = list(choices), overhead_ns
        self._known: dict[float, float] = {}

    def ns(self, size: float) -> float:
        """Time for a message of `size` bytes."""
        found = self._known.get(size)
        if found is None:
            times = [choice.ns(size) for choice in self.choices if size < choice.limit]
            found = self._known[size] = self.overhead_ns + min(times)
        return found

    def add_traffic(self, sizes: NDArray[Any], calls: NDArray[Any] | int, onto: NDArray[np.float64]) -> None:
        """Add the bytes that `calls` messages of each of `sizes` bytes put on each link to `onto` (by link)."""
        sizes = np.asarray(sizes, dtype=np.float64)
        weighted = sizes * calls
        times = np.array([np.where(sizes < choice.limit, choice.many(sizes), np.inf) for choice in self.choices])
        taken = times.argmin(axis=0)
        for i, choice in enumerate(self.choices):
            moved = float(weighted[taken == i].sum())
            if moved:
                for link, chunks in choice.chunks_on.items():
                    onto[link] += moved * chunks / choice.schedule.chunks
