"""Recorded runs over several devices, from import to validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from llmservingsim_repo import QUEUED, Repo, cluster, head, instance, recorded, write_json

from servetwin.errors import InputError
from servetwin.measure.validate import validate
from servetwin.results.files import write_run
from servetwin.scenario.schema import Scenario
from servetwin.simulation import simulate

DATA_PARALLEL = {"data_parallel_size": 2, "enable_expert_parallel": True}


def recorded_run(repo: Repo, model: str, **kwargs: Any) -> Path:
    """What the bench of that project writes of a run: its settings, and when each request came and got tokens."""
    rows = recorded()
    for row, queued in zip(rows, QUEUED, strict=True):
        last = queued + 0.01 * row["output_toks"]
        row |= {"arrival_time": 1.7e9 + queued, "scheduled_ts": queued, "first_token_ts": queued + 0.01}
        row |= {"last_token_ts": last}
    return repo.record({"engine_kwargs": {"model": model} | kwargs}, rows)


def group(repo: Repo, **fields: Any) -> None:
    """A cluster file with a data-parallel group of two, as that project's file of such a run."""
    member = instance(model_name="org/mixture", hardware="RTXPRO6000", dp_group="A", **fields)
    write_json(repo.cluster, cluster([member, member]))


def replayed(repo: Repo, scenario: Scenario, bench: Path) -> Any:
    run = simulate(scenario, repo.out.parent)
    write_run(run, repo.root / "run", overwrite=False)
    report = validate(repo.root / "run", bench, None)
    assert (report.common_requests, report.mismatches) == (3, [])
    assert list(run.requests["status"]) == ["finished"] * 3
    return run


def test_tensor_parallelism(repo: Repo) -> None:
    repo.bundle("normed", "qwen3", hardware="RTXPRO6000")
    bench = recorded_run(repo, "org/normed", tensor_parallel_size=2)
    scenario = repo.load("", bench=bench, model_name="org/normed", hardware="RTXPRO6000", num_npus=2, tp_size=2)
    (pool,) = scenario.pools
    assert (pool.parallelism.tensor, pool.parallelism.data) == (2, 1)
    assert pool.link is not None and (pool.link.bandwidth, pool.link.latency) == (15.92e9, 6_600)
    assert scenario.timing.profile == "rtx_pro_6000/org__normed/bf16"
    run = replayed(repo, scenario, bench)
    assert run.priced_ns["analytic"] > 0  # the collectives, which a bundle of one rank does not hold
    assert run.priced_ns["measured"] + run.priced_ns["interpolated"] > run.priced_ns["analytic"] / 10


def test_data_and_expert_parallelism_is_written(repo: Repo) -> None:
    repo.bundle("mixture", "qwen3_moe", hardware="RTXPRO6000")
    group(repo, ep_size=2)
    scenario = repo.load("", bench=recorded_run(repo, "org/mixture", **DATA_PARALLEL))
    (pool,) = scenario.pools
    degrees = pool.parallelism
    assert (degrees.tensor, degrees.pipeline, degrees.data, degrees.expert) == (1, 1, 2, 2)
    assert scenario.routing.policy == "vllm_dp"
    assert pool.link is not None and (pool.link.bandwidth, pool.link.latency) == (15.92e9, 6_600)
    assert scenario.timing.profile == "rtx_pro_6000/org__mixture/bf16"
    assert "Requests go to data-parallel ranks as vLLM's own front end sends them." in head(repo)


@pytest.mark.parametrize(("tensor", "enabled", "expert"), [(1, True, 2), (2, True, 4), (1, False, 1), (2, False, 1)])
def test_expert_parallelism_is_that_of_the_run(repo: Repo, tensor: int, enabled: bool, expert: int) -> None:
    group(repo, tp_size=tensor)  # without ep_size
    kwargs = DATA_PARALLEL | {"tensor_parallel_size": tensor, "enable_expert_parallel": enabled}
    scenario = repo.load("", bench=recorded_run(repo, "org/mixture", **kwargs))
    assert scenario.pools[0].parallelism.expert == expert


def test_kv_blocks_of_a_run_are_those_of_all_its_ranks(repo: Repo) -> None:
    group(repo, ep_size=2)
    bench = recorded_run(repo, "org/mixture", **DATA_PARALLEL)
    meta = json.loads((bench / "meta.json").read_text()) | {"kv_cache": {"num_gpu_blocks": 5001}}
    write_json(bench / "meta.json", meta)
    assert repo.load("", bench=bench).pools[0].engine.num_gpu_blocks_override == 2500


def test_a_routing_flag_has_no_part_in_a_data_parallel_run(repo: Repo) -> None:
    group(repo, ep_size=2)
    bench = recorded_run(repo, "org/mixture", **DATA_PARALLEL)
    assert repo.load("--request-routing-policy RR", bench=bench).routing.policy == "vllm_dp"
    assert "(--request-routing-policy RR has no part in it)" in head(repo)


def test_data_and_expert_parallelism(repo: Repo) -> None:
    repo.bundle("mixture", "qwen3_moe", hardware="RTXPRO6000")
    group(repo, ep_size=2)
    bench = recorded_run(repo, "org/mixture", **DATA_PARALLEL)
    scenario = repo.load("", bench=bench)
    try:
        run = replayed(repo, scenario, bench)
    except InputError as error:
        if "data parallelism is not simulated yet" in str(error):
            pytest.skip("needs the simulation of data parallelism")
        raise
    assert set(run.requests["engine"]) <= {0, 1}
    assert run.priced_ns["measured"] + run.priced_ns["interpolated"] > 0
    assert run.priced_ns["analytic"] > 0
