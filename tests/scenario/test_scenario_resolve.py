"""Defaults, as vLLM chooses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from servetwin import catalog
from servetwin.scenario.defaults import longest_sequence, newest_engine, resolved_engine
from servetwin.scenario.load import dump, from_flags, load, validated
from servetwin.scenario.resolve import resolve
from servetwin.scenario.schema import EngineOptions, Scenario, SyntheticWorkload, TraceWorkload

GIB = 1 << 30
pytestmark = pytest.mark.skipif(not catalog.names("engines"), reason="the catalogue holds no engine version")


def engine(
    device: str = "h100_sxm", memory: int = 79 * GIB, stages: int = 1, longest: int = 131072, **given: Any
) -> EngineOptions:
    return resolved_engine(EngineOptions(version="vllm-0.33", **given), device, memory, stages, longest)


def scenario(model: str = "meta-llama/Llama-3.1-8B", device: str = "h100_sxm", *sets: str) -> Scenario:
    return from_flags(model=model, device=device, base=Path(), overrides=sets)


@pytest.mark.parametrize(
    ("device", "memory", "tokens", "seqs"),
    [
        ("h100_sxm", 79 * GIB, 8192, 1024),
        ("h200_sxm", 140 * GIB, 8192, 1024),
        ("b200_sxm", 178 * GIB, 16384, 1024),
        ("a100_sxm", 79 * GIB, 2048, 256),
        ("l40s", 44 * GIB, 2048, 256),
        ("gb10", 119 * GIB, 2048, 256),
    ],
)
def test_batch_limits_follow_device_memory(device: str, memory: int, tokens: int, seqs: int) -> None:
    found = engine(device, memory)
    assert (found.max_num_batched_tokens, found.max_num_seqs, found.max_num_active_seqs) == (tokens, seqs, seqs)


def test_batch_limits_of_catalogued_devices() -> None:
    for device, seqs in (("h100_sxm", 1024), ("a100_sxm", 256), ("l40s", 256)):
        assert resolve(scenario(device=device)).pools[0].engine.max_num_seqs == seqs


def test_overridden_memory_counts() -> None:
    changed = scenario("meta-llama/Llama-3.1-8B", "h100_sxm", "pools[0].device_overrides.memory_size=40GiB")
    assert resolve(changed).pools[0].engine.max_num_seqs == 256


def test_requests_of_a_step_are_at_most_its_tokens() -> None:
    assert engine(max_num_batched_tokens=64).max_num_seqs == 64


def test_tokens_of_a_step_are_at_most_what_its_requests_can_hold() -> None:
    assert engine(max_num_seqs=2, max_model_len=100).max_num_batched_tokens == 200


def test_without_chunked_prefill_a_prompt_fits_in_a_step() -> None:
    assert engine(enable_chunked_prefill=False).max_num_batched_tokens == 131072
    assert engine(enable_chunked_prefill=False, max_model_len=1000).max_num_batched_tokens == 8192


def test_plain_defaults() -> None:
    found = engine()
    assert found.block_size == 16
    assert found.gpu_memory_utilization == 0.92
    assert found.enable_prefix_caching is True
    assert found.enable_chunked_prefill is True
    assert found.scheduler_reserve_full_isl is True
    assert found.watermark == 0
    assert found.long_prefill_token_threshold == 0
    assert found.scheduling_policy == "fcfs"
    assert found.async_scheduling is True
    assert found.prefill_schedule_interval == 1
    assert found.max_model_len == 131072
    assert found.num_gpu_blocks_override is None


def test_older_engines_use_less_memory() -> None:
    if "vllm-0.19" not in catalog.names("engines"):
        pytest.skip("the catalogue lacks vllm-0.19")
    older = EngineOptions(version="vllm-0.19")
    assert resolved_engine(older, "h100_sxm", 79 * GIB, 1, 4096).gpu_memory_utilization == 0.9


def test_no_async_scheduling_in_a_pipeline() -> None:
    assert engine(stages=2).async_scheduling is False
    assert engine(stages=2, async_scheduling=True).async_scheduling is True


def test_what_is_given_stays() -> None:
    given = {"max_num_seqs": 7, "max_num_active_seqs": 3, "block_size": 32, "watermark": 0.25, "enforce_eager": True}
    found = engine(**given)
    assert {name: getattr(found, name) for name in given} == given


def test_newest_engine_by_number() -> None:
    names = catalog.names("engines")
    assert newest_engine() == max(names, key=lambda name: [int(part) for part in name.removeprefix("vllm-").split(".")])
    assert resolve(scenario()).pools[0].engine.version == newest_engine()


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"max_position_embeddings": 8192}, 8192),
        ({"max_position_embeddings": 8192, "seq_length": 2048}, 2048),
        ({"n_positions": 1024}, 1024),
        ({}, 2048),
        ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 131072),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 2.0}}, 8192),
        (
            {
                "max_position_embeddings": 163840,
                "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
            },
            163840,
        ),
        ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "longrope", "long_factor": [1]}}, 131072),
        ({"model_type": "gemma3_text"}, 131072),
    ],
)
def test_longest_sequence(config: dict[str, Any], tokens: int) -> None:
    assert longest_sequence(config) == tokens


def test_names_become_those_of_the_catalogue() -> None:
    found = resolve(scenario("META-LLAMA/llama-3.1-8b", "H100"))
    assert (found.model, found.pools[0].device) == ("meta-llama/Llama-3.1-8B", "h100_sxm")


def test_resolving_twice_changes_nothing_and_the_dump_reads_back() -> None:
    once = resolve(scenario())
    assert resolve(once) == once
    import yaml

    assert validated(yaml.safe_load(dump(once))) == once


def test_paths_become_absolute(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    config = {"max_position_embeddings": 512, "num_attention_heads": 4, "num_hidden_layers": 2}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    file = tmp_path / "s.yaml"
    file.write_text("model: model\nworkload: {trace: t.csv}\npools: [{device: h100_sxm}]\ntiming: {overlay: o}\n")
    found = resolve(load(file), tmp_path)
    assert found.model == str(tmp_path / "model" / "config.json")
    assert isinstance(found.workload, TraceWorkload)
    assert found.workload.trace == str(tmp_path / "t.csv")
    assert found.timing.overlay == str(tmp_path / "o")
    assert found.pools[0].engine.max_model_len == 512
    assert resolve(found, Path("/elsewhere")) == found


def test_gamma_is_poisson_unless_told_otherwise() -> None:
    found = resolve(scenario("meta-llama/Llama-3.1-8B", "h100_sxm", "workload.arrivals={process: gamma, rate: 3}"))
    assert isinstance(found.workload, SyntheticWorkload)
    assert found.workload.arrivals.burstiness == 1


def test_experts_over_the_data_parallel_group() -> None:
    sets = ("pools[0].parallelism={tensor: 2, data: 2, expert: 4}",)
    assert resolve(scenario("mistralai/Mixtral-8x7B-v0.1", "h100_sxm", *sets)).pools[0].parallelism.expert == 4
