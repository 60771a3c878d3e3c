"""Which instances of a cluster file of LLMServingSim 2.0 are one replica, and its degree of expert parallelism."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from servetwin.errors import InputError
from servetwin.interop.llmservingsim_bench import Bench
from servetwin.interop.llmservingsim_cluster import Cluster, Instance
from servetwin.interop.llmservingsim_engine import Model

_EQUAL = {
    "model": "model_name",
    "hardware": "hardware",
    "tensor": "tp_size",
    "pipeline": "pp_size",
    "expert": "ep_size",
    "memory": "npu_mem.mem_size",
    "memory_bandwidth": "npu_mem.mem_bw",
}
"""What the members of a data-parallel group have in common, and its names in the file; their options too."""


@dataclass(frozen=True)
class Replica:
    """An instance alone, or the members of a data-parallel group: one engine in the terms of vLLM."""

    members: tuple[Instance, ...]
    expert: int

    @property
    def first(self) -> Instance:
        return self.members[0]


def replicas(cluster: Cluster, models: Mapping[str, Model], run: Bench | None) -> list[Replica]:
    """All replicas of a cluster, in the order of their first instances. `models` by name; `run`: a recorded run of it.

    Raises InputError for members of a group that differ, degrees that do not fit the model, and a cluster other than
    the run's.
    """
    groups: list[list[Instance]] = []
    named: dict[str, list[Instance]] = {}
    for instance in cluster.instances:
        members = named.setdefault(instance.group, []) if instance.group is not None else []
        if not members:
            groups.append(members)
        else:
            _check_alike(cluster, members[0], instance)
        members.append(instance)
    if run is not None:
        _check_run(cluster, run, groups)
    return [Replica(tuple(group), _experts(cluster, group, models[group[0].model], run)) for group in groups]


def _check_alike(cluster: Cluster, first: Instance, other: Instance) -> None:
    ours, theirs = (
        {name: getattr(instance, attribute) for attribute, name in _EQUAL.items()} | dict(instance.engine)
        for instance in (first, other)
    )
    for name in (*ours, *theirs):
        if ours.get(name) != theirs.get(name):
            raise InputError(
                f"differs in the data-parallel group {first.group!r}",
                where=str(cluster.path),
                field=f"{other.place}.{name}",
                found=theirs.get(name, "nothing"),
                allowed=f"{ours.get(name, 'nothing')}, as in {first.place}",
            )


def _experts(cluster: Cluster, group: Sequence[Instance], model: Model, run: Bench | None) -> int:
    """The degree over which whole experts are spread: `ep_size`, by default the tensor degree, as that project has it.

    It spreads them over all data-parallel ranks or none, and over a part of the tensor ranks of each.
    """
    first, data = group[0], len(group)
    if not model.experts:
        if (first.expert or 1) > 1:
            message = f"{first.model} has no experts"
            field = f"{first.place}.ep_size"
            raise InputError(message, where=str(cluster.path), field=field, found=first.expert, allowed="1")
        return 1
    if run is not None:
        real = first.tensor * data if run.expert_parallel else 1
        if first.expert not in (None, real):
            raise _other(cluster, run, first, "ep_size", first.expert, real)
        return real
    found = first.tensor if first.expert is None else first.expert
    fitting = [data * n for n in range(1, first.tensor + 1) if first.tensor % n == 0]
    fitting = [degree for degree in fitting if model.experts % degree == 0]
    if found not in fitting:
        message = f"{model.experts} experts do not fit tp_size {first.tensor} on {data} data-parallel ranks"
        allowed = ", ".join(map(str, fitting)) or "another tp_size"
        raise InputError(message, where=str(cluster.path), field=f"{first.place}.ep_size", found=found, allowed=allowed)
    return found


def _check_run(cluster: Cluster, run: Bench, groups: Sequence[Sequence[Instance]]) -> None:
    if len(groups) > 1:
        message = f"describes {len(groups)} engines, but the run in {run.where} is of one"
        raise InputError(message, where=str(cluster.path), allowed="one instance, or one dp_group")
    first, data = groups[0][0], len(groups[0])
    of_file = {"model_name": first.model, "tp_size": first.tensor, "pp_size": first.pipeline, "dp_group": data}
    of_run = {"model_name": run.model, "tp_size": run.tensor, "pp_size": run.pipeline, "dp_group": run.data}
    for name, found in of_file.items():
        if found != of_run[name]:
            raise _other(cluster, run, first, name, found, of_run[name])


def _other(cluster: Cluster, run: Bench, instance: Instance, name: str, found: object, real: object) -> InputError:
    message = f"is not what the run in {run.where} had"
    if name == "dp_group":
        message = f"{message} (members of the data-parallel group)"
    field = f"{instance.place}.{name}"
    return InputError(message, where=str(cluster.path), field=field, found=found, allowed=str(real))
