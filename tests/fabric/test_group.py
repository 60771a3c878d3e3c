"""Replicas on a topology: who is in which group, prices by stage, and traffic from the step table."""

from __future__ import annotations

import numpy as np
import pytest

from servetwin import catalog
from servetwin.errors import InputError
from servetwin.fabric import shapes
from servetwin.fabric.algorithms import IDEAL
from servetwin.fabric.build import Computer, Wires, build_topology, inside_of
from servetwin.fabric.group import DeviceGroup, Fabric
from servetwin.fabric.link import DeviceLink
from servetwin.fabric.reference import ReferenceLinks
from servetwin.model.kernels import Collective

NODE = Computer(4, Wires("switch", 400e9, 1000), nics=4)
BETWEEN = Wires("rail_fat_tree", 50e9, 2000)


def collective(kind: str, group: str, ranks: int, size: int = 1024, stages: tuple[int, ...] = ()) -> Collective:
    return Collective(name="x", kind=kind, group=group, ranks=ranks, bytes_a_row=size, stages=stages)


def replica(tensor: int, pipeline: int, data: int, nodes: int = 2, algorithm: str = "auto") -> DeviceGroup:
    fabric = Fabric(build_topology([NODE] * nodes, BETWEEN), algorithm, IDEAL)
    return fabric.replica(range(tensor * pipeline * data), tensor, pipeline, data)


def test_ranks_are_numbered_as_in_vllm() -> None:
    """Tensor fastest, then pipeline, then data."""
    devices = replica(2, 2, 2)
    assert devices.members(collective("allreduce", "tensor", 2), 0) == [[0, 1], [4, 5]]
    assert devices.members(collective("allreduce", "tensor", 2), 1) == [[2, 3], [6, 7]]
    assert devices.members(collective("sendrecv", "pipeline", 2), 0) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert devices.members(collective("alltoall", "expert", 4), 0) == [[0, 1, 4, 5]]
    assert devices.members(collective("allgather", "data", 2), 1) == [[2, 6], [3, 7]]
    assert replica(4, 1, 1).members(collective("allgather", "context", 2), 0) == [[0, 1], [2, 3]]


def test_a_link_is_a_switch_with_a_ring() -> None:
    link = DeviceLink(400e9, 1000)
    devices = Fabric(shapes.switch(4, 400e9, 1000), "ring", IDEAL).replica(range(4), 4)
    for kind in ("allreduce", "allgather", "reducescatter"):
        operator = collective(kind, "tensor", 4)
        assert devices.collective_ns(operator, 77) == link.collective_ns(operator, 77)


def test_stages_are_priced_where_they_stand() -> None:
    """Three stages of two: the first hand-over stays in node 0, the second crosses to node 1."""
    devices = replica(2, 3, 1)
    handover = collective("sendrecv", "pipeline", 2, stages=(1, 1, 0))
    inside, across = (devices.collective_ns(handover, 8, stage) for stage in (0, 1))
    assert inside < across
    assert devices.collective_ns(handover, 8) == pytest.approx((inside + across) / 2)
    assert devices.nodes_of(handover) == 2
    assert not devices.spans_nodes(collective("allreduce", "tensor", 2))


def test_groups_that_work_at_once_share_links() -> None:
    """Two tensor ranks hand over through one adapter."""
    one_nic = Computer(2, Wires("switch", 400e9, 0), nics=1)
    fabric = Fabric(build_topology([one_nic] * 2, Wires("switch", 50e9, 0)), "auto", IDEAL)
    handover = collective("sendrecv", "pipeline", 2)
    alone, pair = fabric.replica([0, 2], 1, 2), fabric.replica([0, 1, 2, 3], 2, 2)
    assert pair.collective_ns(handover, 1000) == pytest.approx(2 * alone.collective_ns(handover, 1000))


def test_traffic_of_a_step_table() -> None:
    """A ring all-reduce puts 2 (N-1)/N of the bytes on each rank's link, up and down, for every call."""
    devices = replica(4, 2, 1, algorithm="ring")
    rows = np.array([1, 100, 4096])
    operator = collective("allreduce", "tensor", 4, size=8192, stages=(3, 5))
    onto = devices.traffic(operator, rows)
    topology = devices.fabric.topology
    total = rows.sum() * 8192
    for number, link in enumerate(topology.links):
        calls = 3 if link.source.startswith("node0") else 5
        inside = "switch" in link.source + link.target and not link.source.startswith("spine")
        expected = calls * 2 * 3 / 4 * total if inside and link.source.startswith("node") else 0
        assert onto[number] == pytest.approx(expected), link


def test_traffic_follows_the_choice_of_each_size() -> None:
    """A small all-reduce is read by all at once, (N-1) D a rank, a big one goes round, 2 (N-1)/N D."""
    devices = Fabric(shapes.switch(8, 400e9, 1000)).replica(range(8), 8)
    operator = collective("allreduce", "tensor", 8, size=1)
    small, big, both = (devices.traffic(operator, np.array(rows)).sum() for rows in ([512], [2**28], [512, 2**28]))
    assert small == pytest.approx(2 * 8 * 7 * 512)
    assert big == pytest.approx(2 * 8 * 2 * 7 / 8 * 2**28)
    assert both == small + big


def test_the_reference_takes_a_node_as_its_first_dimension() -> None:
    devices = replica(8, 1, 1)
    operator = collective("allreduce", "tensor", 8, size=655_360)
    wide, narrow = (128 * 2**30, 500), (16 * 2**30, 20_000)
    both = ReferenceLinks(wide, narrow, 1597e9, devices).collective_ns(operator, 1)
    flat = ReferenceLinks(wide, narrow, 1597e9).collective_ns(operator, 1)
    # RS and AG over four in a node, AR over two nodes with a quarter of the bytes.
    message = 655_360 / 4 / (128 * 2**30 / 1e9)
    outer = 30 + 2 * int(20_000 + 655_360 / 8 / (16 * 2**30 / 1e9)) + 3 * 655_360 / 8 / 1597
    inner = 2 * 40 + 2 * 3 * int(500 + message) + 3 * 3 * 655_360 / 4 / 1597
    assert both == int(outer + inner)
    assert flat < both


def test_wrong_replicas_are_refused() -> None:
    fabric = Fabric(shapes.switch(4, 1e9, 0))
    for devices, tensor, message in (
        ([0, 1, 2], 2, "another number of devices"),
        ([0, 4], 2, "no such device; found 4; allowed: different ones of 0 to 3"),
        ([1, 1], 2, "given twice"),
    ):
        with pytest.raises(InputError, match=message):
            fabric.replica(devices, tensor)
    with pytest.raises(InputError, match="takes 3 ranks"):
        fabric.replica([0, 1], 2).collective_ns(collective("allreduce", "tensor", 3), 1)


@pytest.mark.parametrize("name", ["h100_sxm", "mi300x", "rtx_pro_6000", "tpu_v5p", "gaudi3", "h20"])
def test_wiring_of_the_catalogue(name: str) -> None:
    """Every device reaches the rate of its datasheet row, less the share that no collective reaches."""
    device = catalog.device(name)
    wires = inside_of(device, 4)
    topology = build_topology([Computer(4, wires)])
    out = sum(link.bandwidth for link in topology.links if link.source == "node0.gpu0")
    assert device.scale_up is not None
    present = 3 / 7 if wires.kind == "full_mesh" else 1
    assert 0.5 * present < out / device.scale_up.bandwidth < 0.71 * present
    assert Fabric(topology).law("allreduce", [range(4)]).ns(2**20) > 0


def test_a_group_of_1024_is_priced_in_reasonable_time() -> None:
    """128 nodes of 8: the all-reduce over 64 of them, and its traffic."""
    nodes = [Computer(8, Wires("switch", 400e9, 1000), nics=8)] * 128
    fabric = Fabric(build_topology(nodes, BETWEEN))
    devices = fabric.replica(range(512, 1024), 8, 1, 64)
    assert devices.collective_ns(collective("allreduce", "tensor", 8), 64) > 0
    assert devices.collective_ns(collective("allreduce", "data", 64), 64) > 0
