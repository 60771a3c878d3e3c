"""Shapes and ways through them."""

from __future__ import annotations

import pytest

from servetwin.errors import InputError
from servetwin.fabric import shapes
from servetwin.fabric.build import Computer, Wires, build_topology
from servetwin.fabric.topology import Link, Topology, both


def way(topology: Topology, a: int, b: int) -> list[str]:
    return [topology.links[i].target for i in topology.path(a, b)]


def test_ways_inside_a_node() -> None:
    assert way(shapes.full_mesh(4, 1e9, 10), 0, 3) == ["gpu3"]
    assert way(shapes.switch(4, 1e9, 10), 0, 3) == ["switch", "gpu3"]
    assert way(shapes.ring(5, 1e9, 10), 0, 3) == ["gpu4", "gpu3"]
    tree = shapes.pcie_tree(8, 1e9, 10, sockets=2, switches=2)
    assert way(tree, 0, 1) == ["pcie0", "gpu1"]
    assert way(tree, 0, 2) == ["pcie0", "root0", "pcie1", "gpu2"]
    assert way(tree, 0, 7) == ["pcie0", "root0", "root1", "pcie3", "gpu7"]
    assert not tree.passes_host(0, 1)
    assert tree.passes_host(0, 2)


def test_latency_is_that_of_one_link_through_a_switch_and_of_each_hop_on_a_ring() -> None:
    assert shapes.switch(4, 1e9, 700).latency_ns(0, 3) == 700
    assert shapes.ring(8, 1e9, 700).latency_ns(0, 3) == 2100


def test_a_torus_wraps_and_links_two_in_a_row_once() -> None:
    torus = shapes.torus((4, 2, 3), 1e9, 1)
    assert len(torus.devices) == 24
    # 24 links each way along the sides of 4 and 3, 12 along the side of 2.
    assert len(torus.links) == 2 * (24 + 12 + 24)
    assert torus.latency_ns(0, 3) == 1
    assert torus.latency_ns(0, 2 + 4 + 8) == 2 + 1 + 1


def cluster(kind: str, nodes: int = 4, **more: object) -> Topology:
    computer = Computer(8, Wires("switch", 450e9, 1000), nics=8)
    return build_topology([computer] * nodes, Wires(kind, 50e9, 2000, **more))  # type: ignore[arg-type]


def test_rails_keep_the_same_place_off_the_spine() -> None:
    rails = cluster("rail_fat_tree")
    assert way(rails, 1, 25) == ["node0.nic1", "leaf1", "node3.nic1", "node3.gpu1"]
    assert way(rails, 1, 26) == ["node0.nic1", "leaf1", "spine", "leaf2", "node3.nic2", "node3.gpu2"]
    assert rails.nodes[7:9] == (0, 1)


def test_leaves_of_a_fat_tree() -> None:
    tree = cluster("fat_tree", shape=(2,), oversubscription=4.0)
    assert "spine" not in way(tree, 0, 8)
    assert "spine" in way(tree, 0, 16)
    assert {link.bandwidth for link in tree.links if link.target == "spine"} == {16 * 50e9 / 4}


@pytest.mark.parametrize(("kind", "more"), [("full_mesh", {}), ("ring", {}), ("torus", {"shape": (2, 2)})])
def test_nodes_without_a_switch(kind: str, more: dict[str, object]) -> None:
    topology = cluster(kind, **more)
    assert way(topology, 0, 8) == ["node0.nic0", "node0.gate", "node1.gate", "node1.nic0", "node1.gpu0"]
    out = [li.bandwidth for li in topology.links if li.source == "node0.gate" and li.target.endswith("gate")]
    assert sum(out) == pytest.approx(8 * 50e9)


def test_adapters_hang_where_their_devices_do() -> None:
    computer = Computer(4, Wires("pcie_tree", 50e9, 1000, (2, 1)), nics=2)
    topology = build_topology([computer] * 2, Wires("switch", 25e9, 2000))
    assert way(topology, 3, 7)[:3] == ["node0.pcie1", "node0.nic1", "switch"]


@pytest.mark.parametrize("inside", ["switch", "ring"])
def test_an_adapter_is_no_way_between_devices_of_its_node(inside: str) -> None:
    computer = Computer(8, Wires(inside, 50e9, 9000), nics=1)
    topology = build_topology([computer] * 2, Wires("switch", 400e9, 100))
    assert not [name for a in range(8) for b in range(8) for name in way(topology, a, b) if "nic" in name]


def test_data_does_not_pass_other_devices_where_it_need_not() -> None:
    links = [
        *both("gpu0", "gpu1", 1e9),
        *both("gpu1", "gpu2", 1e9),
        *both("gpu0", "box", 1e9, 9),
        *both("box", "gpu2", 1e9, 9),
    ]
    assert way(Topology(["gpu0", "gpu1", "gpu2"], links), 0, 2) == ["box", "gpu2"]


def test_ways_of_equal_cost_are_decided_by_the_order_of_links() -> None:
    links = [*both("gpu0", "b", 1e9), *both("gpu0", "a", 1e9), *both("a", "gpu1", 1e9), *both("b", "gpu1", 1e9)]
    assert way(Topology(["gpu0", "gpu1"], links), 0, 1) == ["b", "gpu1"]


def test_the_wider_of_two_links_is_taken() -> None:
    links = [Link("gpu0", "gpu1", 1e9), Link("gpu0", "gpu1", 2e9), Link("gpu1", "gpu0", 1e9)]
    assert Topology(["gpu0", "gpu1"], links).path(0, 1) == (1,)


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(InputError, match="gpu2 cannot be reached from gpu0"):
        Topology(["gpu0", "gpu1", "gpu2"], both("gpu0", "gpu1", 1e9))
    with pytest.raises(InputError, match="gpu1 cannot reach gpu0"):
        Topology(["gpu0", "gpu1"], [Link("gpu0", "gpu1", 1e9)])
    with pytest.raises(InputError, match="bandwidth"):
        Link("a", "b", 0)
    with pytest.raises(InputError, match="did you mean 'torus'"):
        build_topology([Computer(4, Wires("toros", 1e9, 0))])
    with pytest.raises(InputError, match=r"network.inside.shape.*product is 4"):
        build_topology([Computer(4, Wires("torus", 1e9, 0, (3, 2)))])
    with pytest.raises(InputError, match=r"network\.between"):
        build_topology([Computer(1, Wires("switch", 1e9, 0))] * 2)
    with pytest.raises(InputError, match="network adapter"):
        build_topology([Computer(1, Wires("switch", 1e9, 0))] * 2, Wires("switch", 1e9, 0))
    with pytest.raises(InputError, match="same number of adapters"):
        two = [Computer(2, Wires("switch", 1e9, 0), nics) for nics in (1, 2)]
        build_topology(two, Wires("rail_fat_tree", 1e9, 0))
    with pytest.raises(InputError, match="did you mean 'gpu3'"):
        shapes.switch(4, 1e9, 0).device("gpu 3")
