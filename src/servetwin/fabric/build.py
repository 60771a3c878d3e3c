"""From plain facts (how many devices, which kind of wiring, which link) to a topology."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from servetwin import catalog
from servetwin.errors import InputError, nearest
from servetwin.fabric import shapes
from servetwin.fabric.topology import Link, Topology, both

INSIDE = ("full_mesh", "switch", "pcie_tree", "ring", "torus")
BETWEEN = ("switch", "fat_tree", "rail_fat_tree", "full_mesh", "ring", "torus")

PAYLOAD = {"pcie": 0.56, "": 0.70}
"""Share of a published link rate that big messages reach, by the start of the link's name. Fitted together with
`algorithms.SERVING`: PCIe to rtx_pro_6000 with two devices, all others to h100_sxm with 2, 4 and 8."""


@dataclass(frozen=True)
class Wires:
    """How devices of a node, or nodes, are joined.

    `bandwidth` is what one device (one adapter) can send, B/s, over all its links: a full mesh, ring or torus spreads
    it over its neighbours. `latency_ns` is that of the way from one to another (mesh, ring, torus: to a neighbour).
    `shape` is the sides of a torus; sockets, and PCIe switches a socket, of a PCIe tree; nodes a leaf of a fat tree.
    """

    kind: str
    bandwidth: float
    latency_ns: float
    shape: tuple[int, ...] = ()
    oversubscription: float = 1.0


@dataclass(frozen=True)
class Computer:
    """A node: `devices` joined by `inside`, and `nics` network adapters. `slot_bandwidth` is that of the way from a
    device to its adapter (B/s); None = no narrower than the adapter."""

    devices: int
    inside: Wires
    nics: int = 0
    slot_bandwidth: float | None = None


def build_topology(computers: Sequence[Computer], between: Wires | None = None, names: Sequence[str] = ()) -> Topology:
    """Devices of all computers, numbered in order, on one network. `names` are those of the computers: `node0`, ... by
    default.

    Raises:
        InputError: an unknown kind, a shape that does not hold the devices or nodes, several nodes without a network
            or without adapters.
    """
    if len(computers) > 1 and between is None:
        raise InputError("needs a network between the nodes", field="network.between", found=None)
    nodes, made = list[shapes.Node](), dict[Computer, shapes.Node]()
    for computer in computers:
        if computer not in made:
            slot = computer.slot_bandwidth or (between.bandwidth if between else computer.inside.bandwidth)
            nics = computer.nics if between else 0
            made[computer] = shapes.Node(_inside(computer), nics, slot)
        nodes.append(made[computer])
    names = names or [f"node{number}" for number in range(len(nodes))]
    ports = [node.ports(name) for name, node in zip(names, nodes, strict=True)]
    wires = _between(between, ports, [f"{name}.gate" for name in names]) if between and len(nodes) > 1 else []
    return shapes.joined(nodes, wires, names)


def published(link: catalog.Link) -> tuple[float, float]:
    """B/s that collectives reach over a link of the catalogue, and its latency in ns."""
    share = next(share for start, share in PAYLOAD.items() if link.id.startswith(start))
    return link.bandwidth * share, link.latency_ns


def inside_of(device: catalog.Device, devices: int) -> Wires:
    """The wiring of `devices` of a kind in one node, from the catalogue's scale-up link.

    Raises:
        InputError: the catalogue knows no link between such devices.
    """
    scale_up = device.scale_up
    if scale_up is None:
        if devices > 1:
            raise InputError(f"no link between devices of kind {device.id} is known", field="network.inside")
        return Wires("switch", 1.0, 0)
    bandwidth = scale_up.bandwidth * published(scale_up.link)[0] / scale_up.link.bandwidth
    kind = next((kind for start, kind in _WIRING.items() if scale_up.link.id.startswith(start)), "switch")
    if kind == "full_mesh" and scale_up.domain > devices > 1:  # links to the devices that are not there stay unused
        bandwidth *= (devices - 1) / (scale_up.domain - 1)
    shape = (2 if devices > 1 else 1,) if kind == "pcie_tree" else (devices,) if kind == "torus" else ()
    return Wires(kind, bandwidth, scale_up.link.latency_ns, shape)


_WIRING = {"pcie": "pcie_tree", "infinity_fabric": "full_mesh", "roce_gaudi": "full_mesh", "hccs": "full_mesh"}
_WIRING |= {"ici": "torus"}
"""Kind of wiring by the start of the scale-up link's name; else a switch."""


def _inside(computer: Computer) -> Topology:
    count, wires = computer.devices, computer.inside
    bandwidth, latency = wires.bandwidth, wires.latency_ns
    match _known(wires.kind, INSIDE, "network.inside.kind"):
        case "full_mesh":
            return shapes.full_mesh(count, bandwidth / max(1, count - 1), latency)
        case "switch":
            return shapes.switch(count, bandwidth, latency)
        case "pcie_tree":
            sockets, switches = (*wires.shape, *(2, 0)[len(wires.shape) :])[:2]
            return shapes.pcie_tree(count, bandwidth, latency, min(sockets, count), switches)
        case "ring":
            return shapes.ring(count, bandwidth / _neighbours((count,)), latency)
        case _:
            shape = _filled(wires.shape, count, "devices", "network.inside.shape")
            return shapes.torus(shape, bandwidth / _neighbours(shape), latency)


def _between(wires: Wires, ports: list[list[str]], gates: list[str]) -> list[Link]:
    bandwidth, latency = wires.bandwidth, wires.latency_ns
    match _known(wires.kind, BETWEEN, "network.between.kind"):
        case "switch":
            return shapes.switch_links(ports, bandwidth, latency)
        case "fat_tree":
            nodes_a_leaf = wires.shape[0] if wires.shape else 1
            return shapes.fat_tree_links(ports, bandwidth, latency, nodes_a_leaf, wires.oversubscription)
        case "rail_fat_tree":
            return shapes.rail_links(ports, bandwidth, latency, wires.oversubscription)
        case kind:  # no switch: the adapters of a node share its links evenly
            pairs = [(port, gate) for gate, node in zip(gates, ports, strict=True) for port in node]
            links = [link for port, gate in pairs for link in both(port, gate, bandwidth)]
            bandwidth *= min(len(node) for node in ports)
            if kind == "full_mesh":
                return links + shapes.mesh_links(gates, bandwidth / (len(gates) - 1), latency)
            shape: tuple[int, ...] = (len(gates),)
            if kind == "torus":
                shape = _filled(wires.shape, len(gates), "nodes", "network.between.shape")
            return links + shapes.torus_links(gates, shape, bandwidth / _neighbours(shape), latency)


def _neighbours(shape: Sequence[int]) -> int:
    return max(1, sum(min(side - 1, 2) for side in shape))


def _known(kind: str, kinds: tuple[str, ...], field: str) -> str:
    if kind not in kinds:
        raise InputError("no such wiring", field=field, found=kind, allowed=", ".join(kinds), hint=nearest(kind, kinds))
    return kind


def _filled(shape: tuple[int, ...], count: int, what: str, field: str) -> tuple[int, ...]:
    if prod(shape) != count or not shape:
        allowed = f"sides whose product is {count}, the number of {what}"
        raise InputError(f"does not hold the {what}", field=field, found=list(shape), allowed=allowed)
    return shape
