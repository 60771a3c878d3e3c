"""Intervals beside the metrics: how sure a run is of its latencies, as far as its step times go.

Were every step longer by a share e, a request's times would be longer by e times its *exposure*: the time that it
spends
on steps, its own and those of the requests before it in a queue that never empties. A request that is taken up at
once is
exposed for as long as it is in the system. One that arrives while others wait is exposed since that queue began to
form,
because every step since then has pushed it back (infinitesimal perturbation analysis of a busy period: Ho and Cao,
Perturbation Analysis of Discrete Event Dynamic Systems, 1991). In a closed loop clients wait for answers, so
arrivals move with the steps and a request is exposed only while it is in the system.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from servetwin.results.run import Ints, Run

LEVEL = 0.9
DEVIATIONS = 1.6449
"""Standard deviations on either side that hold 90 % of a normal variable."""


def intervals(
    run: Run, latencies: dict[str, np.ndarray[Any, Any]], statistics: dict[str, float | None]
) -> dict[str, Any]:
    """`{"level": 0.9, "mean_ttft_ms": [low, high], "p99_ttft_ms": ...}` for the mean and the 99th percentile of each
    latency. `latencies` are those of the finished requests (ns), `statistics` the summary's values (ms).

    TTFT takes the error of steps with prefills, the other latencies that of all steps, weighted by their time.
    """
    result: dict[str, Any] = {"level": LEVEL}
    prefill, overall = (DEVIATIONS * run.step_error.get(kind, 0.0) for kind in ("prefill", "overall"))
    exposed = _exposure(run)
    for name in ("ttft", "tpot", "itl", "e2el"):
        for statistic in ("mean", "p99"):
            key = f"{statistic}_{name}_ms"
            value = statistics[key]
            if value is None:
                result[key] = None
                continue
            reach = prefill if name == "ttft" else overall
            if name in ("tpot", "itl") or not len(exposed):
                low, high = value * (1 - reach), value * (1 + reach)
            else:
                # Exposure of the first token; that of the end is longer by the time in between.
                more = exposed if name == "ttft" else exposed + latencies["e2el"] - latencies["ttft"]
                low, high = (_statistic(statistic, latencies[name] + sign * reach * more) for sign in (-1, 1))
            result[key] = [max(0.0, low), high]
    return result


def _statistic(statistic: str, values: np.ndarray[Any, Any]) -> float:
    value = np.mean(values) if statistic == "mean" else np.percentile(values, 99)
    return float(value) / 1e6


def _exposure(run: Run) -> np.ndarray[Any, Any]:
    """Exposure (ns) of the first token of each finished request."""
    done = run.has_status("finished")
    arrival, first, engine = (run.ints(name)[done] for name in ("arrival_ns", "first_token_ns", "engine"))
    start = arrival.copy()
    if run.concurrency is None:
        begin, waiting = run.steps["start_ns"], run.steps["waiting"] > 0
        numbers = np.unique(engine)
        firsts, ends = (np.searchsorted(run.steps["engine"], numbers, side=side) for side in ("left", "right"))
        for number, first_step, end in zip(numbers, firsts, ends, strict=True):
            mine, steps = engine == number, slice(first_step, end)
            start[mine] = np.minimum(arrival[mine], _queue_began(begin[steps], waiting[steps], arrival[mine]))
    return (first - start).astype(np.float64)


def _queue_began(begin: Ints, waiting: np.ndarray[Any, Any], moments: Ints) -> Ints:
    """For each moment: when the queue that stood then began to form; the moment itself when nobody waited.

    Of one engine: the start of each step, and whether somebody waited.
    """
    if not len(begin):
        return moments
    # Start of the latest run of steps with somebody waiting, at each step.
    opens = waiting & ~np.concatenate(([False], waiting[:-1]))
    began = begin[np.maximum.accumulate(np.where(opens, np.arange(len(begin)), 0))]
    at = np.searchsorted(begin, moments, side="right") - 1
    standing = (at >= 0) & waiting[np.maximum(at, 0)]
    return np.where(standing, began[np.maximum(at, 0)], moments)
