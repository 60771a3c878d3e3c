"""From a cluster file of LLMServingSim 2.0 to a scenario that prices its steps with the same measurements.

https://github.com/casys-kaist/LLMServingSim (MIT, CASYS Lab, KAIST). What the cluster file, the flags or a recorded run
ask for and a scenario cannot say is refused by its name. docs/llmservingsim.md tells what becomes of the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from servetwin import catalog
from servetwin.errors import InputError
from servetwin.interop.llmservingsim_bench import read_bench
from servetwin.interop.llmservingsim_cluster import Instance, read_cluster
from servetwin.interop.llmservingsim_differences import differences
from servetwin.interop.llmservingsim_engine import Model, read_model
from servetwin.interop.llmservingsim_links import Links, read_links
from servetwin.interop.llmservingsim_options import WHERE, Flags, read_flags
from servetwin.interop.llmservingsim_pools import Pool, members_of, nodes_of, places_of, pools_of, timing_of, unmeasured
from servetwin.interop.llmservingsim_replicas import replicas
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
    devices = {instance.place: _device(instance, cluster) for instance in file.instances}
    table, about = requests(workload, given, run, repo, len(file.instances))
    links = read_links(file, engines, list(devices.values()))

    pools = pools_of(engines, models, devices, given, run, repo, cluster)
    timing = timing_of(pools)
    warnings = [*differences(file, engines, models, given, links, run), *unmeasured(pools, timing)]

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
        "nodes": nodes_of(file, devices),
    }
    if links.between is not None:
        wires = {"inside": links.inside} if links.spanned else {}
        wires["between"] = links.between
        data["network"] = {level: {"kind": "switch"} | link.section() for level, link in wires.items()}
    data["pools"] = _sections(pools, places_of(file, devices), links)
    if len(file.instances) > 1:
        by_itself = run is not None and run.data > 1
        data["routing"] = {"policy": ROUTING_OF_RUN if by_itself else ROUTING[given.routing]}
    data["timing"] = timing
    scenario = from_data(document.parse(document.write(data), str(cluster)), str(cluster), out.parent)
    _at(lambda: resolve(scenario, out.parent), cluster)

    notes = [f"From a cluster file of LLMServingSim, {cluster.name}.", *_flag_notes(flags, given), *about]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_workload(table, replayed)
    head = "".join(f"# {' '.join(note.split())}\n" for note in (*notes, *members_of(pools), *warnings))
    out.write_text(head + document.write(data), encoding="utf-8")
    for warning in warnings:
        tell(warning)
    return scenario


def _sections(pools: Sequence[Pool], places: Mapping[str, str], links: Links) -> list[dict[str, Any]]:
    """The `pools` of the scenario; a model is named where it is another than the first's, the scenario's own."""
    sections = []
    for pool in pools:
        section = dict(pool.section)
        if section["model"] == pools[0].section["model"]:
            del section["model"]
        section["replicas"] = len(pool.replicas)
        section["placement"] = [places[member.place] for replica in pool.replicas for member in replica.members]
        if not links.spanned:
            section["link"] = links.inside.section()
        sections.append(section)
    return sections


def _check_cluster_flag(given: Flags, cluster: Path, repo: Path) -> None:
    named = given.cluster_config
    if named is not None and cluster.resolve() not in (Path(named).resolve(), (repo / named).resolve()):
        message, flag = "is another file than the one to import", "--cluster-config"
        raise InputError(message, where=WHERE, field=flag, found=named, allowed=str(cluster))


def _flag_notes(flags: str, given: Flags) -> list[str]:
    notes = [f"Flags: {flags}"] if flags.strip() else []
    if given.unused:
        notes.append("Of no effect here, they concern that program's own output: " + ", ".join(given.unused))
    return notes


def _device(instance: Instance, cluster: Path) -> str:
    return _at(lambda: catalog.device(instance.hardware), cluster, f"{instance.place}.hardware").id


def _at(look_up: Callable[[], T], cluster: Path, field: str | None = None) -> T:
    try:
        return look_up()
    except InputError as error:
        raise error.at(str(cluster), field) from None
