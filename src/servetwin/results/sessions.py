"""Agentic sessions as wholes: one row a session, and what the summary says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from servetwin.results.run import Columns, Ints, Run

STATISTICS = ("mean", "median", "p90", "p99")
FIGURES = {
    "duration_ms": "finish_ns",
    "turns": "turns",
    "tool_ms": "tool_ns",
    "first_ttft_ms": "first_ttft_ns",
    "last_ttft_ms": "last_ttft_ns",
}
"""Name in the summary, and the column behind it (of the duration: where it ends)."""


def session_columns(requests: Columns, tool_ns: Ints, turns: Ints) -> dict[str, Ints | Sequence[str]]:
    """The columns SESSION_COLUMNS, one row a session, by number; requests of none (-1) are left out.

    `requests` are the columns REQUEST_COLUMNS; `tool_ns` is the time from the end of the turn before each request to
    its release (0 where there is none), `turns` the number of requests of its session in the workload: sessions of
    which not all have ended (a run that was interrupted) are left out.

    A session lasts from its first arrival to its last end. `status` is that of its first request that did not finish,
    in order of arrival, otherwise finished; times to the first token are of the request that came first and of the one
    that came last, -1 when it got none.
    """
    session, arrival, finish, first_token = (
        np.asarray(requests[name], np.int64) for name in ("session", "arrival_ns", "finish_ns", "first_token_ns")
    )
    order = np.lexsort((np.asarray(requests["request"], np.int64), arrival, session))
    labels, begin, ended = np.unique(session[order], return_index=True, return_counts=True)
    whole = (labels >= 0) & (ended == turns[order][begin])
    last = (begin + ended - 1)[whole]
    status = np.asarray(requests["status"], dtype=np.str_)[order]
    rank = np.where(status == "finished", len(order), np.arange(len(order)))

    def per_session(how: np.ufunc, values: Ints) -> Ints:
        reduced: Ints = how.reduceat(values[order], begin)[whole] if len(begin) else np.empty(0, np.int64)
        return reduced

    ttft = np.where(first_token < 0, -1, first_token - arrival)[order]
    broken = np.minimum.reduceat(rank, begin)[whole] if len(begin) else np.empty(0, np.int64)
    return {
        "session": labels[whole],
        "status": ["finished" if at == len(order) else str(status[at]) for at in broken.tolist()],
        "turns": ended[whole],
        "arrival_ns": arrival[order][begin][whole],
        "finish_ns": per_session(np.maximum, finish),
        "tool_ns": per_session(np.add, tool_ns),
        **{
            name: per_session(np.add, np.asarray(requests[name], np.int64))
            for name in ("input_tokens", "output_tokens", "cached_tokens")
        },
        "first_ttft_ns": ttft[begin][whole],
        "last_ttft_ns": ttft[last],
    }


def session_metrics(run: Run, duration_s: float) -> dict[str, Any]:
    """`{"sessions": {...}}` for the summary; empty when there are none. Distributions are over finished sessions."""
    sessions = run.sessions
    if sessions is None:
        return {}
    done = np.fromiter((status == "finished" for status in sessions["status"]), np.bool_, len(sessions["status"]))
    completed = int(done.sum())
    figures: dict[str, Any] = {
        "completed": completed,
        "failed": len(done) - completed,
        "session_throughput": completed / duration_s if duration_s else None,
    }
    for name, column in FIGURES.items():
        values = _ints(sessions, column)[done]
        if name == "duration_ms":
            values = values - _ints(sessions, "arrival_ns")[done]
        figures |= _statistics(name, values / 1e6 if name.endswith("_ms") else values)
    return {"sessions": figures}


def _ints(columns: Mapping[str, Any], name: str) -> Ints:
    return np.asarray(columns[name], np.int64)


def _statistics(name: str, values: NDArray[Any]) -> dict[str, float | None]:
    """Mean, median and percentiles (linear interpolation) under names such as `p99_turns`; None of nothing."""
    if not len(values):
        return {f"{statistic}_{name}": None for statistic in STATISTICS}
    found = (float(np.mean(values)), *np.percentile(values, (50, 90, 99)).tolist())
    return {f"{statistic}_{name}": value for statistic, value in zip(STATISTICS, found, strict=True)}
