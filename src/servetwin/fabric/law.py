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


class Protocol(NamedTuple):
    """How software sends: `overhead_ns` a call, and the share of a link's bandwidth that it reaches."""

    overhead_ns: float = 0
    share: float = 1.0


class PricedSchedule:
    """A schedule run at once by every group of `members` (device numbers by rank).

    A round takes as long as its slowest flow: the latency of its path, and all bytes that the round puts on the busiest
    link of that path, since flows over one link share it (Hockney's alpha-beta law with contention). The next round
    begins when it ends. Of `protocols` the quickest for a message is used. `limit` is the message size from which the
    schedule is not to be used.
    """

    def __init__(
        self,
        schedule: Schedule,
        topology: Topology,
        members: Sequence[Sequence[int]],
        protocols: Sequence[Protocol] = (Protocol(),),
        limit: float = float("inf"),
    ) -> None:
        self.schedule, self.members, self.protocols, self.limit = schedule, members, protocols, limit
        self._topology = topology
        self._loads = [self._load(r) for r in schedule.rounds]
        self.rounds = [(r.times, self._lines(r, load)) for r, load in zip(schedule.rounds, self._loads, strict=True)]

    def ns(self, size: float) -> float:
        """Time for a message of `size` bytes."""
        return min([overhead + self._rounds_ns(size / share) for overhead, share in self.protocols])

    def many(self, sizes: NDArray[np.float64]) -> NDArray[np.float64]:
        """The same for an array of sizes."""
        best = np.full(len(sizes), np.inf)
        for overhead, share in self.protocols:
            best = np.minimum(best, overhead + self._rounds_many(sizes / share))
        return best

    def _rounds_ns(self, size: float) -> float:
        chunk, total = size / self.schedule.chunks, 0.0
        for times, lines in self.rounds:
            total += times * max([at + n * chunk / bandwidth * 1e9 for at, n, bandwidth in lines])
        return total

    def _rounds_many(self, sizes: NDArray[np.float64]) -> NDArray[np.float64]:
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
        for r, load in zip(self.schedule.rounds, self._loads, strict=True):
            for link, chunks in load.items():
                crossed[link] += r.busy * chunks
        return dict(crossed)

    def _flows(self, r: Round) -> list[tuple[int, int, int]]:
        return [(ranks[a], ranks[b], chunks) for ranks in self.members for a, b, chunks in r.flows]

    def _load(self, r: Round) -> Counter[int]:
        load: Counter[int] = Counter()
        for a, b, chunks in self._flows(r):
            for link in self._topology.path(a, b):
                load[link] += chunks
        return load

    def _lines(self, r: Round, load: Counter[int]) -> tuple[Line, ...]:
        links = self._topology.links
        found: set[Line] = set()
        for a, b, _ in self._flows(r):
            path = self._topology.path(a, b)
            busiest = max(path, key=lambda i: load[i] / links[i].bandwidth)
            latency = sum(links[i].latency_ns for i in path)
            found.add(Line(latency, load[busiest], links[busiest].bandwidth))
        # A line below another one everywhere is never the slowest.
        lines: list[Line] = []
        steepest = -1.0
        for line in sorted(found, key=lambda li: (-li.latency_ns, -li.chunks / li.bandwidth)):
            if line.chunks / line.bandwidth > steepest:
                steepest = line.chunks / line.bandwidth
                lines.append(line)
        return tuple(lines)


class Law:
    """The quickest of some schedules for each message size."""

    def __init__(self, choices: Sequence[PricedSchedule]) -> None:
        self.choices = list(choices)
        self._known: dict[float, float] = {}

    def ns(self, size: float) -> float:
        """Time for a message of `size` bytes."""
        found = self._known.get(size)
        if found is None:
            found = self._known[size] = min([choice.ns(size) for choice in self.choices if size < choice.limit])
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
