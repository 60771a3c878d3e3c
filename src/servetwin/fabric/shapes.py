"""The usual ways to join devices, and nodes.

Inside a node, a function returns a `Topology` of devices `gpu0`, `gpu1`, ... Between nodes, a function returns the
links that join ports: `ports[i]` names the adapters of node i, which `joined` connects to its devices. Bandwidths are
B/s of one link in one direction. A way through switches has the latency of one link, counted where it leaves the device
or adapter: catalogue latencies are those of a transfer from one end to the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import prod

from servetwin.errors import InputError
from servetwin.fabric.topology import Link, Topology, both

Ports = Sequence[Sequence[str]]


def _devices(count: int) -> list[str]:
    return [f"gpu{i}" for i in range(count)]


def full_mesh(devices: int, bandwidth: float, latency_ns: float) -> Topology:
    """A link of its own between any two devices (Infinity Fabric of MI300X)."""
    names = _devices(devices)
    return Topology(names, mesh_links(names, bandwidth, latency_ns))


def switch(devices: int, bandwidth: float, latency_ns: float) -> Topology:
    """Every device on one switch that all can use at full rate at once (NVSwitch)."""
    names = _devices(devices)
    return Topology(names, switch_links([names], bandwidth, latency_ns))


def ring(devices: int, bandwidth: float, latency_ns: float) -> Topology:
    """Each device linked with the one before and the one after it."""
    return torus((devices,), bandwidth, latency_ns)


def torus(shape: Sequence[int], bandwidth: float, latency_ns: float) -> Topology:
    """A grid of `shape` devices, numbered along the first side first, whose lines close to rings (TPU pods)."""
    if not shape or min(shape) < 1:
        raise InputError("must be whole numbers of at least 1", field="shape", found=list(shape))
    names = _devices(prod(shape))
    return Topology(names, torus_links(names, shape, bandwidth, latency_ns), shape=tuple(shape))


def pcie_tree(
    devices: int,
    bandwidth: float,
    latency_ns: float,
    sockets: int = 2,
    switches: int = 0,
    bridge_bandwidth: float | None = None,
) -> Topology:
    """Devices spread evenly over `sockets` root complexes, each with `switches` PCIe switches (0: plugged straight in).

    A switch has one link up, as wide as that of one device. Root complexes are joined by a bridge, as wide as one
    device's link unless given: the processors' own links differ by model, and peer traffic seldom gets all of them.
    """
    names, attach, links = _devices(devices), list[str](), list[Link]()
    if not 1 <= sockets <= devices:
        raise InputError("must be from 1 to the number of devices", field="sockets", found=sockets)
    roots = [f"root{i}" for i in range(sockets)]
    groups = sockets * max(1, switches)
    for i, name in enumerate(names):
        group = i * groups // devices
        parent = f"pcie{group}" if switches else roots[group]
        attach.append(parent)
        links += both(name, parent, bandwidth, latency_ns, 0)
    for group in range(groups if switches else 0):
        links += both(f"pcie{group}", roots[group // switches], bandwidth)
    wide = bandwidth if bridge_bandwidth is None else bridge_bandwidth
    for a, b in combinations(roots, 2):
        links += both(a, b, wide, latency_ns)
    return Topology(names, links, hosts=roots, attach=attach)


def mesh_links(names: Sequence[str], bandwidth: float, latency_ns: float) -> list[Link]:
    """A link between any two endpoints."""
    return [link for a, b in combinations(names, 2) for link in both(a, b, bandwidth, latency_ns)]


def torus_links(names: Sequence[str], shape: Sequence[int], bandwidth: float, latency_ns: float) -> list[Link]:
    """Closed lines along every side of a grid; two in a row share one link. All links forward come before those back,
    so that data for the opposite side of a ring, with two equal ways, goes forward from everywhere."""
    pairs, step = list[tuple[str, str]](), 1
    for side in shape:
        for i, name in enumerate(names):
            at = i // step % side
            if side > 2 or at < side - 1:
                pairs.append((name, names[i + ((at + 1) % side - at) * step]))
        step *= side
    ahead = [Link(a, b, bandwidth, latency_ns) for a, b in pairs]
    return ahead + [Link(b, a, bandwidth, latency_ns) for a, b in pairs]


def switch_links(ports: Ports, bandwidth: float, latency_ns: float) -> list[Link]:
    """All ports on one switch that never blocks."""
    return [link for node in ports for port in node for link in both(port, "switch", bandwidth, latency_ns, 0)]


def fat_tree_links(
    ports: Ports, bandwidth: float, latency_ns: float, nodes_a_leaf: int = 1, oversubscription: float = 1.0
) -> list[Link]:
    """Two levels: the ports of every `nodes_a_leaf` nodes on one leaf switch, all leaves on the spine.

    The spine switches stand as one, and a leaf's links to them as one of their joint rate, so traffic is taken to be
    spread over them perfectly. `oversubscription` is the rate of a leaf's ports over that of its links up.
    """
    leaves = [
        [port for node in ports[i : i + nodes_a_leaf] for port in node] for i in range(0, len(ports), nodes_a_leaf)
    ]
    return _leaves(leaves, bandwidth, latency_ns, oversubscription)


def rail_links(ports: Ports, bandwidth: float, latency_ns: float, oversubscription: float = 1.0) -> list[Link]:
    """Rail-optimised fat tree: port i of every node on leaf switch i, all leaves on the spine (as `fat_tree_links`).

    Raises:
        InputError: nodes differ in their number of ports.
    """
    if len({len(node) for node in ports}) > 1:
        counts = sorted({len(node) for node in ports})
        raise InputError("rails need the same number of adapters in every node", field="nics", found=counts)
    rails = [[node[i] for node in ports] for i in range(len(ports[0]))]
    return _leaves(rails, bandwidth, latency_ns, oversubscription)


def _leaves(leaves: list[list[str]], bandwidth: float, latency_ns: float, oversubscription: float) -> list[Link]:
    if not oversubscription > 0:
        raise InputError("must be more than 0", field="oversubscription", found=oversubscription)
    links = []
    for i, members in enumerate(leaves):
        for port in members:
            links += both(port, f"leaf{i}", bandwidth, latency_ns, 0)
        if len(leaves) > 1:
            links += both(f"leaf{i}", "spine", bandwidth * len(members) / oversubscription)
    return links


@dataclass(frozen=True)
class Node:
    """A computer: its devices, and `nics` network adapters that they share evenly, in order. `slot_bandwidth` is that
    of the way from a device to its adapter (B/s)."""

    inside: Topology
    nics: int
    slot_bandwidth: float

    def ports(self, name: str) -> list[str]:
        """Names of the adapters of a node of this name."""
        return [f"{name}.nic{i}" for i in range(self.nics)]


def joined(nodes: Sequence[Node], between: Sequence[Link], names: Sequence[str]) -> Topology:
    """Nodes and the network between their adapters. Devices are numbered node by node: `node0.gpu0`, ... where the
    first of the `names` is `node0`.

    Raises:
        InputError: a node has no adapter, or the links leave one out.
    """
    devices, attach, links, hosts, numbers = list[str](), list[str](), list[Link](), list[str](), list[int]()
    for number, (name, node) in enumerate(zip(names, nodes, strict=True)):
        inside, ports, prefix = node.inside, node.ports(name), f"{name}."
        if len(nodes) > 1 and not ports:
            raise InputError("has no network adapter", field=f"nodes[{number}]", found=0, allowed="at least 1")
        links += [Link(prefix + li.source, prefix + li.target, li.bandwidth, li.latency_ns) for li in inside.links]
        hosts += [prefix + host for host in inside.hosts]
        devices += [prefix + device for device in inside.devices]
        numbers += [number] * len(inside.devices)
        plugged = [prefix + at for at in inside.attach]
        attach += plugged
        slots = dict.fromkeys((at, ports[i * node.nics // len(plugged)]) for i, at in enumerate(plugged) if ports)
        for at, port in slots:
            links += both(at, port, node.slot_bandwidth)
    shape = nodes[0].inside.shape if len(nodes) == 1 else ()
    adapters = [port for name, node in zip(names, nodes, strict=True) for port in node.ports(name)]
    return Topology(
        devices, [*links, *between], hosts=hosts, adapters=adapters, nodes=numbers, shape=shape, attach=attach
    )
