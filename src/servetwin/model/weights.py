"""What a model weighs: parameters, bytes of weights and of KV cache a rank.

A layer part is a list of `Weight`s (matrices and vectors) as one rank holds them, with the projections that an engine
fuses (q, k, v; gate and up) already fused. Everything else is a sum over that list, so that parameter counts, memory
and the matrix products of `operators` cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from servetwin.model.dtypes import Dtypes
from servetwin.model.layers import (
    Architecture,
    Attention,
    DenseMlp,
    GatedDeltaNet,
    LatentAttention,
    Layer,
    Mamba2,
    MoE,
)
from servetwin.model.sharding import Sharding, split, stages

ONE = Sharding()
_VOCAB_PADDING = 64
"""vLLM pads the vocabulary to a multiple of this before it splits it (VocabParallelEmbedding)"""


class Weight(NamedTuple):
    """`copies` matrices of n outputs by k inputs, or vectors (k = 0) of n elements, held by one rank."""

    name: str
    part: str
    """attention, mlp, expert, embedding, router or norm; chooses the number format"""
    n: int
    k: int = 0
    copies: int = 1
    used: int = 1
    """of `copies`, those that one token uses"""
    stored: bool = True
    """False for a working copy that is no parameter (absorbed MLA projections)"""

    @property
    def elements(self) -> int:
        return self.n * max(1, self.k) * self.copies


def layer_weights(layer: Layer, arch: Architecture, sharding: Sharding = ONE) -> list[Weight]:
    """The weights of `layer` on the fullest rank."""
    h = arch.hidden
    norm = Weight("norms", "norm", layer.norms * h * (2 if arch.norm_bias else 1))
    return [*_mixer(layer, h, sharding), *_mlp(layer, h, sharding), norm]


def _mixer(layer: Layer, h: int, sharding: Sharding) -> Iterator[Weight]:
    tp = sharding.tensor
    match layer.mixer:
        case Attention() as a:
            q, kv = split(a.heads, tp) * a.head_dim, split(a.kv_heads, tp) * a.head_dim
            wide = q * (2 if a.gate else 1) + 2 * kv
            yield Weight("qkv_proj", "attention", wide, h)
            yield Weight("o_proj", "attention", h, q)
            extra = wide * a.qkv_bias + h * a.out_bias + split(a.heads, tp) * a.sinks
            extra += {"head": 2 * a.head_dim, "full": q + kv, None: 0}[a.qk_norm]
            yield Weight("attention_vectors", "norm", extra)
        case LatentAttention() as a:
            yield from _latent(a, h, tp)
        case GatedDeltaNet() as g:
            k, v, heads = _delta_widths(g, tp)
            yield Weight("in_proj_qkvz", "attention", 2 * k + 2 * v, h)
            yield Weight("in_proj_ba", "attention", 2 * heads, h)
            yield Weight("out_proj", "attention", h, v)
            yield Weight("recurrence_vectors", "norm", (2 * k + v) * g.conv_kernel + 2 * heads + g.value_dim)
        case Mamba2() as m:
            heads, inner, conv = _mamba_widths(m, tp)
            yield Weight("in_proj", "attention", inner + conv + heads, h)
            yield Weight("out_proj", "attention", h, inner)
            vectors = conv * (m.conv_kernel + m.conv_bias) + 3 * heads + inner
            vectors += (inner + conv + heads + h) * m.bias
            yield Weight("recurrence_vectors", "norm", vectors)


def _latent(a: LatentAttention, h: int, tp: int) -> Iterator[Weight]:
    heads = split(a.heads, tp)
    q = heads * (a.qk_nope_dim + a.qk_rope_dim)
    if a.q_lora_rank:
        yield Weight("q_kv_a_proj", "attention", a.q_lora_rank + a.latent, h)
        yield Weight("q_b_proj", "attention", q, a.q_lora_rank)
    else:
        yield Weight("q_proj", "attention", q, h)
        yield Weight("kv_a_proj", "attention", a.latent, h)
    up = Weight("kv_b_proj", "attention", heads * (a.qk_nope_dim + a.v_dim), a.kv_lora_rank)
    yield up
    yield up._replace(name="kv_b_absorbed", part="norm", stored=False)
    yield Weight("o_proj", "attention", h, heads * a.v_dim)
    yield Weight("attention_vectors", "norm", (a.q_lora_rank or 0) + a.kv_lora_rank)
    if a.index_heads:
        yield Weight("index_q_proj", "attention", a.index_heads * a.index_dim, a.q_lora_rank or h)
        yield Weight("index_k_proj", "attention", a.index_dim, h)
        yield Weight("index_weights", "norm", a.index_heads, h)
        yield Weight("index_vectors", "norm", 2 * a.index_dim)


def _mlp(layer: Layer, h: int, sharding: Sharding) -> Iterator[Weight]:
    match layer.mlp:
        case DenseMlp() as d:
            yield from _two(d.inter, d.gated, h, sharding.tensor, "", "mlp")
            if d.bias:
                yield Weight("mlp_vectors", "norm", split(d.inter, sharding.tensor) * (2 if d.gated else 1) + h)
        case MoE() as m:
            inner = split(m.inter, sharding.expert_tensor)
            local = split(m.experts + sharding.redundant, sharding.expert)
            wide = inner * (2 if m.gated else 1)
            yield Weight("router", "router", m.experts, h)
            width = m.latent or h
            yield Weight("experts_up", "expert", wide, width, local, min(local, m.top_k))
            yield Weight("experts_down", "expert", width, inner, local, min(local, m.top_k))
            if m.latent:
                yield Weight("latent_in_proj", "mlp", m.latent, h)
                yield Weight("latent_out_proj", "mlp", h, m.latent)
            if m.router_bias:
                yield Weight("router_bias", "norm", m.experts)
            if m.expert_bias:
                yield Weight("expert_bias", "norm", wide + width, 0, local, min(local, m.top_k))
            if m.shared_inter:
                ranks = 1 if sharding.sequence_parallel else sharding.tensor
                yield from _two(m.shared_inter, m.gated, h, ranks, "shared_", "mlp")
            if m.shared_gate:
                yield Weight("shared_gate", "router", 1, h)


def _two(inter: int, gated: bool, h: int, tp: int, prefix: str, part: str) -> Iterator[Weight]:
    inner = split(inter, tp)
    yield Weight(f"{prefix}gate_up_proj" if gated else f"{prefix}up_proj", part, inner * (2 if gated else 1), h)
    yield Weight(f"{prefix}down_proj", part, h, inner)


def outer_weights(arch: Architecture, sharding: Sharding, *, first: bool, last: bool) -> list[Weight]:
    """Embedding table, final norm and output projection of a stage; the vocabulary padded and split as in vLLM."""
    rows = arch.vocab if sharding == ONE else split(padded_vocab(arch), sharding.tensor)
    table = []
    if first or (last and arch.tied):
        table.append(Weight("embed_tokens", "embedding", rows, arch.hidden))
    if last:
        table.append(Weight("norm", "norm", arch.hidden * (2 if arch.norm_bias else 1)))
        if not arch.tied:
            table.append(Weight("lm_head", "embedding", rows, arch.hidden))
        if arch.head_bias:
            table.append(Weight("lm_head_bias", "norm", rows))
    return table


def padded_vocab(arch: Architecture) -> int:
    return split(arch.vocab, _VOCAB_PADDING) * _VOCAB_PADDING


class Parameters(NamedTuple):
    """Numbers of parameters of the whole model; a tied table counts once."""

    total: int
    active: int
    """those that one token uses: `top_k` of the experts, everything else"""
    embedding: int
    """embedding table and, unless tied, output projection"""
    layers: tuple[int, ...]


def parameters(arch: Architecture) -> Parameters:
    outer = outer_weights(arch, ONE, first=True, last=True)
    layers = [[w for w in layer_weights(layer, arch) if w.stored] for layer in arch.layers]
    total = sum(w.elements for w in outer)
    every = [w for layer in layers for w in layer]
    return Parameters(
        total=total + sum(w.elements for w in every),
        active=total + sum(w.elements // w.copies * w.used for w in every),
        embedding=sum(w.elements for w in outer if w.part == "embedding"),
        layers=tuple(sum(w.elements for w in layer) for layer in layers),
    )


def stage_weights(arch: Architecture, sharding: Sharding, stage: int) -> list[Weight]:
    """All weights of the fullest rank of pipeline stage `stage`."""
    run = stages(arch, sharding.pipeline)[stage]
    last = stage == sharding.pipeline - 1
    outer = outer_weights(arch, sharding, first=stage == 0, last=last)
    return outer + [w for i in run for w in layer_weights(arch.layers[i], arch, sharding)]


def weight_bytes(arch: Architecture, dtypes: Dtypes, sharding: Sharding = ONE, stage: int | None = None) -> int:
    """Bytes of weights on the fullest rank of `stage`, or of the heaviest stage when it is None.

    Norms, biases and routers are repeated on every rank; KV heads are repeated when `tensor` exceeds them.
    """
    if stage is None:
        return max(weight_bytes(arch, dtypes, sharding, s) for s in range(sharding.pipeline))
    return sum(dtypes.of(w.part).bytes(w.elements) for w in stage_weights(arch, sharding, stage))


def _delta_widths(g: GatedDeltaNet, tp: int) -> tuple[int, int, int]:
    """Key width, value width and value heads a rank."""
    heads = split(g.value_heads, tp)
    return split(g.key_heads, tp) * g.key_dim, heads * g.value_dim, heads


def _mamba_widths(m: Mamba2, tp: int) -> tuple[int, int, int]:
    """Heads, inner width and convolution width a rank (groups repeat when there are fewer than ranks)."""
    heads = split(m.heads, tp)
    return heads, heads * m.head_dim, heads * m.head_dim + 2 * split(m.groups, tp) * m.state


def recurrent_elements(mixer: GatedDeltaNet | Mamba2, tp: int = 1) -> tuple[int, int]:
    """Elements a sequence a rank of (recurrent state, convolution state)."""
    if isinstance(mixer, GatedDeltaNet):
        k, v, heads = _delta_widths(mixer, tp)
        return heads * mixer.key_dim * mixer.value_dim, (2 * k + v) * (mixer.conv_kernel - 1)
    heads, _, conv = _mamba_widths(mixer, tp)
    return heads * mixer.head_dim * mixer.state, conv * (mixer.conv_kernel - 1)


def matrices(weights: Iterable[Weight]) -> list[Weight]:
    """Those of `weights` that a step multiplies with."""
    return [w for w in weights if w.k and w.stored]
