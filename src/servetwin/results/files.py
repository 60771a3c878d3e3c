"""The result folder: written whole or not at all, the same bytes for the same run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from servetwin.errors import InputError
from servetwin.results.metrics import summarize
from servetwin.results.run import (
    LINK_COLUMNS,
    REQUEST_COLUMNS,
    SCHEDULE_COLUMNS,
    SESSION_COLUMNS,
    STEP_COLUMNS,
    TEXT_COLUMNS,
    Columns,
    Ints,
    Run,
)

if TYPE_CHECKING:
    import pyarrow as pa

SCENARIO, SUMMARY = "scenario.yaml", "summary.json"
REQUESTS, STEPS, SCHEDULE = "requests.parquet", "steps.parquet", "schedule.parquet"
SESSIONS, LINKS = "sessions.parquet", "links.parquet"
RESULT_FILES = (SCENARIO, REQUESTS, STEPS, SCHEDULE, SESSIONS, LINKS, SUMMARY)


@dataclass(frozen=True)
class SavedRun:
    """A result folder, read back. `requests`, `steps`, `schedule` and `sessions` are columns as in `Run`."""

    folder: Path
    scenario_yaml: str
    summary: dict[str, Any]
    requests: Columns
    steps: Mapping[str, Ints]
    schedule: Mapping[str, Ints] | None = None
    token_ns: Sequence[Ints] | None = None
    sessions: Columns | None = None


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that `write_run` would refuse (a simulation can ask before it starts).

    Raises InputError when `folder` is a file, or holds something and `overwrite` is not set.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError("the output must be a folder, but a file stands there", where=str(folder))
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise InputError("the output folder is not empty", where=str(folder), allowed="another folder, or --overwrite")


def _write_parquet(table: pa.Table, path: Path) -> None:
    import pyarrow.parquet as pq

    pq.write_table(table, path, compression="zstd", compression_level=3, version="2.6", row_group_size=1 << 20)


def _requests_table(run: Run) -> pa.Table:
    import pyarrow as pa

    columns: dict[str, pa.Array[Any]] = {}
    for name in REQUEST_COLUMNS:
        if name in TEXT_COLUMNS:
            columns[name] = pa.array(list(run.requests[name]), type=pa.string())
        else:
            columns[name] = pa.array(run.ints(name))
    if run.token_ns is not None:
        ends = np.cumsum([0, *(len(tokens) for tokens in run.token_ns)])
        flat = np.concatenate([np.empty(0, dtype=np.int64), *run.token_ns])
        columns["token_ns"] = pa.LargeListArray.from_arrays(pa.array(ends), pa.array(flat))
    return pa.table(columns)


def _ints_table(columns: Mapping[str, Ints], names: tuple[str, ...]) -> pa.Table:
    import pyarrow as pa

    return pa.table({name: pa.array(np.asarray(columns[name], dtype=np.int64)) for name in names})


def _links_table(links: Columns) -> pa.Table:
    import pyarrow as pa

    return pa.table({name: pa.array(links[name]) for name in LINK_COLUMNS})


def _sessions_table(sessions: Columns) -> pa.Table:
    import pyarrow as pa

    return pa.table(
        {
            name: pa.array(list(sessions[name]), type=pa.string())
            if name in TEXT_COLUMNS
            else pa.array(np.asarray(sessions[name], dtype=np.int64))
            for name in SESSION_COLUMNS
        }
    )


def _scenario_text(run: Run) -> str:
    """The scenario, headed by comments with what else decided the tables."""
    facts = {"seed": run.seed, **dict(sorted(run.versions.items()))}
    head = "".join(f"# {name}: {value}\n" for name, value in facts.items())
    return head + run.scenario_yaml.rstrip("\n") + "\n"


def _write_files(run: Run, folder: Path) -> None:
    (folder / SCENARIO).write_text(_scenario_text(run), encoding="utf-8", newline="\n")
    _write_parquet(_requests_table(run), folder / REQUESTS)
    _write_parquet(_ints_table(run.steps, STEP_COLUMNS), folder / STEPS)
    if run.schedule is not None:
        _write_parquet(_ints_table(run.schedule, SCHEDULE_COLUMNS), folder / SCHEDULE)
    if run.links is not None:
        _write_parquet(_links_table(run.links), folder / LINKS)
    if run.sessions is not None:
        _write_parquet(_sessions_table(run.sessions), folder / SESSIONS)
    summary = json.dumps(summarize(run), indent=2, allow_nan=False)
    (folder / SUMMARY).write_text(summary + "\n", encoding="utf-8", newline="\n")


def write_run(run: Run, folder: Path, overwrite: bool = False) -> None:
    """Write the result files into `folder`.

    They are written beside it first and moved in once complete. With `overwrite`, only files of a result folder are
    replaced (others stay), and `summary.json` goes first and comes last: a folder that has it is whole. Only
    `summary.json` holds what differs between two runs of the same scenario (wall and CPU seconds).

    Raises InputError as `check_output`, and when the folder cannot be written.
    """
    check_output(folder, overwrite)
    folder = folder.absolute()
    aside = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    try:
        aside.mkdir(parents=True)
        try:
            _write_files(run, aside)
            if folder.is_dir():
                (folder / SUMMARY).unlink(missing_ok=True)
                for name in RESULT_FILES:
                    if (aside / name).exists():
                        (aside / name).replace(folder / name)
                    else:
                        (folder / name).unlink(missing_ok=True)
            else:
                aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise InputError(f"cannot write the results: {error.strerror or error}", where=str(folder)) from error


def _read_parquet(path: Path, names: tuple[str, ...]) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise InputError("no such file; the folder is not a complete result folder", where=str(path))
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError("cannot be read as Parquet: truncated or damaged", where=str(path)) from error
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise InputError("a column is missing", where=str(path), field=missing[0], allowed=", ".join(names))
    for name in names:
        expected = pa.string() if name in TEXT_COLUMNS else pa.int64()
        if table.schema.field(name).type != expected:
            found = str(table.schema.field(name).type)
            raise InputError(f"must be {expected}", where=str(path), field=name, found=found)
        if table.column(name).null_count:
            raise InputError("has empty values", where=str(path), field=name)
    return table


def _columns(table: pa.Table, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: table[name].to_pylist() if name in TEXT_COLUMNS else table[name].to_numpy() for name in names}


def read_run(folder: Path) -> SavedRun:
    """Read a result folder. Raises InputError for a missing, incomplete or damaged one."""
    if not folder.is_dir():
        raise InputError("no such result folder", where=str(folder))
    texts = {}
    for name in (SUMMARY, SCENARIO):
        if not (folder / name).is_file():
            raise InputError("no such file; the folder is not a complete result folder", where=str(folder / name))
        try:
            texts[name] = (folder / name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError("is not UTF-8 text: damaged", where=str(folder / name)) from error
    try:
        summary = json.loads(texts[SUMMARY])
    except json.JSONDecodeError as error:
        where = str(folder / SUMMARY)
        raise InputError(f"is not JSON: {error.msg}", where=where, field=f"line {error.lineno}") from error
    if not isinstance(summary, dict):
        raise InputError("must hold one JSON object", where=str(folder / SUMMARY))

    requests = _read_parquet(folder / REQUESTS, REQUEST_COLUMNS)
    steps = _columns(_read_parquet(folder / STEPS, STEP_COLUMNS), STEP_COLUMNS)
    schedule = None
    if (folder / SCHEDULE).exists():
        schedule = _columns(_read_parquet(folder / SCHEDULE, SCHEDULE_COLUMNS), SCHEDULE_COLUMNS)
    sessions = None
    if (folder / SESSIONS).exists():
        sessions = _columns(_read_parquet(folder / SESSIONS, SESSION_COLUMNS), SESSION_COLUMNS)
    token_ns = None
    if "token_ns" in requests.column_names:
        token_ns = [np.asarray(tokens, dtype=np.int64) for tokens in requests["token_ns"].to_pylist()]
    columns = _columns(requests, REQUEST_COLUMNS)
    return SavedRun(folder, texts[SCENARIO], summary, columns, steps, schedule, token_ns, sessions)
