"""What a sequence keeps in memory: keys and values a token, or a state of constant size."""

from __future__ import annotations

from typing import Literal, NamedTuple

from servetwin.model.dtypes import Dtypes
from servetwin.model.layers import Architecture, Attention, GatedDeltaNet, LatentAttention, Mamba2, Mixer
from servetwin.model.sharding import Sharding, split, stages
from servetwin.model.weights import ONE, recurrent_elements

_INDEX_BYTES_A_SCALE = 4
"""DeepSeek-V3.2 keeps its indexer keys in fp8 with one float32 scale a token (128 elements)"""


class KvGroup(NamedTuple):
    """Layers of one stage that keep the same things, on one rank."""

    kind: Literal["full", "window", "latent", "state"]
    layers: int
    bytes_per_token: int
    """of one layer; 0 for a state"""
    window: int | None = None
    state_bytes: int = 0
    """of one layer and sequence"""


def layer_kv(mixer: Mixer | None, dtypes: Dtypes, tensor: int = 1, context: int = 1) -> KvGroup | None:
    """What one layer keeps on one rank, None when it keeps nothing; `context` ranks deal the tokens out.

    Grouped-query attention keeps 2 x kv_heads x head_dim elements a token, its heads repeated when `tensor` exceeds
    them; latent attention keeps one latent on every rank (DeepSeek-V2, arXiv:2405.04434, 2.1). Recurrent states are in
    the format that the configuration asks for (`mamba_ssm_dtype`, `mamba_ssm_cache_dtype`), convolution states in that
    of the activations, as vLLM keeps them.
    """
    match mixer:
        case Attention() as a:
            size = dtypes.kv.bytes(2 * split(a.kv_heads, tensor) * a.head_dim)
            return KvGroup("window" if a.window else "full", 1, split(size, context), a.window)
        case LatentAttention() as a:
            index = a.index_dim + _INDEX_BYTES_A_SCALE if a.index_heads else 0
            return KvGroup("latent", 1, split(dtypes.kv.bytes(a.latent) + index, context))
        case GatedDeltaNet() | Mamba2() as m:
            state, conv = recurrent_elements(m, tensor)
            return KvGroup("state", 1, 0, None, dtypes.state.bytes(state) + dtypes.activation.bytes(conv))
    return None


def kv_groups(arch: Architecture, dtypes: Dtypes, sharding: Sharding = ONE, stage: int = 0) -> tuple[KvGroup, ...]:
    """The distinct kinds of KV that `stage` keeps, each with its number of layers, in order of first appearance."""
    counts: dict[KvGroup, int] = {}
    for i in stages(arch, sharding.pipeline)[stage]:
        kept = layer_kv(arch.layers[i].mixer, dtypes, sharding.tensor, sharding.context)
        if kept is not None:
            counts[kept] = counts.get(kept, 0) + 1
    return tuple(group._replace(layers=count) for group, count in counts.items())


def kv_bytes_per_token(arch: Architecture, dtypes: Dtypes, sharding: Sharding = ONE, stage: int | None = None) -> int:
    """Bytes one more token adds on one rank while no window is full; the most of any stage when `stage` is None."""
    if stage is None:
        return max(kv_bytes_per_token(arch, dtypes, sharding, s) for s in range(sharding.pipeline))
    return sum(group.layers * group.bytes_per_token for group in kv_groups(arch, dtypes, sharding, stage))


def state_bytes_per_sequence(
    arch: Architecture, dtypes: Dtypes, sharding: Sharding = ONE, stage: int | None = None
) -> int:
    """Bytes of recurrent state a sequence on one rank, whatever its length; the most of any stage when it is None."""
    if stage is None:
        return max(state_bytes_per_sequence(arch, dtypes, sharding, s) for s in range(sharding.pipeline))
    return sum(group.layers * group.state_bytes for group in kv_groups(arch, dtypes, sharding, stage))
