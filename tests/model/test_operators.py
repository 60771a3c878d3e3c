"""A step as operators: FLOPs and bytes against the parameters, and sharded against whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servetwin import catalog
from servetwin.model import Dtypes, Sharding, architecture_of, dtype, kv_bytes_per_token, parameters, weight_bytes
from servetwin.model.kernels import AttentionKernel, Experts, Gemm, Operator, context_pairs
from servetwin.model.layers import Architecture
from servetwin.model.operators import operators
from servetwin.model.weights import layer_weights, outer_weights
from servetwin.timing.shape import StepShape

MIXED = StepShape(2, 1000, 500, 600_000, 30, 30, 30_000, 2000, 500)
DECODE = StepShape(0, 0, 0, 0, 64, 64, 64_000, 1000, 1000)
FAMILIES = [
    "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-30B-A3B", "deepseek-ai/DeepSeek-V3", "openai/gpt-oss-20b",
    "google/gemma-3-27b-it", "Qwen/Qwen3-Next-80B-A3B-Instruct", "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "deepseek-ai/DeepSeek-V3.2", "MiniMaxAI/MiniMax-M2.5", "zai-org/GLM-4.5", "tiiuae/falcon-7b",
]  # fmt: skip


def arch_of(name: str) -> Architecture:
    return architecture_of(catalog.model(name).config, name)


def dense_flops(ops: list[Operator], shape: StepShape) -> float:
    return sum(o.flops(shape) * sum(o.stages) for o in ops if isinstance(o, Gemm | Experts) and o.rows == "tokens")


@pytest.mark.parametrize("name", FAMILIES)
def test_matrix_flops_are_two_per_active_parameter_and_token(name: str) -> None:
    arch = arch_of(name)
    counts = parameters(arch)
    outer = [w for w in outer_weights(arch, Sharding(), first=True, last=True) if not w.k]
    layers = sum(
        w.elements // w.copies * w.used
        for layer in arch.layers
        for w in layer_weights(layer, arch)
        if w.stored and not w.k
    )
    active = counts.active - counts.embedding - layers - sum(w.elements for w in outer)
    assert dense_flops(operators(arch, Dtypes()), MIXED) == pytest.approx(2 * active * MIXED.tokens, rel=1e-12)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "tiiuae/falcon-7b"])  # 71 heads
@pytest.mark.parametrize("tensor", [2, 4])
def test_tensor_ranks_share_the_work(name: str, tensor: int) -> None:
    """All ranks together do what one does, and repeat what is not split: routers and down-projections to latents."""
    arch = arch_of(name)
    repeated = {"router", "q_kv_a_proj", "index_q_proj", "index_k_proj", "index_weights", "shared_gate"}
    whole = {o.name: o for o in operators(arch, Dtypes())}
    split = {o.name: o for o in operators(arch, Dtypes(), Sharding(tensor=tensor))}
    for op in whole.values():
        if not isinstance(op, Gemm | Experts | AttentionKernel) or op.name in repeated:
            continue
        ranks = tensor * split[op.name].flops(MIXED)
        if (op.name == "qkv_proj" and arch.kv_heads < tensor) or op.name == "lm_head":
            assert ranks >= op.flops(MIXED)
        else:
            assert ranks == pytest.approx(op.flops(MIXED), rel=1e-12), op.name


@pytest.mark.parametrize("name", FAMILIES)
def test_operators_hold_the_weights_of_the_model(name: str) -> None:
    arch = arch_of(name)
    held = sum(o.weight_bytes * sum(o.stages) for o in operators(arch, Dtypes()))
    assert held <= weight_bytes(arch, Dtypes())
    assert held == pytest.approx(2 * (parameters(arch).total - (not arch.tied) * arch.vocab * arch.hidden), rel=2e-3)


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B", "deepseek-ai/DeepSeek-V3", "Qwen/Qwen3-30B-A3B"])
def test_decode_reads_the_whole_context_once(name: str) -> None:
    arch = arch_of(name)
    for dtypes in (Dtypes(), Dtypes(kv=dtype("fp8"))):
        read = sum(o.kv_bytes(DECODE) * sum(o.stages) for o in operators(arch, dtypes))
        assert read == (64_000 + 64) * kv_bytes_per_token(arch, dtypes)


def test_llama_layer_by_hand() -> None:
    ops = {o.name: o for o in operators(arch_of("meta-llama/Llama-3.1-8B"), Dtypes(), Sharding(tensor=2))}
    sizes = {name: (o.n, o.k) for name, o in ops.items() if isinstance(o, Gemm)}
    assert sizes == {"qkv_proj": (3072, 4096), "o_proj": (4096, 2048), "gate_up_proj": (14336, 4096),
                     "down_proj": (4096, 7168), "lm_head": (64128, 4096)}  # fmt: skip
    context, generation = ops["context_attention"], ops["generation_attention"]
    assert context.flops(MIXED) == 4 * 600_000 * 16 * 128
    assert generation.flops(MIXED) == 4 * (30_000 + 30) * 16 * 128
    assert generation.kv_bytes(MIXED) == (30_000 + 30) * 2 * 4 * 128 * 2
    assert ops["mixer_allreduce"].message_bytes(MIXED) == 1030 * 4096 * 2
    assert ops["logits_allgather"].message_bytes(MIXED) == 32 * 128256 * 2
    assert [ops[n].stages for n in ("embedding_allreduce", "mixer_allreduce", "mlp_allreduce")] == [(1,), (32,), (32,)]


def test_pipeline_stages_hand_over_hidden_state_and_residual() -> None:
    ops = operators(arch_of("meta-llama/Llama-3.1-8B"), Dtypes(), Sharding(tensor=2, pipeline=4))
    by_name = {o.name: o for o in ops}
    assert by_name["qkv_proj"].stages == (8, 8, 8, 8)
    assert by_name["stage_handover"].stages == (1, 1, 1, 0)
    assert by_name["stage_handover"].message_bytes(DECODE) == 64 * 2 * 4096 * 2 // 2
    assert (by_name["embed_tokens"].stages, by_name["lm_head"].stages) == ((1, 0, 0, 0), (0, 0, 0, 1))


def test_small_kernels_quantise_the_inputs_of_fp8_products() -> None:
    fp8 = dtype("fp8")
    ops = {o.name: o for o in operators(arch_of("meta-llama/Llama-3.1-8B"), Dtypes(fp8, fp8, fp8))}
    assert ops["qkv_proj_quantise"].bytes_written(DECODE) == 64 * 4096
    assert ops["qkv_proj"].weight_bytes == 6144 * 4096
    assert ops["lm_head"].weight_bytes == 2 * 128256 * 4096
    assert "lm_head_quantise" not in ops


def test_few_tokens_touch_few_experts() -> None:
    """T tokens that pick k of E experts at random touch E (1 - (1 - k/E)^T)."""
    (op,) = (o for o in operators(arch_of("Qwen/Qwen3-30B-A3B"), Dtypes()) if isinstance(o, Experts))
    one, eight = (DECODE._replace(decode_seqs=n, decode_tokens=n) for n in (1, 8))
    assert op.touched(one) == pytest.approx(8)
    assert op.touched(eight) == pytest.approx(51.62, abs=0.01)
    assert op.touched(DECODE._replace(decode_tokens=4096)) == pytest.approx(128)


@given(st.integers(1, 300), st.integers(0, 300), st.integers(1, 8), st.integers(1, 200))
def test_windowed_pairs_of_like_sequences_are_exact(q: int, c: int, seqs: int, window: int) -> None:
    pairs = seqs * sum(c + i for i in range(1, q + 1))
    wanted = seqs * sum(min(c + i, window) for i in range(1, q + 1))
    shape = StepShape(seqs, seqs * q, seqs * c, pairs, 0, 0, 0, 0, 0)
    assert context_pairs(shape, window) == wanted
    assert context_pairs(shape, None) == pairs


def test_a_window_bounds_what_decodes_read() -> None:
    ops = operators(arch_of("openai/gpt-oss-20b"), Dtypes())
    window, full = (o for o in ops if o.kind == "generation_attention" and isinstance(o, AttentionKernel))
    assert window.window == 128
    assert window.kv_tokens(DECODE) == 64 * 128
    assert full.kv_tokens(DECODE) == 64 * 1001
    short = StepShape(0, 0, 0, 0, 4, 4, 40, 10, 10)
    assert window.kv_tokens(short) == full.kv_tokens(short) == 44


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(FAMILIES))
def test_arrays_give_what_single_steps_give(name: str) -> None:
    shapes = [MIXED, DECODE, StepShape(1, 512, 0, 512 * 513 // 2, 0, 0, 0, 0, 0)]
    many = StepShape(*(np.array(column) for column in zip(*shapes, strict=True)))
    for op in operators(arch_of(name), Dtypes(), Sharding(tensor=1)):
        for measure in (op.flops, op.bytes_read, op.bytes_written, op.kv_bytes, op.message_bytes):
            together = np.broadcast_to(measure(many), (3,))
            assert together == pytest.approx([measure(s) for s in shapes], rel=1e-12), op.name
