"""Metrics are what numpy says of the same populations."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servetwin.results.metrics import PERCENTILES, distribution, summarize, weighted_percentiles
from servetwin.results.run import Run

MakeRun = Callable[..., Run]
MS = 1_000_000

weighted = st.lists(st.tuples(st.integers(0, 10**12), st.integers(1, 40)), min_size=1, max_size=30)


@given(weighted)
def test_weighted_percentiles_equal_numpy_on_the_expanded_population(pairs: list[tuple[int, int]]) -> None:
    values, counts = (np.array(column, dtype=np.int64) for column in zip(*pairs, strict=True))
    expected = np.percentile(np.repeat(values, counts), PERCENTILES).tolist()
    assert weighted_percentiles(values, counts) == expected


@given(weighted)
def test_a_weighted_distribution_is_that_of_the_expanded_population(pairs: list[tuple[int, int]]) -> None:
    values, counts = (np.array(column, dtype=np.int64) for column in zip(*pairs, strict=True))
    expanded = np.repeat(values, counts) / 1e6
    result = distribution("itl", values, counts)
    assert result["mean_itl_ms"] == pytest.approx(expanded.mean(), rel=1e-12)
    assert result["std_itl_ms"] == pytest.approx(expanded.std(), rel=1e-9, abs=1e-6)
    assert result["median_itl_ms"] == result["p50_itl_ms"]


def test_gaps_that_never_occur_do_not_count() -> None:
    result = distribution("itl", np.array([5 * MS, 9 * MS]), np.array([1, 0]))
    assert result["mean_itl_ms"] == result["p99_itl_ms"] == 5
    assert distribution("itl", np.array([5]), np.array([0]))["mean_itl_ms"] is None


@given(seed=st.integers(0, 10_000), n=st.integers(1, 60))
def test_latencies_and_rates_equal_numpy(make_run: MakeRun, seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    run = make_run(rng.integers(0, 10**10, n), rng.integers(1, 10**9, n), rng.integers(1, 5, n))
    summary = summarize(run)
    arrival, first, finish, output = (
        run.ints(name) for name in ("arrival_ns", "first_token_ns", "finish_ns", "output_tokens")
    )
    many = output > 1
    populations = {
        "ttft": (first - arrival) / 1e6,
        "tpot": (finish - first)[many] / (output - 1)[many] / 1e6,
        "e2el": (finish - arrival) / 1e6,
    }
    for name, population in populations.items():
        if not len(population):
            assert summary[f"mean_{name}_ms"] is None
            continue
        assert summary[f"mean_{name}_ms"] == pytest.approx(population.mean())
        assert summary[f"median_{name}_ms"] == pytest.approx(np.median(population))
        assert summary[f"std_{name}_ms"] == pytest.approx(population.std(), abs=1e-6)
        for p in PERCENTILES:
            assert summary[f"p{p}_{name}_ms"] == pytest.approx(np.percentile(population, p))
    duration = (finish.max() - arrival.min()) / 1e9
    assert summary["duration_s"] == pytest.approx(duration)
    assert summary["request_throughput"] == pytest.approx(n / duration)
    assert summary["output_throughput"] == pytest.approx(output.sum() / duration)
    assert summary["total_token_throughput"] == pytest.approx((output.sum() + 100 * n) / duration)


def test_the_promised_keys_are_there(make_run: MakeRun) -> None:
    summary = summarize(make_run([0, 5], 10))
    latencies = {
        f"{statistic}_{name}_ms"
        for statistic in ("mean", "median", "std", "p50", "p75", "p90", "p95", "p99")
        for name in ("ttft", "tpot", "itl", "e2el")
    }
    promised = {
        "completed", "failed", "duration_s", "total_input_tokens", "total_output_tokens", "request_throughput",
        "output_throughput", "total_token_throughput", "preemptions", "prefix_cache_hit_rate", "peak_kv_usage",
        "simulation", *latencies,
    }  # fmt: skip
    assert promised <= set(summary)
    assert set(summary["simulation"]) == {"wall_s", "cpu_s", "steps", "events"}


def test_nothing_finished_gives_nulls_and_never_nan(make_run: MakeRun) -> None:
    run = make_run([0, 5], 10, itl=(np.array([], np.int64), np.array([], np.int64)), priced_ns={}, assumed_ns=0)
    never = np.full(2, -1)
    requests = dict(run.requests) | {"status": ["failed"] * 2, "reason": ["prompt longer than the KV cache"] * 2}
    requests |= {"scheduled_ns": never, "first_token_ns": never, "finish_ns": never}
    summary = json.loads(json.dumps(summarize(replace(run, requests=requests)), allow_nan=False))
    assert (summary["completed"], summary["failed"], summary["duration_s"]) == (0, 2, 0)
    assert summary["mean_ttft_ms"] is summary["p99_itl_ms"] is summary["request_throughput"] is None
    assert summary["provenance"]["measured"] is None


def test_an_empty_workload_is_summarised(make_run: MakeRun) -> None:
    summary = summarize(make_run([], 10))
    assert summary["completed"] == 0 and summary["peak_kv_usage"] is None
    json.dumps(summary, allow_nan=False)


def test_failed_requests_are_not_in_the_latencies(make_run: MakeRun) -> None:
    run = make_run([0, 0, 0], 10 * MS)
    failed = replace(run, requests=dict(run.requests) | {"status": ["finished", "failed", "aborted"]})
    summary = summarize(failed)
    assert (summary["completed"], summary["failed"], summary["aborted"]) == (1, 1, 1)
    assert summary["mean_e2el_ms"] == 10 and summary["total_input_tokens"] == 100
    assert summary["duration_s"] == 0.03  # the others took the server's time all the same


def test_one_token_requests_have_no_tpot(make_run: MakeRun) -> None:
    summary = summarize(make_run([0, 0], 10 * MS, [1, 6]))
    assert summary["mean_tpot_ms"] == summary["p99_tpot_ms"] == 1


def test_goodput_counts_requests_that_meet_every_limit(make_run: MakeRun) -> None:
    # served one after another: E2EL 10, 20, 30, 40 ms; TTFT 5, 15, 25, 35 ms; TPOT 1 ms, none for the first
    slo = {"ttft_ns": 15 * MS, "tpot_ns": MS, "e2el_ns": None}
    summary = summarize(make_run([0] * 4, 10 * MS, [1, 6, 6, 6], slo=slo))
    assert summary["request_goodput"] == pytest.approx(2 / 0.04)
    assert summary["slo"] == {
        "ttft_ms": 15, "tpot_ms": 1, "ttft_attainment": 0.5, "tpot_attainment": 1, "attainment": 0.5,
    }  # fmt: skip
    assert "request_goodput" not in summarize(make_run([0], 10, slo={"ttft_ns": None}))


def test_a_failed_request_meets_no_limit(make_run: MakeRun) -> None:
    run = make_run([0, 0], 10 * MS, slo={"e2el_ns": 10**12})
    failed = replace(run, requests=dict(run.requests) | {"status": ["finished", "failed"]})
    assert summarize(failed)["slo"]["attainment"] == 0.5


def test_shares_of_the_priced_time_add_up(make_run: MakeRun) -> None:
    provenance = summarize(make_run([0, 5], 10, priced_ns={"measured": 50, "analytic": 30, "interpolated": 20}))[
        "provenance"
    ]
    assert provenance == {"measured": 0.5, "interpolated": 0.2, "extrapolated": 0, "analytic": 0.3, "assumed": 0.01}


def test_peak_kv_usage_is_that_of_the_fullest_engine(make_run: MakeRun) -> None:
    run = make_run([0, 5, 9], 10, kv_blocks_total=[1000, 10, 0])
    steps = dict(run.steps) | {"engine": np.array([0, 1, 2]), "kv_blocks_used": np.array([100, 9, 0])}
    assert summarize(replace(run, steps=steps))["peak_kv_usage"] == 0.9
