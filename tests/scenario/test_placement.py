"""Which devices the replicas get."""

from __future__ import annotations

from typing import Any

import pytest

from servetwin.errors import InputError
from servetwin.scenario.placement import Placement, placed
from servetwin.scenario.schema import Node, Parallelism, Pool


def pool(tensor: int = 1, pipeline: int = 1, data: int = 1, device: str = "h100_sxm", **more: Any) -> Pool:
    degrees = Parallelism(tensor=tensor, pipeline=pipeline, data=data)
    return Pool(device=device, parallelism=degrees, **more)


def node(count: int = 1, name: str = "n", **devices: int) -> Node:
    return Node(name=name, count=count, devices=devices)


def test_replicas_fill_nodes_in_order_and_stay_within_one_where_they_fit() -> None:
    found = placed([pool(tensor=4, replicas=3)], [node(2, h100_sxm=6)])
    assert found.replicas == [[(0, 1, 2, 3), (6, 7, 8, 9), (4, 5, 10, 11)]]
    assert found.text(0) == ["n-0:0-3", "n-1:0-3", "n-0:4-5", "n-1:4-5"]


def test_a_replica_larger_than_a_node_keeps_its_tensor_groups_whole() -> None:
    found = placed([pool(tensor=4, pipeline=2)], [node(2, h100_sxm=6)])
    assert found.replicas == [[(0, 1, 2, 3, 6, 7, 8, 9)]]


def test_kinds_are_told_apart_in_a_node_of_both() -> None:
    pools = [pool(device="l40s", tensor=2), pool(tensor=2)]
    found = placed(pools, [node(h100_sxm=2, l40s=2)])
    assert found.replicas == [[(2, 3)], [(0, 1)]]


def test_explicit_places_come_first_and_are_what_is_written_out() -> None:
    pools = [pool(tensor=2, replicas=2), pool(tensor=2, replicas=2, placement=["n-1:2-3", "n-0:0,2"])]
    found = placed(pools, [node(2, h100_sxm=4)])
    assert found.replicas[1] == [(6, 7), (0, 2)]
    assert found.replicas[0] == [(1, 3), (4, 5)]
    again = [p.model_copy(update={"placement": found.text(i)}) for i, p in enumerate(pools)]
    assert placed(again, [node(2, h100_sxm=4)]).replicas == found.replicas


def test_without_nodes_there_are_as_many_as_needed() -> None:
    found = placed([pool(tensor=8, replicas=2), pool(tensor=4), pool(tensor=4), pool(tensor=8, pipeline=2)], None)
    spread = [
        sorted({found.machine_of(d).name for d in replica}) for replicas in found.replicas for replica in replicas
    ]
    assert spread == [["node0"], ["node1"], ["node2"], ["node2"], ["node3", "node4"]]


def says(pools: list[Pool], nodes: list[Node] | None) -> str:
    with pytest.raises(InputError) as raised:
        placed(pools, nodes)
    return str(raised.value)


def test_too_few_devices_are_reckoned_up() -> None:
    assert says([pool(tensor=8, name="a"), pool(tensor=4, replicas=3, name="b")], [node(2, h100_sxm=8)]) == (
        "pools[1]: does not fit: 3 replicas x (tensor 4 x pipeline 1 x data 1) = 12 h100_sxm, but the nodes have 16, "
        "of which a takes 8: 4 are missing"
    )
    assert says([pool(device="l40s")], [node(h100_sxm=8)]) == (
        "pools[0]: does not fit: 1 replicas x (tensor 1 x pipeline 1 x data 1) = 1 l40s, but the nodes have 0: 1 are "
        "missing; allowed: a device of the nodes: h100_sxm"
    )


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (["n_0:0"], "pools[0].placement[0]: no such node; found 'n_0'; allowed: n-0, n-1; did you mean 'n-0'?"),
        (
            ["0"],
            "pools[0].placement[0]: is not a place; found '0'; allowed: NODE:SLOTS, such as node0:0-3 or node0:0,2",
        ),
        (["n-0:9"], "pools[0].placement[0]: the node has no such devices; found 'n-0:9'; allowed: n-0:0-7"),
        (
            ["n-0:0-1"],
            "pools[0].placement: names 2 devices; allowed: 1 = 1 replicas x (tensor 1 x pipeline 1 x data 1)",
        ),
    ],
)
def test_wrong_places(places: list[str], message: str) -> None:
    assert says([pool(placement=places)], [node(2, h100_sxm=8)]) == message


def test_a_device_is_given_away_once() -> None:
    both = [pool(placement=["n:0"]), pool(placement=["n:0"])]
    assert says(both, [node(h100_sxm=8)]) == "pools[1].placement: a device is given away twice; found 'n:0'"
    assert says([pool(placement=["n:0"])], [node(l40s=8)]) == (
        "pools[0].placement[0]: slot 0 holds a l40s, the pool runs on h100_sxm; found 'n:0'"
    )


@pytest.mark.parametrize("nodes", [None, [node(3, h100_sxm=5)]])
def test_no_device_serves_twice(nodes: list[Node] | None) -> None:
    found: Placement = placed([pool(tensor=2, replicas=3), pool(tensor=3), pool(pipeline=4)], nodes)
    devices = [d for replicas in found.replicas for replica in replicas for d in replica]
    assert len(devices) == len(set(devices)) == 13
