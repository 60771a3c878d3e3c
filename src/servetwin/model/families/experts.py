"""Families with mixtures of experts."""

from __future__ import annotations

from dataclasses import replace

from servetwin.model.config import Config
from servetwin.model.families.reading import attention, build, dense_mlp, depth, one_a_layer, qwen_windows, windows
from servetwin.model.layers import Architecture, Attention, DenseMlp, LatentAttention, Layer, MoE

_SCORED = {"deepseek_v3", "deepseek_v32", "kimi_k2", "glm4_moe", "glm_moe_dsa"}
"""families whose router has e_score_correction_bias without `topk_method` in the file"""


def qwen_mlp(c: Config, layer: int) -> DenseMlp | MoE:
    sparse = layer not in c.list("mlp_only_layers") and (layer + 1) % c.int("decoder_sparse_step", default=1) == 0
    if not sparse:
        return dense_mlp(c)
    shared = c.int("shared_expert_intermediate_size", default=0)
    return MoE(
        c.int("num_experts"),
        c.int("num_experts_per_tok"),
        c.int("moe_intermediate_size"),
        shared_inter=shared,
        shared_gate=shared > 0,
    )


def qwen2_moe(c: Config) -> Architecture:
    return build(
        c,
        (
            Layer(attention(c, window=w, bias=True, out_bias=False), qwen_mlp(c, i))
            for i, w in enumerate(qwen_windows(c))
        ),
    )


def qwen3_moe(c: Config) -> Architecture:
    return build(
        c, (Layer(attention(c, window=w, qk_norm=True), qwen_mlp(c, i)) for i, w in enumerate(qwen_windows(c)))
    )


def mixtral(c: Config) -> Architecture:
    moe = MoE(c.int("num_local_experts"), c.int("num_experts_per_tok"), c.int("intermediate_size"))
    return build(c, (Layer(attention(c, window=w), moe) for w in windows(c, lambda _: True)))


def phimoe(c: Config) -> Architecture:
    """Phi-3.5-MoE: LayerNorms and biases on a Mixtral body."""
    moe = MoE(c.int("num_local_experts"), c.int("num_experts_per_tok"), c.int("intermediate_size"))
    layers = (Layer(attention(c, window=w), moe) for w in windows(c, lambda _: True))
    return build(c, layers, norm_bias=True, head_bias=c.flag("lm_head_bias"))


def gpt_oss(c: Config) -> Architecture:
    moe = MoE(
        c.int("num_local_experts"),
        c.int("num_experts_per_tok", "experts_per_token"),
        c.int("intermediate_size"),
        router_bias=True,
        expert_bias=True,
    )
    sizes = windows(c, lambda layer: layer % 2 == 0)
    return build(c, (Layer(attention(c, window=w, bias=True, sinks=True, head_dim=64), moe) for w in sizes))


def deepseek_mlp(c: Config, layer: int) -> DenseMlp | MoE:
    """Dense first layers, then routed and shared experts (DeepSeek, Kimi, GLM)."""
    experts = c.int("n_routed_experts", default=0)
    sparse = layer >= c.int("first_k_dense_replace", default=0) and layer % c.int("moe_layer_freq", default=1) == 0
    if not experts or not sparse:
        return dense_mlp(c)
    inter = c.int("moe_intermediate_size")
    v3 = c.text("topk_method", default="noaux_tc" if c.text("model_type") in _SCORED else "") == "noaux_tc"
    return MoE(
        experts,
        c.int("num_experts_per_tok"),
        inter,
        shared_inter=c.int("n_shared_experts", default=0) * inter,
        router_bias=v3,
        groups=c.int("n_group", default=1) or 1,
        top_groups=c.int("topk_group", default=1) or 1,
    )


def deepseek(c: Config) -> Architecture:
    """DeepSeek V2/V3/R1/V3.2, Kimi-K2, GLM-5: latent attention, with an indexer where `index_n_heads` is set (only in
    the layers that `indexer_types` calls "full"; the others use the choice of the layer before)."""
    mla = LatentAttention(
        heads=c.int("num_attention_heads"),
        q_lora_rank=c.int("q_lora_rank", default=0) or None,
        kv_lora_rank=c.int("kv_lora_rank"),
        qk_nope_dim=c.int("qk_nope_head_dim"),
        qk_rope_dim=c.int("qk_rope_head_dim"),
        v_dim=c.int("v_head_dim"),
        index_heads=c.int("index_n_heads", default=0),
        index_dim=c.int("index_head_dim", default=0),
        index_topk=c.int("index_topk", default=0),
    )
    borrowed = replace(mla, index_heads=0, index_dim=0)
    kinds = c.list("indexer_types") or ["full"] * depth(c)
    one_a_layer(c, "indexer_types", kinds)
    return build(c, (Layer(mla if kind == "full" else borrowed, deepseek_mlp(c, i)) for i, kind in enumerate(kinds)))


def glm4_moe(c: Config) -> Architecture:
    mixer = attention(c, out_bias=False, qk_norm=c.flag("use_qk_norm"))
    return build(c, (Layer(mixer, deepseek_mlp(c, i)) for i in range(depth(c))))


def minimax_m2(c: Config) -> Architecture:
    base = attention(c)
    mixer = Attention(
        base.heads, base.kv_heads, base.head_dim, qk_norm="full" if c.flag("use_qk_norm", default=True) else None
    )
    moe = MoE(
        c.int("num_local_experts"),
        c.int("num_experts_per_tok"),
        c.int("intermediate_size"),
        shared_inter=c.int("shared_intermediate_size", default=0),
        router_bias=c.flag("use_routing_bias", default=True),
    )
    return build(c, [Layer(mixer, moe)] * depth(c))
