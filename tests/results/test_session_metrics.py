"""Metrics of sessions, against figures counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from servetwin.results.metrics import summarize
from servetwin.results.run import SESSION_COLUMNS, Run
from servetwin.results.sessions import session_columns

MakeRun = Callable[..., Run]
MS = 1_000_000


def run_of(make_run: MakeRun, sessions: list[int], statuses: list[str], **columns: list[int]) -> Run:
    """Requests of 10 ms each, far apart; the first token after 5."""
    run = make_run(np.arange(len(sessions)) * 100 * MS, 10 * MS)
    changes = {"session": np.array(sessions), "status": statuses}
    return replace(run, requests={**run.requests, **changes, **{k: np.array(v) for k, v in columns.items()}})


def of(run: Run, tool_ms: list[int], turns: list[int]) -> dict[str, Any]:
    found = session_columns(run.requests, np.array(tool_ms) * MS, np.array(turns))
    assert tuple(found) == SESSION_COLUMNS
    return {name: list(values) for name, values in found.items()}


def test_one_row_a_session(make_run: MakeRun) -> None:
    run = run_of(make_run, [4, -1, 2, 4, 2], ["finished"] * 5, cached_tokens=[0, 0, 0, 16, 32])
    assert of(run, [0, 0, 0, 30, 20], [2, 1, 2, 2, 2]) == {
        "session": [2, 4],
        "status": ["finished", "finished"],
        "turns": [2, 2],
        "arrival_ns": [200 * MS, 0],
        "finish_ns": [410 * MS, 310 * MS],
        "tool_ns": [20 * MS, 30 * MS],
        "input_tokens": [200, 200],
        "output_tokens": [16, 16],
        "cached_tokens": [32, 16],
        "first_ttft_ns": [5 * MS, 5 * MS],
        "last_ttft_ns": [5 * MS, 5 * MS],
    }


def test_a_failed_turn_fails_its_session(make_run: MakeRun) -> None:
    run = run_of(
        make_run,
        [0, 0, 0, 1],
        ["finished", "aborted", "failed", "failed"],
        first_token_ns=[5 * MS, 105 * MS, -1, -1],
    )
    columns = of(run, [0] * 4, [3, 3, 3, 1])
    assert columns["status"] == ["aborted", "failed"]
    assert columns["first_ttft_ns"] == [5 * MS, -1] and columns["last_ttft_ns"] == [-1, -1]


def test_the_turns_of_an_interrupted_session_do_not_count(make_run: MakeRun) -> None:
    run = run_of(make_run, [0, 1, 1], ["finished"] * 3)
    assert of(run, [0] * 3, [2, 2, 2])["session"] == [1]
    run = run_of(make_run, [], [])
    assert of(run, [], [])["session"] == []


def test_summary(make_run: MakeRun) -> None:
    count = 40
    sessions = np.repeat(np.arange(count // 2), 2)
    run = run_of(make_run, sessions.tolist(), ["failed" if i == 5 else "finished" for i in range(count)])
    tool = (np.arange(count) % 2) * np.arange(count) * MS
    columns = session_columns(run.requests, tool, np.full(count, 2))
    summary = summarize(replace(run, sessions=columns))
    figures = summary["sessions"]
    assert figures["completed"] == 19 and figures["failed"] == 1
    assert figures["session_throughput"] == pytest.approx(19 / summary["duration_s"])
    tools = [i for i in range(1, count, 2) if i != 5]
    for name, values in {"duration_ms": [110.0] * 19, "turns": [2] * 19, "tool_ms": tools}.items():
        assert figures[f"mean_{name}"] == pytest.approx(np.mean(values))
        assert figures[f"median_{name}"] == pytest.approx(np.median(values))
        for percent in (90, 99):
            assert figures[f"p{percent}_{name}"] == pytest.approx(np.percentile(values, percent))
    assert figures["mean_first_ttft_ms"] == figures["mean_last_ttft_ms"] == 5.0
    assert "sessions" not in summarize(run)


def test_nothing_finished(make_run: MakeRun) -> None:
    run = run_of(make_run, [0], ["failed"])
    figures = summarize(replace(run, sessions=session_columns(run.requests, np.zeros(1, int), np.ones(1, int))))
    assert figures["sessions"]["mean_duration_ms"] is None and figures["sessions"]["failed"] == 1
