"""Shares of a rank add up to the whole model."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servetwin import catalog
from servetwin.errors import InputError
from servetwin.model import Dtypes, Sharding, architecture_of, check_sharding, parameters, stages, weight_bytes
from servetwin.model.layers import Architecture
from servetwin.model.weights import stage_weights


def arch_of(name: str) -> Architecture:
    return architecture_of(catalog.model(name).config, name)


def test_one_rank_holds_every_parameter_once() -> None:
    for name in ("meta-llama/Llama-3.1-8B", "Qwen/Qwen3-30B-A3B", "meta-llama/Llama-3.2-1B"):
        arch = arch_of(name)
        assert weight_bytes(arch, Dtypes()) == 2 * parameters(arch).total


@given(st.sampled_from(["meta-llama/Llama-3.1-70B", "Qwen/Qwen3-32B"]), st.sampled_from([2, 4, 8]))
@settings(max_examples=6, deadline=None)
def test_tensor_ranks_add_up_to_the_model_and_repeated_vectors(name: str, tensor: int) -> None:
    arch = arch_of(name)
    counts = parameters(arch)
    qk_norms = 2 * 128 * len(arch.layers) if arch.model_type == "qwen3" else 0
    vectors = (2 * len(arch.layers) + 1) * arch.hidden + qk_norms
    ranks = tensor * weight_bytes(arch, Dtypes(), Sharding(tensor=tensor))
    assert ranks == 2 * (counts.total + (tensor - 1) * vectors)


@given(st.integers(1, 61))
@settings(max_examples=20, deadline=None)
def test_pipeline_stages_add_up(pipeline: int) -> None:
    arch = arch_of("deepseek-ai/DeepSeek-V3")
    runs = stages(arch, pipeline)
    assert [i for run in runs for i in run] == list(range(61))
    assert max(map(len, runs)) - min(map(len, runs)) <= 1
    whole = Sharding(pipeline=pipeline)
    held = [w for s in range(pipeline) for w in stage_weights(arch, whole, s) if w.stored]
    padding = 0 if pipeline == 1 else 2 * (-arch.vocab % 64) * arch.hidden
    assert sum(w.elements for w in held) == parameters(arch).total + padding


def test_left_over_layers_go_before_the_last_stage() -> None:
    """vLLM's get_pp_indices: 61 layers on 4 stages are 15, 15, 16, 15; 62 are 15, 16, 16, 15."""
    assert [len(r) for r in stages(arch_of("deepseek-ai/DeepSeek-V3"), 4)] == [15, 15, 16, 15]
    assert [len(r) for r in stages(arch_of("MiniMaxAI/MiniMax-M2.5"), 4)] == [15, 16, 16, 15]


def test_experts_are_spread_whole_or_by_width() -> None:
    arch = arch_of("Qwen/Qwen3-30B-A3B")
    experts = 48 * 128 * 3 * 2048 * 768

    def held(sharding: Sharding) -> int:
        return sum(w.elements for w in stage_weights(arch, sharding, 0) if w.part == "expert")

    assert held(Sharding()) == experts
    assert held(Sharding(tensor=4)) == held(Sharding(tensor=4, expert=4)) == experts // 4
    assert held(Sharding(tensor=2, data=4, expert=8)) == held(Sharding(tensor=2, data=4, expert=2)) == experts // 8


def test_a_tied_table_is_on_the_first_and_on_the_last_stage() -> None:
    arch = arch_of("meta-llama/Llama-3.2-1B")
    tables = [[w.name for w in stage_weights(arch, Sharding(pipeline=2), s) if w.part == "embedding"] for s in (0, 1)]
    assert tables == [["embed_tokens"], ["embed_tokens"]]


@pytest.mark.parametrize(
    ("name", "sharding", "field"),
    [
        ("meta-llama/Llama-3.1-8B", {"tensor": 3}, "parallelism.tensor"),
        ("meta-llama/Llama-3.1-8B", {"tensor": 64}, "parallelism.tensor"),
        ("meta-llama/Llama-3.1-8B", {"pipeline": 33}, "parallelism.pipeline"),
        ("meta-llama/Llama-3.1-8B", {"tensor": 2, "expert": 2}, "parallelism.expert"),
        ("Qwen/Qwen3-30B-A3B", {"tensor": 4, "expert": 3}, "parallelism.expert"),
        ("Qwen/Qwen3-30B-A3B", {"tensor": 0}, "parallelism.tensor"),
    ],
)
def test_impossible_degrees_are_refused(name: str, sharding: dict[str, int], field: str) -> None:
    with pytest.raises(InputError) as caught:
        check_sharding(arch_of(name), Sharding(**sharding))
    assert caught.value.field == field
