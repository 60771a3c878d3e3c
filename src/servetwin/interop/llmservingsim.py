"""From a cluster file of LLMServingSim 2.0 to a scenario that prices its steps with the same measurements.

https://github.com/casys-kaist/LLMServingSim (MIT, CASYS Lab, KAIST). What the cluster file, the flags or a recorded run
ask for and a scenario cannot say is refused by its name. docs/llmservingsim.md tells what becomes of the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from servetwin import catalog
from servetwin.catalog.units import format_bytes, format_rate
from servetwin.errors import InputError
from servetwin.interop.llmservingsim_bench import Bench, read_bench
from servetwin.interop.llmservingsim_bundle import bundled_profile
from servetwin.interop.llmservingsim_cluster import Cluster, Instance, read_cluster
from servetwin.interop.llmservingsim_differences import differences
from servetwin.interop.llmservingsim_engine import SHORT, Model, engine_options, read_model
from servetwin.interop.llmservingsim_links import read_links
from servetwin.interop.llmservingsim_options import WHERE, Flags, read_flags
from servetwin.interop.llmservingsim_replicas import Replica, replicas
from servetwin.interop.llmservingsim_requests import requests
from servetwin.scenario import document
from servetwin.scenario.load import from_data
from servetwin.scenario.resolve import resolve
from servetwin.scenario.schema import Scenario
from servetwin.workload import write_workload

T = TypeVar("T")
Tell = Callable[[str], None]

ROUTING = {"LOAD": "llmservingsim_load", "RR": "round_robin", "RAND": "random"}
ROUTING_OF_RUN = "vllm_dp"
"""How vLLM itself spreads requests over its data-parallel ranks, which nothing outside it decides."""


def _silent(_: str) -> None:
    """Nobody listens."""


@dataclass
class _Pool:
    """Equal replicas: their section of the scenario but for their number and place, and the replicas."""

    section: dict[str, Any]
    profile: str | None
    missing: str
    """what there is no profile of"""
    replicas: list[Replica] = field(default_factory=list)


def import_cluster(
    cluster: Path, repo: Path, workload: Path | None, bench: Path | None, flags: str, out: Path, tell: Tell = _silent
) -> Scenario:
    """Write the scenario of a cluster file to `out`, and its requests beside it (`<stem of out>.workload.parquet`).

    `repo` is a checkout of LLMServingSim, or a part of one; its profile bundles are converted into the user's profile
    folder unless they are there already. `workload` is the file to replay (default: --dataset of `flags`, then what the
    `bench` says, then equal requests as in that project). `bench` is the folder of a recorded real run: its engine
    settings replace defaults, and its `queued_ts` are the arrivals. `flags` are that project's command-line flags.
    `tell` is called with what a user has to know, which also stands in the comments at the head of the scenario.

    Raises InputError for anything wrong, contradictory or not supported; nothing is written then but profiles.
    """
    given = read_flags(flags)
    _check_cluster_flag(given, cluster, repo)
    file = read_cluster(cluster)
    run = None if bench is None else read_bench(bench)
    models: dict[str, Model] = {}
    for instance in file.instances:
        if instance.model not in models:
            models[instance.model] = read_model(instance, repo, cluster)
    engines = replicas(file, models, run)
    devices = [_device(instance, cluster) for instance in file.instances]
    table, about = requests(workload, given, run, repo, len(file.instances))
    links = read_links(file, engines, devices)
    warnings = differences(file, engines, models, given, links, run)

    pools: list[_Pool] = []
    for replica in engines:
        pool = _pool(replica, models[replica.first.model], given, run, repo, cluster)
        same = next((other for other in pools if other.section == pool.section), pool)
        if same is pool:
            pools.append(pool)
        same.replicas.append(replica)
    timing = _timing(pools)
    warnings += _unmeasured(pools, timing)

    replayed = out.with_name(f"{out.stem}.workload.parquet")
    data: dict[str, Any] = {
        "name": cluster.stem,
        "model": pools[0].section["model"],
        "workload": {
            "trace": replayed.name,
            "format": "servetwin",
            "arrivals_at": "engine" if run else "client",
            "output_ends": "length",
        },
        "nodes": _nodes(file, devices),
    }
    if links.between is not None:
        inside, between = links.inside.section(), links.between.section()
        data["network"] = {"inside": {"kind": "full_mesh"} | inside, "between": {"kind": "switch"} | between}
    places = _places(file, devices)
    data["pools"] = []
    for pool in pools:
        model = {} if pool.section["model"] == data["model"] else {"model": pool.section["model"]}
        placement = [places[member.place] for replica in pool.replicas for member in replica.members]
        link = {"link": links.inside.section()} if links.between is None else {}
        where = {"replicas": len(pool.replicas), "placement": placement} | link
        data["pools"].append(model | {name: pool.section[name] for name in pool.section if name != "model"} | where)
    if len(file.instances) > 1:
        by_itself = run is not None and run.data > 1
        data["routing"] = {"policy": ROUTING_OF_RUN if by_itself else ROUTING[given.routing]}
    data["timing"] = timing
    scenario = from_data(document.parse(document.write(data), str(cluster)), str(cluster), out.parent)
    _at(lambda: resolve(scenario, out.parent), cluster)

    notes = [f"From a cluster file of LLMServingSim, {cluster.name}.", *_flag_notes(flags, given), *about]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_workload(table, replayed)
    head = "".join(f"# {' '.join(note.split())}\n" for note in (*notes, *_members(pools), *warnings))
    out.write_text(head + document.write(data), encoding="utf-8")
    for warning in warnings:
        tell(warning)
    return scenario


def _check_cluster_flag(given: Flags, cluster: Path, repo: Path) -> None:
    named = given.cluster_config
    if named is not None and cluster.resolve() not in (Path(named).resolve(), (repo / named).resolve()):
        message, flag = "is another file than the one to import", "--cluster-config"
        raise InputError(message, where=WHERE, field=flag, found=named, allowed=str(cluster))


def _device(instance: Instance, cluster: Path) -> str:
    return _at(lambda: catalog.device(instance.hardware), cluster, f"{instance.place}.hardware").id


def _pool(replica: Replica, model: Model, given: Flags, run: Bench | None, repo: Path, cluster: Path) -> _Pool:
    first = replica.first
    device = _device(first, cluster)
    engine, dtype, kv_dtype = engine_options(first, given, run, model, cluster)
    degrees = {"tensor": first.tensor, "pipeline": first.pipeline}
    if len(replica.members) > 1 or replica.expert > 1:
        degrees |= {"data": len(replica.members), "expert": replica.expert}
    section: dict[str, Any] = {
        "model": model.reference,
        "device": device,
        "device_overrides": {
            "memory_size": format_bytes(run.memory if run and run.memory else first.memory),
            "memory_bandwidth": format_rate(first.memory_bandwidth),
        },
        "parallelism": degrees,
    }
    if model.experts and given.expert_routing == "RAND":
        section["experts"] = {"routing": "random"}
    section["engine"] = engine
    variant = SHORT[dtype] + ("" if kv_dtype == "auto" else f"-kv{kv_dtype}")
    return _Pool(section, *bundled_profile(repo, first, variant, device, model.layers))


def _timing(pools: Sequence[_Pool]) -> dict[str, Any]:
    """One profile for all, by its name; else each pool finds its own, or is priced without one."""
    names = {pool.profile for pool in pools}
    if len(names) == 1 and (name := names.pop()) is not None:
        return {"source": "profile", "profile": name}
    return {"source": "auto"}


def _unmeasured(pools: Sequence[_Pool], timing: dict[str, Any]) -> list[str]:
    """What is to be said of pools whose steps are not priced by that project's measurements."""
    found = []
    for pool in pools:
        first = pool.replicas[0].first
        if pool.profile is None:
            degrees = "1" if first.tensor == 1 else f"1,{first.tensor}"
            found.append(
                f"NOT MEASURED: {pool.missing}. Steps are priced by source auto: kernel times of the device where the "
                "package has them, else its datasheet. For measured prices make the bundle there with that project's "
                f"profiler (python -m profiler profile {first.model} --hardware {first.hardware} --tp {degrees}) and "
                "import again."
            )
        elif timing["source"] == "auto" and Path(pool.section["model"]).is_absolute():
            found.append(
                f"NOT MEASURED: source auto finds profiles by the names of the catalogue, which does not know "
                f"{first.model}; for measured prices simulate its pool alone, with profile: {pool.profile}."
            )
    return list(dict.fromkeys(found))


def _nodes(file: Cluster, devices: Sequence[str]) -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = []
    for number, host in enumerate(file.hosts):
        counts: dict[str, int] = {}
        for instance, device in zip(file.instances, devices, strict=True):
            if instance.node == number:
                counts[device] = counts.get(device, 0) + instance.devices
        memory = {"memory_size": format_bytes(host.memory), "memory_bandwidth": format_rate(host.bandwidth)}
        nodes.append({"name": f"node{number}", "devices": counts} | memory)
    return nodes


def _places(file: Cluster, devices: Sequence[str]) -> dict[str, str]:
    """The devices of every instance: those of its node in the order of the file; a node lists them kind by kind."""
    places: dict[str, str] = {}
    for number in range(len(file.hosts)):
        slot = 0
        here = [pair for pair in zip(file.instances, devices, strict=True) if pair[0].node == number]
        for kind in dict.fromkeys(device for _, device in here):
            for instance in (instance for instance, device in here if device == kind):
                last = slot + instance.devices - 1
                places[instance.place] = f"node{number}:{slot}" + (f"-{last}" if last > slot else "")
                slot = last + 1
    return places


def _members(pools: Sequence[_Pool]) -> list[str]:
    """Which instances of the file each pool holds, where that is not plain to see."""
    if len(pools) == 1 and len(pools[0].replicas) == len(pools[0].replicas[0].members) == 1:
        return []
    notes = []
    for number, pool in enumerate(pools):
        groups = (" + ".join(member.place for member in replica.members) for replica in pool.replicas)
        notes.append(f"pool{number}: " + ", ".join(groups))
    return notes


def _flag_notes(flags: str, given: Flags) -> list[str]:
    notes = [f"Flags: {flags}"] if flags.strip() else []
    if given.unused:
        notes.append("Of no effect here, they concern that program's own output: " + ", ".join(given.unused))
    return notes


def _at(look_up: Callable[[], T], cluster: Path, field: str | None = None) -> T:
    try:
        return look_up()
    except InputError as error:
        raise error.at(str(cluster), field) from None
