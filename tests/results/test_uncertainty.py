"""Intervals: what a run would say if every step were a little longer, told from the one run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servetwin.results.metrics import latencies, summarize
from servetwin.results.run import Run
from servetwin.results.uncertainty import DEVIATIONS
from servetwin.scenario.load import from_data
from servetwin.simulation import simulate


def run_of(rate: float, stretch: float = 1.0, **engine: Any) -> Run:
    """A linear law whose every step is `stretch` times as long."""
    law = {"base_ns": 5_000_000, "per_prefill_token_ns": 20_000, "per_decode_seq_ns": 50_000}
    data = {
        "model": "meta-llama/Llama-3.1-8B",
        "workload": {
            "arrivals": {"process": "poisson", "rate": rate},
            "requests": 600,
            "input_tokens": {"distribution": "uniform", "min": 100, "max": 900},
            "output_tokens": {"distribution": "uniform", "min": 20, "max": 200},
        },
        "timing": {"source": "linear", **{name: round(ns * stretch) for name, ns in law.items()}},
        "pools": [{"device": "h100_sxm", "engine": engine}],
    }
    return simulate(from_data(data, "test", Path()))


def with_error(run: Run, error: float) -> dict[str, Any]:
    return summarize(replace(run, step_error={"prefill": error, "overall": error}))


@pytest.mark.parametrize(
    ("rate", "engine"),
    [(4.0, {}), (60.0, {"max_num_seqs": 32}), (30.0, {"max_num_seqs": 8})],
    ids=["idle", "busy", "over"],
)
def test_an_interval_says_what_longer_steps_would_do(rate: float, engine: dict[str, Any]) -> None:
    """Steps 2 % longer move mean TTFT and E2EL by about as much as the interval of a 2 % error is wide, also where a
    queue multiplies them."""
    reach = 0.02
    summary = with_error(run_of(rate, **engine), reach / DEVIATIONS)
    longer = summarize(run_of(rate, 1 + reach, **engine))
    for name in ("ttft", "e2el", "tpot"):
        key = f"mean_{name}_ms"
        told = summary["interval"][key][1] - summary[key]
        happened = longer[key] - summary[key]
        assert told == pytest.approx(happened, rel=0.35), name


def test_without_an_error_there_is_no_interval() -> None:
    assert summarize(replace(run_of(4.0), step_error={}))["interval"] is None


def test_the_bounds_enclose_the_metric() -> None:
    summary = with_error(run_of(20.0), 0.1)
    for key, bounds in summary["interval"].items():
        if key != "level":
            assert 0 <= bounds[0] < summary[key] < bounds[1], key


def test_a_request_taken_up_at_once_is_exposed_for_its_own_time() -> None:
    run = run_of(0.2)
    summary = with_error(run, 0.1)
    columns = ("arrival_ns", "first_token_ns", "finish_ns", "output_tokens")
    ttft = latencies(*(run.ints(name) for name in columns))["ttft"]
    low, high = summary["interval"]["mean_ttft_ms"]
    assert high - low == pytest.approx(2 * 0.1 * DEVIATIONS * float(np.mean(ttft)) / 1e6, rel=1e-6)


def test_the_intervals_are_those_of_single_steps() -> None:
    workload = {"arrivals": {"process": "poisson", "rate": 5}, "requests": 60, "input_tokens": 300, "output_tokens": 90}
    data = {"model": "meta-llama/Llama-3.1-8B", "workload": workload, "pools": [{"device": "h100_sxm", "replicas": 2}]}
    scenario = from_data(data, "test", Path())
    whole = simulate(scenario)
    single = simulate(scenario, coalesce=False, record=frozenset({"steps"}))
    assert len(single.steps["steps"]) > 2 * len(whole.steps["steps"])
    assert whole.step_error == single.step_error and whole.step_error
    assert summarize(whole)["interval"] == summarize(single)["interval"]
