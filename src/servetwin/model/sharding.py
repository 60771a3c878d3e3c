"""How a model is spread over devices."""

from __future__ import annotations

from dataclasses import dataclass

from servetwin.errors import InputError
from servetwin.model.layers import Architecture, Attention, LatentAttention, MoE


@dataclass(frozen=True, slots=True)
class Sharding:
    """Degrees of parallelism, named as in vLLM.

    `tensor` splits every matrix over the ranks of a group, `pipeline` gives each stage a run of layers, `data` repeats
    attention and dense parts and gives each copy its own requests. `expert` = ranks over which whole experts are
    spread; what remains of tensor x data splits each expert's width (vLLM: expert = tensor x data with
    --enable-expert-parallel, else 1), `redundant` = copies of popular experts beyond one of each (vLLM's
    `num_redundant_experts`). `context` = ranks of a tensor group over which the KV of every sequence is dealt out
    (vLLM's --decode-context-parallel-size); it takes no devices of its own.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    expert: int = 1
    redundant: int = 0
    context: int = 1

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "data", "expert", "context"):
            if getattr(self, name) < 1:
                raise InputError("must be at least 1", field=f"parallelism.{name}", found=getattr(self, name))
        if self.tensor * self.data % self.expert:
            raise InputError(
                "must divide tensor x data",
                field="parallelism.expert",
                found=self.expert,
                allowed=f"a divisor of {self.tensor * self.data}",
            )
        if self.tensor % self.context:
            raise InputError(
                "must divide tensor",
                field="parallelism.context",
                found=self.context,
                allowed=f"a divisor of {self.tensor}",
            )

    @property
    def expert_tensor(self) -> int:
        """Ranks that share the width of one expert."""
        return self.tensor * self.data // self.expert

    @property
    def sequence_parallel(self) -> bool:
        """Whether tensor ranks, which hold the same tokens after attention, deal them out among themselves for the
        expert layers, so that each token is dispatched once (vLLM `use_sequence_parallel_moe`: tensor and data above 1
        with expert parallelism). Shared experts then stand whole on every rank."""
        return self.tensor > 1 and self.data > 1 and self.expert > 1


def check_sharding(arch: Architecture, sharding: Sharding) -> None:
    """InputError unless vLLM could run `arch` so: heads divide, KV heads divide or repeat, experts suffice."""
    tp = sharding.tensor
    for mixer in dict.fromkeys(arch.mixers):
        if isinstance(mixer, Attention | LatentAttention) and mixer.heads % tp:
            raise InputError(
                "must divide the attention heads",
                field="parallelism.tensor",
                found=tp,
                allowed=f"a divisor of {mixer.heads}",
            )
        if isinstance(mixer, Attention) and mixer.kv_heads % tp and tp % mixer.kv_heads:
            raise InputError(
                "must divide the key-value heads or be a multiple of them",
                field="parallelism.tensor",
                found=tp,
                allowed=f"a divisor or multiple of {mixer.kv_heads}",
            )
    if sharding.pipeline > len(arch.layers):
        raise InputError(
            "must not exceed the layers of the model",
            field="parallelism.pipeline",
            found=sharding.pipeline,
            allowed=f"<= {len(arch.layers)}",
        )
    experts = min((layer.mlp.experts for layer in arch.layers if isinstance(layer.mlp, MoE)), default=0)
    if sharding.expert > 1 and sharding.expert > experts:
        raise InputError(
            "must not exceed the experts of the model",
            field="parallelism.expert",
            found=sharding.expert,
            allowed=f"<= {experts}" if experts else "1, the model has no experts",
        )
    _check_redundant(arch, sharding)
    if sharding.context > 1:
        _check_context(arch, sharding)


def _check_redundant(arch: Architecture, sharding: Sharding) -> None:
    if not sharding.redundant:
        return
    if sharding.expert == 1:
        raise InputError(
            "copies of experts need ranks to spread them over",
            field="experts.redundant_experts",
            found=sharding.redundant,
            allowed="with parallelism.expert above 1",
        )
    for experts in {layer.mlp.experts for layer in arch.layers if isinstance(layer.mlp, MoE)}:
        if left := (experts + sharding.redundant) % sharding.expert:
            raise InputError(
                f"{experts} experts and their copies cannot be spread evenly over {sharding.expert} ranks",
                field="experts.redundant_experts",
                found=sharding.redundant,
                allowed=f"such as {sharding.redundant - left + sharding.expert}",
            )


def _check_context(arch: Architecture, sharding: Sharding) -> None:
    """vLLM shards the KV along the sequence only over ranks that would hold copies of the same heads, and only where
    all layers keep the KV of all tokens."""
    field, context = "parallelism.context", sharding.context
    for mixer in dict.fromkeys(arch.mixers):
        whole = isinstance(mixer, Attention | LatentAttention) and not (
            mixer.window if isinstance(mixer, Attention) else mixer.index_heads
        )
        if not whole:
            message = "needs attention over all tokens in every layer (no window, state or sparse indexer)"
            raise InputError(message, field=field, found=context, allowed="1")
        copies = sharding.tensor // mixer.kv_heads if isinstance(mixer, Attention) else sharding.tensor
        if copies < 1 or copies % context:
            held = max(1, copies)
            message = f"KV is dealt out over the ranks that hold copies of the same heads, here {held}"
            raise InputError(message, field=field, found=context, allowed=f"a divisor of {held}")


def stages(arch: Architecture, pipeline: int) -> tuple[range, ...]:
    """Layers of each pipeline stage. Layers left over by an even split go one each to the stages before the last
    (nearest first), since the last one also runs the output projection (vLLM `get_pp_indices`)."""
    each, left = divmod(len(arch.layers), pipeline)
    sizes = [each] * pipeline
    for back in range(left):
        sizes[-(back + 2)] += 1
    starts = [sum(sizes[:stage]) for stage in range(pipeline)]
    return tuple(range(start, start + size) for start, size in zip(starts, sizes, strict=True))


def split(size: int, ways: int) -> int:
    """The share of the fullest rank when `size` is spread over `ways`."""
    return -(-size // ways)
