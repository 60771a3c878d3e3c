"""Decode context parallelism: the KV of a sequence dealt out over ranks that would hold copies of it."""

from __future__ import annotations

import pytest

from servetwin import catalog
from servetwin.errors import InputError
from servetwin.memory.capacity import kv_capacity
from servetwin.model import Dtypes, Sharding, architecture_of, kv_bytes_per_token
from servetwin.model.kernels import AttentionKernel, Collective, Operator
from servetwin.model.layers import Architecture
from servetwin.model.operators import operators
from servetwin.timing.shape import StepShape

DECODE = StepShape(0, 0, 0, 0, 64, 64, 64_000, 1000, 1000)
MIXED = StepShape(2, 1000, 500, 600_000, 30, 30, 30_000, 2000, 500)


def arch_of(name: str) -> Architecture:
    return architecture_of(catalog.model(name).config, name)


def step(arch: Architecture, sharding: Sharding) -> dict[str, Operator]:
    return {op.name: op for op in operators(arch, Dtypes(), sharding)}


@pytest.mark.parametrize(
    ("name", "tensor", "context"),
    [("meta-llama/Llama-3.1-70B", 16, 2), ("deepseek-ai/DeepSeek-V3", 8, 8), ("Qwen/Qwen3-30B-A3B", 16, 4)],
)
def test_ranks_read_their_part_of_the_kv_with_the_heads_of_all(name: str, tensor: int, context: int) -> None:
    arch = arch_of(name)
    kind = "mla_generation" if "DeepSeek" in name else "generation_attention"
    copied, dealt = step(arch, Sharding(tensor)), step(arch, Sharding(tensor, context=context))
    before, after = copied[kind], dealt[kind]
    assert isinstance(before, AttentionKernel) and isinstance(after, AttentionKernel)
    assert (after.heads, after.kv_heads) == (context * before.heads, before.kv_heads)
    assert after.kv_bytes(DECODE) * context == before.kv_bytes(DECODE)
    assert after.flops(DECODE) == before.flops(DECODE)
    assert kv_bytes_per_token(arch, Dtypes(), Sharding(tensor, context=context)) * context == kv_bytes_per_token(
        arch, Dtypes(), Sharding(tensor)
    )
    prefill = kind.replace("generation", "context")
    assert dealt[prefill] == copied[prefill]


def test_queries_are_gathered_and_partial_outputs_merged() -> None:
    ops = step(arch_of("meta-llama/Llama-3.1-70B"), Sharding(16, context=2))
    found = {
        op.name: (op.kind, op.ranks, op.message_bytes(MIXED), op.stages)
        for op in ops.values()
        if isinstance(op, Collective) and op.rows == "decodes"
    }
    heads = 2 * 4  # of two ranks
    assert found == {
        "query_allgather": ("allgather", 2, 30 * heads * 128 * 2, (80,)),
        "lse_allgather": ("allgather", 2, 30 * 2 * heads * 4, (80,)),
        "attention_reducescatter": ("reducescatter", 2, 30 * heads * 128 * 2, (80,)),
    }


def test_more_context_fits() -> None:
    arch = arch_of("deepseek-ai/DeepSeek-V3")
    small = Dtypes()
    copied, dealt = (
        kv_capacity(arch, small, Sharding(16, context=c), device_memory_bytes=141 * 10**9) for c in (1, 16)
    )
    assert dealt.num_gpu_blocks == copied.num_gpu_blocks
    assert (dealt.block_size, dealt.tokens) == (16 * 16, 16 * copied.tokens)


@pytest.mark.parametrize(
    "name", ["openai/gpt-oss-120b", "deepseek-ai/DeepSeek-V3.2", "Qwen/Qwen3-Next-80B-A3B-Instruct"]
)
def test_layers_that_keep_something_else_cannot_deal_it_out(name: str) -> None:
    with pytest.raises(InputError, match="needs attention over all tokens in every layer"):
        step(arch_of(name), Sharding(16, context=2))
