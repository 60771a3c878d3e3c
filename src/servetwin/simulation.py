"""One function: scenario in, run out."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from servetwin import __version__, catalog
from servetwin.catalog.units import format_rate
from servetwin.cluster.build import Built, build
from servetwin.cluster.ended import EndedRequests
from servetwin.cluster.traffic import link_bytes
from servetwin.engine.gaps import Gaps
from servetwin.engine.log import COLUMNS, ENTRIES, StepLog, by_column
from servetwin.results.run import Columns, Ints, Run
from servetwin.results.sessions import session_columns
from servetwin.scenario.load import dump
from servetwin.scenario.resolve import resolve
from servetwin.timing.shape import StepShape
from servetwin.timing.uncertainty import step_error
from servetwin.workload import build as build_workload

if TYPE_CHECKING:
    from servetwin.results.files import ResultFolder
    from servetwin.results.tables import StoredColumns
    from servetwin.scenario.schema import Scenario
    from servetwin.workload.table import RequestTable

Progress = Callable[[int, int, int], None]

MEASURED = ("silicon", "profile")
"""How the name of a pricing begins whose times are measured ones first."""

LINK_STEPS = ("engine", "steps", "start_ns", "end_ns", "prefill_seqs", "prefill_tokens", "decode_seqs")
"""Columns of the steps that tell what was carried over links, and for how long."""


def simulate(
    scenario: Scenario,
    base: Path = Path(),
    *,
    record: frozenset[str] = frozenset(),
    coalesce: bool = True,
    progress: Progress | None = None,
    folder: ResultFolder | None = None,
) -> Run:
    """Run a scenario.

    `base` is the folder that relative paths start at. `record` may hold `steps` (one row a step), `tokens` (time of
    every token), `schedule` (tokens of every request in every step) and `links` (bytes that each link carried).
    `coalesce` False carries out every step singly; the results are the same. `progress(ended requests, all requests,
    simulated ns)` is called now and then.

    With `folder`, a long run puts its tables there piece by piece instead of holding them; the run that is returned
    reads their columns from the files, and is to be written with `folder.write`.

    A KeyboardInterrupt ends the run early; what had finished is returned, marked as partial.

    Raises:
        InputError: the scenario cannot be run as it stands, or `folder` cannot be written.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    scenario = resolve(scenario, base)
    table = build_workload(scenario.workload, scenario.seed, base)
    keep = None if folder is None else folder.keep
    log = StepLog(expand="steps" in record, schedule=[] if "schedule" in record else None, keep=keep)
    built = build(
        scenario,
        table,
        base=base,
        log=log,
        record_tokens="tokens" in record,
        coalesce=coalesce,
        progress=progress,
    )
    ended, gaps = EndedRequests(built.pools, keep), Gaps()
    for engine in built.cluster.engines:
        for lane in engine.scheduler.lanes:
            lane.gaps = gaps  # many gaps occur in several engines; of each only one note is kept
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
    run = _run(scenario, table, built, ended, gaps, partial, "links" in record, folder)
    object.__setattr__(run, "wall_s", time.perf_counter() - wall)
    object.__setattr__(run, "cpu_s", time.process_time() - cpu)
    return run


def _run(
    scenario: Scenario,
    table: RequestTable,
    built: Built,
    ended: EndedRequests,
    gaps: Gaps,
    partial: bool,
    links: bool,
    folder: ResultFolder | None,
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
    kept_requests = _kept(folder, "requests", ended.hand_over)
    requests = ended.columns() if kept_requests is None else kept_requests
    kept_steps = _kept(folder, "steps", log.hand_over_steps)
    steps = log.table() if kept_steps is None else kept_steps
    kept_schedule = _kept(folder, "schedule", log.hand_over_entries)
    return Run(
        scenario_yaml=dump(scenario),
        seed=scenario.seed,
        requests=requests,
        sessions=_session_columns(table, requests),
        links=_link_columns(built, steps) if links else None,
        steps=steps,
        itl=gaps.counts(),
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
        schedule=_schedule(log) if kept_schedule is None else kept_schedule,
        slo=None if slo is None else {"ttft_ns": slo.ttft, "tpot_ns": slo.tpot, "e2el_ns": slo.e2el},
        versions=hashes,
        notes=[*table.notes, *_without_effect(built), *ended.failures()],
    )


def _without_effect(built: Built) -> Iterator[str]:
    """What was asked for but changes nothing: measured kernels keep the times of the device that they were timed on."""
    for pool, pricing in {replica.pool.name: (replica.pool, replica.pricing) for replica in built.replicas}.values():
        wanted = pool.device_overrides.memory_bandwidth if pool.device_overrides else None
        published = catalog.device(pool.device).memory_bandwidth
        if wanted is not None and abs(wanted / published - 1) > 0.01 and pricing.source.startswith(MEASURED):
            yield (
                f"pool {pool.name}: memory_bandwidth {format_rate(wanted)} changes only what the roofline prices; what "
                f"was measured on {pool.device} keeps its time (timing.source: roofline prices all of it)"
            )


def _kept(folder: ResultFolder | None, table: str, hand_over: Callable[[], None]) -> StoredColumns | None:
    """The columns of a table of which `folder` took pieces, once it has the rest; None where it holds none of it."""
    if folder is None or not folder.keeps(table):
        return None
    hand_over()
    return folder.table(table)


def _link_columns(built: Built, steps: Mapping[str, Ints]) -> Columns:
    """The links that carried something or could have, the busiest first; none where nothing goes over the network."""
    links = built.network.topology.links if built.network else ()
    steps = {name: steps[name] for name in LINK_STEPS}
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
    for kind, shapes in _mean_steps(steps, len(built.cluster.engines)).items():
        for engine, pricing, found in zip(built.cluster.engines, built.pricing, shapes, strict=True):
            if found is not None:
                shape, ns = found
                spent[kind] += ns
                erring[kind] += ns * step_error(engine.timer, pricing.spread, engine.host, shape)
    whole = sum(spent.values())
    if not whole:
        return {}
    overall = sum(erring.values()) / whole
    return {"prefill": erring["prefill"] / spent["prefill"] if spent["prefill"] else overall, "overall": overall}


def _mean_steps(steps: Mapping[str, Ints], engines: int) -> dict[str, list[tuple[StepShape, int] | None]]:
    """By kind and engine: the mean shape of its steps with prefills (or of its pure decode steps), and the time of all
    of them; None where there are none. Sums of integers, of one column at a time, as if every step had a row."""
    bounds = np.searchsorted(steps["engine"], np.arange(engines + 1)).tolist()
    prefills, weight, ns = steps["prefill_seqs"] > 0, steps["steps"], steps["end_ns"] - steps["start_ns"]
    masks = {"prefill": prefills, "decode": ~prefills & (steps["decode_seqs"] > 0)}
    some = {kind: _sums(mask, bounds) for kind, mask in masks.items()}
    times = {kind: _sums(np.where(mask, ns, 0), bounds) for kind, mask in masks.items()}
    weights = {kind: _sums(np.where(mask, weight, 0), bounds) for kind, mask in masks.items()}
    sums: dict[str, list[list[int]]] = {kind: [] for kind in masks}
    for name in COLUMNS[5:10]:
        column = steps[name] * weight
        if name == "decode_context":  # grows in each step of a row
            column = column + steps["decode_seqs"] * (weight * (weight - 1) // 2)
        for kind, mask in masks.items():
            sums[kind].append(_sums(np.where(mask, column, 0), bounds))
    return {
        kind: [
            (_mean_shape(kind, [of[i] / weights[kind][i] for of in sums[kind]]), times[kind][i]) if number else None
            for i, number in enumerate(some[kind])
        ]
        for kind in masks
    }


def _sums(column: Ints | NDArray[np.bool_], bounds: list[int]) -> list[int]:
    """The sum of the rows between each two bounds."""
    return [int(column[begin:end].sum()) for begin, end in pairwise(bounds)]


def _mean_shape(kind: str, means: list[float]) -> StepShape:
    seqs, tokens, old, decodes, context = map(round, means)
    seqs = max(1, seqs) if kind == "prefill" else 0
    pairs = tokens * old // max(1, seqs) + tokens * (tokens // max(1, seqs) + 1) // 2
    longest = context // max(1, decodes)
    decodes = max(decodes, 0 if kind == "prefill" else 1)
    return StepShape(seqs, tokens, old, pairs, decodes, decodes, context, longest, longest)


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
    return by_column(ENTRIES, entries)
