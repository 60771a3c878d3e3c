"""The collectives of LLMServingSim 2.0: rings over links that nothing else uses, with the floors of its back-end.

Its formulas (`BasicTopology.cpp` and the ring of its analytical back-end), for N ranks, a message of D bytes, links of
bandwidth B and latency L, 10 ns between two calls, and memory of bandwidth M for the additions:

    message of m bytes    floor(L + m/B)
    all-reduce            (2N-1) 10 + 2(N-1) message(D/N) + (N-1) 3 D/N / M
    all-gather            N 10 + (N-1) message(chunk of a rank)
    reduce-scatter        N 10 + (N-1) message(D/N) + (N-1) 3 D/N / M

An all-reduce over two dimensions is a reduce-scatter over the first, an all-reduce over the second and an all-gather
over the first. Bandwidths are B/s here; that project writes GiB/s for links (16 = 16 x 2^30 B/s) and 10^9 B/s for
memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor, prod

from servetwin.fabric.group import DeviceGroup
from servetwin.model.kernels import Collective

ENDPOINT_NS = 10


@dataclass(frozen=True)
class Dimension:
    """Ranks along one dimension, and the link between two of them."""

    ranks: int
    bandwidth: float
    latency_ns: float

    def message_ns(self, size: float) -> int:
        return floor(self.latency_ns + size / (self.bandwidth / 1e9))


@dataclass(frozen=True)
class ReferenceRings:
    """Collectives over `dimensions`; `memory_bandwidth` in B/s. All times in ns, not rounded as a whole."""

    dimensions: tuple[Dimension, ...]
    memory_bandwidth: float

    def allreduce(self, size: float) -> float:
        """Of `size` bytes."""
        first, *rest = self.dimensions
        if rest:
            share = size / first.ranks
            inner = ReferenceRings(tuple(rest), self.memory_bandwidth).allreduce(share)
            return self._scatter(first, size) + inner + _gather(first, share)
        messages = 2 * (first.ranks - 1) * first.message_ns(size / first.ranks)
        return (2 * first.ranks - 1) * ENDPOINT_NS + messages + self._additions(first, size)

    def allgather(self, chunk: float) -> float:
        """Of `chunk` bytes from every rank; the last dimension first."""
        total = 0.0
        for dimension in reversed(self.dimensions):
            total += _gather(dimension, chunk)
            chunk *= dimension.ranks
        return total

    def reducescatter(self, size: float) -> float:
        """Of `size` bytes, the first dimension first."""
        total = 0.0
        for dimension in self.dimensions:
            total += self._scatter(dimension, size)
            size /= dimension.ranks
        return total

    def _scatter(self, over: Dimension, size: float) -> float:
        messages = (over.ranks - 1) * over.message_ns(size / over.ranks)
        return over.ranks * ENDPOINT_NS + messages + self._additions(over, size)

    def _additions(self, over: Dimension, size: float) -> float:
        return (over.ranks - 1) * 3 * (size / over.ranks) / (self.memory_bandwidth / 1e9)


def _gather(over: Dimension, chunk: float) -> float:
    return over.ranks * ENDPOINT_NS + (over.ranks - 1) * over.message_ns(chunk)


@dataclass(frozen=True)
class ReferenceLinks:
    """Collectives of a replica priced so: the first dimension is a group's ranks in one node, the second its nodes.

    `inside` and `between` are bandwidth (B/s) and latency (ns) of the links; `group` says which devices a group has, or
    None when all are in one node. Times are floored to whole ns, as that back-end's are.
    """

    inside: tuple[float, float]
    between: tuple[float, float]
    memory_bandwidth: float
    group: DeviceGroup | None = None
    explicit: bool = True

    def collective_ns(self, operator: Collective, rows: int) -> float:
        """Time over `rows` rows. An all-to-all or a broadcast, which that project does not have, is priced as an
        all-gather of the same bytes."""
        size, across = operator.bytes_a_row * rows, self.spans_nodes(operator)
        if operator.kind == "sendrecv":
            return Dimension(2, *(self.between if across else self.inside)).message_ns(size)
        rings = ReferenceRings(self._dimensions(operator, across), self.memory_bandwidth)
        match operator.kind:
            case "allreduce":
                return floor(rings.allreduce(size))
            case "reducescatter":
                return floor(rings.reducescatter(size))
            case _:
                return floor(rings.allgather(size / prod(d.ranks for d in rings.dimensions)))

    def spans_nodes(self, operator: Collective) -> bool:
        return self.group is not None and self.group.spans_nodes(operator)

    def _dimensions(self, operator: Collective, across: bool) -> tuple[Dimension, ...]:
        if not across or self.group is None:
            return (Dimension(operator.ranks, *self.inside),)
        nodes = self.group.nodes_of(operator)
        sides = ((operator.ranks // nodes, self.inside), (nodes, self.between))
        return tuple(Dimension(ranks, *link) for ranks, link in sides if ranks > 1)
