"""LLMServingSim's workload: JSONL, a request or an agentic session a line, arrivals in ns, with or without token ids.

https://github.com/casys-kaist/LLMServingSim: a request is `{"input_toks", "output_toks", "arrival_time_ns",
"input_tok_ids"?, "output_tok_ids"?}`, a session `{"session_id", "arrival_time_ns", "sub_requests": [{"input_toks",
"output_toks", "tool_duration_ns"?, "input_tok_ids"?, "output_tok_ids"?}, …]}`. Of a session, the first sub-request
comes at its arrival, and each other one when the one before it has finished and that one's tool has run.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from servetwin.workload.dependence import Dependence
from servetwin.workload.readers.jsonl import JsonRow, json_rows
from servetwin.workload.readers.source import TraceFile
from servetwin.workload.table import RequestTable

SIGNS = ("input_toks", "sub_requests")
MOST_ID = (1 << 31) - 1

Ids = NDArray[np.int32]
UNKNOWN: Ids = np.empty(0, np.int32)


@dataclass
class _Rows:
    """The columns as they grow, row by row."""

    arrival: list[int] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    session: list[int] = field(default_factory=list)
    before: list[int] = field(default_factory=list)
    """the turn before a row, -1 = none"""
    delay: list[int] = field(default_factory=list)
    ids: list[Ids | None] = field(default_factory=list)
    output_ids: list[Ids] = field(default_factory=list)

    def add(self, row: JsonRow, arrival: int, session: int = -1, before: int = -1, delay: int = 0) -> None:
        self.arrival.append(arrival)
        self.session.append(session)
        self.before.append(before)
        self.delay.append(delay)
        self.prompts.append(row.tokens("input_toks"))
        self.outputs.append(row.tokens("output_toks"))
        ids = _ids(row, "input", self.prompts[-1])
        self.ids.append(ids if len(ids) else None)
        self.output_ids.append(UNKNOWN if session < 0 else _ids(row, "output", self.outputs[-1]))


def read(file: TraceFile) -> RequestTable:
    """Arrivals as they stand in the file, in any order; a session's rows follow one another.

    Each line with sub_requests is a session of its own, numbered from 0, whatever its `session_id`. Where ids are
    given, they alone say which tokens are the same; in such a file a turn without ids gets some that occur nowhere
    else. A turn without ids whose prompt is long enough opens with the prompt and the output of the turn before it; a
    shorter one is new text. Output ids matter only where a later turn may quote them: those of requests outside
    sessions are not used.
    """
    rows, names = _Rows(), set()
    sessions = twice = 0
    for line in json_rows(file):
        arrival = line.time_ns("arrival_time_ns", 1)
        if "sub_requests" not in line.values:
            rows.add(line, arrival)
            continue
        name = str(line.values.get("session_id"))
        twice += name in names and "session_id" in line.values
        names.add(name)
        before, delay = -1, 0
        for turn in line.objects("sub_requests"):
            rows.add(turn, arrival, sessions, before, delay)
            before = len(rows.prompts) - 1
            delay = turn.time_ns("tool_duration_ns", 1) if turn.values.get("tool_duration_ns") is not None else 0
        sessions += 1
    table = RequestTable(
        arrival_ns=np.array(rows.arrival, np.int64),
        input_tokens=np.array(rows.prompts, np.int64),
        output_tokens=np.array(rows.outputs, np.int64),
    )
    return _with_tokens(table, rows) if not sessions else _with_sessions(table, rows, twice)


def _with_sessions(table: RequestTable, rows: _Rows, twice: int) -> RequestTable:
    parents = [[before] if before >= 0 else [] for before in rows.before]
    shorter = sum(before >= 0 and not _continues(rows, row) for row, before in enumerate(rows.before))
    notes = []
    if twice:
        notes.append(f"{twice} lines repeat a session_id of an earlier one; each line is a session of its own")
    if shorter:
        notes.append(f"{shorter} turns have prompts shorter than the conversation before them: new text, without ids")
    table = replace(
        table,
        session=np.array(rows.session, np.int64),
        waits_for=Dependence.of(parents, rows.delay),
        notes=tuple(notes),
    )
    return _with_tokens(table, rows)


def _continues(rows: _Rows, row: int) -> bool:
    """Whether the prompt of a turn is long enough to hold the prompt and the output of the turn before it."""
    before = rows.before[row]
    return before >= 0 and rows.prompts[row] >= rows.prompts[before] + rows.outputs[before]


def _with_tokens(table: RequestTable, rows: _Rows) -> RequestTable:
    """`table` with the columns that say which tokens are the same."""
    if any(ids is not None for ids in rows.ids):
        ids, output_ids = _filled(rows)
        known = any(len(row) for row in output_ids)
        return replace(table, token_ids=ids, output_ids=output_ids if known else None)
    extends = [before if _continues(rows, row) else -1 for row, before in enumerate(rows.before)]
    if any(before >= 0 for before in extends):
        return replace(table, extends=np.array(extends, np.int64))
    return table


def _ids(row: JsonRow, side: str, tokens: int) -> Ids:
    """The ids of a prompt or an output; empty when they are not given."""
    name = f"{side}_tok_ids"
    if row.values.get(name) is None:
        return UNKNOWN
    ids = row.whole_numbers(name, MOST_ID)
    if len(ids) != tokens:
        raise row.file.error(
            f"{name} and {side}_toks differ",
            row.place,
            found=f"{len(ids)} ids, {side}_toks {tokens}",
            allowed="one id a token",
        )
    return np.array(ids, np.int32)


def _filled(rows: _Rows) -> tuple[list[Ids], list[Ids]]:
    """Ids of all prompts, and of the outputs that may be quoted. Made-up ids are negative: they occur nowhere else."""
    below = 0

    def new(tokens: int) -> Ids:
        nonlocal below
        below -= tokens
        return np.arange(below + tokens - 1, below - 1, -1, dtype=np.int32)

    prompts: list[Ids] = []
    outputs = list(rows.output_ids)
    for row, given in enumerate(rows.ids):
        before = rows.before[row]
        ids = given
        if not _continues(rows, row):
            ids = new(rows.prompts[row]) if ids is None else ids
        else:
            end = len(prompts[before])
            spoken = end + rows.outputs[before]
            if ids is None:
                if not len(outputs[before]):
                    outputs[before] = new(rows.outputs[before])
                ids = np.concatenate((prompts[before], outputs[before], new(rows.prompts[row] - spoken)))
            elif not len(outputs[before]) and np.array_equal(ids[:end], prompts[before]):
                # A prompt that goes on from the one before it tells what was answered in between.
                outputs[before] = ids[end:spoken]
        prompts.append(ids)
    return prompts, outputs
