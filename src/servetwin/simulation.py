"""One function: scenario in, run out."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from servetwin import __version__
from servetwin.cluster.build import Built, build
from servetwin.engine.log import COLUMNS, StepLog
from servetwin.engine.request import Request, Status
from servetwin.results.run import Columns, Ints, Run
from servetwin.results.sessions import session_columns
from servetwin.scenario.load import dump
from servetwin.scenario.resolve import resolve
from servetwin.timing.shape import StepShape
from servetwin.timing.uncertainty import step_error
from servetwin.workload import build as build_workload

if TYPE_CHECKING:
    from servetwin.scenario.schema import Scenario
    from servetwin.workload.table import RequestTable

Progress = Callable[[int, int, int], None]

_STATUS = {Status.FINISHED: "finished", Status.ABORTED: "aborted", Status.FAILED: "failed"}


def simulate(
    scenario: Scenario,
    base: Path = Path(),
    *,
    record: frozenset[str] = frozenset(),
    coalesce: bool = True,
    progress: Progress | None = None,
) -> Run:
    """Run a scenario.

    `base` is the folder that relative paths start at. `record` may hold `steps` (one row a step), `tokens` (time of
    every
    token) and `schedule` (tokens of every request in every step). `coalesce` False carries out every step singly; the
    results are the same. `progress(ended requests, all requests, simulated ns)` is called now and then.

    A KeyboardInterrupt ends the run early; what had finished is returned, marked as partial.

    Raises:
        InputError: the scenario cannot be run as it stands.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    scenario = resolve(scenario, base)
    table = build_workload(scenario.workload, scenario.seed, base)
    log = StepLog(expand="steps" in record, schedule=[] if "schedule" in record else None)
    built = build(
        scenario,
        table,
        base=base,
        log=log,
        record_tokens="tokens" in record,
        coalesce=coalesce,
        progress=progress,
    )
    partial = False
    # Requests and batches are freed by reference counts; looking for cycles among millions of them only takes time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        built.cluster.run()
    except KeyboardInterrupt:
        partial = True
    finally:
        if collecting:
            gc.enable()
    if progress is not None:
        progress(len(built.cluster.ended_requests), len(table), built.cluster.now)
    run = _run(scenario, table, built, partial)
    object.__setattr__(run, "wall_s", time.perf_counter() - wall)
    object.__setattr__(run, "cpu_s", time.process_time() - cpu)
    return run


def _run(scenario: Scenario, table: RequestTable, built: Built, partial: bool) -> Run:
    cluster, log = built.cluster, built.log
    requests = sorted(cluster.ended_requests, key=lambda request: request.row)
    gaps: dict[int, int] = {}
    for engine in cluster.engines:
        for gap, count in engine.scheduler.gaps.items():
            gaps[gap] = gaps.get(gap, 0) + count
    priced: dict[str, int] = {}
    for ledger in {id(engine.timer.ledger): engine.timer.ledger for engine in cluster.engines}.values():
        for kind in ("measured", "interpolated", "extrapolated"):
            priced[kind] = priced.get(kind, 0) + getattr(ledger, kind)
        priced["analytic"] = priced.get("analytic", 0) + ledger.analytic + ledger.assumed
        priced["assumed"] = priced.get("assumed", 0) + ledger.assumed
    assumed = priced.pop("assumed", 0)
    hashes: dict[str, str] = {"servetwin": __version__}
    for pricing in built.pricing:
        hashes |= pricing.hashes
    if table.sha256:
        hashes["trace"] = table.sha256
    slo = scenario.slo
    request_columns = _request_columns(requests, built.pools)
    order = sorted(range(len(log.rows)), key=lambda i: log.rows[i][:2])
    columns = zip(*(log.rows[i] for i in order), strict=True) if log.rows else ([] for _ in COLUMNS)
    return Run(
        scenario_yaml=dump(scenario),
        seed=scenario.seed,
        requests=request_columns,
        sessions=_session_columns(table, request_columns),
        steps={name: _ints(values) for name, values in zip(COLUMNS, columns, strict=True)},
        itl=(_ints(sorted(gaps)), _ints(gaps[gap] for gap in sorted(gaps))),
        kv_blocks_total=[engine.scheduler.options.usable_blocks for engine in cluster.engines],
        prefix_queries=sum(engine.scheduler.prefix_queries for engine in cluster.engines),
        prefix_hits=sum(engine.scheduler.prefix_hits for engine in cluster.engines),
        priced_ns=priced,
        assumed_ns=assumed,
        step_error=_step_error(built),
        events=cluster.events,
        partial=partial,
        concurrency=table.concurrency,
        token_ns=[_ints(r.token_ns or []) for r in requests] if requests and requests[0].token_ns is not None else None,
        schedule=_schedule(log),
        slo=None if slo is None else {"ttft_ns": slo.ttft, "tpot_ns": slo.tpot, "e2el_ns": slo.e2el},
        versions=hashes,
        notes=list(table.notes),
    )


def _step_error(built: Built) -> dict[str, float]:
    """Relative error of the mean step with prefills and of the mean decode step, and both weighted by their time.

    Every pool counts by the time of its engines' steps; pools are taken to err together.
    """
    spent = {"prefill": 0.0, "decode": 0.0}
    erring = {"prefill": 0.0, "decode": 0.0}
    for number, (engine, pricing) in enumerate(zip(built.cluster.engines, built.pricing, strict=True)):
        for kind, (shape, ns) in _mean_steps(built.log, number).items():
            spent[kind] += ns
            erring[kind] += ns * step_error(engine.timer, pricing.spread, engine.host, shape)
    whole = sum(spent.values())
    if not whole:
        return {}
    overall = sum(erring.values()) / whole
    return {"prefill": erring["prefill"] / spent["prefill"] if spent["prefill"] else overall, "overall": overall}


def _mean_steps(log: StepLog, engine: int) -> dict[str, tuple[StepShape, int]]:
    """The mean shape of an engine's steps with prefills and of its pure decode steps, with the time of all of them."""
    rows = np.array([row for row in log.rows if row[0] == engine], dtype=np.float64).reshape(-1, len(COLUMNS))
    column = {name: rows[:, i] for i, name in enumerate(COLUMNS)}
    found = {}
    prefills, decodes_only = column["prefill_seqs"] > 0, (column["prefill_seqs"] == 0) & (column["decode_seqs"] > 0)
    for kind, mask in (("prefill", prefills), ("decode", decodes_only)):
        if mask.any():
            weight = column["steps"][mask]
            means = {name: round(float(np.average(column[name][mask], weights=weight))) for name in COLUMNS[5:10]}
            seqs, tokens, old, decodes, context = means.values()
            seqs = max(1, seqs) if kind == "prefill" else 0
            pairs = tokens * old // max(1, seqs) + tokens * (tokens // max(1, seqs) + 1) // 2
            longest = context // max(1, decodes)
            decodes = max(decodes, 0 if kind == "prefill" else 1)
            shape = StepShape(seqs, tokens, old, pairs, decodes, decodes, context, longest, longest)
            found[kind] = shape, int((column["end_ns"][mask] - column["start_ns"][mask]).sum())
    return found


def _request_columns(requests: Sequence[Request], pools: Sequence[str]) -> Mapping[str, Ints | Sequence[str]]:
    numbers = {
        "request": (r.row for r in requests),
        "session": (r.session for r in requests),
        "engine": (r.engine for r in requests),
        "decode_engine": (-1 for _ in requests),
        "arrival_ns": (r.arrival_ns for r in requests),
        "scheduled_ns": (r.scheduled_ns for r in requests),
        "first_token_ns": (r.first_token_ns for r in requests),
        "finish_ns": (r.finish_ns for r in requests),
        "input_tokens": (r.prompt for r in requests),
        "output_tokens": (r.outputs for r in requests),
        "cached_tokens": (r.cached_tokens for r in requests),
        "preemptions": (r.preemptions for r in requests),
    }
    texts = {
        "pool": [pools[r.engine] if r.engine >= 0 else "" for r in requests],
        "status": [_STATUS[r.status] for r in requests],
        "reason": [r.reason if r.status != Status.FINISHED else "" for r in requests],
    }
    return {name: _ints(values) for name, values in numbers.items()} | texts


def _session_columns(table: RequestTable, requests: Columns) -> Columns | None:
    """The table of sessions, None when no request has one."""
    session = table.session
    if session is None or not (session >= 0).any():
        return None
    rows = np.asarray(requests["request"], np.int64)
    _, at, sizes = np.unique(session, return_inverse=True, return_counts=True)
    tool_ns = np.zeros(len(rows), np.int64)
    if table.waits_for is not None:
        released = np.asarray(requests["engine"], np.int64) >= 0  # others failed with a turn before them
        tool_ns = np.where(released, table.waits_for.delay_ns[rows], 0)
    return session_columns(requests, tool_ns, sizes[at][rows])


def _schedule(log: StepLog) -> dict[str, Ints] | None:
    if log.schedule is None:
        return None
    entries = sorted(log.schedule, key=lambda entry: entry[:2])
    columns = zip(*entries, strict=True) if entries else ([] for _ in range(4))
    return dict(zip(("engine", "step", "request", "tokens"), map(_ints, columns), strict=True))


def _ints(values: Iterable[int]) -> Ints:
    return np.fromiter(values, dtype=np.int64)
