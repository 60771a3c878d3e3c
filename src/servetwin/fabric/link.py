"""The simplest fabric: one link between any two devices of a replica."""

from __future__ import annotations

from dataclasses import dataclass

from servetwin.fabric.collectives import exchange_ns, ring_allreduce_ns, ring_gather_ns, transfer_ns
from servetwin.model.kernels import Collective


@dataclass(frozen=True)
class DeviceLink:
    """`bandwidth` in B/s in one direction of one device, `latency_ns` before the first byte arrives: what a `Fabric` of
    one switch with the algorithm `ring` comes to (an all-to-all: `one_shot`).

    `explicit` says that a person described this link, rather than the catalogue.
    """

    bandwidth: float
    latency_ns: float
    explicit: bool = True

    def collective_ns(self, operator: Collective, rows: int) -> float:
        """Time of a collective over `rows` rows."""
        size = operator.bytes_a_row * rows
        match str(operator.kind):
            case "allreduce":
                return ring_allreduce_ns(operator.ranks, size, self.bandwidth, self.latency_ns)
            case "allgather" | "reducescatter":
                return ring_gather_ns(operator.ranks, size, self.bandwidth, self.latency_ns)
            case "alltoall":
                return exchange_ns(operator.ranks, size, self.bandwidth, self.latency_ns)
            case _:
                return transfer_ns(size, self.bandwidth, self.latency_ns)

    def spans_nodes(self, operator: Collective) -> bool:
        """A link knows no nodes."""
        return False
