"""From a cluster file of LLMServingSim 2.0 to a scenario that prices its steps with the same measurements.

https://github.com/casys-kaist/LLMServingSim (MIT, CASYS Lab, KAIST). Single engines only; whatever else the cluster
file, the flags or a recorded run ask for is refused by its name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from servetwin import catalog
from servetwin.catalog import profiles
from servetwin.catalog.units import format_bytes, format_duration, format_rate
from servetwin.errors import InputError
from servetwin.interop.llmservingsim_bench import Bench, queued, read_bench
from servetwin.interop.llmservingsim_cluster import INSTANCE, Instance, read_cluster
from servetwin.interop.llmservingsim_engine import SHORT, check_experts, check_run, engine_options, read_model
from servetwin.interop.llmservingsim_options import WHERE, Flags, read_flags
from servetwin.interop.llmservingsim_profile import import_profile
from servetwin.scenario import document
from servetwin.scenario.load import from_data
from servetwin.scenario.resolve import resolve
from servetwin.scenario.schema import Scenario
from servetwin.workload import write_workload
from servetwin.workload.readers import read_trace
from servetwin.workload.table import RequestTable

T = TypeVar("T")

ROUTING = {"LOAD": "least_loaded", "RR": "round_robin", "RAND": "random"}
DEFAULT_REQUESTS = (16, 64, 64)
"""What it replays without a data set: requests, all at once, prompt tokens, output tokens."""


def import_cluster(
    cluster: Path, repo: Path, workload: Path | None, bench: Path | None, flags: str, out: Path
) -> Scenario:
    """Write the scenario of a cluster file to `out`, and its requests beside it (`<stem of out>.workload.parquet`).

    `repo` is a checkout of LLMServingSim, or a part of one; its profile bundle is converted into the user's profile
    folder unless it is there already. `workload` is the file to replay (default: --dataset of `flags`, then what the
    `bench` says, then 16 equal requests as in that project). `bench` is the folder of a recorded real run: its engine
    settings replace defaults, and its `queued_ts` are the arrivals. `flags` are that project's command-line flags.

    Raises InputError for anything wrong, contradictory or not supported; nothing is written then but the profile.
    """
    given = read_flags(flags)
    _check_cluster_flag(given, cluster, repo)
    instance = read_cluster(cluster)
    run = None if bench is None else read_bench(bench)
    model = read_model(instance, repo, cluster)
    check_experts(instance, given, model, cluster)
    if run is not None:
        check_run(run, instance, cluster)
    device = _at(lambda: catalog.device(instance.hardware), cluster, f"{INSTANCE}.hardware")
    engine, dtype, kv_dtype = engine_options(instance, given, run, model, cluster)
    variant = SHORT[dtype] + ("" if kv_dtype == "auto" else f"-kv{kv_dtype}")
    table, notes = _requests(workload, given, run, repo)
    profile = _profile(repo, instance, variant, device.id, model.layers)

    replayed = out.with_name(f"{out.stem}.workload.parquet")
    memory = run.memory if run and run.memory else instance.memory
    data: dict[str, Any] = {
        "name": cluster.stem,
        "model": model.reference,
        "workload": {
            "trace": replayed.name,
            "format": "servetwin",
            "arrivals_at": "engine" if run else "client",
            "output_ends": "length",
        },
        "pools": [
            {
                "device": device.id,
                "device_overrides": {
                    "memory_size": format_bytes(memory),
                    "memory_bandwidth": format_rate(instance.memory_bandwidth),
                },
                "parallelism": {"tensor": instance.tensor, "pipeline": instance.pipeline},
                "link": {
                    "bandwidth": format_rate(instance.link_bandwidth),
                    "latency": format_duration(instance.link_latency),
                },
                "engine": engine,
            }
        ],
        "routing": {"policy": ROUTING[given.routing]},
        "timing": {"source": "profile", "profile": profile},
    }
    scenario = from_data(document.parse(document.write(data), str(cluster)), str(cluster), out.parent)
    _at(lambda: resolve(scenario, out.parent), cluster)
    notes = [f"From a cluster file of LLMServingSim, {cluster.name}.", *_flag_notes(flags, given), *notes]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_workload(table, replayed)
    head = "".join(f"# {' '.join(note.split())}\n" for note in notes)
    out.write_text(head + document.write(data), encoding="utf-8")
    return scenario


def _check_cluster_flag(given: Flags, cluster: Path, repo: Path) -> None:
    named = given.cluster_config
    if named is not None and cluster.resolve() not in (Path(named).resolve(), (repo / named).resolve()):
        message, flag = "is another file than the one to import", "--cluster-config"
        raise InputError(message, where=WHERE, field=flag, found=named, allowed=str(cluster))


def _requests(workload: Path | None, given: Flags, run: Bench | None, repo: Path) -> tuple[RequestTable, list[str]]:
    """The requests to replay, and what is to be said about them."""
    path = _workload_path(workload, given, run, repo)
    if path is None:
        if run is not None:
            raise InputError("names no workload", where=run.where, field="dataset_path", allowed="give --workload FILE")
        rows, prompt, output = DEFAULT_REQUESTS
        rows = min(rows, given.requests or rows)
        arrival = np.zeros(rows, np.int64)
        table = RequestTable(arrival, np.full(rows, prompt, np.int64), np.full(rows, output, np.int64))
        return table, [f"No workload was named: {rows} equal requests at once, which that project then replays."]
    table = read_trace(path, "llmservingsim")
    notes = [f"Workload: {path.name}.", *(f"{note[0].upper()}{note[1:]}." for note in table.notes)]
    if run is not None:
        if table.waits_for is not None:
            raise InputError("has agentic sessions, which a recorded run does not replay", where=str(path))
        sent, arrival = queued(run, table, str(path))
        table = replace(_first(table, sent), arrival_ns=arrival)
        notes += [f"Arrivals: queued_ts of a run of vLLM {run.version or 'of unknown version'}."]
        if run.dataset_sha256 not in (None, table.sha256):
            notes.append("The workload file is not byte for byte the one that the run names (its sha256 differs).")
    return (_first(table, given.requests) if given.requests else table), notes


def _workload_path(workload: Path | None, given: Flags, run: Bench | None, repo: Path) -> Path | None:
    if workload is not None:
        return workload if workload.exists() else _existing(repo / workload, "--workload", None, str(workload))
    if given.dataset is not None:
        return _existing(repo / given.dataset, WHERE, "--dataset", given.dataset)
    if run is not None and run.dataset is not None:
        return _existing(repo / run.dataset, run.where, "dataset_path", run.dataset)
    return None


def _existing(path: Path, where: str, field: str | None, name: str) -> Path:
    if not path.is_file():
        raise InputError(f"no such workload, looked for at {path}", where=where, field=field, found=name)
    return path


def _first(table: RequestTable, units: int) -> RequestTable:
    """The first `units` requests and sessions (lines of the workload file)."""
    return table.take(np.flatnonzero(table.units() < units))


def _profile(repo: Path, instance: Instance, variant: str, device: str, layers: int) -> str:
    """The id of the profile made from the bundle of the model on its hardware, converted where it is not there yet."""
    folder = repo / "profiler" / "perf" / instance.hardware / instance.model / variant
    if not (folder / "meta.yaml").is_file():
        raise InputError(
            f"no measurements of {instance.model} ({variant}) on {instance.hardware}: a profile bundle with meta.yaml "
            "was looked for here",
            where=str(folder),
            allowed=f"a bundle made there by that project's profiler (python -m profiler profile {instance.model} "
            f"--hardware {instance.hardware}), or a scenario of your own with timing: {{source: roofline}}",
        )
    degrees = sorted(int(path.name[2:]) for path in folder.glob("tp*") if path.name[2:].isdecimal())
    if instance.tensor not in degrees:
        message = "the bundle has no measurements at this tensor-parallel degree"
        allowed = ", ".join(map(str, degrees)) or f"a folder tp{instance.tensor} in the bundle"
        raise InputError(message, where=str(folder), field="tp_size", found=instance.tensor, allowed=allowed)
    place = profiles.user_folder() / device / instance.model.replace("/", "__") / variant
    if not _made_from(place, folder, degrees, layers):
        place = import_profile(folder, device, layers=layers)
    return profiles.read_profile(place).id


def _made_from(place: Path, bundle: Path, degrees: list[int], layers: int) -> bool:
    """Whether the profile in `place` was made from just these files."""
    if not (place / profiles.HEADER).is_file():
        return False
    try:
        profile = profiles.read_profile(place)
        sources = profile.data["provenance"]["sources"]
        for name in profile.tables:
            profile.table(name)
        same = all(hashlib.sha256((bundle / name).read_bytes()).hexdigest() == sources[name] for name in sources)
    except (InputError, KeyError, TypeError, ValueError, OSError, AttributeError):
        return False  # written by hand or damaged: it is replaced
    measured = {f"tp{degree}/skew.csv" for degree in degrees if (bundle / f"tp{degree}" / "skew.csv").is_file()}
    known = list(profile.tensor) == degrees and measured <= set(sources)
    return same and known and profile.data.get("layers") == layers


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
