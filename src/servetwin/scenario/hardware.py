"""What the engines run on: the `nodes` and the `network` of a scenario."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from servetwin.scenario.quantities import Bytes, Count, Duration, Rate
from servetwin.scenario.workload import Section, wrong

SHAPED = ("torus",)
TREES = ("fat_tree", "rail_fat_tree")


class Nic(Section):
    """Network cards of a node."""

    link: str | None = Field(default=None, description="a link of the catalogue (servetwin list links)", min_length=1)
    count: Count | None = Field(default=None, description="cards a node; default: the host's own")
    bandwidth: Rate | None = Field(default=None, description="bytes/s of a card in one direction; default: the link's")
    latency: Duration | None = Field(default=None, description="of a small message, one way; default: the link's")


class Node(Section):
    """`count` equal computers."""

    name: str = Field(default="", description="default: node0, node1, …; of several equal ones, with -0, -1, … behind")
    count: Count = 1
    devices: dict[str, Count] = Field(description="devices of the catalogue, and how many of each", min_length=1)
    host: str | None = Field(default=None, description="a host of the catalogue, for what is not given here")
    memory_size: Bytes | None = Field(default=None, description="host memory")
    memory_bandwidth: Rate | None = Field(default=None, description="of the host memory, over all sockets")
    nic: Nic | None = None


class Topology(Section):
    """How one level of the network is joined, and by which links."""

    kind: Literal["full_mesh", "switch", "pcie_tree", "ring", "torus", "fat_tree", "rail_fat_tree"]
    link: str | None = Field(default=None, description="a link of the catalogue (servetwin list links)", min_length=1)
    bandwidth: Rate | None = Field(default=None, description="bytes/s in one direction; default: the link's")
    latency: Duration | None = Field(default=None, description="of a small message, one way; default: the link's")
    shape: list[Count] | None = Field(default=None, description="torus: devices along each dimension", min_length=2)
    oversubscription: Annotated[float, Field(ge=1)] | None = Field(
        default=None, description="fat trees: bandwidth towards the nodes over that towards the spine; default: 1"
    )

    @model_validator(mode="after")
    def _of_the_kind(self) -> Topology:
        if self.kind in SHAPED and self.shape is None:
            raise wrong("shape", f"missing: a {self.kind} needs it", allowed="a list of whole numbers")
        for name, kinds in (("shape", SHAPED), ("oversubscription", TREES)):
            if getattr(self, name) is not None and self.kind not in kinds:
                message = f"does not go with kind {self.kind!r}"
                raise wrong(name, message, found=getattr(self, name), allowed="with kind: " + ", ".join(kinds))
        return self


class Network(Section):
    """How devices reach each other, and how collectives use that."""

    inside: Topology | None = Field(default=None, description="in a node; default: the devices' own scale-up fabric")
    between: Topology | None = Field(default=None, description="of the nodes; default: a switch over their cards")
    graph: str | None = Field(
        default=None, description="file with a graph of links, instead of inside and between", min_length=1
    )
    collectives: Literal["auto", "ring", "tree", "hierarchical", "one_shot", "llmservingsim"] = Field(
        default="auto", description="algorithm; auto: what is measured, else the one that such hardware would use"
    )

    @model_validator(mode="after")
    def _one_description(self) -> Network:
        for name in ("inside", "between"):
            if self.graph is not None and getattr(self, name) is not None:
                raise wrong(name, "does not go with graph, which describes all links", allowed="one of the two")
        return self
