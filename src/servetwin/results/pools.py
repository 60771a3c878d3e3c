"""What each pool of a cluster did, where there are several."""

from __future__ import annotations

from typing import Any

import numpy as np

from servetwin.results.run import Ints, Run

PERCENTILES = {"median": 50, "p99": 99}


def pool_metrics(run: Run) -> dict[str, Any]:
    """Key `pools` of the summary: by name, the pool's engines, how its requests ended, latencies in ms of those that
    finished, tokens/s over the whole run, and of its engines the mean share of the run in which a step was under way
    (`busy`, dummy batches included) and the largest KV usage. Empty with a single pool.
    """
    names = list(dict.fromkeys(run.engine_pools))
    if len(names) < 2:
        return {}
    ended = run.ints("finish_ns")
    seconds = (int(ended.max()) - int(run.ints("arrival_ns").min())) / 1e9 if len(ended) else 0.0
    of_request, of_engine = np.array(run.requests["pool"], np.str_), np.array(run.engine_pools, np.str_)
    blocks = np.asarray(run.kv_blocks_total, np.float64)
    return {"pools": {name: _pool(run, of_request == name, of_engine == name, blocks, seconds) for name in names}}


def _pool(run: Run, mine: Any, engines: Any, blocks: Any, seconds: float) -> dict[str, Any]:
    finished = mine & run.has_status("finished")
    arrival, first, finish = (run.ints(name)[finished] for name in ("arrival_ns", "first_token_ns", "finish_ns"))
    tokens = run.ints("output_tokens")[finished]
    many = tokens > 1
    found = {
        "ttft": first - arrival,
        "tpot": (finish - first)[many] / (tokens[many] - 1),
        "e2el": finish - arrival,
    }
    latencies: dict[str, float | None] = {}
    for name, values in found.items():
        latencies[f"mean_{name}_ms"] = float(values.mean()) / 1e6 if len(values) else None
        for label, percent in PERCENTILES.items():
            latencies[f"{label}_{name}_ms"] = float(np.percentile(values, percent)) / 1e6 if len(values) else None
    ran = engines[run.steps["engine"]]
    busy = _under_way(run.steps["engine"][ran], run.steps["start_ns"][ran], run.steps["end_ns"][ran]) / 1e9
    used = run.steps["kv_blocks_used"][ran] / blocks[run.steps["engine"][ran]]
    return {
        "engines": int(engines.sum()),
        "completed": int(finished.sum()),
        "failed": int((mine & run.has_status("failed")).sum()),
        "aborted": int((mine & run.has_status("aborted")).sum()),
        **latencies,
        "output_throughput": int(tokens.sum()) / seconds if seconds else None,
        "busy": busy / seconds / int(engines.sum()) if seconds else None,
        "peak_kv_usage": float(used.max()) if len(used) else 0.0,
    }


def _under_way(engine: Ints, start: Ints, end: Ints) -> int:
    """Time (ns), summed over engines, in which at least one step was under way: steps of a pipeline overlap."""
    total = 0
    for number in np.unique(engine):
        mine = engine == number
        order = np.argsort(start[mine], kind="stable")
        begins, ends = start[mine][order], end[mine][order]
        before = np.maximum.accumulate(np.concatenate([begins[:1], ends[:-1]]))
        total += int(np.maximum(0, ends - np.maximum(begins, before)).sum())
    return total
