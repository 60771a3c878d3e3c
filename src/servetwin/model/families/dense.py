"""Families without experts: one kind of MLP in every layer."""

from __future__ import annotations

from servetwin.model.config import Config
from servetwin.model.families.reading import attention, build, dense_mlp, depth, qwen_windows, windows
from servetwin.model.layers import Architecture, Attention, DenseMlp, Layer, Mixer


def llama(c: Config) -> Architecture:
    """Llama 1-3, Mistral (one window for all layers) and their many relatives."""
    sizes = windows(c, lambda _: True)
    return build(c, (Layer(attention(c, window=w), dense_mlp(c)) for w in sizes))


def qwen2(c: Config) -> Architecture:
    sizes = qwen_windows(c)
    return build(c, (Layer(attention(c, window=w, bias=True, out_bias=False), dense_mlp(c)) for w in sizes))


def qwen3(c: Config) -> Architecture:
    return build(c, (Layer(attention(c, window=w, qk_norm=True), dense_mlp(c)) for w in qwen_windows(c)))


def gemma(c: Config) -> Architecture:
    return build(c, [Layer(attention(c, head_dim=256), dense_mlp(c))] * depth(c), tied=True)


def gemma2(c: Config) -> Architecture:
    sizes = windows(c, lambda layer: layer % 2 == 0)
    return build(c, (Layer(attention(c, window=w, head_dim=256), dense_mlp(c), norms=4) for w in sizes), tied=True)


def gemma3(c: Config) -> Architecture:
    defaults = {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    }
    c = Config({**defaults, **c.values}, c.where)
    every = c.int("sliding_window_pattern", "_sliding_window_pattern", default=6)
    sizes = windows(c, lambda layer: (layer + 1) % every != 0)
    return build(c, (Layer(attention(c, window=w, qk_norm=True), dense_mlp(c), norms=4) for w in sizes), tied=True)


def phi3(c: Config) -> Architecture:
    """Phi-3 and Phi-4 (the checkpoint's fused projections are the ones an engine fuses anyway)."""
    return build(c, (Layer(attention(c, window=w), dense_mlp(c)) for w in windows(c, lambda _: True)))


def falcon(c: Config) -> Architecture:
    """Falcon 7B/40B/180B: parallel attention and MLP, one or two LayerNorms."""
    heads = c.int("num_attention_heads", "n_head")
    new = c.flag("new_decoder_architecture")
    kv = (
        c.int("num_kv_heads", "n_head_kv", default=heads)
        if new
        else 1
        if c.flag("multi_query", default=True)
        else heads
    )
    hidden, bias = c.int("hidden_size"), c.flag("bias")
    mixer: Mixer = Attention(heads, kv, hidden // heads, qkv_bias=bias, out_bias=bias)
    mlp = DenseMlp(c.int("ffn_hidden_size", default=4 * hidden), gated=False, bias=bias)
    norms = c.int("num_ln_in_parallel_attn", default=2 if new else 1 if c.flag("parallel_attn", default=True) else 2)
    return build(c, [Layer(mixer, mlp, norms=norms)] * depth(c), tied=True, norm_bias=True)


def gpt_neox(c: Config) -> Architecture:
    mixer = attention(c, bias=True)
    mlp = DenseMlp(c.int("intermediate_size"), gated=False, bias=True)
    return build(c, [Layer(mixer, mlp)] * depth(c), norm_bias=True)
