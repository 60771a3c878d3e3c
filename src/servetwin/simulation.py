"""One function: scenario in, run out."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from servetwin import __version__
from servetwin.cluster.build import Built, build
from servetwin.cluster.ended import EndedRequests
from servetwin.cluster.traffic import link_bytes
from servetwin.engine.gaps import merged
from servetwin.engine.log import COLUMNS, StepLog
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
    every token), `schedule` (tokens of every request in every step) and `links` (bytes that each link carried).
    `coalesce` False carries out every step singly; the results are the same. `progress(ended requests, all requests,
    simulated ns)` is called now and then.

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
    ended = EndedRequests()
    built.cluster.on_ended = ended.add
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
        progress(len(ended), len(table), built.cluster.now)
    run = _run(scenario, table, built, ended, partial, links="links" in record)
    object.__setattr__(run, "wall_s", time.perf_counter() - wall)
    object.__setattr__(run, "cpu_s", time.process_time() - cpu)
    return run


def _run(
    scenario: Scenario, table: RequestTable, built: Built, ended: EndedRequests, partial: bool, links: bool
) -> Run:
    cluster, log = built.cluster, built.log
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
    request_columns = ended.columns(built.pools)
    steps = log.table()
    return Run(
        scenario_yaml=dump(scenario),
        seed=scenario.seed,
        requests=request_columns,
        sessions=_session_columns(table, request_columns),
        links=_link_columns(built, steps) if links else None,
        steps=steps,
        itl=merged([engine.scheduler.riding.gaps.counts() for engine in cluster.engines]),
        kv_blocks_total=[engine.scheduler.options.usable_blocks for engine in cluster.engines],
        engine_pools=built.pools,
        prefix_queries=sum(engine.scheduler.prefix_queries for engine in cluster.engines),
        prefix_hits=sum(engine.scheduler.prefix_hits for engine in cluster.engines),
        priced_ns=priced,
        assumed_ns=assumed,
        step_error=_step_error(built, steps),
        events=cluster.events,
        partial=partial,
        concurrency=table.concurrency,
        token_ns=ended.token_ns(),
        schedule=_schedule(log),
        slo=None if slo is None else {"ttft_ns": slo.ttft, "tpot_ns": slo.tpot, "e2el_ns": slo.e2el},
        versions=hashes,
        notes=list(table.notes),
    )


def _link_columns(built: Built, steps: Mapping[str, Ints]) -> Columns:
    """The links that carried something or could have, the busiest first; none where nothing goes over the network."""
    links = built.network.topology.links if built.network else ()
    carried = link_bytes(built, steps) if links else np.zeros(0)
    bandwidth = np.array([link.bandwidth for link in links])
    seconds = (int(steps["end_ns"].max()) - int(steps["start_ns"].min())) / 1e9 if len(steps["end_ns"]) else 0.0
    used = np.divide(carried, bandwidth * seconds, out=np.zeros(len(links)), where=bandwidth * seconds > 0)
    order = np.argsort(-used, kind="stable")
    return {
        "source": [links[i].source for i in order],
        "target": [links[i].target for i in order],
        "bandwidth": np.rint(bandwidth[order]).astype(np.int64),
        "bytes": np.rint(carried[order]).astype(np.int64),
        "utilization": used[order],
    }


def _step_error(built: Built, steps: Mapping[str, Ints]) -> dict[str, float]:
    """Relative error of the mean step with prefills and of the mean decode step, and both weighted by their time.

    Every pool counts by the time of its engines' steps; pools are taken to err together.
    """
    spent = {"prefill": 0.0, "decode": 0.0}
    erring = {"prefill": 0.0, "decode": 0.0}
    numbers = range(len(built.cluster.engines))
    starts = np.searchsorted(steps["engine"], numbers)
    ends = np.searchsorted(steps["engine"], numbers, side="right")
    for engine, pricing, start, end in zip(built.cluster.engines, built.pricing, starts, ends, strict=True):
        for kind, (shape, ns) in _mean_steps({name: column[start:end] for name, column in steps.items()}).items():
            spent[kind] += ns
            erring[kind] += ns * step_error(engine.timer, pricing.spread, engine.host, shape)
    whole = sum(spent.values())
    if not whole:
        return {}
    overall = sum(erring.values()) / whole
    return {"prefill": erring["prefill"] / spent["prefill"] if spent["prefill"] else overall, "overall": overall}


def _mean_steps(column: Mapping[str, Ints]) -> dict[str, tuple[StepShape, int]]:
    """The mean shape of an engine's steps with prefills and of its pure decode steps, with the time of all of them."""
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
