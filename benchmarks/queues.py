"""Compare simulated waits with what queueing theory knows exactly.

    python benchmarks/queues.py [--requests 1000000] [--load 0.5 0.8 0.95]

An engine that runs one request a step, with a linear law and one-token requests, is a queue with one server: M/D/1
for prompts of one length, M/M/1 for exponential ones, M/G/1 for any. A pool of them in turn is M/D/c. For each the
table has the mean wait of the simulation, its standard error (100 batches), what the formula says for the very
distribution of whole numbers that was drawn from, and whether every single wait equals that of the recursion for such
queues (Lindley; Kiefer and Wolfowitz) on the same arrivals, to the nanosecond.

Waits of neighbours hang together the more the higher the load, so that at 0.95 a million requests pin the mean only to
some 2 to 4 %. The last column is the recursion over 200 times as many requests, drawn afresh.
"""

from __future__ import annotations

import argparse
import heapq
import math
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from servetwin.scenario.load import from_data
from servetwin.simulation import simulate

BASE_NS, TOKEN_NS = 1_000, 10_000
MEAN_TOKENS = 1000
LONGER = 200
"""How many times as many requests the recursion is carried on for."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    name: str
    lengths: NDArray[np.int64]
    """prompt lengths, all equally likely"""
    tokens: Any
    """the same, as a scenario says it"""
    servers: int = 1


def cases(folder: Path) -> Iterable[Case]:
    fixed = np.array([MEAN_TOKENS])
    yield Case("M/D/1", fixed, MEAN_TOKENS)
    quantiles = (np.arange(20_000) + 0.5) / 20_000
    exponential = np.maximum(2, np.rint(-MEAN_TOKENS * np.log1p(-quantiles))).astype(np.int64)
    (folder / "exponential.txt").write_text("\n".join(map(str, exponential)))
    yield Case("M/M/1", exponential, {"distribution": "empirical", "file": str(folder / "exponential.txt")})
    uniform = {"distribution": "uniform", "min": 2, "max": 2 * MEAN_TOKENS - 2}
    yield Case("M/G/1 uniform", np.arange(2, 2 * MEAN_TOKENS - 1), uniform)
    bursts = np.array([100] * 9 + [9100])
    (folder / "bursts.txt").write_text("\n".join(map(str, bursts)))
    yield Case("M/G/1 nine short, one long", bursts, {"distribution": "empirical", "file": str(folder / "bursts.txt")})
    yield Case("M/D/4", fixed, MEAN_TOKENS, servers=4)


def expected_wait(case: Case, rate: float) -> float:
    """Mean wait in ns. One server: Pollaczek and Khinchine, W = lambda E[S^2] / (2 (1 - rho)). Several, of equal
    service times D: Crommelin's equations for the number present, which D later is what is left of it and a Poisson
    number."""
    service = BASE_NS + TOKEN_NS * case.lengths.astype(float)
    a_ns = rate / 1e9
    if case.servers == 1:
        return float(a_ns * np.mean(service**2) / (2 * (1 - a_ns * service.mean())))
    return crommelin(a_ns * service[0], case.servers) / a_ns


def crommelin(offered: float, servers: int, most: int = 1500) -> float:
    """Mean number waiting in M/D/c with `offered` = lambda D."""
    log_factorials = np.array([math.lgamma(k + 1) for k in range(most)])
    arriving = np.exp(np.arange(most) * math.log(offered) - offered - log_factorials)
    step = np.zeros((most, most))
    for present in range(most):
        left = max(0, present - servers)
        step[left:, present] = arriving[: most - left]
    step[-1] += 1 - step.sum(axis=0)
    system = np.vstack([(step - np.eye(most))[:-1], np.ones(most)])
    chances = np.linalg.solve(system, np.eye(most)[-1])
    return float(np.maximum(0, np.arange(most) - servers) @ chances)


def recursion(gaps: Iterable[int], service: Iterable[int], servers: int) -> NDArray[np.int64]:
    """The wait of each request: whoever comes is served by the server that is free first."""
    free, found, now = [0] * servers, [], 0
    for gap, served in zip(gaps, service, strict=True):
        now += gap
        start = max(now, heapq.heappop(free))
        heapq.heappush(free, start + served)
        found.append(start - now)
    return np.array(found)


def long_run(case: Case, rate: float, requests: int, random: np.random.Generator) -> float:
    """Mean wait by Lindley's recursion over requests drawn afresh. In turn, a server gets every request whose number it
    divides: the gaps that it sees are sums of as many exponential ones."""
    total, chunk, last = 0.0, 1_000_000, 0.0
    rounds = max(1, requests // chunk)
    for _ in range(rounds):
        gaps = random.gamma(case.servers, 1e9 / rate, chunk)
        service = BASE_NS + TOKEN_NS * random.choice(case.lengths, chunk).astype(float)
        path = last + np.concatenate([[0.0], np.cumsum(service - gaps)])
        waits = path - np.minimum(0, np.minimum.accumulate(path))
        total, last = total + float(waits[:-1].sum()), float(waits[-1])
    return total / (rounds * chunk)


def simulated(case: Case, rate: float, requests: int) -> tuple[NDArray[np.int64], bool]:
    """The waits, and whether they are those of the recursion."""
    data = {
        "model": "meta-llama/Llama-3.1-8B",
        "workload": {
            "arrivals": {"process": "poisson", "rate": rate},
            "requests": requests,
            "input_tokens": case.tokens,
            "output_tokens": 1,
        },
        "pools": [
            {
                "device": "h100_sxm",
                "replicas": case.servers,
                "engine": {
                    "max_num_seqs": 1,
                    "max_num_batched_tokens": 131072,
                    "async_scheduling": False,
                    "enable_prefix_caching": False,
                },
            }
        ],
        "routing": {"policy": "round_robin"},
        "timing": {"source": "linear", "base_ns": BASE_NS, "per_prefill_token_ns": TOKEN_NS},
    }
    run = simulate(from_data(data, None, Path()))
    arrivals = run.ints("arrival_ns")
    service = BASE_NS + TOKEN_NS * run.ints("input_tokens")
    waits = run.ints("finish_ns") - arrivals - service
    exact = recursion(np.diff(arrivals, prepend=0).tolist(), service.tolist(), case.servers)
    return waits, bool((waits == exact).all())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--load", type=float, nargs="+", default=[0.5, 0.8, 0.95])
    args = parser.parse_args()
    print(f"{'queue':27s} load  formula ms  simulated  off %  error %  exact  {LONGER} times as long, off %  CPU s")
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(Path(folder)):
            for load in args.load:
                began = time.process_time()
                mean_ns = BASE_NS + TOKEN_NS * float(case.lengths.mean())
                rate = load * case.servers * 1e9 / mean_ns
                waits, exact = simulated(case, rate, args.requests)
                expected = expected_wait(case, rate)
                off, exactly = 100 * (waits.mean() / expected - 1), "yes" if exact else "NO"
                batches = waits[: len(waits) // 100 * 100].reshape(100, -1).mean(axis=1)
                error = batches.std(ddof=1) / 10
                longer = long_run(case, rate, LONGER * args.requests, np.random.default_rng(1))
                print(
                    f"{case.name:27s} {load:4.2f}  {expected / 1e6:10.4f}  {waits.mean() / 1e6:9.4f}  "
                    f"{off:+5.2f}  {100 * error / expected:7.2f}  {exactly:>5s}  {100 * (longer / expected - 1):+27.2f}"
                    f"  {time.process_time() - began:5.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
