"""How many KV blocks fit on a device: what an engine finds out by a profiling run, estimated.

    blocks = (device memory x utilisation - weights - activation peak - reserve) / bytes a block

as vLLM reckons it at start (`determine_available_memory`, `get_kv_cache_config_from_groups`; versions 0.19 to 0.33). A
rank's device memory is what the driver reports (`total_memory`), not the figure in the brochure. What the driver, the
CUDA context and NCCL took before the engine looked comes out of the 1 - utilisation outside, as in vLLM.

Measured against (nothing here is fitted to a case; see `Reserve` for what is assumed):

| case | measured or implied | this estimate |
| --- | --- | --- |
| RTX 4090 (25250627584 B), Llama-3.1-8B bf16, vLLM 0.19, 2048 tokens, 256 sequences | 2588 blocks | 2565 (-0.9 %) |
| H200, Llama-3.1-70B fp8 + fp8 KV, 8192 tokens, 1024 sequences | 356k-366k tokens (two other estimates) | 364k-368k |
| H100, TP2, Llama-3.1-70B fp8 + bf16 KV, same settings | 220k-230k tokens (implied by queueing) | 228k-231k |

Only the first is a measurement of the number itself. The error is all in activations and reserve, so it is a fixed
0.1-0.5 GB: under 1 % of the KV cache of an 80 GB device, more where little is left beside the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from servetwin.errors import InputError
from servetwin.model.dtypes import Dtypes
from servetwin.model.kv import KvGroup, kv_groups
from servetwin.model.layers import Architecture, MoE
from servetwin.model.sharding import Sharding, check_sharding, stages
from servetwin.model.weights import layer_weights, padded_vocab, weight_bytes

_SAMPLER_BYTES = 2 + 4 + 4 + 4
"""a row and vocabulary entry while sampling: logits in 16 bit, in float32, probabilities, exponential noise"""


@dataclass(frozen=True, slots=True)
class Reserve:
    """Bytes a rank that are neither weights, activations nor KV. Both defaults are assumed round figures: the order of
    what vLLM logs for dense models of 8 to 70 billion parameters; give measured ones where they are known."""

    graphs: int = 512 * 2**20
    """CUDA graphs (vLLM subtracts its estimate since 0.19); 0 with enforce_eager"""
    runtime: int = 256 * 2**20
    """what the libraries take during the profiling run: kernels, cuBLAS and attention workspaces, fragmentation"""


@dataclass(frozen=True, slots=True)
class BlockGroup:
    """Layers that share one block table; every block of every group has the same bytes and comes from one pool."""

    kind: str
    """full, window, latent or state"""
    layers: int
    window: int | None = None

    def blocks(self, tokens: int, block_size: int, max_num_batched_tokens: int) -> int:
        """Most blocks that one request of `tokens` tokens holds: a window keeps what the next step may still see, a
        state one block (vLLM `max_memory_usage_bytes` of the group's kind)."""
        if self.kind == "state":
            return 1
        if self.window is None:
            return -(-tokens // block_size)
        return -(-min(self.window - 1 + max_num_batched_tokens, tokens) // block_size) + 1


@dataclass(frozen=True, slots=True)
class Capacity:
    num_gpu_blocks: int
    """blocks of the shared pool, the null block included"""
    block_size: int
    """tokens a block; larger than asked for where a recurrent state must fit into one"""
    block_bytes: int
    tokens: int
    """tokens of context that fit when requests are of max_model_len (vLLM's "GPU KV cache size")"""
    groups: tuple[BlockGroup, ...]
    parts: Mapping[str, int]
    """bytes: weights, activations, graphs, runtime, kv_cache, rest (less than a block), outside; their sum is the
    device memory exactly"""


def kv_capacity(
    arch: Architecture,
    dtypes: Dtypes,
    sharding: Sharding,
    *,
    device_memory_bytes: int,
    gpu_memory_utilization: float = 0.9,
    block_size: int = 16,
    max_num_batched_tokens: int = 2048,
    max_num_seqs: int = 256,
    max_model_len: int | None = None,
    reserve: Reserve | None = None,
) -> Capacity:
    """KV blocks of one rank; with pipeline stages, of the stage that has the fewest (vLLM takes the minimum).

    InputError when weights and activations leave no room, or not enough for one request of `max_model_len` tokens,
    with what is missing and the smallest tensor degree that would do; also for a sharding the model does not allow.
    """
    check_sharding(arch, sharding)
    if not 0 < gpu_memory_utilization <= 1:
        raise InputError("must lie in (0, 1]", field="gpu_memory_utilization", found=gpu_memory_utilization)
    if block_size < 1:
        raise InputError("must be at least 1", field="block_size", found=block_size)
    limits = _Limits(
        device_memory_bytes,
        gpu_memory_utilization,
        block_size,
        max_num_batched_tokens,
        max_num_seqs,
        max_model_len,
        reserve or Reserve(),
    )
    capacity, missing = _fewest(arch, dtypes, sharding, limits)
    if missing > 0:
        degree = _degree_that_fits(arch, dtypes, sharding, limits)
        weights = capacity.parts["weights"] / 2**30
        what = "one request of max_model_len" if capacity.parts["kv_cache"] > 0 else "a KV cache"
        raise InputError(
            f"the model does not fit: {missing / 2**30:.2f} GiB a device are missing for {what}"
            f" (weights {weights:.2f} GiB, device {device_memory_bytes / 2**30:.2f} GiB)",
            field="parallelism.tensor",
            found=sharding.tensor,
            allowed=f">= {degree}" if degree else "no tensor degree up to 64 fits; use a larger device or fewer bits",
        )
    return capacity


def block_layout(
    arch: Architecture, dtypes: Dtypes, sharding: Sharding, block_size: int
) -> tuple[tuple[BlockGroup, ...], int]:
    """The KV groups and tokens a block where the number of blocks is given; of the stage with the largest blocks.
    Ranks that deal out the KV of a sequence hold `block_size` tokens of a block each, as in vLLM.

    InputError for a sharding the model does not allow.
    """
    check_sharding(arch, sharding)
    wide = block_size * sharding.context
    plans = [plan_groups(kv_groups(arch, dtypes, sharding, i), wide) for i in range(sharding.pipeline)]
    groups, tokens, _ = max(plans, key=lambda plan: plan[2])
    return groups, tokens


@dataclass(frozen=True, slots=True)
class _Limits:
    device: int
    utilization: float
    block_size: int
    batched_tokens: int
    seqs: int
    model_len: int | None
    reserve: Reserve


def _fewest(arch: Architecture, dtypes: Dtypes, sharding: Sharding, limits: _Limits) -> tuple[Capacity, int]:
    """The capacity of the tightest stage, and the bytes that it lacks (<= 0 when it fits)."""
    found = [_stage(arch, dtypes, sharding, stage, limits) for stage in range(sharding.pipeline)]
    return max(found, key=lambda one: (max(0, one[1]), -one[0].num_gpu_blocks))


def _stage(arch: Architecture, dtypes: Dtypes, sharding: Sharding, stage: int, limits: _Limits) -> tuple[Capacity, int]:
    weights = weight_bytes(arch, dtypes, sharding, stage)
    peak = activation_bytes(arch, dtypes, sharding, stage, limits.batched_tokens, limits.seqs)
    budget = int(limits.device * limits.utilization)
    room = budget - weights - peak - limits.reserve.graphs - limits.reserve.runtime
    wide = limits.block_size * sharding.context
    groups, block_size, block_bytes = plan_groups(kv_groups(arch, dtypes, sharding, stage), wide)
    blocks = max(0, room) // block_bytes if block_bytes else 0
    length = limits.model_len or arch.max_positions
    a_request = sum(g.blocks(length, block_size, limits.batched_tokens) for g in groups)
    needed = a_request * block_bytes if limits.model_len else block_bytes
    plain = len(groups) == 1 and groups[0].window is None and groups[0].kind != "state"
    tokens = blocks * block_size if plain or not a_request else blocks * length // a_request
    parts = {
        "weights": weights,
        "activations": peak,
        "graphs": limits.reserve.graphs,
        "runtime": limits.reserve.runtime,
        "kv_cache": blocks * block_bytes,
        "rest": room - blocks * block_bytes,
        "outside": limits.device - budget,
    }
    capacity = Capacity(blocks, block_size, block_bytes, tokens, groups, MappingProxyType(parts))
    return capacity, needed - room


def _degree_that_fits(arch: Architecture, dtypes: Dtypes, sharding: Sharding, limits: _Limits) -> int | None:
    for tensor in (1, 2, 4, 8, 16, 32, 64):
        if tensor <= sharding.tensor:
            continue
        whole = sharding.tensor * sharding.data
        expert = tensor * sharding.data if sharding.expert == whole > 1 else sharding.expert
        wider = Sharding(tensor, sharding.pipeline, sharding.data, expert)
        try:
            check_sharding(arch, wider)
        except InputError:
            continue
        if _fewest(arch, dtypes, wider, limits)[1] <= 0:
            return tensor
    return None


def activation_bytes(
    arch: Architecture,
    dtypes: Dtypes,
    sharding: Sharding,
    stage: int,
    max_num_batched_tokens: int,
    max_num_seqs: int,
) -> int:
    """Peak bytes of intermediate tensors in the profiling run, the larger of two moments:

    - in the widest layer, for every batched token: hidden state, residual, and either the fused q, k, v with the
      attention output, the fused gate and up with their product, or the workspaces of the routed experts
      (top_k x (max(gate and up, hidden) + inner), for the tokens of all data-parallel ranks);
    - in the sampler of the last stage, for `max_num_seqs` rows: `_SAMPLER_BYTES` an entry of the padded vocabulary,
      beside the hidden state of every token. The logits are gathered, so `tensor` does not divide them.
    """
    run = stages(arch, sharding.pipeline)[stage]
    tokens, size = max_num_batched_tokens, dtypes.activation
    widest = max((_layer_width(arch, i, sharding) for i in run), default=0)
    forward = size.bytes(tokens * (2 * arch.hidden + widest))
    if stage < sharding.pipeline - 1:
        return forward
    rows = min(max_num_seqs, tokens)
    sampler = size.bytes((tokens + rows) * arch.hidden) + rows * padded_vocab(arch) * _SAMPLER_BYTES
    return max(forward, sampler)


def _layer_width(arch: Architecture, index: int, sharding: Sharding) -> int:
    """Elements a token that are alive at once in layer `index`, beside hidden state and residual."""
    layer = arch.layers[index]
    held = {w.name: w for w in layer_weights(layer, arch, sharding)}

    def pair(first: str, second: str) -> int:
        return (held[first].n if first in held else 0) + (held[second].k if second in held else 0)

    widths = [
        pair("qkv_proj", "o_proj"),
        pair("in_proj_qkvz", "out_proj"),
        pair("in_proj", "out_proj"),
        pair("q_b_proj", "o_proj") + pair("kv_b_proj", ""),
        pair("gate_up_proj", "down_proj"),
        pair("up_proj", "down_proj"),
    ]
    if isinstance(layer.mlp, MoE):
        up, down = held["experts_up"], held["experts_down"]
        widths.append(layer.mlp.top_k * (max(up.n, down.n) + down.k) * sharding.data)
    return max(widths)


def plan_groups(kept: tuple[KvGroup, ...], block_size: int) -> tuple[tuple[BlockGroup, ...], int, int]:
    """Block groups, tokens a block and bytes a block, as vLLM lays out layers that keep different things.

    One kind of layer is one group. With several, all blocks must have the same bytes, so each kind is cut into groups
    of as many layers as the rarest kind has (of the commonest, when that is less than half as many again), the last
    group padded (`_get_kv_cache_groups_uniform_page_size`). A recurrent state takes one block, for which attention
    blocks grow to a multiple of 16 tokens. Exact for models of one kind; for mixed head sizes an upper bound on bytes.
    """
    if not kept:
        return (), block_size, 0
    widest = max(group.bytes_per_token for group in kept)
    state = max(group.state_bytes for group in kept)
    if not widest:
        return (
            (BlockGroup("state", sum(g.layers for g in kept)),),
            block_size,
            sum(g.layers * g.state_bytes for g in kept),
        )
    if state > block_size * widest:
        block_size = -(-state // (16 * widest)) * 16
    kinds: dict[tuple[str, int | None], int] = {}
    for group in kept:
        kinds[group.kind, group.window] = kinds.get((group.kind, group.window), 0) + group.layers
    if len(kinds) == 1:
        (((kind, window), layers),) = kinds.items()
        return (
            (BlockGroup(kind, layers, window),),
            block_size,
            block_size * sum(group.layers * group.bytes_per_token for group in kept),
        )
    rarest, commonest = min(kinds.values()), max(kinds.values())
    size = commonest if 2 * commonest < 3 * rarest else rarest
    groups = []
    for (kind, window), layers in kinds.items():
        count = -(-layers // size)
        groups += [BlockGroup(kind, len(range(i, layers, count)), window) for i in range(count)]
    return tuple(groups), block_size, size * block_size * widest
