"""The verdict on M/D/1 queues, whose behaviour is known: stable below a load of 1, growing without bound above."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from servetwin.results.run import STEP_COLUMNS, Run
from servetwin.results.saturation import saturation

MakeRun = Callable[..., Run]
SERVICE = 10_000_000


def poisson(load: float, n: int, seed: int) -> np.ndarray:
    return np.cumsum(np.random.default_rng(seed).exponential(SERVICE / load, n)).astype(np.int64)


@pytest.mark.parametrize("load", [0.5, 0.9])
@pytest.mark.parametrize("n", [200, 2000])
def test_a_stable_queue_keeps_up(make_run: MakeRun, load: float, n: int) -> None:
    verdicts = [saturation(make_run(poisson(load, n, seed), SERVICE)) for seed in range(30)]
    assert not any(verdict["saturated"] for verdict in verdicts)


@pytest.mark.parametrize(("load", "n"), [(1.2, 3000), (2.0, 200)])
def test_an_overloaded_queue_is_saturated(make_run: MakeRun, load: float, n: int) -> None:
    for seed in range(30):
        result = saturation(make_run(poisson(load, n, seed), SERVICE))
        assert result["saturated"], result
        assert result["taken_up_rate"] == pytest.approx(1e9 / SERVICE, rel=0.02)
        assert result["verdict"].startswith("saturated: the queue grows from ")


def test_too_few_requests_to_tell_are_undecided_or_keep_up(make_run: MakeRun) -> None:
    verdicts = [saturation(make_run(poisson(1.2, 60, seed), SERVICE))["verdict"] for seed in range(20)]
    assert any(verdict.startswith("undecided: ") for verdict in verdicts)


def test_a_burst_that_is_being_worked_off_is_no_saturation(make_run: MakeRun) -> None:
    span = 1000 * SERVICE
    steady = np.arange(0, span, 2 * SERVICE)  # half load ...
    burst = np.full(250, span * 6 // 10)  # ... and 250 at once in the third quarter
    assert not saturation(make_run(np.sort(np.concatenate([steady, burst])), SERVICE))["saturated"]


def test_a_queue_that_forms_late_in_the_arrivals_is_found(make_run: MakeRun) -> None:
    first = np.arange(0, 1000 * SERVICE, 2 * SERVICE)
    then = np.arange(1000 * SERVICE, 2000 * SERVICE, SERVICE // 2)
    assert saturation(make_run(np.concatenate([first, then]), SERVICE))["saturated"]


def test_closed_loop_and_all_at_once_are_never_saturated(make_run: MakeRun) -> None:
    closed = saturation(make_run(poisson(2, 500, 0), SERVICE, concurrency=8))
    assert not closed["saturated"] and closed["verdict"].startswith("closed loop")
    at_once = saturation(make_run(np.zeros(500), SERVICE))
    assert not at_once["saturated"] and at_once["verdict"].startswith("all requests arrive at once")
    assert not saturation(make_run([], SERVICE))["saturated"]


def test_refused_requests_do_not_wait(make_run: MakeRun) -> None:
    run = make_run(np.arange(400) * SERVICE, SERVICE // 2)
    never = np.full(400, -1)
    requests = dict(run.requests) | {"status": ["failed"] * 400, "scheduled_ns": never, "finish_ns": never}
    assert not saturation(replace(run, requests=requests))["saturated"]


def test_an_engine_that_decodes_its_own_prefills_has_one_queue(make_run: MakeRun) -> None:
    run = make_run(poisson(2, 400, 0), SERVICE)
    queue = np.searchsorted(run.ints("arrival_ns"), run.steps["start_ns"], side="right") - 1 - np.arange(400)
    told_twice = replace(
        run,
        requests=dict(run.requests) | {"decode_engine": run.requests["engine"]},
        steps=dict(run.steps) | {"waiting": queue},
    )
    assert queue.max() > 100
    assert saturation(told_twice) == saturation(run)


def test_a_decode_queue_may_grow_by_more_than_the_arrivals(make_run: MakeRun) -> None:
    """Requests that were between prefill and decode at the start of the window come on top."""
    run = make_run(np.arange(400) * SERVICE, SERVICE // 2)
    steps = {name: np.append(column, 0) for name, column in run.steps.items()}
    steps["engine"][-1], steps["start_ns"][-1], steps["waiting"][-1] = 1, 399 * SERVICE, 250
    result = saturation(
        replace(run, requests=dict(run.requests) | {"decode_engine": np.ones(400, np.int64)}, steps=steps)
    )
    assert result["saturated"] and result["queue_end"] - result["queue_start"] > result["arrived"]
    assert result["taken_up_rate"] == 0


def test_a_queue_in_front_of_decode_engines_counts(make_run: MakeRun) -> None:
    run = make_run(np.arange(400) * SERVICE, SERVICE // 2)
    decode_steps = {name: np.zeros(400, np.int64) for name in STEP_COLUMNS} | {
        "engine": np.ones(400, np.int64), "start_ns": np.arange(400) * SERVICE, "waiting": np.arange(400) // 2,
    }  # fmt: skip
    steps = {name: np.concatenate([run.steps[name], decode_steps[name]]) for name in STEP_COLUMNS}
    requests = dict(run.requests) | {"decode_engine": np.ones(400, np.int64)}
    assert not saturation(run)["saturated"]
    assert saturation(replace(run, requests=requests, steps=steps))["saturated"]
