"""Small runs built by hand: one queue in front of one server, without the simulator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from servetwin.results.run import STEP_COLUMNS, Run

MakeRun = Callable[..., Run]


def queue_run(arrival_ns: Any, service_ns: Any, outputs: Any = 8, **fields: Any) -> Run:
    """First come, first served by one server; the first token comes after half of the service."""
    arrival = np.asarray(arrival_ns, dtype=np.int64)
    n = len(arrival)
    service = np.broadcast_to(np.asarray(service_ns, dtype=np.int64), n)
    output = np.broadcast_to(np.asarray(outputs, dtype=np.int64), n).copy()
    scheduled, finish, free = np.zeros(n, np.int64), np.zeros(n, np.int64), 0
    for request in np.argsort(arrival, kind="stable"):
        scheduled[request] = max(free, arrival[request])
        free = finish[request] = scheduled[request] + service[request]
    first = scheduled + service // 2
    none = np.full(n, -1)
    requests = {
        "request": np.arange(n), "session": none, "pool": ["default"] * n, "engine": np.zeros(n, np.int64),
        "decode_engine": none, "status": ["finished"] * n, "reason": [""] * n, "arrival_ns": arrival,
        "scheduled_ns": scheduled, "first_token_ns": first, "finish_ns": finish,
        "input_tokens": np.full(n, 100), "output_tokens": output, "cached_tokens": np.zeros(n, np.int64),
        "preemptions": np.zeros(n, np.int64),
    }  # fmt: skip
    steps = {name: np.zeros(n, np.int64) for name in STEP_COLUMNS}
    order = np.argsort(scheduled, kind="stable")
    steps |= {
        "step": np.arange(n), "steps": np.ones(n, np.int64), "start_ns": scheduled[order], "end_ns": finish[order],
        "kv_blocks_used": np.arange(n) % 50,
    }  # fmt: skip
    defaults: dict[str, Any] = {
        "scenario_yaml": "model: tiny\n",
        "seed": 0,
        "itl": (np.array([3_000_000, 1_000_000]), np.array([2, 3])),
        "kv_blocks_total": [100],
        "priced_ns": {"measured": 3, "analytic": 1},
        "assumed_ns": 1,
        "events": 2 * n,
    }
    return Run(requests=requests, steps=steps, **{**defaults, **fields})


@pytest.fixture(scope="session")
def make_run() -> MakeRun:
    return queue_run
