"""Which schedules may run a collective: by the name of an algorithm, or those that serving software would choose."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal

from servetwin.errors import InputError, nearest
from servetwin.fabric import schedules as s
from servetwin.fabric.law import PricedSchedule
from servetwin.fabric.topology import Topology

Algorithm = Literal["auto", "ring", "tree", "hierarchical", "one_shot"]
ALGORITHMS = ("auto", "ring", "tree", "hierarchical", "one_shot")
KINDS = ("allreduce", "allgather", "reducescatter", "alltoall", "broadcast", "sendrecv")

CUSTOM_RANKS = 8
"""The most devices for which engines reduce with a kernel of their own instead of NCCL (vLLM `CustomAllreduce`)."""
CUSTOM_BYTES = 8 * 2**20
"""Message size from which they leave it to NCCL (vLLM: `max_size` 8 MiB). The shipped tables of vLLM's all-reduce show
the step on a100_sxm, h100_sxm and h200_sxm with two devices."""

_CHOSEN = {
    "allreduce": (("ring", "custom"), ("ring", "tree", "hierarchical")),
    "allgather": (("ring",), ("ring", "tree", "hierarchical")),
    "reducescatter": (("ring",), ("ring", "tree", "hierarchical")),
    "alltoall": (("one_shot",), ("one_shot", "hierarchical")),
    "broadcast": (("ring", "tree"), ("ring", "tree", "hierarchical")),
    "sendrecv": (("one_shot",), ("one_shot",)),
}
"""What `auto` chooses from, inside one node and across nodes: NCCL's rings inside a node and its rings, trees and PAT
(an all-gather in rounds of doubling distance) across nodes; grouped sends for an all-to-all, over the rail of the
target's adapter (PXN) or straight; and for a small all-reduce the engine's own kernel. A torus takes its sides one by
one."""


def priced(kind: str, algorithm: str, topology: Topology, members: Sequence[Sequence[int]]) -> list[PricedSchedule]:
    """The schedules among which the quickest runs `kind` over every group of `members` at once (ordered device numbers,
    at least two, equally many in each).

    Raises:
        InputError: unknown kind or algorithm; `hierarchical` over nodes that hold different numbers of a group.
    """
    for field, found, allowed in (("kind", kind, KINDS), ("collectives", algorithm, ALGORITHMS)):
        if found not in allowed:
            hint = nearest(found, allowed)
            raise InputError("no such", field=field, found=found, allowed=", ".join(allowed), hint=hint)
    ranks = len(members[0])
    grids = [_grid(topology, group) for group in members]
    dims = grids[0][0] if len({grid[0] for grid in grids}) == 1 else ()
    across = any(len({topology.nodes[device] for device in group}) > 1 for group in members)
    names: tuple[str, ...] = (algorithm,)
    if algorithm == "auto":
        torus = ("hierarchical",) if bool(topology.shape) and len(dims) > 1 else ()
        names = tuple(dict.fromkeys(_CHOSEN[kind][across] + torus))
    found_: list[PricedSchedule] = []
    for name in names:
        if name == "hierarchical":
            if not dims:
                if algorithm != "auto":
                    raise InputError(
                        "needs the same number of ranks in every node of a group", field="collectives", found=name
                    )
                continue
            ordered = [grid[1] for grid in grids]
            found_ += [PricedSchedule(schedule, topology, ordered) for schedule in _levels(kind, dims)]
        elif name == "custom":
            if _custom(topology, members):
                found_ += [PricedSchedule(sc, topology, members, CUSTOM_BYTES) for sc in _flat(kind, "one_shot", ranks)]
        elif name == "ring" and algorithm == "auto" and kind in ("allreduce", "allgather", "reducescatter"):
            passes = 2 if kind == "allreduce" else 1
            every = [s.rings(ranks, strides, passes) for strides in s.stride_sets(ranks)]
            found_ += [PricedSchedule(schedule, topology, members) for schedule in every]
        else:
            found_ += [PricedSchedule(schedule, topology, members) for schedule in _flat(kind, name, ranks)]
    return found_


def _custom(topology: Topology, members: Sequence[Sequence[int]]) -> bool:
    """Whether engines would use a kernel of their own: up to eight devices that reach each other without a processor in
    between, or any two (vLLM asks for NVLink between more than two)."""
    ranks = len(members[0])
    if ranks > CUSTOM_RANKS:
        return False
    return ranks == 2 or not any(topology.passes_host(a, b) for group in members for a in group for b in group)


def _grid(topology: Topology, group: Sequence[int]) -> tuple[tuple[int, ...], list[int]]:
    """Sides and the group in their order: the sides of a torus that it fills; else ranks a node, and nodes. No sides
    when nodes hold different numbers of ranks."""
    shape = tuple(side for side in topology.shape if side > 1)
    if len(shape) > 1 and list(group) == list(range(prod(shape))):
        return shape, list(group)
    by_node: dict[int, list[int]] = {}
    for device in group:
        by_node.setdefault(topology.nodes[device], []).append(device)
    counts = {len(held) for held in by_node.values()}
    dims = (counts.pop(), len(by_node)) if len(counts) == 1 else ()
    return tuple(side for side in dims if side > 1), [device for held in by_node.values() for device in held]


def _flat(kind: str, algorithm: str, ranks: int) -> list[s.Schedule]:
    """One level, whatever the nodes."""
    one = (ranks,)
    match kind, algorithm:
        case "allreduce", "ring":
            return [s.all_reduce(one, ("ring",))]
        case "allreduce", "tree":
            return [s.double_tree(ranks, segments) for segments in s.SEGMENTS]
        case "allreduce", _:
            return [s.one_shot(ranks), s.all_reduce(one, ("direct",))]
        case "allgather" | "reducescatter", _:
            build = s.all_gather if kind == "allgather" else s.reduce_scatter
            methods: dict[str, s.Method] = {"ring": "ring", "tree": "doubling", "one_shot": "direct"}
            return [build(one, (methods[algorithm],))]
        case "alltoall", "ring":
            return [s.pairwise(ranks)]
        case "alltoall", "tree":
            return [s.exchange_doubling(ranks)]
        case "alltoall", _:
            return [s.exchange(one)]
        case "broadcast", "ring":
            return [s.broadcast_ring(ranks)]
        case "broadcast", "tree":
            return [s.broadcast_tree(one)]
        case "broadcast", _:
            return [s.broadcast_at_once(ranks)]
        case _:
            return [s.transfer()]


def _levels(kind: str, dims: tuple[int, ...]) -> list[s.Schedule]:
    """Side after side: rings or all at once along the first, rings or doubling along the others."""
    match kind:
        case "alltoall":
            return [s.exchange(dims)]
        case "broadcast":
            return [s.broadcast_tree(dims)]
        case "sendrecv":
            return [s.transfer()]
    build = {"allreduce": s.all_reduce, "allgather": s.all_gather, "reducescatter": s.reduce_scatter}[kind]
    inner: tuple[s.Method, ...] = ("ring", "direct")
    outer: tuple[s.Method, ...] = ("ring", "doubling") if len(dims) > 1 else ("ring",)
    return [build(dims, (first, *(rest,) * (len(dims) - 1))) for first in inner for rest in outer]
