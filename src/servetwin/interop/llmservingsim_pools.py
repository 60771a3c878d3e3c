"""The pools that the replicas of a cluster file of LLMServingSim 2.0 make, and the devices under them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from servetwin.catalog.units import format_bytes, format_rate
from servetwin.interop.llmservingsim_bench import Bench
from servetwin.interop.llmservingsim_bundle import bundled_profile
from servetwin.interop.llmservingsim_cluster import Cluster
from servetwin.interop.llmservingsim_engine import SHORT, Model, engine_options
from servetwin.interop.llmservingsim_options import Flags
from servetwin.interop.llmservingsim_replicas import Replica


@dataclass
class Pool:
    """Equal replicas."""

    section: dict[str, Any]
    """of the scenario, but for their number, place and link"""
    profile: str | None
    missing: str
    """what there is no profile of"""
    replicas: list[Replica] = field(default_factory=list)


def pools_of(
    replicas: Sequence[Replica],
    models: Mapping[str, Model],
    devices: Mapping[str, str],
    given: Flags,
    run: Bench | None,
    repo: Path,
    cluster: Path,
) -> list[Pool]:
    """Equal replicas in one pool each, in the order of the file. `models` by name, `devices` (ids of the catalogue) by
    the place of an instance."""
    pools: list[Pool] = []
    for replica in replicas:
        first = replica.first
        pool = _pool(replica, models[first.model], devices[first.place], given, run, repo, cluster)
        same = next((other for other in pools if other.section == pool.section), pool)
        if same is pool:
            pools.append(pool)
        same.replicas.append(replica)
    return pools


def _pool(
    replica: Replica, model: Model, device: str, given: Flags, run: Bench | None, repo: Path, cluster: Path
) -> Pool:
    first = replica.first
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
    return Pool(section, *bundled_profile(repo, first, variant, device, model.layers))


def timing_of(pools: Sequence[Pool]) -> dict[str, Any]:
    """One profile for all, by its name; else each pool finds its own, or is priced without one."""
    names = {pool.profile for pool in pools}
    if len(names) == 1 and (name := names.pop()) is not None:
        return {"source": "profile", "profile": name}
    return {"source": "auto"}


def unmeasured(pools: Sequence[Pool], timing: dict[str, Any]) -> list[str]:
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


def nodes_of(file: Cluster, devices: Mapping[str, str]) -> list[dict[str, Any]]:
    """The nodes with what their instances use."""
    nodes: list[dict[str, Any]] = []
    for number, host in enumerate(file.hosts):
        counts: dict[str, int] = {}
        for instance in file.instances:
            if instance.node == number:
                kind = devices[instance.place]
                counts[kind] = counts.get(kind, 0) + instance.devices
        memory = {"memory_size": format_bytes(host.memory), "memory_bandwidth": format_rate(host.bandwidth)}
        nodes.append({"name": f"node{number}", "devices": counts} | memory)
    return nodes


def places_of(file: Cluster, devices: Mapping[str, str]) -> dict[str, str]:
    """The devices of every instance: those of its node in the order of the file; a node lists them kind by kind."""
    places: dict[str, str] = {}
    for number in range(len(file.hosts)):
        slot = 0
        here = [instance for instance in file.instances if instance.node == number]
        kinds = list(dict.fromkeys(devices[instance.place] for instance in here))
        for instance in sorted(here, key=lambda instance: kinds.index(devices[instance.place])):
            last = slot + instance.devices - 1
            places[instance.place] = f"node{number}:{slot}" + (f"-{last}" if last > slot else "")
            slot = last + 1
    return places


def members_of(pools: Sequence[Pool]) -> list[str]:
    """Which instances of the file each pool holds, where that is not plain to see."""
    if len(pools) == 1 and len(pools[0].replicas) == len(pools[0].replicas[0].members) == 1:
        return []
    notes = []
    for number, pool in enumerate(pools):
        groups = (" + ".join(member.place for member in replica.members) for replica in pool.replicas)
        notes.append(f"pool{number}: " + ", ".join(groups))
    return notes
