"""Parameter counts equal the published ones, exactly where the publisher is exact."""

from __future__ import annotations

from typing import Any

import pytest

from servetwin import catalog
from servetwin.model import architecture_of, parameters

CLASSES = "parameters of the model class of the transformers library (5.19), built from the same configuration"
PUBLISHED = "given with the checkpoint on Hugging Face, and " + CLASSES

EXACT = {
    "meta-llama/Llama-2-7b-hf": (6_738_415_616, PUBLISHED),
    "meta-llama/Llama-3.1-8B": (8_030_261_248, PUBLISHED),
    "meta-llama/Llama-3.1-70B": (70_553_706_496, PUBLISHED),
    "meta-llama/Llama-3.1-405B": (405_853_388_800, PUBLISHED),
    "meta-llama/Llama-3.2-1B": (1_235_814_400, PUBLISHED),
    "meta-llama/Llama-3.2-3B": (3_212_749_824, PUBLISHED),
    "mistralai/Mixtral-8x7B-v0.1": (46_702_792_704, PUBLISHED),
    "mistralai/Mixtral-8x22B-v0.1": (140_620_634_112, PUBLISHED),
    "Qwen/Qwen2.5-7B": (7_615_616_512, PUBLISHED),
    "Qwen/Qwen2.5-72B": (72_706_203_648, PUBLISHED),
    "Qwen/Qwen3-0.6B": (596_049_920, CLASSES),
    "Qwen/Qwen3-1.7B": (1_720_574_976, CLASSES),
    "Qwen/Qwen3-8B": (8_190_735_360, PUBLISHED),
    "Qwen/Qwen3-32B": (32_762_123_264, PUBLISHED),
    "Qwen/Qwen3-30B-A3B": (30_532_122_624, PUBLISHED),
    "Qwen/Qwen3-235B-A22B": (235_093_634_560, PUBLISHED),
    "Qwen/Qwen3-Coder-480B-A35B-Instruct": (480_154_875_392, PUBLISHED),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": (79_674_391_296, CLASSES),
    "Qwen/Qwen3.5-35B-A3B": (34_660_610_688, CLASSES),
    "google/gemma-2-9b-it": (9_241_705_984, PUBLISHED),
    "google/gemma-2-27b-it": (27_227_128_320, PUBLISHED),
    "google/gemma-3-27b-it": (27_009_346_304, CLASSES + ", text part"),
    "microsoft/Phi-3-mini-4k-instruct": (3_821_079_552, PUBLISHED),
    "microsoft/phi-4": (14_659_507_200, PUBLISHED),
    "openai/gpt-oss-20b": (20_914_757_184, CLASSES),
    "openai/gpt-oss-120b": (116_829_156_672, CLASSES),
    "deepseek-ai/DeepSeek-V2-Lite": (15_706_484_224, PUBLISHED),
    "deepseek-ai/DeepSeek-V3": (671_026_419_200, CLASSES + ", with the router's score bias"),
    "deepseek-ai/DeepSeek-V3.2": (671_877_944_064, CLASSES + ", with the router's score bias"),
    "moonshotai/Kimi-K2-Instruct": (1_026_408_232_448, CLASSES + ", with the router's score bias"),
    "MiniMaxAI/MiniMax-M2.5": (228_689_764_864, CLASSES + ", with the router's score bias"),
    "zai-org/GLM-4.5": (352_797_829_024, CLASSES + ", with the router's score bias"),
    "nvidia/Nemotron-H-56B-Base-8K": (56_324_350_464, CLASSES),
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": (31_577_940_288, CLASSES + ", with the router's score bias"),
    "tiiuae/falcon-7b": (6_921_720_704, CLASSES),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_totals(name: str) -> None:
    assert parameters(architecture_of(catalog.model(name).config, name)).total == EXACT[name][0]


DENSE: dict[str, Any] = {"tie_word_embeddings": False}
OTHER_FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    "mistralai/Mistral-7B-v0.1": (
        {
            "model_type": "mistral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
            "sliding_window": 4096,
            **DENSE,
        },
        7_241_732_096,
    ),
    "google/gemma-7b": (
        {
            "model_type": "gemma",
            "hidden_size": 3072,
            "intermediate_size": 24576,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "head_dim": 256,
            "vocab_size": 256000,
        },
        8_537_680_896,
    ),
    "google/gemma-3-4b-it, text part, defaults left out": (
        {
            "model_type": "gemma3",
            "text_config": {
                "model_type": "gemma3_text",
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "num_hidden_layers": 34,
                "sliding_window": 1024,
            },
        },
        3_880_263_168,
    ),
    "Qwen/Qwen1.5-MoE-A2.7B": (
        {
            "model_type": "qwen2_moe",
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "vocab_size": 151936,
            **DENSE,
        },
        14_315_784_192,
    ),
    "microsoft/Phi-3.5-MoE-instruct": (
        {
            "model_type": "phimoe",
            "hidden_size": 4096,
            "intermediate_size": 6400,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 16,
            "num_experts_per_tok": 2,
            "vocab_size": 32064,
            "attention_bias": True,
            "lm_head_bias": True,
            **DENSE,
        },
        41_873_153_344,
    ),
    "deepseek-ai/DeepSeek-V2": (
        {
            "model_type": "deepseek_v2",
            "hidden_size": 5120,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "num_hidden_layers": 60,
            "num_attention_heads": 128,
            "n_shared_experts": 2,
            "n_routed_experts": 160,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 512,
            "q_lora_rank": 1536,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "vocab_size": 102400,
            "n_group": 8,
            "topk_group": 3,
            "topk_method": "group_limited_greedy",
            **DENSE,
        },
        235_741_434_880,
    ),
    "zai-org/GLM-4.5-Air": (
        {
            "model_type": "glm4_moe",
            "attention_bias": True,
            "head_dim": 128,
            "hidden_size": 4096,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 1,
            "num_attention_heads": 96,
            "num_key_value_heads": 8,
            "num_hidden_layers": 46,
            "use_qk_norm": False,
            "vocab_size": 151552,
            **DENSE,
        },
        106_852_251_264,
    ),
    "EleutherAI/gpt-neox-20b": (
        {
            "model_type": "gpt_neox",
            "hidden_size": 6144,
            "intermediate_size": 24576,
            "num_hidden_layers": 44,
            "num_attention_heads": 64,
            "vocab_size": 50432,
            **DENSE,
        },
        20_554_567_680,
    ),
    "tiiuae/falcon-40b": (
        {
            "model_type": "falcon",
            "hidden_size": 8192,
            "num_hidden_layers": 60,
            "num_attention_heads": 128,
            "num_kv_heads": 8,
            "vocab_size": 65024,
            "new_decoder_architecture": True,
            "bias": False,
        },
        41_303_293_952,
    ),
}


@pytest.mark.parametrize("name", OTHER_FAMILIES)
def test_families_outside_the_catalogue(name: str) -> None:
    """Totals of the transformers classes (5.19) for the same configuration."""
    config, total = OTHER_FAMILIES[name]
    assert parameters(architecture_of(config, name)).total == total


@pytest.mark.parametrize("name", catalog.names("models"))
def test_every_catalogue_entry_agrees_with_its_publisher(name: str) -> None:
    entry = catalog.model(name)
    total = parameters(architecture_of(entry.config, name)).total
    if entry.published is None or entry.published.counts is not None:
        return
    digits = entry.published.digits
    wanted = entry.published.parameters
    assert total == wanted if digits is None else f"{total:.{digits - 1}e}" == f"{wanted:.{digits - 1}e}"


@pytest.mark.parametrize(
    ("name", "active"),
    [
        ("mistralai/Mixtral-8x7B-v0.1", 12_879_925_248),
        ("openai/gpt-oss-20b", 3_610_000_000),
        ("openai/gpt-oss-120b", 5_130_000_000),
        ("Qwen/Qwen3-235B-A22B", 22_000_000_000),
        ("Qwen/Qwen3-30B-A3B", 3_300_000_000),
    ],
)
def test_active_parameters(name: str, active: int) -> None:
    """Model cards; that of gpt-oss leaves out the embedding table, but not the output projection."""
    arch = architecture_of(catalog.model(name).config, name)
    found = parameters(arch).active
    if name.startswith("openai"):
        found -= arch.vocab * arch.hidden
    assert found == pytest.approx(active, rel=0.02)


def test_layers_and_embeddings_add_up() -> None:
    arch = architecture_of(catalog.model("deepseek-ai/DeepSeek-V3").config)
    counts = parameters(arch)
    assert counts.embedding == 2 * 129280 * 7168
    assert counts.total == sum(counts.layers) + counts.embedding + arch.hidden
    assert len(counts.layers) == 61
    assert len(set(counts.layers)) == 2  # three dense layers, then experts
