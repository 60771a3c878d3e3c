"""The metrics of a run, defined and named as in `vllm bench serve`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from servetwin.results.pools import pool_metrics
from servetwin.results.run import PRICED, Ints, Run
from servetwin.results.saturation import saturation
from servetwin.results.sessions import session_metrics
from servetwin.results.uncertainty import intervals

Floats = NDArray[np.float64]

PERCENTILES = (50, 75, 90, 95, 99)
LATENCIES = ("ttft", "tpot", "itl", "e2el")
STATISTICS = ("mean", "median", "std", *(f"p{p}" for p in PERCENTILES))


def weighted_percentiles(values: Ints, counts: Ints, percents: tuple[int, ...] = PERCENTILES) -> list[float]:
    """Percentiles of the population in which `values[i]` occurs `counts[i]` times, by linear interpolation.

    Equal, bit for bit, to `numpy.percentile(numpy.repeat(values, counts), percents)` for values below 2**53, without
    ever building that population. It must not be empty.
    """
    if not (values[1:] >= values[:-1]).all():
        order = np.argsort(values, kind="stable")
        values, counts = values[order], counts[order]
    upto = np.cumsum(counts)
    rank = (int(upto[-1]) - 1) * (np.asarray(percents) / 100)
    lower = np.floor(rank)
    part = rank - lower
    below = values[np.searchsorted(upto, lower, side="right")].astype(np.float64)
    above = values[np.searchsorted(upto, np.ceil(rank), side="right")].astype(np.float64)
    step = above - below  # the two forms below are how numpy keeps an interpolation monotonic
    result: Floats = np.where(part >= 0.5, above - step * (1 - part), below + step * part)
    return [float(value) for value in result]


def distribution(name: str, values: NDArray[Any], counts: Ints | None = None) -> dict[str, float | None]:
    """Statistics in ms of a population of durations in ns (`counts` as in `weighted_percentiles`), keyed `p50_ttft_ms`.

    `std` is that of the population. All None when the population is empty.
    """
    if counts is not None and not counts.all():
        values, counts = values[counts > 0], counts[counts > 0]
    if not len(values):
        return {f"{statistic}_{name}_ms": None for statistic in STATISTICS}
    mean = float(np.average(values, weights=counts))
    std = math.sqrt(float(np.average((values - mean) ** 2, weights=counts)))
    if counts is None:
        percentiles = np.percentile(values, PERCENTILES).tolist()
    else:
        percentiles = weighted_percentiles(values, counts)
    results = (mean, percentiles[PERCENTILES.index(50)], std, *percentiles)
    return {f"{statistic}_{name}_ms": result / 1e6 for statistic, result in zip(STATISTICS, results, strict=True)}


def latencies(arrival_ns: Ints, first_token_ns: Ints, finish_ns: Ints, output_tokens: Ints) -> dict[str, Floats]:
    """TTFT, TPOT and E2EL (ns, keys `ttft`, `tpot`, `e2el`) of finished requests, one entry a request.

    TPOT is NaN for requests of one token, which have no gap between tokens.
    """
    many = output_tokens > 1
    tpot = np.full(len(output_tokens), np.nan)
    np.divide(finish_ns - first_token_ns, output_tokens - 1, out=tpot, where=many)
    return {
        "ttft": (first_token_ns - arrival_ns).astype(np.float64),
        "tpot": tpot,
        "e2el": (finish_ns - arrival_ns).astype(np.float64),
    }


def duration_ns(run: Run) -> int:
    """From the first arrival to the last end of a request; 0 when none ended."""
    ended = run.ints("finish_ns")
    ended = ended[ended >= 0]
    return int(ended.max() - run.ints("arrival_ns").min()) if len(ended) else 0


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _slo(run: Run, of_finished: dict[str, Floats], duration_s: float) -> dict[str, Any]:
    """Goodput, and the share of all requests that met every limit and each of them (one that failed meets none)."""
    limits = {name: limit for name in of_finished if (limit := (run.slo or {}).get(f"{name}_ns")) is not None}
    if not limits:
        return {}
    met = {name: ~(of_finished[name] > limit) for name, limit in limits.items()}  # a TPOT of NaN meets every limit
    good = int(np.logical_and.reduce(list(met.values())).sum())
    return {
        "request_goodput": _ratio(good, duration_s),
        "slo": {
            **{f"{name}_ms": limit / 1e6 for name, limit in limits.items()},
            **{f"{name}_attainment": _ratio(int(mask.sum()), len(run)) for name, mask in met.items()},
            "attainment": _ratio(good, len(run)),
        },
    }


def _peak_kv_usage(run: Run) -> float | None:
    """Largest share of an engine's KV blocks in use at any step."""
    total, most = np.asarray(run.kv_blocks_total, dtype=np.float64), np.zeros(len(run.kv_blocks_total), np.int64)
    engine = run.steps["engine"]
    np.maximum.at(most, engine, run.steps["kv_blocks_used"])
    ran = (np.bincount(engine, minlength=len(total)) > 0) & (total > 0)
    return float((most[ran] / total[ran]).max()) if ran.any() else None


def _provenance(run: Run) -> dict[str, float | None]:
    """Shares of the priced time; `assumed` is a part of `analytic`."""
    total = sum(run.priced_ns.values())
    shares = {source: _ratio(run.priced_ns.get(source, 0), total) for source in PRICED}
    return {**shares, "assumed": _ratio(run.assumed_ns, total)}


def summarize(run: Run) -> dict[str, Any]:
    """The content of `summary.json`: plain numbers, strings and None, ready for `json.dumps(..., allow_nan=False)`.

    Latencies and token totals are over finished requests. What cannot be computed (a latency when nothing finished, a
    rate over no time) is None.
    """
    finished = run.has_status("finished")
    columns = ("arrival_ns", "first_token_ns", "finish_ns", "output_tokens")
    of_finished = latencies(*(run.ints(column)[finished] for column in columns))
    completed, duration_s = int(finished.sum()), duration_ns(run) / 1e9
    inputs, outputs = (int(run.ints(f"{side}_tokens")[finished].sum()) for side in ("input", "output"))
    tpot = of_finished["tpot"]
    statistics = {
        **distribution("ttft", of_finished["ttft"]),
        **distribution("tpot", tpot[~np.isnan(tpot)]),
        **distribution("itl", *run.itl),
        **distribution("e2el", of_finished["e2el"]),
    }
    return {
        "completed": completed,
        "failed": int(run.has_status("failed").sum()),
        "aborted": int(run.has_status("aborted").sum()),
        "partial": run.partial,
        "duration_s": duration_s,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": _ratio(completed, duration_s),
        "output_throughput": _ratio(outputs, duration_s),
        "total_token_throughput": _ratio(inputs + outputs, duration_s),
        **statistics,
        "interval": intervals(run, of_finished, statistics) if run.step_error else None,
        **_slo(run, of_finished, duration_s),
        **session_metrics(run, duration_s),
        **pool_metrics(run),
        "preemptions": int(run.ints("preemptions").sum()),
        "prefix_cache_hit_rate": _ratio(run.prefix_hits, run.prefix_queries),
        "peak_kv_usage": _peak_kv_usage(run),
        "kv_blocks_total": [int(blocks) for blocks in run.kv_blocks_total],
        "provenance": _provenance(run),
        "saturation": saturation(run),
        "simulation": {
            "wall_s": run.wall_s,
            "cpu_s": run.cpu_s,
            "steps": int(run.steps["steps"].sum()),
            "events": run.events,
        },
        "seed": run.seed,
        "versions": dict(run.versions),
        "notes": list(run.notes),
    }
