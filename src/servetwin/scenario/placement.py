"""Which devices each replica of a pool runs on.

Devices are numbered through: node after node, and in a node in the order in which its kinds are listed. The ranks of a
replica take its devices in order: tensor ranks next to each other, then pipeline stages, then data-parallel ranks, as
vLLM numbers its workers.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from servetwin import catalog
from servetwin.errors import InputError, nearest
from servetwin.scenario.schema import Node, Pool

_SLOTS = re.compile(r"(\d+)(?:-(\d+))?")
ALLOWED = "NODE:SLOTS, such as node0:0-3 or node0:0,2"


@dataclass(frozen=True)
class Machine:
    """One computer: the number of its first device, and the kind of each."""

    name: str
    first: int
    kinds: tuple[str, ...]
    node: int
    """which entry of the scenario's `nodes` it is one of; -1: none were given"""

    @property
    def devices(self) -> range:
        return range(self.first, self.first + len(self.kinds))


@dataclass(frozen=True)
class Placement:
    """`replicas[pool][replica]` = device numbers in rank order."""

    machines: list[Machine] = field(default_factory=list)
    replicas: list[list[tuple[int, ...]]] = field(default_factory=list)

    def machine_of(self, device: int) -> Machine:
        """The computer that holds a device."""
        return self.machines[bisect_right(self.machines, device, key=_first) - 1]

    def layout(self, devices: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """Where devices stand but for which computers they are: (computer, counted from the first that they use, and
        place in it) of each. Replicas with the same layout on equal computers have the same links."""
        machines = [self.machine_of(device) for device in devices]
        order = list(dict.fromkeys(machine.first for machine in machines))
        pairs = zip(machines, devices, strict=True)
        return tuple((order.index(machine.first), device - machine.first) for machine, device in pairs)

    def text(self, pool: int) -> list[str]:
        """The devices of a pool as a scenario names them, replica after replica."""
        return [part for replica in self.replicas[pool] for part in self._spans(replica)]

    def _spans(self, devices: Sequence[int]) -> Iterator[str]:
        start = 0
        for i in range(1, len(devices) + 1):
            machine = self.machine_of(devices[start])
            if i < len(devices) and devices[i] == devices[i - 1] + 1 and devices[i] in machine.devices:
                continue
            low, high = devices[start] - machine.first, devices[i - 1] - machine.first
            yield f"{machine.name}:{low}" if low == high else f"{machine.name}:{low}-{high}"
            start = i


def default_host(kind: str) -> str:
    """The host, of the catalogue, that a device is taken to stand in where none is given."""
    family, _, form = kind.partition("_")
    try:
        return catalog.host(f"dgx_{family}" if form == "sxm" else "generic_2s_x86").id
    except InputError:
        return catalog.host("generic_2s_x86").id


def devices_of(pool: Pool) -> int:
    """Devices that one replica takes."""
    degrees = pool.parallelism
    return degrees.tensor * degrees.pipeline * degrees.data


def placed(pools: Sequence[Pool], nodes: Sequence[Node] | None) -> Placement:
    """The devices of all replicas: explicit placements first, then the others pool by pool.

    A replica goes to the first node that has room for all of it; else its tensor-parallel groups are spread over the
    nodes in order; a group is only split where no node has room for one. Without `nodes` there are as many as the pools
    need, each with the devices that share a scale-up fabric.

    Raises InputError, its field in `pools`, when the devices do not suffice (with the arithmetic), for a device that is
    given away twice, or one of another kind than the pool's.
    """
    machines = _machines(nodes or ())
    seats = _Seats(machines, endless=nodes is None)
    found: dict[int, list[tuple[int, ...]]] = {}
    for index, pool in enumerate(pools):
        if pool.placement is not None:
            found[index] = _explicit(index, pool, seats)
    for index, pool in enumerate(pools):
        if index not in found:
            found[index] = [_automatic(index, pool, seats, pools) for _ in range(pool.replicas)]
    return Placement(machines, [found[index] for index in range(len(pools))])


def _machines(nodes: Sequence[Node]) -> list[Machine]:
    machines: list[Machine] = []
    first = 0
    for index, node in enumerate(nodes):
        kinds = tuple(catalog.device(kind).id for kind, count in node.devices.items() for _ in range(count))
        for copy in range(node.count):
            name = node.name if node.count == 1 else f"{node.name}-{copy}"
            machines.append(Machine(name, first, kinds, index))
            first += len(kinds)
    return machines


def _first(machine: Machine) -> int:
    return machine.first


class _Seats:
    """Which devices are free."""

    def __init__(self, machines: list[Machine], endless: bool) -> None:
        self.machines, self.endless = machines, endless
        self.owner: dict[int, int] = {}
        """pool of each device that is taken"""
        self._free = [list(machine.devices) for machine in machines]
        self._open, self._stale = list(range(len(machines))), False
        self._domains: dict[str, int] = {}

    def free(self, machine: int, kind: str) -> list[int]:
        free = self._free[machine]
        if not free:
            return free
        first, kinds = self.machines[machine].first, self.machines[machine].kinds
        return [device for device in free if kinds[device - first] == kind]

    @property
    def open(self) -> list[int]:
        """Numbers of the machines with anything free, in order."""
        if self._stale:
            self._open = [machine for machine in self._open if self._free[machine]]
            self._stale = False
        return self._open

    def take(self, devices: Sequence[int], pool: int) -> tuple[int, ...]:
        for device in devices:
            self.owner[device] = pool
            free = self._free[bisect_right(self.machines, device, key=_first) - 1]
            free.remove(device)
            self._stale |= not free
        return tuple(devices)

    def domain(self, kind: str) -> int:
        """Devices of a kind that share a scale-up fabric."""
        if kind not in self._domains:
            scale_up = catalog.device(kind).scale_up
            self._domains[kind] = scale_up.domain if scale_up else 1
        return self._domains[kind]

    def add(self, kind: str) -> None:
        """One more computer, with the devices of `kind` that share a scale-up fabric."""
        first = self.machines[-1].devices.stop if self.machines else 0
        machine = Machine(f"node{len(self.machines)}", first, (kind,) * self.domain(kind), -1)
        self.machines.append(machine)
        self._free.append(list(machine.devices))
        self._open.append(len(self._free) - 1)


def _automatic(index: int, pool: Pool, seats: _Seats, pools: Sequence[Pool]) -> tuple[int, ...]:
    wanted, tensor = devices_of(pool), pool.parallelism.tensor
    while True:
        for machine in seats.open:
            devices = seats.free(machine, pool.device)
            if len(devices) >= wanted:
                return seats.take(devices[:wanted], index)
        free = [seats.free(machine, pool.device) for machine in seats.open]
        whole = [device for devices in free for device in devices[: len(devices) // tensor * tensor]]
        split = [device for devices in free for device in devices]
        # A replica that fits into one computer is not spread while computers can be added.
        fits_one = seats.endless and wanted <= seats.domain(pool.device)
        for devices in () if fits_one else (whole, split):
            if len(devices) >= wanted and not (
                seats.endless and devices is split and tensor <= seats.domain(pool.device)
            ):
                return seats.take(devices[:wanted], index)
        if not seats.endless:
            raise _too_few(index, pool, seats, pools)
        seats.add(pool.device)


def _too_few(index: int, pool: Pool, seats: _Seats, pools: Sequence[Pool]) -> InputError:
    p, each = pool.parallelism, devices_of(pool)
    of_kind = [
        device for machine in seats.machines for device in machine.devices if _kind(machine, device) == pool.device
    ]
    others: dict[str, int] = {}
    for device in of_kind:
        owner = seats.owner.get(device)
        if owner is not None and owner != index:
            name = pools[owner].name or f"pool{owner}"
            others[name] = others.get(name, 0) + 1
    wanted = pool.replicas * each
    taken = "".join(f", of which {name} takes {count}" for name, count in others.items())
    message = (
        f"does not fit: {pool.replicas} replicas x (tensor {p.tensor} x pipeline {p.pipeline} x data {p.data}) = "
        f"{wanted} {pool.device}, but the nodes have {len(of_kind)}{taken}: "
        f"{wanted - (len(of_kind) - sum(others.values()))} are missing"
    )
    kinds = sorted({kind for machine in seats.machines for kind in machine.kinds})
    allowed = None if of_kind else "a device of the nodes: " + ", ".join(kinds)
    return InputError(message, field=f"pools[{index}]", allowed=allowed)


def _kind(machine: Machine, device: int) -> str:
    return machine.kinds[device - machine.first]


def _explicit(index: int, pool: Pool, seats: _Seats) -> list[tuple[int, ...]]:
    assert pool.placement is not None
    if seats.endless:
        message = "names nodes, but the scenario has none"
        raise InputError(message, field=f"pools[{index}].placement", allowed="with nodes: [...]")
    devices = []
    for at, text in enumerate(pool.placement):
        try:
            devices += list(_named(text, pool, seats))
        except InputError as error:
            raise error.at(field=f"pools[{index}].placement[{at}]") from None
    each = devices_of(pool)
    if len(devices) != each * pool.replicas:
        p = pool.parallelism
        message = f"names {len(devices)} devices"
        allowed = (
            f"{each * pool.replicas} = {pool.replicas} replicas x (tensor {p.tensor} x pipeline {p.pipeline} x "
            f"data {p.data})"
        )
        raise InputError(message, field=f"pools[{index}].placement", allowed=allowed)
    twice = next((d for i, d in enumerate(devices) if d in devices[:i] or d in seats.owner), None)
    if twice is not None:
        machine = next(machine for machine in seats.machines if twice in machine.devices)
        found = f"{machine.name}:{twice - machine.first}"
        raise InputError("a device is given away twice", field=f"pools[{index}].placement", found=found)
    seats.take(devices, index)
    return [tuple(devices[i : i + each]) for i in range(0, len(devices), each)]


def _named(text: str, pool: Pool, seats: _Seats) -> Iterator[int]:
    name, colon, slots = text.rpartition(":")
    names = [machine.name for machine in seats.machines]
    if not colon:
        raise InputError("is not a place", found=text, allowed=ALLOWED)
    if name not in names:
        raise InputError("no such node", found=name, allowed=", ".join(names), hint=nearest(name, names))
    machine = seats.machines[names.index(name)]
    for part in slots.split(","):
        match = _SLOTS.fullmatch(part.strip())
        if match is None:
            raise InputError("is not a place", found=text, allowed=ALLOWED)
        low, high = int(match[1]), int(match[2] or match[1])
        if low > high or high >= len(machine.kinds):
            allowed = f"{machine.name}:0-{len(machine.kinds) - 1}"
            raise InputError("the node has no such devices", found=text, allowed=allowed)
        for slot in range(low, high + 1):
            if machine.kinds[slot] != pool.device:
                message = f"slot {slot} holds a {machine.kinds[slot]}, the pool runs on {pool.device}"
                raise InputError(message, found=text)
            yield machine.first + slot
