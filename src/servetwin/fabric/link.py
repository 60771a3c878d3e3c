"""The link between the devices of one replica."""

from __future__ import annotations

from dataclasses import dataclass

from servetwin.fabric.collectives import exchange_ns, ring_allreduce_ns, ring_gather_ns, transfer_ns
from servetwin.model.kernels import Collective


@dataclass(frozen=True)
class DeviceLink:
    """`bandwidth` in B/s in one direction of one device, `latency_ns` before the first byte arrives."""

    bandwidth: float
    latency_ns: float

    def collective_ns(self, operator: Collective, rows: int) -> float:
        """Time of a collective over `rows` rows."""
        size = operator.bytes_a_row * rows
        match operator.kind:
            case "allreduce":
                return ring_allreduce_ns(operator.ranks, size, self.bandwidth, self.latency_ns)
            case "allgather" | "reducescatter":
                return ring_gather_ns(operator.ranks, size, self.bandwidth, self.latency_ns)
            case "alltoall":
                return exchange_ns(operator.ranks, size, self.bandwidth, self.latency_ns)
            case _:
                return transfer_ns(size, self.bandwidth, self.latency_ns)
