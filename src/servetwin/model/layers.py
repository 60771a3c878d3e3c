"""What a decoder-only transformer is made of: plain data, one class a kind of layer part.

A layer is a token *mixer* (attention or a recurrence), an *MLP* (dense or a mixture of experts), or both; a model is a
tuple of layers, which need not be alike. Names follow the fields of the Hugging Face `config.json` they come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Attention:
    """Softmax attention that keeps keys and values of every token: multi-head, grouped-query or multi-query."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    """tokens that a query sees, itself included; None = all"""
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["head", "full"] | None = None
    """RMS norm on queries and keys: one weight a head dimension ("head"), or one a dimension of all heads ("full")"""
    sinks: bool = False
    """one learned logit a head (gpt-oss)"""
    gate: bool = False
    """the query projection also yields an output gate of the same width (Qwen3-Next)"""


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2): keys and values live in one latent of `kv_lora_rank + qk_rope_dim`."""

    heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_dim: int
    qk_rope_dim: int
    v_dim: int
    index_heads: int = 0
    """heads of the sparse-attention indexer (DeepSeek-V3.2), 0 = dense attention"""
    index_dim: int = 0
    index_topk: int = 0
    """keys that a query attends to after the indexer"""

    @property
    def latent(self) -> int:
        """Elements kept a token, shared by all heads."""
        return self.kv_lora_rank + self.qk_rope_dim


@dataclass(frozen=True, slots=True)
class GatedDeltaNet:
    """Linear attention with a constant state a sequence (Qwen3-Next, Qwen3.5)."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_kernel: int


@dataclass(frozen=True, slots=True)
class Mamba2:
    """State-space mixer with a constant state a sequence (Nemotron-H)."""

    heads: int
    head_dim: int
    groups: int
    state: int
    conv_kernel: int
    conv_bias: bool = True
    bias: bool = False


@dataclass(frozen=True, slots=True)
class DenseMlp:
    inter: int
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True, slots=True)
class MoE:
    """A mixture of experts: a router picks `top_k` of `experts` for every token; shared experts see every token."""

    experts: int
    top_k: int
    inter: int
    """intermediate size of one routed expert"""
    shared_inter: int = 0
    """intermediate size of all shared experts together, 0 = none"""
    shared_gate: bool = False
    gated: bool = True
    router_bias: bool = False
    """one value an expert, added to the logits or to the selection score (e_score_correction_bias)"""
    expert_bias: bool = False
    latent: int = 0
    """width of a projection that the routed experts work in, 0 = the hidden size (Nemotron 3 Super)"""
    groups: int = 1
    top_groups: int = 1
    """group-limited routing: experts come from the `top_groups` best of `groups` groups (DeepSeek-V3)"""


Mixer = Attention | LatentAttention | GatedDeltaNet | Mamba2
Mlp = DenseMlp | MoE


@dataclass(frozen=True, slots=True)
class Layer:
    mixer: Mixer | None
    mlp: Mlp | None
    norms: int = 2
    """norms over the hidden size"""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder-only transformer as its `config.json` describes it (text part, no multi-token prediction)."""

    model_type: str
    hidden: int
    vocab: int
    layers: tuple[Layer, ...]
    max_positions: int
    tied: bool = False
    """the output projection is the embedding table"""
    norm_bias: bool = False
    """LayerNorm with a bias instead of RMS norm"""
    head_bias: bool = False
    dtype: str = "bf16"
    """of the checkpoint where it is not quantised"""
    state_dtype: str | None = None
    """of recurrent states, None = that of the activations"""
    quantization: tuple[tuple[str, object], ...] = ()
    """the checkpoint's quantization_config, as sorted pairs"""
    excluded_parts: tuple[str, ...] = ()
    """what the configuration describes and this leaves out (vision tower, multi-token prediction)"""

    @property
    def heads(self) -> int:
        """Query heads of the widest attention layer, 0 when there is none."""
        return max((m.heads for m in self.mixers if isinstance(m, Attention | LatentAttention)), default=0)

    @property
    def kv_heads(self) -> int:
        """Key-value heads of the widest attention layer (1 for latent attention), 0 when there is none."""
        widths = [
            m.kv_heads if isinstance(m, Attention) else 1
            for m in self.mixers
            if isinstance(m, Attention | LatentAttention)
        ]
        return max(widths, default=0)

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        return tuple(layer.mixer for layer in self.layers if layer.mixer is not None)

    @property
    def is_moe(self) -> bool:
        return any(isinstance(layer.mlp, MoE) for layer in self.layers)
