"""What a token and a sequence keep in memory."""

from __future__ import annotations

import pytest

from servetwin import catalog
from servetwin.model import (
    Dtypes,
    Sharding,
    architecture_of,
    dtype,
    dtypes_of,
    kv_bytes_per_token,
    kv_groups,
    state_bytes_per_sequence,
)
from servetwin.model.layers import Architecture


def arch_of(name: str) -> Architecture:
    return architecture_of(catalog.model(name).config, name)


# 2 (K and V) x layers x kv_heads x head_dim x 2 bytes, written out; published where a source is named
BF16_BYTES = {
    "meta-llama/Llama-2-7b-hf": 2 * 32 * 32 * 128 * 2,  # 0.5 MB, vLLM paper (arXiv:2309.06180) has 800 KB for OPT-13B
    "meta-llama/Llama-3.1-8B": 131072,  # LLMServingSim and vLLM: 2588 blocks of 16 in 5.05 GiB
    "meta-llama/Llama-3.1-70B": 327680,
    "meta-llama/Llama-3.1-405B": 516096,  # DeepSeek-V3 ISCA paper (arXiv:2505.09343), table 1
    "Qwen/Qwen2.5-72B": 327680,  # the same table
    "deepseek-ai/DeepSeek-V3": 70272,  # the same table
    "meta-llama/Llama-3.2-1B": 2 * 16 * 8 * 64 * 2,
    "meta-llama/Llama-3.2-3B": 2 * 28 * 8 * 128 * 2,
    "mistralai/Mixtral-8x7B-v0.1": 2 * 32 * 8 * 128 * 2,
    "mistralai/Mixtral-8x22B-v0.1": 2 * 56 * 8 * 128 * 2,
    "Qwen/Qwen2.5-7B": 2 * 28 * 4 * 128 * 2,
    "Qwen/Qwen3-0.6B": 2 * 28 * 8 * 128 * 2,
    "Qwen/Qwen3-8B": 2 * 36 * 8 * 128 * 2,
    "Qwen/Qwen3-32B": 2 * 64 * 8 * 128 * 2,
    "Qwen/Qwen3-30B-A3B": 2 * 48 * 4 * 128 * 2,
    "Qwen/Qwen3-235B-A22B": 2 * 94 * 4 * 128 * 2,
    "Qwen/Qwen3-Next-80B-A3B-Instruct": 2 * 12 * 2 * 256 * 2,  # one attention layer in four
    "google/gemma-2-9b-it": 2 * 42 * 8 * 256 * 2,
    "google/gemma-2-27b-it": 2 * 46 * 16 * 128 * 2,
    "microsoft/Phi-3-mini-4k-instruct": 2 * 32 * 32 * 96 * 2,
    "microsoft/phi-4": 2 * 40 * 10 * 128 * 2,
    "openai/gpt-oss-20b": 2 * 24 * 8 * 64 * 2,
    "openai/gpt-oss-120b": 2 * 36 * 8 * 64 * 2,
    "deepseek-ai/DeepSeek-V2-Lite": 27 * (512 + 64) * 2,
    "moonshotai/Kimi-K2-Instruct": 61 * (512 + 64) * 2,
    "MiniMaxAI/MiniMax-M2.5": 2 * 62 * 8 * 128 * 2,
    "tiiuae/falcon-7b": 2 * 32 * 1 * 64 * 2,
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": 2 * 6 * 2 * 128 * 2,
}


@pytest.mark.parametrize("name", BF16_BYTES)
def test_bytes_a_token(name: str) -> None:
    assert kv_bytes_per_token(arch_of(name), Dtypes()) == BF16_BYTES[name]


def test_fp8_halves_and_tensor_ranks_share_until_there_are_no_more_heads() -> None:
    arch = arch_of("meta-llama/Llama-3.1-70B")
    assert kv_bytes_per_token(arch, Dtypes(kv=dtype("fp8"))) == 163840
    assert [kv_bytes_per_token(arch, Dtypes(), Sharding(tensor=t)) for t in (2, 8, 16, 64)] == [163840] + 3 * [40960]


def test_the_latent_is_on_every_rank() -> None:
    arch = arch_of("deepseek-ai/DeepSeek-V3")
    assert kv_bytes_per_token(arch, Dtypes(), Sharding(tensor=8)) == 70272


def test_pipeline_stages_keep_their_own_layers() -> None:
    arch = arch_of("deepseek-ai/DeepSeek-V3")
    split = Sharding(pipeline=4)
    assert [kv_bytes_per_token(arch, Dtypes(), split, s) // 1152 for s in range(4)] == [15, 15, 16, 15]
    assert kv_bytes_per_token(arch, Dtypes(), split) == 16 * 1152


def test_window_and_full_layers_are_groups_of_their_own() -> None:
    groups = kv_groups(arch_of("google/gemma-3-27b-it"), Dtypes())
    assert [(g.kind, g.layers, g.window) for g in groups] == [("window", 52, 1024), ("full", 10, None)]
    assert [(g.kind, g.layers, g.window) for g in kv_groups(arch_of("openai/gpt-oss-20b"), Dtypes())] == [
        ("window", 12, 128),
        ("full", 12, None),
    ]


def test_a_recurrent_state_does_not_grow_with_the_sequence() -> None:
    """Qwen3-Next: 36 layers of 32 heads x 128 x 128, and 3 columns of a convolution 8192 wide; Qwen3.5 asks for
    float32 states."""
    arch = arch_of("Qwen/Qwen3-Next-80B-A3B-Instruct")
    assert state_bytes_per_sequence(arch, Dtypes()) == 36 * (32 * 128 * 128 + 3 * 8192) * 2
    newer = arch_of("Qwen/Qwen3.5-35B-A3B")
    assert state_bytes_per_sequence(newer, dtypes_of(newer)) == 30 * (32 * 128 * 128 * 4 + 3 * 8192 * 2)
    assert state_bytes_per_sequence(arch, Dtypes(), Sharding(tensor=2)) * 2 == state_bytes_per_sequence(arch, Dtypes())
    assert state_bytes_per_sequence(arch_of("meta-llama/Llama-3.1-8B"), Dtypes()) == 0
