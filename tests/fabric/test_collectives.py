"""Laws that hold for every collective, and exact times on small topologies."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servetwin.errors import InputError
from servetwin.fabric import schedules, shapes
from servetwin.fabric.algorithms import ALGORITHMS, IDEAL, KINDS, SERVING, priced
from servetwin.fabric.build import Computer, Wires, build_topology
from servetwin.fabric.collectives import exchange_ns, ring_allreduce_ns, ring_gather_ns, transfer_ns
from servetwin.fabric.group import Fabric
from servetwin.fabric.law import Law
from servetwin.fabric.topology import Link, Topology

B, L = 100e9, 1000.0


@pytest.mark.parametrize("ranks", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("make", [shapes.full_mesh, shapes.switch], ids=["mesh", "switch"])
def test_a_ring_is_its_closed_formula_exactly(make, ranks: int) -> None:
    fabric = Fabric(make(ranks, B, L), "ring", IDEAL)
    group = [list(range(ranks))]
    for size in (1, 1000, 655_360, 2**30):
        assert fabric.law("allreduce", group).ns(size) == ring_allreduce_ns(ranks, size, B, L)
        assert fabric.law("allgather", group).ns(size) == ring_gather_ns(ranks, size, B, L)
        assert fabric.law("reducescatter", group).ns(size) == ring_gather_ns(ranks, size, B, L)
        assert fabric.law("sendrecv", [[0, 1]]).ns(size) == transfer_ns(size, B, L)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_an_exchange_over_a_switch_is_its_closed_formula(ranks: int) -> None:
    law = Fabric(shapes.switch(ranks, B, L), "one_shot", IDEAL).law("alltoall", [range(ranks)])
    assert law.ns(2**20) == pytest.approx(exchange_ns(ranks, 2**20, B, L), rel=1e-12)


def test_flows_over_one_link_share_it() -> None:
    """Two sockets of two: in a ring one flow crosses each way, in an exchange 2 x 2 do."""
    tree = shapes.pcie_tree(4, B, L, sockets=2, bridge_bandwidth=B / 4)
    ring = Fabric(tree, "ring", IDEAL).law("allgather", [range(4)]).ns(4e6)
    assert ring == pytest.approx(3 * (2 * L + 1e6 / (B / 4) * 1e9))
    exchange = Fabric(tree, "one_shot", IDEAL).law("alltoall", [range(4)]).ns(4e6)
    assert exchange == pytest.approx(2 * L + 4 * 1e6 / (B / 4) * 1e9)


def test_an_oversubscribed_tree_slows_what_crosses_it() -> None:
    def law(oversubscription: float, kind: str) -> float:
        between = Wires("fat_tree", 50e9, 2000, (), oversubscription)
        topology = build_topology([Computer(4, Wires("switch", 400e9, 1000), nics=4)] * 4, between)
        return Fabric(topology, "one_shot", IDEAL).law(kind, [range(16)]).ns(2**30)

    assert law(4, "alltoall") == pytest.approx(4 * law(1, "alltoall"), rel=1e-4)


def test_rings_that_cross_the_spine_in_the_wrong_order() -> None:
    """The order of a group matters: interleaved over two nodes, every step of the ring crosses."""
    computer = Computer(4, Wires("switch", 400e9, 1000), nics=1)
    topology = build_topology([computer] * 2, Wires("switch", 50e9, 2000))
    ring = Fabric(topology, "ring", IDEAL)
    good = ring.law("allgather", [[0, 1, 2, 3, 4, 5, 6, 7]]).ns(2**30)
    bad = ring.law("allgather", [[0, 4, 1, 5, 2, 6, 3, 7]]).ns(2**30)
    assert bad == pytest.approx(4 * good, rel=1e-3)


def test_links_have_a_direction() -> None:
    """A ring of links one way only serves a ring in that direction; backwards every step goes round."""
    links = [Link(f"gpu{i}", f"gpu{(i + 1) % 4}", B, L) for i in range(4)]
    one_way = Fabric(Topology([f"gpu{i}" for i in range(4)], links), "ring", IDEAL)
    assert one_way.law("allreduce", [[0, 1, 2, 3]]).ns(4e6) == ring_allreduce_ns(4, 4e6, B, L)
    assert one_way.law("allreduce", [[3, 2, 1, 0]]).ns(4e6) == pytest.approx(6 * (3 * L + 3e6 / B * 1e9))


def test_a_torus_is_taken_side_by_side() -> None:
    """Three sides of four: 3 rounds out and back along each but the first, where all send at once, two hops far; one
    ring takes 126 rounds."""
    torus = shapes.torus((4, 4, 4), B, L)
    for algorithm in ("hierarchical", "auto"):
        law = Fabric(torus, algorithm, IDEAL).law("allreduce", [range(64)])
        assert law.ns(1) == pytest.approx(2 * (2 + 3 + 3) * L, rel=1e-3)


def test_hierarchy_sends_a_share_between_nodes() -> None:
    """Reduce-scatter inside (one round), all-reduce of 1/8 on each rail (2 + 2 of doubling distance), all-gather
    inside."""
    topology = build_topology(
        [Computer(8, Wires("switch", 400e9, 1000), nics=8)] * 4, Wires("rail_fat_tree", 50e9, 2000)
    )
    law = Fabric(topology, "hierarchical", IDEAL).law("allreduce", [range(32)])
    size = 2**30
    inside = 2 * ring_gather_ns(8, size, 400e9, 0)
    between = ring_allreduce_ns(4, size / 8, 50e9, 0)
    assert law.ns(size) == pytest.approx(inside + between + 2 * 1000 + 4 * 2000, rel=1e-12)


@pytest.mark.parametrize("ranks", range(2, 40))
def test_double_tree(ranks: int) -> None:
    """Every rank but the root sends up in each tree and gets back; none is inside both; the height is logarithmic."""
    (round_,) = schedules.double_tree(ranks, 1).rounds
    first, second = round_.flows[: len(round_.flows) // 2], round_.flows[len(round_.flows) // 2 :]
    inner = []
    for tree in (first, second):
        up = tree[::2]
        assert len({a for a, _, _ in up}) == len(up) == ranks - 1
        assert {(b, a) for a, b, _ in up} == {(a, b) for a, b, _ in tree[1::2]}
        children = [b for _, b, _ in up]
        assert max(children.count(b) for b in children) <= 2
        inner.append(set(children))
    assert not inner[0] & inner[1] or ranks == 2
    assert round_.times <= 2 * (ranks - 1).bit_length()


def deliver(schedule: schedules.Schedule, ranks: int) -> list[set[int]]:
    """Follow an all-gather whose ranks pass on all they hold: what each rank has in the end."""
    held = [{rank} for rank in range(ranks)]
    for times, flows, _ in schedule.rounds:
        for _ in range(times):
            before = [set(h) for h in held]
            for a, b, _ in flows:
                held[b] |= before[a]
    return held


@pytest.mark.parametrize("dims", [(2,), (3,), (8,), (11,), (4, 3), (2, 2, 5), (8, 4)])
@pytest.mark.parametrize("method", ["ring", "direct", "doubling"])
def test_an_all_gather_reaches_all_with_the_least_bytes(dims: tuple[int, ...], method: schedules.Method) -> None:
    schedule = schedules.all_gather(dims, (method,) * len(dims))
    ranks = schedule.chunks
    assert deliver(schedule, ranks) == [set(range(ranks))] * ranks
    received = [sum(r.busy * n for r in schedule.rounds for _, b, n in r.flows if b == rank) for rank in range(ranks)]
    assert received == [ranks - 1] * ranks


@pytest.mark.parametrize("dims", [(5,), (8,), (4, 3), (3, 2, 2)])
def test_a_broadcast_reaches_all(dims: tuple[int, ...]) -> None:
    ranks = int(np.prod(dims))
    plans = [schedules.broadcast_tree(dims), schedules.broadcast_ring(ranks), schedules.broadcast_at_once(ranks)]
    assert all(0 in held for plan in plans for held in deliver(plan, ranks))


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    inside = draw(st.sampled_from(["full_mesh", "switch", "pcie_tree", "ring", "torus"]))
    devices = draw(st.sampled_from([2, 4, 6]))
    shape = {"torus": (2, devices // 2), "pcie_tree": (draw(st.integers(1, 2)), draw(st.integers(0, 2)))}.get(
        inside, ()
    )
    rates = st.sampled_from([25e9, 64e9, 450e9])
    computer = Computer(
        devices, Wires(inside, draw(rates), draw(st.integers(0, 3000)), shape), draw(st.sampled_from([1, 2]))
    )
    nodes = draw(st.integers(1, 4))
    kind = draw(st.sampled_from(["switch", "fat_tree", "rail_fat_tree", "full_mesh", "ring"]))
    between = Wires(kind, draw(rates), draw(st.integers(0, 9000)), (), draw(st.sampled_from([1.0, 2.0, 4.0])))
    return build_topology([computer] * nodes, between)


sizes = st.integers(1, 2**32)


def law(topology: Topology, kind: str, algorithm: str, group: list[int]) -> Law | None:
    try:
        return Fabric(topology, algorithm, SERVING).law(kind, [group])
    except InputError:
        return None


@st.composite
def cases(draw: st.DrawFn) -> tuple[Topology, list[int], str]:
    topology = draw(topologies())
    everyone = range(len(topology.devices))
    group = draw(st.lists(st.sampled_from(everyone), min_size=2, max_size=len(everyone), unique=True))
    kind = draw(st.sampled_from(KINDS))
    return topology, sorted(group)[:2] if kind == "sendrecv" else sorted(group), kind


@settings(max_examples=150, deadline=None)
@given(cases(), sizes, sizes)
def test_time_never_falls_with_the_message(case, a: int, b: int) -> None:
    for algorithm in ALGORITHMS:
        found = law(case[0], case[2], algorithm, case[1])
        if found is not None:
            small, large = sorted((a, b))
            assert found.ns(small) <= found.ns(large) * (1 + 1e-12)


@settings(max_examples=100, deadline=None)
@given(cases(), sizes)
def test_half_the_bandwidth_is_never_faster(case, size: int) -> None:
    topology, group, kind = case
    slower = Topology(
        topology.devices,
        [replace(link, bandwidth=link.bandwidth / 2) for link in topology.links],
        hosts=topology.hosts,
        adapters=topology.adapters,
        nodes=topology.nodes,
        shape=topology.shape,
    )
    for algorithm in ALGORITHMS:
        before, after = law(topology, kind, algorithm, group), law(slower, kind, algorithm, group)
        if before is not None and after is not None:
            assert after.ns(size) >= before.ns(size)


@settings(max_examples=100, deadline=None)
@given(cases(), sizes)
def test_auto_is_the_best_of_what_it_may_choose(case, size: int) -> None:
    topology, group, kind = case
    auto = Fabric(topology, "auto", SERVING).law(kind, [group])
    across = len({topology.nodes[device] for device in group}) > 1
    for algorithm in ("ring", "tree", "hierarchical") if across else ("ring",):
        found = law(topology, kind, algorithm, group)
        if found is not None and not (algorithm == "tree" and kind == "alltoall"):
            assert auto.ns(size) <= found.ns(size) * (1 + 1e-12)
    assert auto.ns(size) == min(plan.ns(size) for plan in auto.choices if size < plan.limit)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([shapes.full_mesh, shapes.switch, shapes.ring]), st.integers(2, 9), st.integers(0, 8), sizes)
def test_equal_groups_take_equal_times(make, ranks: int, turn: int, size: int) -> None:
    topology = make(ranks, B, L)
    turned = [(rank + turn) % ranks for rank in range(ranks)]
    for kind in ("allreduce", "allgather", "reducescatter", "alltoall"):
        for algorithm in ALGORITHMS:
            fabric = Fabric(topology, algorithm)
            assert fabric.law(kind, [turned]).ns(size) == pytest.approx(
                fabric.law(kind, [range(ranks)]).ns(size), rel=1e-12
            )


@settings(max_examples=60, deadline=None)
@given(cases(), st.lists(sizes, min_size=1, max_size=5))
def test_arrays_of_sizes_give_the_same_times(case, many: list[int]) -> None:
    for plan in priced(case[2], "auto", case[0], [case[1]], SERVING):
        np.testing.assert_allclose(plan.many(np.array(many, float)), [plan.ns(size) for size in many], rtol=1e-15)


MOVED = {
    "allreduce": lambda n: 2 * (n - 1),
    "allgather": lambda n: n - 1,
    "reducescatter": lambda n: n - 1,
    "alltoall": lambda n: n - 1,
    "sendrecv": lambda n: 1,
    "broadcast": lambda n: n - 1,
}
"""Messages that all ranks together send at least, n ranks"""


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from(ALGORITHMS))
def test_link_bytes_are_what_the_ranks_send(case, algorithm: str) -> None:
    """Bytes on links = bytes of each flow x links on its way; every rank's own links carry what it sends and gets."""
    topology, group, kind = case
    try:
        plans = priced(kind, algorithm, topology, [group])
    except InputError:
        return
    for plan in plans:
        # A plan over levels may number the ranks in another order: take it from the plan itself.
        (ranks,) = plan.members
        flows = [(ranks[a], ranks[b], r.busy * n) for r in plan.schedule.rounds for a, b, n in r.flows]
        hops = sum(n * len(topology.path(a, b)) for a, b, n in flows)
        assert sum(plan.chunks_on.values()) == hops
        sent = sum(n for _, _, n in flows)
        least = MOVED[kind](len(group)) * plan.schedule.chunks
        assert sent >= least
        if algorithm == "ring" and kind != "broadcast":
            assert sent == least
        # What enters a device, less what only passes through it, is what was sent to it.
        for device in ranks:
            name = topology.devices[device]
            entering = sum(n for i, n in plan.chunks_on.items() if topology.links[i].target == name)
            leaving = sum(n for i, n in plan.chunks_on.items() if topology.links[i].source == name)
            got = sum(n for _, b, n in flows if b == device)
            gave = sum(n for a, _, n in flows if a == device)
            assert entering - got == leaving - gave >= 0


def test_hierarchy_needs_even_nodes() -> None:
    topology = build_topology([Computer(4, Wires("switch", B, L), nics=1)] * 2, Wires("switch", B, L))
    with pytest.raises(InputError, match="same number of ranks in every node"):
        Fabric(topology, "hierarchical").law("allreduce", [[0, 1, 4]])
    assert Fabric(topology).law("allreduce", [[0, 1, 4]]).ns(1) > 0
    with pytest.raises(InputError, match="did you mean 'allreduce'"):
        Fabric(topology).law("all_reduce", [[0, 1]])
    with pytest.raises(InputError, match="did you mean 'one_shot'"):
        Fabric(topology, "oneshot").law("allreduce", [[0, 1]])


def test_the_engine_reduces_by_itself_only_where_engines_do() -> None:
    """Up to 8 MiB over a switch; over PCIe only two devices; never across nodes."""

    def limits(topology: Topology, ranks: int) -> list[float]:
        return [
            plan.limit for plan in priced("allreduce", "auto", topology, [range(ranks)]) if plan.limit < float("inf")
        ]

    assert limits(shapes.switch(8, B, L), 8) == [8 * 2**20] * 2
    assert limits(shapes.pcie_tree(8, B, L), 2) == [8 * 2**20] * 2
    assert not limits(shapes.pcie_tree(8, B, L), 4)
    assert not limits(shapes.switch(16, B, L), 16)
    nodes = build_topology([Computer(1, Wires("switch", B, L), nics=1)] * 2, Wires("switch", B, L))
    assert not limits(nodes, 2)
