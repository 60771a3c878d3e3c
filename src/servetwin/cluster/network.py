"""From a scenario's nodes and network to the links of each replica."""

from __future__ import annotations

from pathlib import Path

from servetwin import catalog
from servetwin.errors import InputError
from servetwin.fabric.build import Computer, Wires, inside_of, published
from servetwin.fabric.network import Network
from servetwin.scenario.placement import Machine, Placement, default_host
from servetwin.scenario.schema import Node, Pool, Scenario, Topology
from servetwin.timing.links import Links

_EXAMPLES = {"bandwidth": "50GB/s", "latency": "1us"}


def network_of(scenario: Scenario, placement: Placement, base: Path) -> Network:
    """What joins the devices of a resolved scenario.

    Where the scenario says nothing, devices of a node are joined by their own scale-up fabric, and nodes by one switch
    over the network cards of their hosts.

    Raises:
        InputError: devices between which no link is known.
    """
    given = scenario.network
    inside = given.inside if given else None
    computers = tuple(_computer(machine, scenario.nodes, inside) for machine in placement.machines)
    between = None
    if given is not None and given.between is not None:
        between = _wires(given.between, "network.between")
    elif len(computers) > 1:
        between = _cards(scenario, placement)
    graph = base / given.graph if given is not None and given.graph is not None else None
    collectives = given.collectives if given else "auto"
    names = tuple(machine.name for machine in placement.machines)
    return Network(computers, between, graph, collectives, explicit=inside is not None, names=names)


def links_of(network: Network, pool: Pool, devices: tuple[int, ...]) -> Links | None:
    """What joins the devices of a replica; None for a single one, and where the pool has a link of its own."""
    if len(devices) < 2 or pool.link is not None:
        return None
    degrees, override = pool.parallelism, pool.device_overrides
    bandwidth = (override.memory_bandwidth if override else None) or catalog.device(pool.device).memory_bandwidth
    return network.links(devices, degrees.tensor, degrees.pipeline, degrees.data, bandwidth)


def _computer(machine: Machine, nodes: list[Node] | None, inside: Topology | None) -> Computer:
    count = len(machine.kinds)
    if inside is not None:
        wires = _wires(inside, "network.inside")
    elif len(set(machine.kinds)) == 1:
        wires = inside_of(catalog.device(machine.kinds[0]), count)
    else:  # devices of different kinds share no fabric of their own: they meet on the host's bus
        wires = _bus(machine)
    nic = nodes[machine.node].nic if nodes and machine.node >= 0 else None
    cards = (nic.count or 0) if nic else catalog.host(default_host(machine.kinds[0])).nics
    slots = [device.host_link for device in map(catalog.device, set(machine.kinds))]
    narrowest = min((published(link)[0] for link in slots if link is not None), default=None)
    return Computer(count, wires, cards, narrowest)


def _bus(machine: Machine) -> Wires:
    links = {kind: catalog.device(kind).host_link for kind in machine.kinds}
    lacking = next((kind for kind, link in links.items() if link is None), None)
    if lacking is not None:
        message = f"no link between devices of different kinds is known for {lacking}"
        raise InputError(message, field="network.inside")
    found = [published(link) for link in links.values() if link is not None]
    return Wires("pcie_tree", min(bandwidth for bandwidth, _ in found), max(latency for _, latency in found), (2,))


def _cards(scenario: Scenario, placement: Placement) -> Wires | None:
    """One switch over the network cards: the slowest card counts."""
    found: list[tuple[float, float]] = []
    for machine in placement.machines:
        nic = scenario.nodes[machine.node].nic if scenario.nodes and machine.node >= 0 else None
        if nic is not None and nic.bandwidth is not None:
            link = catalog.link(nic.link) if nic.link else None
            share = published(link)[0] / link.bandwidth if link else 1.0
            found.append((nic.bandwidth * share, nic.latency or 0))
        else:
            link = catalog.host(default_host(machine.kinds[0])).nic
            found += [published(link)] if link is not None else []
    if not found:
        return None
    return Wires("switch", min(bandwidth for bandwidth, _ in found), max(latency for _, latency in found))


def _wires(topology: Topology, field: str) -> Wires:
    bandwidth: float | None = topology.bandwidth
    latency: float | None = topology.latency
    if topology.link is not None:
        of_link = published(catalog.link(topology.link))
        bandwidth, latency = bandwidth or of_link[0], of_link[1] if latency is None else latency
    if bandwidth is None or latency is None:
        name = "bandwidth" if bandwidth is None else "latency"
        raise InputError(
            f"missing: a {topology.kind} without a link of the catalogue needs it",
            field=f"{field}.{name}",
            allowed="a value with its unit, such as " + _EXAMPLES[name] + "; or link, as `servetwin list links` prints",
        )
    return Wires(topology.kind, bandwidth, latency, tuple(topology.shape or ()), topology.oversubscription or 1.0)
