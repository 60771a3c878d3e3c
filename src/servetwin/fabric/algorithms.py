"""Which schedules may run a collective: by the name of an algorithm, or those that serving software would choose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

from servetwin.errors import InputError, nearest
from servetwin.fabric import schedules as s
from servetwin.fabric.law import PricedSchedule, Protocol
from servetwin.fabric.topology import Topology

ALGORITHMS = ("auto", "ring", "tree", "hierarchical", "one_shot")
KINDS = ("allreduce", "allgather", "reducescatter", "alltoall", "broadcast", "sendrecv")

CUSTOM_RANKS = 8
"""The most devices for which engines reduce with a kernel of their own instead of NCCL (vLLM `CustomAllreduce`)."""
CUSTOM_BYTES = 8 * 2**20
"""Message size from which they leave it to NCCL (vLLM: `max_size` 8 MiB). The shipped tables of vLLM's all-reduce show
the step on a100_sxm, h100_sxm and h200_sxm with two devices."""


@dataclass(frozen=True)
class Software:
    """Protocols of the communication library, and of the engine's own kernel for small all-reduces."""

    collectives: tuple[Protocol, ...] = (Protocol(),)
    kernel: tuple[Protocol, ...] = (Protocol(),)


IDEAL = Software()
"""Nothing but the links."""
SERVING = Software((Protocol(4500, 0.4), Protocol(18000)), (Protocol(4000),))
"""NCCL, whose low-latency protocols send flags along with the data, while its bulk protocol waits for buffers; and an
engine's one-shot kernel. Fitted to h100_sxm: the library to the all-reduce, all-gather and reduce-scatter over 2, 4 and
8 devices from 512 B to 512 MiB (mean error 9 %), the kernel to vLLM's all-reduce of 4 KiB. Shares are of the rate that
big messages reach. docs/fabric.md has the errors on devices that they were not fitted to."""

_CHOSEN = {
    "allreduce": (("rings", "custom"), ("rings", "tree", "hierarchical")),
    "allgather": (("rings",), ("rings", "tree", "hierarchical")),
    "reducescatter": (("rings",), ("rings", "tree", "hierarchical")),
    "alltoall": (("one_shot",), ("one_shot", "hierarchical")),
    "broadcast": (("ring", "tree"), ("ring", "tree", "hierarchical")),
    "sendrecv": (("one_shot",), ("one_shot",)),
}
"""What `auto` chooses from, inside one node and across nodes: the library's rings (several at once where devices have
several links) inside a node, and its rings, trees and rounds of doubling distance (NCCL's PAT) across nodes; sends to
all at once for an all-to-all, or over the rail of the target's adapter (PXN); and for a small all-reduce the engine's
own kernel. A torus is taken side by side too."""


def priced(
    kind: str, algorithm: str, topology: Topology, members: Sequence[Sequence[int]], software: Software = IDEAL
) -> list[PricedSchedule]:
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
    dims = grids[0][0] if len({sides for sides, _ in grids}) == 1 else ()
    if algorithm == "hierarchical" and not dims:
        message = "needs the same number of ranks in every node of a group"
        raise InputError(message, field="collectives", found=algorithm)

    def run(name: str) -> list[PricedSchedule]:
        if name == "hierarchical":
            ordered = [order for _, order in grids]
            return [PricedSchedule(x, topology, ordered, software.collectives) for x in _levels(kind, dims) if dims]
        if name == "custom":
            plans = _flat(kind, "one_shot", ranks) if _custom(topology, members) else []
            return [PricedSchedule(x, topology, members, software.kernel, CUSTOM_BYTES) for x in plans]
        own = kind == "allreduce" and name == "one_shot"
        plans = _rings(kind, ranks, _meshed(topology, members)) if name == "rings" else _flat(kind, name, ranks)
        return [PricedSchedule(x, topology, members, software.kernel if own else software.collectives) for x in plans]

    if algorithm != "auto":
        return run(algorithm)
    across = any(len({topology.nodes[device] for device in group}) > 1 for group in members)
    torus = ("hierarchical",) if topology.shape and len(dims) > 1 else ()
    return [plan for name in dict.fromkeys(_CHOSEN[kind][across] + torus) for plan in run(name)]


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


def _meshed(topology: Topology, members: Sequence[Sequence[int]]) -> bool:
    """Whether any two devices of a group have a link of their own."""
    return all(len(topology.path(a, b)) == 1 for group in members for a in group for b in group if a != b)


def _rings(kind: str, ranks: int, meshed: bool) -> list[s.Schedule]:
    """Rings in ever more directions. In a mesh the library's rings together use every link, as an exchange with all at
    once does, which stands for them."""
    plans = [s.rings(ranks, strides, 2 if kind == "allreduce" else 1) for strides in s.stride_sets(ranks)]
    if meshed:
        plans.append(_of_kind(kind)((ranks,), ("direct",)))
    return plans


def _of_kind(kind: str) -> Callable[[Sequence[int], Sequence[s.Method]], s.Schedule]:
    return {"allreduce": s.all_reduce, "allgather": s.all_gather, "reducescatter": s.reduce_scatter}[kind]


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
            methods: dict[str, s.Method] = {"ring": "ring", "tree": "doubling", "one_shot": "direct"}
            return [_of_kind(kind)(one, (methods[algorithm],))]
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
    inner: tuple[s.Method, ...] = ("ring", "direct")
    outer: tuple[s.Method, ...] = ("ring", "doubling") if len(dims) > 1 else ("ring",)
    return [_of_kind(kind)(dims, (first, *(rest,) * (len(dims) - 1))) for first in inner for rest in outer]
