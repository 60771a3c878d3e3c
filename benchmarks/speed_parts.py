"""How fast a run is, and what pricing a step costs.

    python benchmarks/speed.py [--requests 10000]

Prints CPU seconds of the same workload (Llama-3.1-8B on one H100, 512 in / 128 out, Poisson 10/s) carried out with
coalesced decode runs and step by step, their ratio (the results are bit-identical), and the cost of pricing one whole
step of Llama-3.1-70B: a mixed step whose token counts were never seen before, and a step inside a decode run.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from servetwin.scenario.load import from_data
from servetwin.scenario.resolve import resolve
from servetwin.simulation import simulate
from servetwin.timing.choose import pricing_for
from servetwin.timing.shape import StepShape


def scenario(model: str, device: str, tensor: int, requests: int, engine: dict[str, object]) -> dict[str, object]:
    return {
        "model": model,
        "workload": {
            "arrivals": {"process": "poisson", "rate": 10.0},
            "requests": requests,
            "input_tokens": 512,
            "output_tokens": 128,
        },
        "pools": [{"device": device, "parallelism": {"tensor": tensor}, "engine": engine}],
    }


def whole_runs(requests: int) -> None:
    data = from_data(scenario("meta-llama/Llama-3.1-8B", "h100_sxm", 1, requests, {}), "speed", Path())
    coalesced = simulate(data)
    single = simulate(data, coalesce=False)
    steps = int(coalesced.steps["steps"].sum())
    print(f"{requests} requests, {steps} steps")
    for name, run in (("coalesced", coalesced), ("step by step", single)):
        rates = f"{requests / run.cpu_s:8.0f} requests/s {steps / run.cpu_s:9.0f} steps/s"
        print(f"  {name:<13} {run.cpu_s:6.2f} CPU s {rates}")
    print(f"  ratio {single.cpu_s / coalesced.cpu_s:.2f}")


def step_prices(calls: int = 4000) -> None:
    engine = {"quantization": "fp8", "kv_cache_dtype": "fp8"}
    resolved = resolve(from_data(scenario("meta-llama/Llama-3.1-70B", "h200_sxm", 4, 1, engine), "speed", Path()))
    timer = pricing_for(resolved, resolved.pools[0], Path()).new_timer()
    mixed = [StepShape(1, 600 + i, 0, (600 + i) ** 2 // 2, 60, 60, 64_000 + i, 2000, 10) for i in range(calls)]
    start = time.perf_counter()
    for shape in mixed:
        timer.step_ns(shape)
    cold = (time.perf_counter() - start) / calls
    start = time.perf_counter()
    timer.run_ns(StepShape(0, 0, 0, 0, 64, 64, 64_000, 2000, 10), calls)
    amortised = (time.perf_counter() - start) / calls
    print(f"whole-step price: {1e6 * cold:.1f} us with new token counts, {1e6 * amortised:.1f} us in a decode run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    whole_runs(parser.parse_args().requests)
    step_prices()


if __name__ == "__main__":
    main()
