"""KV blocks on a device, against what engines reported."""

from __future__ import annotations

from typing import Any

import pytest

from servetwin import catalog
from servetwin.errors import InputError
from servetwin.memory.capacity import BlockGroup, Reserve, activation_bytes, kv_capacity, plan_groups
from servetwin.model import Dtypes, Sharding, architecture_of, dtype, dtypes_of, kv_groups
from servetwin.model.layers import Architecture

GIB = 2**30
H100, H200 = int(79.1 * GIB), int(139.8 * GIB)  # total_memory as PyTorch reports it


def arch_of(name: str) -> Architecture:
    return architecture_of(catalog.model(name).config, name)


def on_80gib(name: str, **options: Any) -> Any:
    arch = arch_of(name)
    return kv_capacity(arch, dtypes_of(arch), Sharding(), **{"device_memory_bytes": 80 * GIB, **options})


def test_rtx_4090_llama_8b() -> None:
    """vLLM 0.19 reported 2588 blocks (LLMServingSim's RTX 4090 bench run, `kv_cache` of its meta.json)."""
    arch = arch_of("meta-llama/Llama-3.1-8B")
    found = kv_capacity(arch, Dtypes(), Sharding(), device_memory_bytes=25_250_627_584, max_model_len=32768)
    assert found.num_gpu_blocks == pytest.approx(2588, rel=0.01)
    assert found.tokens == 16 * found.num_gpu_blocks
    assert found.block_bytes == 16 * 131072


@pytest.mark.parametrize(
    ("memory", "tensor", "kv", "low", "high"),
    [(H200, 1, "fp8", 356_000, 366_000), (H100, 2, "bf16", 220_000, 230_000)],
)
def test_llama_70b_on_hopper(memory: int, tensor: int, kv: str, low: int, high: int) -> None:
    """Capacity implied by queueing in InferenceX runs and reckoned by AIConfigurator 0.12, fp8 weights."""
    arch = arch_of("meta-llama/Llama-3.1-70B")
    dtypes = dtypes_of(arch, quantization="fp8", kv_cache_dtype=kv)
    found = kv_capacity(arch, dtypes, Sharding(tensor=tensor), device_memory_bytes=memory,
                        max_num_batched_tokens=8192, max_num_seqs=1024)  # fmt: skip
    assert low <= found.tokens <= high


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B", "google/gemma-2-9b-it", "openai/gpt-oss-20b"])
@pytest.mark.parametrize("sharding", [Sharding(), Sharding(tensor=2), Sharding(pipeline=2)])
def test_parts_add_up_to_the_device(name: str, sharding: Sharding) -> None:
    arch = arch_of(name)
    found = kv_capacity(arch, dtypes_of(arch), sharding, device_memory_bytes=80 * GIB)
    assert sum(found.parts.values()) == 80 * GIB
    assert found.parts["kv_cache"] == found.num_gpu_blocks * found.block_bytes
    assert 0 <= found.parts["rest"] < found.block_bytes


def test_more_of_anything_else_is_less_cache() -> None:
    name = "meta-llama/Llama-3.1-8B"
    base = on_80gib(name).num_gpu_blocks
    assert on_80gib(name, gpu_memory_utilization=0.8).num_gpu_blocks < base
    assert on_80gib(name, max_num_seqs=1024).num_gpu_blocks < base
    assert on_80gib(name, max_num_batched_tokens=65536).num_gpu_blocks < base
    assert on_80gib(name, reserve=Reserve(graphs=0)).num_gpu_blocks == base + 512 * 2**20 // (16 * 131072)


def test_activation_peak_is_the_sampler_or_the_widest_layer() -> None:
    arch = arch_of("meta-llama/Llama-3.1-8B")
    sampler = (2048 + 256) * 4096 * 2 + 256 * 128256 * 14
    assert activation_bytes(arch, Dtypes(), Sharding(), 0, 2048, 256) == sampler
    layer = 16384 * (2 * 4096 + 3 * 14336) * 2
    assert activation_bytes(arch, Dtypes(), Sharding(), 0, 16384, 16) == layer
    assert activation_bytes(arch, Dtypes(), Sharding(pipeline=2), 0, 2048, 256) == layer // 8


def test_a_model_that_does_not_fit_says_how_many_devices_it_needs() -> None:
    with pytest.raises(InputError) as caught:
        on_80gib("meta-llama/Llama-3.1-70B")
    assert caught.value.field == "parallelism.tensor"
    assert caught.value.allowed == ">= 2"
    missing = 70_553_706_496 * 2 + 1024**2 * 768 - 0.9 * 80 * GIB
    assert f"{missing / GIB:.0f}" in caught.value.message
    with pytest.raises(InputError, match="larger device"):
        on_80gib("meta-llama/Llama-3.1-405B", device_memory_bytes=4 * GIB)


def test_the_degree_named_in_the_error_does_fit_and_the_one_below_does_not() -> None:
    arch = arch_of("meta-llama/Llama-3.1-405B")
    with pytest.raises(InputError) as caught:
        kv_capacity(arch, Dtypes(), Sharding(), device_memory_bytes=H200)
    degree = int(str(caught.value.allowed).removeprefix(">= "))
    assert kv_capacity(arch, Dtypes(), Sharding(tensor=degree), device_memory_bytes=H200).num_gpu_blocks > 0
    with pytest.raises(InputError):
        kv_capacity(arch, Dtypes(), Sharding(tensor=degree // 2), device_memory_bytes=H200)


def test_one_request_of_the_longest_length_must_fit() -> None:
    options = {"device_memory_bytes": 25_250_627_584, "max_model_len": 131072}
    with pytest.raises(InputError, match="one request of max_model_len"):
        on_80gib("meta-llama/Llama-3.1-8B", **options)
    assert on_80gib("meta-llama/Llama-3.1-8B", **{**options, "max_model_len": 32768}).tokens > 32768


def test_hybrid_models_cut_their_layers_into_groups_of_equal_bytes() -> None:
    """vLLM: gemma-3-27b has 52 windowed and 10 full layers: groups of 10, six windowed ones and a full one."""
    groups, block_size, block_bytes = plan_groups(kv_groups(arch_of("google/gemma-3-27b-it"), Dtypes()), 16)
    assert [(g.kind, g.window) for g in groups] == [("window", 1024)] * 6 + [("full", None)]
    assert sum(g.layers for g in groups) == 62
    assert block_bytes == 10 * 16 * 2 * 16 * 128 * 2 and block_size == 16
    two, _, _ = plan_groups(kv_groups(arch_of("openai/gpt-oss-120b"), Dtypes()), 16)
    assert two == (BlockGroup("window", 18, 128), BlockGroup("full", 18))


def test_a_window_holds_no_more_than_it_and_the_next_step_need() -> None:
    group = BlockGroup("window", 1, 128)
    assert group.blocks(100_000, 16, 2048) == -(-(127 + 2048) // 16) + 1
    assert group.blocks(64, 16, 2048) == 5
    assert BlockGroup("full", 1).blocks(100_000, 16, 2048) == 6250


def test_windows_hold_more_context_than_full_attention_would() -> None:
    found = on_80gib("openai/gpt-oss-20b", max_model_len=131072)
    all_full = found.parts["kv_cache"] // (2 * 24 * 8 * 64 * 2)
    assert found.tokens > 1.9 * all_full


def test_attention_blocks_grow_until_a_recurrent_state_fits() -> None:
    """Qwen3-Next: 1097728 B of state a layer, 2048 B a token and attention layer: vLLM logs "Setting attention block
    size to 544 tokens"; three groups of states and one of attention."""
    found = on_80gib("Qwen/Qwen3-Next-80B-A3B-Instruct", device_memory_bytes=H200 * 2)
    assert found.block_size == 544
    assert found.block_bytes == 12 * 544 * 2048
    assert [g.kind for g in found.groups] == ["state"] * 3 + ["full"]
    assert found.groups[0].blocks(10**6, found.block_size, 2048) == 1


def test_the_tightest_stage_counts() -> None:
    arch = arch_of("meta-llama/Llama-3.1-8B")
    both = kv_capacity(arch, Dtypes(), Sharding(pipeline=2), device_memory_bytes=24 * GIB)
    assert both.parts["weights"] == 2 * (8_030_261_248 // 2 + 4096 // 2)  # the last stage, with the final norm
    assert both.block_bytes == 16 * 131072 // 2


def test_fp8_cache_doubles_the_tokens() -> None:
    arch = arch_of("meta-llama/Llama-3.1-8B")
    bf16, fp8 = (
        kv_capacity(arch, d, Sharding(), device_memory_bytes=H100) for d in (Dtypes(), Dtypes(kv=dtype("fp8")))
    )
    assert fp8.tokens // 2 in (bf16.tokens, bf16.tokens + 8)


@pytest.mark.parametrize("share", [0, -0.5, 1.01])
def test_utilisation_must_be_a_share(share: float) -> None:
    with pytest.raises(InputError, match="gpu_memory_utilization"):
        on_80gib("meta-llama/Llama-3.1-8B", gpu_memory_utilization=share)
