"""The requests that a cluster file of LLMServingSim 2.0 is run on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from servetwin.errors import InputError
from servetwin.interop.llmservingsim_bench import Bench, queued
from servetwin.interop.llmservingsim_options import WHERE, Flags
from servetwin.workload.readers import read_trace
from servetwin.workload.table import RequestTable

DEFAULT_REQUESTS = (16, 64, 64)
"""What each instance replays without a data set: requests, all at once, prompt tokens, output tokens."""


def requests(
    workload: Path | None, given: Flags, run: Bench | None, repo: Path, instances: int
) -> tuple[RequestTable, list[str]]:
    """The requests to replay, and what is to be said about them."""
    path = _workload_path(workload, given, run, repo)
    if path is None:
        if run is not None:
            raise InputError("names no workload", where=run.where, field="dataset_path", allowed="give --workload FILE")
        rows, prompt, output = DEFAULT_REQUESTS
        rows = min(rows * instances, given.requests or rows * instances)
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
