"""What a cluster file, flags and a recorded run of LLMServingSim become in a scenario."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from llmservingsim_repo import DENSE, Repo, cluster, write_json, write_lines

from servetwin.catalog import profiles
from servetwin.interop.llmservingsim import import_cluster
from servetwin.scenario.load import load
from servetwin.scenario.schema import Scenario, TraceWorkload
from servetwin.simulation import simulate
from servetwin.workload import RequestTable, build


def requests_of(scenario: Scenario, repo: Repo) -> RequestTable:
    return build(scenario.workload, 0, repo.out.parent)


def test_defaults_are_those_of_that_project(repo: Repo) -> None:
    scenario = repo.load()
    pool = scenario.pools[0]
    assert pool.device == "rtx_4090"
    assert pool.device_overrides is not None and pool.link is not None
    assert pool.device_overrides.memory_size == 24 * 2**30
    assert pool.device_overrides.memory_bandwidth == 1008e9
    assert (pool.link.bandwidth, pool.link.latency) == (16 * 2**30, 20_000)
    engine = pool.engine
    assert (engine.version, engine.dtype, engine.kv_cache_dtype) == ("vllm-0.19", "bfloat16", "auto")
    assert (engine.max_num_seqs, engine.max_num_batched_tokens, engine.block_size) == (128, 2048, 16)
    assert engine.enable_chunked_prefill and engine.enable_prefix_caching and engine.scheduler_reserve_full_isl
    assert (engine.gpu_memory_utilization, engine.long_prefill_token_threshold) == (0.9, 0)
    assert scenario.timing.source == "profile"
    assert scenario.timing.profile == "rtx_4090/org__dense/bf16"
    assert isinstance(scenario.workload, TraceWorkload)
    assert (scenario.workload.arrivals_at, scenario.workload.output_ends) == ("client", "length")


def test_what_is_written_runs_alone(repo: Repo) -> None:
    scenario = repo.load()
    assert load(repo.out) == scenario
    run = simulate(scenario, repo.out.parent)
    assert list(run.requests["status"]) == ["finished"] * 3
    assert list(run.requests["output_tokens"]) == [5, 7, 1]
    assert sorted(path.name for path in repo.out.parent.iterdir()) == ["twin.workload.parquet", "twin.yaml"]


def test_requests_keep_arrivals_lengths_and_token_ids(repo: Repo) -> None:
    table = requests_of(repo.load(), repo)
    assert table.arrival_ns.tolist() == [1_000_000, 3_000_000, 2_000_000]
    assert table.input_tokens.tolist() == [10, 20, 30]
    assert table.token_ids is not None
    assert table.token_ids[1].tolist() == list(range(20))


def test_flags_and_fields_of_the_instance(repo: Repo) -> None:
    flags = (
        "--max-num-seqs 32 --max-num-batched-tokens=0 --long-prefill-token-threshold 64 --block-size 32 "
        "--no-enable-prefix-caching --no-reserve-full-isl --npu-memory-utilization 0.5 --num-reqs 2 "
        "--dataset workloads/three.jsonl --log-level INFO --output 'a b.csv'"
    )
    memory = {"mem_size": 24, "mem_bw": 1008, "mem_latency": 0, "mem_util": 0.75}
    scenario = repo.load(flags, max_num_seqs=16, npu_mem=memory)
    engine = scenario.pools[0].engine
    assert engine.max_num_seqs == 16  # the instance's own
    assert engine.max_num_batched_tokens == 4096  # 0: the model's longest sequence
    assert (engine.long_prefill_token_threshold, engine.block_size) == (64, 32)
    assert engine.enable_prefix_caching is False and engine.scheduler_reserve_full_isl is False
    assert engine.gpu_memory_utilization == 0.75
    assert len(requests_of(scenario, repo)) == 2
    assert "--log-level INFO" in repo.out.read_text().split("\nname:")[0]


def test_the_token_budget_ends_at_the_longest_sequence(repo: Repo) -> None:
    assert repo.load("--max-num-batched-tokens 100000").pools[0].engine.max_num_batched_tokens == 4096


def test_without_a_workload_sixteen_equal_requests(repo: Repo) -> None:
    table = requests_of(repo.load(""), repo)
    assert (table.arrival_ns.tolist(), set(table.input_tokens.tolist())) == ([0] * 16, {64})
    assert set(table.output_tokens.tolist()) == {64}


def test_a_workload_named_for_itself_comes_first(repo: Repo, tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    write_lines(own, [{"input_toks": 3, "output_toks": 4, "arrival_time_ns": 5}])
    assert requests_of(repo.load(workload=own), repo).input_tokens.tolist() == [3]


@pytest.mark.parametrize(
    ("fields", "degrees"),
    [
        ({"tp_size": 2}, (2, 1)),
        ({"tp_size": None, "num_npus": 2}, (2, 1)),
        ({"tp_size": None}, (1, 1)),
        ({"tp_size": 2, "pp_size": 2}, (2, 2)),
        ({"tp_size": 1, "num_npus": 4}, (1, 4)),
        ({"tp_size": None, "num_npus": 4, "pp_size": 2}, (2, 2)),
    ],
)
def test_degrees_are_inferred(repo: Repo, fields: dict[str, int | None], degrees: tuple[int, int]) -> None:
    parallelism = repo.load(**fields).pools[0].parallelism
    assert (parallelism.tensor, parallelism.pipeline) == degrees


def test_number_formats(repo: Repo) -> None:
    repo.bundle("dense", "llama", "fp8-kvfp8")
    scenario = repo.load("--kv-cache-dtype fp8", dtype="fp8")
    engine = scenario.pools[0].engine
    assert (engine.quantization, engine.dtype, engine.kv_cache_dtype) == ("fp8", "auto", "fp8")
    assert scenario.timing.profile == "rtx_4090/org__dense/fp8-kvfp8"
    repo.bundle("dense", "llama", "fp16")
    assert repo.load("--dtype float16", dtype=None).pools[0].engine.dtype == "float16"


def test_a_model_with_experts_on_one_device(repo: Repo) -> None:
    repo.bundle("experts", "mixtral")
    scenario = repo.load(model_name="org/experts")
    assert list(simulate(scenario, repo.out.parent).requests["status"]) == ["finished"] * 3


def test_the_model_is_named_when_the_catalogue_has_it(repo: Repo) -> None:
    path = repo.root / "configs/model/org/dense.json"
    assert repo.load().model == str(path.resolve())
    from servetwin import catalog

    name = "Qwen/Qwen3-0.6B"
    write_json(repo.root / f"configs/model/{name}.json", catalog.model(name).config)
    (repo.root / "profiler/perf/RTX4090/Qwen").mkdir()
    bundle = repo.bundle("../Qwen/Qwen3-0.6B", "llama")
    (bundle / "meta.yaml").write_text((bundle / "meta.yaml").read_text().replace("org/../", ""))
    assert repo.load(model_name=name).model == name
    write_json(repo.root / f"configs/model/{name}.json", DENSE)
    assert repo.load(model_name=name).model.endswith("Qwen3-0.6B.json")


# ---- the profile ----


def test_the_profile_is_made_once_and_again_when_its_source_changes(repo: Repo, own_profiles: Path) -> None:
    repo.load()
    header = own_profiles / "rtx_4090/org__dense/bf16" / profiles.HEADER
    os.utime(header, ns=(1, 1))
    repo.load()
    assert header.stat().st_mtime_ns == 1
    table = repo.root / "profiler/perf/RTX4090/org/dense/bf16/tp1/dense.csv"
    table.write_text(table.read_text() + "\nembedding,1024,900.0")
    repo.load()
    assert header.stat().st_mtime_ns != 1


def test_a_damaged_profile_is_replaced(repo: Repo, own_profiles: Path) -> None:
    repo.load()
    place = own_profiles / "rtx_4090/org__dense/bf16"
    (place / "dense.parquet").write_bytes(b"nothing")
    repo.load()
    profiles.read_profile(place).table("dense")
    (place / profiles.HEADER).write_text("schema: 1\n")
    assert repo.load().timing.profile == "rtx_4090/org__dense/bf16"


# ---- a recorded run ----


def test_arrivals_are_when_the_engine_queued_the_requests(repo: Repo) -> None:
    scenario = repo.load("", bench=repo.record())
    assert isinstance(scenario.workload, TraceWorkload)
    assert scenario.workload.arrivals_at == "engine"
    table = requests_of(scenario, repo)
    assert table.at_engine
    assert table.arrival_ns.tolist() == [125_000_000, 375_000_000, 0]


def test_settings_of_the_run_replace_defaults(repo: Repo) -> None:
    meta = {
        "engine_kwargs": {"max_model_len": 1024},
        "kv_cache": {"num_gpu_blocks": 2588, "block_size": 32, "gpu_memory_utilization": 0.8},
        "hardware": {"total_memory": 25250627584},
        "resolved_config": {"scheduler_config": {"async_scheduling": False, "policy": "priority"}},
    }
    memory = {"mem_size": 24, "mem_bw": 1008, "mem_latency": 0, "mem_util": 0.833919}
    pool = repo.load("", bench=repo.record(meta), npu_mem=memory).pools[0]
    engine = pool.engine
    assert (engine.max_num_seqs, engine.max_model_len, engine.num_gpu_blocks_override) == (64, 1024, 2588)
    assert (engine.block_size, engine.gpu_memory_utilization) == (32, 0.8)
    assert (engine.async_scheduling, engine.scheduling_policy) == (False, "priority")
    assert pool.device_overrides is not None and pool.device_overrides.memory_size == 25250627584


@pytest.mark.parametrize(
    ("version", "entry"),
    [("0.19.0", "vllm-0.19"), ("0.21.3", "vllm-0.19"), ("v0.33.1", "vllm-0.33"), (None, "vllm-0.19")],
)
def test_the_version_of_the_run(repo: Repo, version: str | None, entry: str) -> None:
    assert repo.load("", bench=repo.record({"vllm_version": version})).pools[0].engine.version == entry


def test_agentic_sessions(repo: Repo) -> None:
    """--num-reqs counts lines: requests and sessions."""
    turns = [{"input_toks": 40, "output_toks": 5, "tool_duration_ns": 9}, {"input_toks": 60, "output_toks": 4}]
    session = {"session_id": "a", "arrival_time_ns": 5, "sub_requests": turns}
    alone = {"input_toks": 10, "output_toks": 3, "arrival_time_ns": 0}
    write_lines(repo.root / "workloads/agents.jsonl", [session, alone, session])
    table = requests_of(repo.load("--dataset workloads/agents.jsonl --num-reqs 2"), repo)
    assert table.input_tokens.tolist() == [40, 60, 10]
    scenario = repo.load("--dataset workloads/agents.jsonl")
    assert (
        "# 1 lines repeat a session_id of an earlier one; each line is a session of its own.\n" in repo.out.read_text()
    )
    run = simulate(scenario, repo.out.parent)
    assert list(run.requests["session"]) == [0, 0, -1, 1, 1]
    ends, arrivals = run.ints("finish_ns"), run.ints("arrival_ns")
    assert (arrivals[[1, 4]] == ends[[0, 3]] + 9).all()
    assert run.sessions is not None and list(run.sessions["tool_ns"]) == [9, 9]


def test_a_part_of_the_workload_was_sent(repo: Repo) -> None:
    from llmservingsim_repo import recorded

    bench = repo.record({"num_requests": 2}, recorded()[:2])
    assert requests_of(repo.load("", bench=bench), repo).arrival_ns.tolist() == [0, 250_000_000]


def test_the_real_run_of_the_shared_data(shared: Path, tmp_path: Path) -> None:
    repo = shared / "data/llmservingsim"
    example = repo / "bench/examples/RTXPRO6000/Llama-3.1-8B"
    out = tmp_path / "real.yaml"
    scenario = import_cluster(example / "config.json", repo, None, example / "vllm", "", out)
    pool = scenario.pools[0]
    assert (scenario.model, pool.device, pool.engine.version) == (
        "meta-llama/Llama-3.1-8B",
        "rtx_pro_6000",
        "vllm-0.19",
    )
    assert pool.device_overrides is not None and pool.device_overrides.memory_size == 96 * 2**30
    assert (pool.engine.max_num_seqs, pool.engine.max_num_batched_tokens) == (128, 2048)
    table = build(scenario.workload, 0, tmp_path)
    rows = [json.loads(line) for line in (example / "vllm/requests.jsonl").read_text().splitlines()]
    first = min(row["queued_ts"] for row in rows)
    for row in rows:
        arrival = int(table.arrival_ns[int(row["request_id"].removeprefix("bench-"))])
        assert arrival == round((row["queued_ts"] - first) * 1e9)
    assert "sha256" not in out.read_text()
    run = simulate(load(out), tmp_path)
    assert list(run.requests["status"]) == ["finished"] * 300
    again = tmp_path / "again.yaml"
    import_cluster(example / "config.json", repo, None, example, "", again)
    assert again.with_name("again.workload.parquet").read_bytes() == out.with_name("real.workload.parquet").read_bytes()


def test_cluster_config_flag_may_name_the_file_itself(repo: Repo) -> None:
    write_json(repo.root / "configs/cluster/one.json", cluster())
    path = repo.root / "configs/cluster/one.json"
    import_cluster(path, repo.root, None, None, "--cluster-config configs/cluster/one.json", repo.out)
