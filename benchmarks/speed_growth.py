"""How the cost of a run grows with requests, load, batch, output, replicas, context and block size.

    python benchmarks/speed_growth.py

CPU time of the event loop alone, without start-up and results: for each request, row of the step table (a step, or a
run of unchanged ones), engine step and event. Closed loops of equal requests keep in step with one another, so that
most of their steps are unchanged.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from speed import synthetic

from servetwin.cluster.loop import Cluster
from servetwin.scenario.load import from_data
from servetwin.simulation import simulate


def loop_seconds(scenario: dict[str, Any]) -> tuple[Any, float]:
    """A run, and the CPU seconds of its event loop."""
    whole, spent = Cluster.run, 0.0

    def timed(cluster: Cluster) -> None:
        nonlocal spent
        start = time.process_time()
        whole(cluster)
        spent = time.process_time() - start

    Cluster.run = timed  # type: ignore[method-assign]
    try:
        return simulate(from_data(scenario, None, Path())), spent
    finally:
        Cluster.run = whole  # type: ignore[method-assign]


def show(label: str, scenario: dict[str, Any], **engine: Any) -> None:
    scenario["pools"][0]["engine"] = engine
    run, seconds = loop_seconds(scenario)
    rows, steps = len(run.steps["steps"]), int(run.steps["steps"].sum())
    costs = [1e6 * seconds / count for count in (len(run), rows, steps, run.events)]
    batch = float(run.steps["running"].mean())
    print(f"{label:<28} {seconds:6.2f} " + "".join(f"{cost:10.1f}" for cost in costs) + f"{batch:8.0f}", flush=True)


def main() -> None:
    print(f"{'':<28} {'loop s':>6} {'us/request':>9} {'us/row':>9} {'us/step':>9} {'us/event':>9} {'batch':>7}")
    show("(warming up)", synthetic(500, 512, 128, process="poisson", rate=10))
    for requests in (5_000, 10_000, 20_000):
        show(f"{requests} requests, 10/s", synthetic(requests, 512, 128, process="poisson", rate=10))
    for rate in (5, 20, 40):
        show(f"5000 requests, {rate}/s", synthetic(5_000, 512, 128, process="poisson", rate=rate))
    for batch in (16, 64, 256):
        show(f"closed loop of {batch}", synthetic(4_000, 512, 128, process="closed_loop", concurrency=batch))
    for output in (128, 256, 512):
        show(f"closed 64, {output} outputs", synthetic(3_000, 512, output, process="closed_loop", concurrency=64))
    for replicas in (4, 16, 64):
        show(
            f"{replicas} replicas, 10/s each",
            synthetic(5_000, 512, 128, replicas, process="poisson", rate=10 * replicas),
        )
    for prompt in (128, 512, 2048, 8192):
        show(f"closed 32, {prompt} inputs", synthetic(2_000, prompt, 128, process="closed_loop", concurrency=32))
    for size in (16, 32, 64):
        show(f"blocks of {size} tokens", synthetic(5_000, 512, 128, process="poisson", rate=10), block_size=size)


if __name__ == "__main__":
    main()
