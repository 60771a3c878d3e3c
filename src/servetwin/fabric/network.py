"""The network of a whole scenario, and the links that it gives a replica."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from servetwin.errors import InputError, nearest
from servetwin.fabric.algorithms import ALGORITHMS
from servetwin.fabric.build import Computer, Wires, build_topology
from servetwin.fabric.graph_file import read_graph
from servetwin.fabric.group import DeviceGroup, Fabric
from servetwin.fabric.reference import ReferenceLinks
from servetwin.fabric.topology import Topology

REFERENCE = "llmservingsim"
COLLECTIVES = (*ALGORITHMS, REFERENCE)


@dataclass(frozen=True)
class Network:
    """What joins the devices of a scenario: computers and the wires between them, or a user's graph (a file) instead.

    `collectives` is one of `COLLECTIVES`. `explicit` says that the links inside nodes were described for this machine;
    a graph always is such a description. `names` are those of the computers; `node0`, ... by default.
    """

    computers: tuple[Computer, ...]
    between: Wires | None = None
    graph: Path | None = None
    collectives: str = "auto"
    explicit: bool = True
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.collectives not in COLLECTIVES:
            hint = nearest(self.collectives, COLLECTIVES)
            allowed = ", ".join(COLLECTIVES)
            raise InputError("no such", field="network.collectives", found=self.collectives, allowed=allowed, hint=hint)
        if self.collectives == REFERENCE and self.graph is not None:
            message = f"{REFERENCE} knows one link inside and one between nodes, not a graph"
            raise InputError(message, field="network.graph", found=str(self.graph))

    @cached_property
    def topology(self) -> Topology:
        """Devices numbered computer by computer. InputError as `build_topology` and `read_graph`."""
        if self.graph is not None:
            names = self.names or [f"node{i}" for i in range(len(self.computers))]
            devices = [computer.devices for computer in self.computers]
            return read_graph(self.graph, dict(zip(names, devices, strict=True)))
        return build_topology(self.computers, self.between, self.names)

    @cached_property
    def fabric(self) -> Fabric:
        """Its algorithm is `auto` where the reference's rings are asked for, which know no topology."""
        algorithm = "auto" if self.collectives == REFERENCE else self.collectives
        return Fabric(self.topology, algorithm, explicit=self.explicit or self.graph is not None)

    def links(
        self, devices: Sequence[int], tensor: int, pipeline: int, data: int, memory_bandwidth: float
    ) -> DeviceGroup | ReferenceLinks:
        """Links of the replica on these devices (in rank order, see `Fabric.replica`), whose memory has this bandwidth
        (B/s)."""
        group = self.fabric.replica(devices, tensor, pipeline, data)
        if self.collectives != REFERENCE:
            return group
        inside = self.computers[self.topology.nodes[devices[0]]].inside
        between = self.between or inside
        link, wide = (inside.bandwidth, inside.latency_ns), (between.bandwidth, between.latency_ns)
        return ReferenceLinks(link, wide, memory_bandwidth, group, self.explicit)
