"""Small simulations for tests: a scenario, a workload given row by row, and all that came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from servetwin.cluster.build import Built, build
from servetwin.engine.engine import Engine
from servetwin.engine.log import StepLog
from servetwin.engine.request import Request, Status
from servetwin.scenario.load import from_data
from servetwin.scenario.resolve import resolve
from servetwin.scenario.schema import Scenario
from servetwin.workload.table import RequestTable

MS = 1_000_000
LINEAR = {
    "source": "linear",
    "base_ns": 5 * MS,
    "per_prefill_token_ns": 20_000,
    "per_decode_seq_ns": 50_000,
    "per_context_token_ns": 1,
}
WORKLOAD = {"arrivals": {"process": "all_at_once"}, "requests": 1, "input_tokens": 10, "output_tokens": 10}
"""For scenarios whose requests are given as a table."""


def scenario_of(
    engine: dict[str, Any] | None = None,
    *,
    model: str = "meta-llama/Llama-3.1-8B",
    workload: dict[str, Any] | None = None,
    timing: dict[str, Any] | None = None,
    replicas: int = 1,
    routing: str | dict[str, Any] = "least_loaded",
    seed: int = 0,
) -> Scenario:
    """A resolved scenario of `model` on H100s."""
    data = {
        "model": model,
        "workload": workload or WORKLOAD,
        "pools": [{"device": "h100_sxm", "replicas": replicas, "engine": engine or {}}],
        "routing": {"policy": routing} if isinstance(routing, str) else routing,
        "timing": timing or LINEAR,
        "seed": seed,
    }
    return resolve(from_data(data, None, Path()), Path())


@dataclass(frozen=True)
class Row:
    """One request. `segments` replaces `prompt` tokens of its own."""

    arrival_ns: int = 0
    prompt: int = 10
    output: int = 10
    segments: Sequence[tuple[int, int]] | None = None
    priority: int = 0
    abort_ns: int = -1
    session: int = -1


def table_of(rows: Sequence[Row], *, concurrency: int | None = None, output_known: bool = True) -> RequestTable:
    """Requests row by row; the prompts of rows without segments are distinct."""
    segments = None
    if any(row.segments is not None for row in rows):
        segments = [
            row.segments if row.segments is not None else [(1000 + i, row.prompt)] for i, row in enumerate(rows)
        ]

    def column(values: Sequence[int]) -> Any:
        return np.array(values, np.int64)

    return RequestTable(
        arrival_ns=column([row.arrival_ns for row in rows]),
        input_tokens=column([sum(n for _, n in row.segments) if row.segments else row.prompt for row in rows]),
        output_tokens=column([row.output for row in rows]),
        segments=segments,
        session=column([row.session for row in rows]),
        priority=column([row.priority for row in rows]),
        abort_ns=column([row.abort_ns for row in rows]),
        concurrency=concurrency,
        output_known=output_known,
    )


def gaps_of(engine: Engine) -> dict[int, int]:
    """How often each gap (ns) between tokens occurred in an engine."""
    ns, counts = engine.scheduler.riding.gaps.counts()
    return dict(zip(ns.tolist(), counts.tolist(), strict=True))


@dataclass
class Ran:
    """A finished simulation."""

    built: Built
    log: StepLog
    clock: list[int] = field(default_factory=list)

    @property
    def engines(self) -> list[Engine]:
        return self.built.cluster.engines

    @property
    def requests(self) -> list[Request]:
        return sorted(self.built.cluster.ended_requests, key=lambda request: request.row)

    def status(self, row: int) -> Status:
        return self.requests[row].status

    def steps(self) -> list[dict[str, int]]:
        """Rows of the step table, by engine and step."""
        columns = self.log.table()
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in rows]

    def everything(self) -> dict[str, Any]:
        """All that results are made from, in a form that two runs can be compared by."""
        inner = "chain", "quiet", "joined", "rides_to", "base", "lane"
        slots = [name for name in Request.__slots__ if name not in inner]
        gaps = [gaps_of(engine) for engine in self.engines]
        return {
            "requests": [{name: getattr(request, name) for name in slots} for request in self.requests],
            "order of ends": [request.row for request in self.built.cluster.ended_requests],
            "steps": self.steps(),
            "schedule": sorted(self.log.schedule or [], key=lambda entry: entry[:2]),
            "gaps": gaps,
            "priced": [engine.timer.ledger for engine in self.engines],
            "prefix": [(engine.scheduler.prefix_queries, engine.scheduler.prefix_hits) for engine in self.engines],
            "preemptions": [engine.scheduler.preemptions for engine in self.engines],
        }


def run(
    scenario: Scenario,
    table: RequestTable,
    *,
    coalesce: bool = True,
    expand: bool = True,
    prepare: Callable[[Engine], None] | None = None,
) -> Ran:
    """Run `table` on the engines of `scenario`; `prepare` may change each engine before it starts."""
    log = StepLog(expand=expand, schedule=[])
    built = build(scenario, table, base=Path(), log=log, record_tokens=True, coalesce=coalesce)
    ran = Ran(built, log)
    for engine in ran.engines:
        if prepare is not None:
            prepare(engine)
        _note_clock(engine, ran.clock)
    built.cluster.run()
    return ran


def _note_clock(engine: Engine, clock: list[int]) -> None:
    wake = engine.wake

    def noted(now: int) -> int | None:
        clock.append(now)
        return wake(now)

    engine.wake = noted  # type: ignore[method-assign]
