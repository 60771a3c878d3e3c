"""The devices of one replica, and what its collectives cost on a topology."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from servetwin.errors import InputError
from servetwin.fabric.algorithms import SERVING, Software, priced
from servetwin.fabric.law import Law
from servetwin.fabric.topology import Topology
from servetwin.model.kernels import Collective


class Fabric:
    """A topology, the algorithm that collectives use on it (see `algorithms`), and the software that runs them.

    `explicit` says that the links inside nodes were described for this very machine, so that they count for more than a
    table measured on another one.
    """

    def __init__(
        self, topology: Topology, algorithm: str = "auto", software: Software = SERVING, explicit: bool = True
    ) -> None:
        self.topology, self.algorithm, self.software, self.explicit = topology, algorithm, software, explicit
        self._laws: dict[tuple[str, tuple[tuple[int, ...], ...]], Law] = {}

    def law(self, kind: str, members: Sequence[Sequence[int]]) -> Law:
        """Time and traffic of a collective that every group of `members` (ordered device numbers) runs at once."""
        key = kind, tuple(tuple(group) for group in members)
        found = self._laws.get(key)
        if found is None:
            plans = priced(kind, self.algorithm, self.topology, key[1], self.software)
            found = self._laws[key] = Law(plans)
        return found

    def replica(self, devices: Sequence[int], tensor: int = 1, pipeline: int = 1, data: int = 1) -> DeviceGroup:
        """The replica on these devices, in rank order: tensor fastest, then pipeline, then data, as vLLM numbers them.

        Raises:
            InputError: their number is not tensor x pipeline x data; one of them does not exist or comes twice.
        """
        if len(devices) != tensor * pipeline * data:
            allowed = f"{tensor} x {pipeline} x {data} (tensor x pipeline x data)"
            raise InputError("a replica has another number of devices", found=len(devices), allowed=allowed)
        there = len(self.topology.devices)
        for device in devices:
            if not 0 <= device < there or list(devices).count(device) > 1:
                message = "no such device" if not 0 <= device < there else "a device is given twice"
                raise InputError(message, field="devices", found=device, allowed=f"different ones of 0 to {there - 1}")
        return DeviceGroup(self, tuple(devices), tensor, pipeline, data)


@dataclass(frozen=True)
class DeviceGroup:
    """A replica's devices in rank order. Groups of a replica that run the same collective share links while they do."""

    fabric: Fabric
    devices: tuple[int, ...]
    tensor: int
    pipeline: int
    data: int

    @property
    def explicit(self) -> bool:
        """See `Fabric`."""
        return self.fabric.explicit

    def collective_ns(self, operator: Collective, rows: int, stage: int | None = None) -> float:
        """Time of a collective over `rows` rows at a pipeline stage (a hand-over: from that stage to the next).

        Without a stage, the mean over the stages that run it, weighted by how often (`operator.stages`), so that it can
        be multiplied by the calls of a whole step.
        """
        size = operator.bytes_a_row * rows
        if stage is not None:
            return self._law(operator, stage).ns(size)
        times = [(self._law(operator, at).ns(size), calls) for at, calls in self._stages(operator).items()]
        if all(ns == times[0][0] for ns, _ in times):
            return times[0][0]
        return sum(ns * calls for ns, calls in times) / sum(calls for _, calls in times)

    def nodes_of(self, operator: Collective) -> int:
        """The most nodes over which a group that runs this collective is spread."""
        nodes = self.fabric.topology.nodes
        groups = [group for at in self._stages(operator) for group in self.members(operator, at)]
        return max(len({nodes[device] for device in group}) for group in groups)

    def spans_nodes(self, operator: Collective) -> bool:
        """Whether a group that runs this collective has devices in more than one node."""
        return self.nodes_of(operator) > 1

    def traffic(self, operator: Collective, rows: NDArray[Any]) -> NDArray[np.float64]:
        """Bytes that the collective puts on each link (by number, as in `topology.links`) in steps of `rows` rows, all
        stages and groups of the replica together."""
        onto = np.zeros(len(self.fabric.topology.links))
        for at, calls in self._stages(operator).items():
            self._law(operator, at).add_traffic(np.asarray(rows) * operator.bytes_a_row, calls, onto)
        return onto

    def members(self, operator: Collective, stage: int) -> list[list[int]]:
        """Device numbers of the groups that run it at once at a stage.

        Raises:
            InputError: the groups cannot be made of as many ranks as the operator has.
        """
        tensors, datas = range(self.tensor), range(self.data)

        def at(d: int, p: int, t: int) -> int:
            return self.devices[(d * self.pipeline + p) * self.tensor + t]

        match operator.group:
            case "pipeline":
                if not stage + 1 < self.pipeline:
                    raise InputError("the last stage hands over to none", field="parallelism.pipeline", found=stage)
                return [[at(d, stage, t), at(d, stage + 1, t)] for d in datas for t in tensors]
            case "expert":
                whole = [[at(d, stage, t) for d in datas for t in tensors]]
            case "data":
                whole = [[at(d, stage, t) for d in datas] for t in tensors]
            case _:  # tensor, and context: its ranks are tensor ranks
                whole = [[at(d, stage, t) for t in tensors] for d in datas]
        ranks = operator.ranks
        if len(whole[0]) % ranks:
            raise InputError(
                f"{operator.name} takes {ranks} ranks",
                field="parallelism",
                found=len(whole[0]),
                allowed=f"a multiple of {ranks}",
            )
        return [group[i : i + ranks] for group in whole for i in range(0, len(group), ranks)]

    def _law(self, operator: Collective, stage: int) -> Law:
        return self.fabric.law(operator.kind, self.members(operator, stage))

    def _stages(self, operator: Collective) -> dict[int, int]:
        """Times that each stage runs it in a step; once each where the operator does not say."""
        last = self.pipeline - (operator.group == "pipeline")
        calls = {at: n for at, n in enumerate(operator.stages) if n and at < last}
        return calls or dict.fromkeys(range(last), 1)
