"""The result folder: written whole or not at all, the same bytes for the same run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from servetwin.errors import InputError
from servetwin.results.metrics import summarize
from servetwin.results.parts import Parts
from servetwin.results.run import (
    LINK_COLUMNS,
    REQUEST_COLUMNS,
    SCHEDULE_COLUMNS,
    SESSION_COLUMNS,
    STEP_COLUMNS,
    Columns,
    Ints,
    Run,
)
from servetwin.results.tables import ROW_GROUP, StoredColumns, arrow_table, columns_of, read_parquet, write_parquet

SCENARIO, SUMMARY = "scenario.yaml", "summary.json"
REQUESTS, STEPS, SCHEDULE = "requests.parquet", "steps.parquet", "schedule.parquet"
SESSIONS, LINKS = "sessions.parquet", "links.parquet"
TABLES = {
    "requests": REQUEST_COLUMNS,
    "steps": STEP_COLUMNS,
    "schedule": SCHEDULE_COLUMNS,
    "sessions": SESSION_COLUMNS,
    "links": LINK_COLUMNS,
}
"""Columns of each table; `NAME.parquet` is its file."""
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


def _scenario_text(run: Run) -> str:
    """The scenario, headed by comments with what else decided the tables."""
    facts = {"seed": run.seed, **dict(sorted(run.versions.items()))}
    head = "".join(f"# {name}: {value}\n" for name, value in facts.items())
    return head + run.scenario_yaml.rstrip("\n") + "\n"


class ResultFolder:
    """A result folder that is being written, as a context: on leaving it, what is not in its place is gone.

    Files are written beside `folder`, in `.NAME.partial-PID`, and moved in by `write` once all are complete. Of a long
    run, `keep` takes tables away piece by piece while it goes on; a process that is killed leaves those pieces there,
    one folder a table (see `Parts`).

    Raises InputError as `check_output`, and when the folder cannot be written.
    """

    def __init__(self, folder: Path, overwrite: bool = False) -> None:
        check_output(folder, overwrite)
        self.folder, self._overwrite = folder.absolute(), overwrite
        self._aside = self.folder.parent / f".{self.folder.name}.partial-{os.getpid()}"
        self._begun = False
        self._parts: dict[str, Parts] = {}
        self._stored: dict[str, StoredColumns] = {}

    def __enter__(self) -> ResultFolder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._begun:
            shutil.rmtree(self._aside, ignore_errors=True)

    def keep(self, table: str, number: int, columns: Columns) -> None:
        """Take piece `number` of a table: `requests` (with `token_ns` where it is recorded), `steps` or `schedule`.

        A piece of the number of the one before takes its place: taking that one was interrupted.
        """
        token_ns = cast("list[Ints] | None", columns.get("token_ns"))
        with self._writing():
            parts = self._parts.setdefault(table, Parts(self._aside / table))
            parts.put(number, arrow_table(columns, TABLES[table], token_ns))

    def keeps(self, table: str) -> bool:
        """Whether pieces of `table` were taken."""
        return table in self._parts

    def table(self, table: str) -> StoredColumns:
        """The whole table, all of whose pieces were taken: requests by their number, the others by engine and step."""
        if table not in self._stored:
            path = self._aside / f"{table}.parquet"
            with self._writing():
                write_parquet(self._parts[table].merged(ROW_GROUP), path)
                shutil.rmtree(self._aside / table)
            self._stored[table] = StoredColumns(path, TABLES[table])
        return self._stored[table]

    def write(self, run: Run) -> dict[str, Any]:
        """Write the files of `run` and move all into place; the content of `summary.json`.

        In a folder that is there already, only files of a result folder are replaced (others stay), and `summary.json`
        goes first and comes last: a folder that has it is whole. Only `summary.json` holds what differs between two
        runs of the same scenario (wall and CPU seconds).
        """
        check_output(self.folder, self._overwrite)  # somebody else may have written there during the run
        with self._writing():
            self._write_tables(run)
            (self._aside / SCENARIO).write_text(_scenario_text(run), encoding="utf-8", newline="\n")
            summary = summarize(run)
            text = json.dumps(summary, indent=2, allow_nan=False)
            (self._aside / SUMMARY).write_text(text + "\n", encoding="utf-8", newline="\n")
            self._move_in()
        return summary

    def _write_tables(self, run: Run) -> None:
        tables = {"requests": run.requests, "steps": run.steps, "schedule": run.schedule}
        tables |= {"links": run.links, "sessions": run.sessions}
        for table, columns in tables.items():
            if columns is not None and table not in self._stored:
                token_ns = run.token_ns if table == "requests" else None
                write_parquet([arrow_table(columns, TABLES[table], token_ns)], self._aside / f"{table}.parquet")

    def _move_in(self) -> None:
        if not self.folder.is_dir():
            self._aside.rename(self.folder)
        else:
            (self.folder / SUMMARY).unlink(missing_ok=True)
            for name in RESULT_FILES:
                if (self._aside / name).exists():
                    (self._aside / name).replace(self.folder / name)
                else:
                    (self.folder / name).unlink(missing_ok=True)
        for stored in self._stored.values():
            stored.path = self.folder / stored.path.name

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            if not self._begun:
                self._aside.mkdir(parents=True)
                self._begun = True
            yield
        except OSError as error:
            message = f"cannot write the results: {error.strerror or error}"
            raise InputError(message, where=str(self.folder)) from error


def write_run(run: Run, folder: Path, overwrite: bool = False) -> None:
    """Write the result files of a whole run into `folder` (see `ResultFolder`, also for what it raises)."""
    with ResultFolder(folder, overwrite) as results:
        results.write(run)


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

    requests = read_parquet(folder / REQUESTS, REQUEST_COLUMNS)
    steps = columns_of(read_parquet(folder / STEPS, STEP_COLUMNS), STEP_COLUMNS)
    schedule = None
    if (folder / SCHEDULE).exists():
        schedule = columns_of(read_parquet(folder / SCHEDULE, SCHEDULE_COLUMNS), SCHEDULE_COLUMNS)
    sessions = None
    if (folder / SESSIONS).exists():
        sessions = columns_of(read_parquet(folder / SESSIONS, SESSION_COLUMNS), SESSION_COLUMNS)
    token_ns = None
    if "token_ns" in requests.column_names:
        token_ns = [np.asarray(tokens, dtype=np.int64) for tokens in requests["token_ns"].to_pylist()]
    columns = columns_of(requests, REQUEST_COLUMNS)
    return SavedRun(folder, texts[SCENARIO], summary, columns, steps, schedule, token_ns, sessions)
