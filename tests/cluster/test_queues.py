"""An engine that serves one request at a time is a queue with one server, a pool of them one with many: what queueing
theory knows exactly must come out.

`benchmarks/queues.py` does the same over millions of requests.
"""

from __future__ import annotations

import heapq
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from servetwin.scenario.load import from_data
from servetwin.simulation import simulate

BASE_NS, TOKEN_NS = 1_000_000, 10_000
"""Time of a step, and of each prompt token in it (prompts have two tokens or more: a single one counts as a decode)."""
Waits = NDArray[np.int64]


def waits(requests: int, tokens: object, rate: float, servers: int = 1, seed: int = 0) -> tuple[Waits, Waits, Waits]:
    """Arrivals, service times and waits (all ns) of a Poisson stream of one-token requests, one a step."""
    data = {
        "model": "meta-llama/Llama-3.1-8B",
        "workload": {
            "arrivals": {"process": "poisson", "rate": rate},
            "requests": requests,
            "input_tokens": tokens,
            "output_tokens": 1,
        },
        "pools": [
            {"device": "h100_sxm", "replicas": servers, "engine": {"max_num_seqs": 1, "async_scheduling": False}}
        ],
        "routing": {"policy": "round_robin"},
        "timing": {"source": "linear", "base_ns": BASE_NS, "per_prefill_token_ns": TOKEN_NS},
        "seed": seed,
    }
    run = simulate(from_data(data, None, Path()))
    assert run.has_status("finished").all()
    service = BASE_NS + TOKEN_NS * run.ints("input_tokens")
    return run.ints("arrival_ns"), service, run.ints("finish_ns") - run.ints("arrival_ns") - service


def one_server(arrivals: Waits, service: Waits) -> Waits:
    """Lindley's recursion: W' = max(0, W + S - A)."""
    found, wait = [0], 0
    for gap, served in zip(np.diff(arrivals).tolist(), service.tolist(), strict=False):
        wait = max(0, wait + served - gap)
        found.append(wait)
    return np.array(found)


def many_servers(arrivals: Waits, service: Waits, servers: int) -> Waits:
    """Kiefer and Wolfowitz: whoever comes is served by the server that is free first."""
    free, found = [0] * servers, []
    for arrival, served in zip(arrivals.tolist(), service.tolist(), strict=True):
        start = max(arrival, heapq.heappop(free))
        heapq.heappush(free, start + served)
        found.append(start - arrival)
    return np.array(found)


@pytest.mark.parametrize("tokens", [100, {"distribution": "uniform", "min": 2, "max": 400}])
@pytest.mark.parametrize("load", [0.5, 0.95])
def test_one_engine_is_a_queue_with_one_server_to_the_nanosecond(tokens: object, load: float) -> None:
    mean_ns = BASE_NS + TOKEN_NS * (100 if tokens == 100 else 201)
    arrivals, service, found = waits(3000, tokens, load * 1e9 / mean_ns)
    assert found.max() > 0
    np.testing.assert_array_equal(found, one_server(arrivals, service))


def test_a_pool_in_turn_is_a_queue_with_many_servers_where_all_are_served_alike() -> None:
    arrivals, service, found = waits(3000, 100, 0.9 * 4 * 1e9 / (BASE_NS + 100 * TOKEN_NS), servers=4)
    assert found.max() > 0
    np.testing.assert_array_equal(found, many_servers(arrivals, service, 4))


def test_the_mean_wait_is_that_of_the_formula() -> None:
    """M/D/1 at half load: W = rho S / (2 (1 - rho)). The standard error comes from 40 batches of the run."""
    load, service_ns = 0.5, BASE_NS + 100 * TOKEN_NS
    found = waits(20_000, 100, load * 1e9 / service_ns, seed=1)[2]
    batches = found.reshape(40, -1).mean(axis=1)
    error = batches.std(ddof=1) / math.sqrt(len(batches))
    expected = load * service_ns / (2 * (1 - load))
    assert error < 0.05 * expected
    assert abs(found.mean() - expected) < 3 * error
