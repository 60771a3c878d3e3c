"""A model's step as operators, in the order and with the fusions of vLLM (q, k, v in one matrix; gate and up in one).

    >>> sum(op.flops(shape) * sum(op.stages) for op in operators(arch, dtypes, Sharding()))

Every operator is one rank's share. Weights are those of `servetwin.model.weights`, so that FLOPs, traffic and memory
agree by construction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from servetwin.model.dtypes import Dtypes
from servetwin.model.kernels import AttentionKernel, Collective, Experts, Gemm, Indexer, Kind, Operator, Recurrence
from servetwin.model.kv import layer_kv
from servetwin.model.layers import Architecture, Attention, GatedDeltaNet, LatentAttention, Layer, Mamba2, MoE
from servetwin.model.sharding import Sharding, check_sharding, split, stages
from servetwin.model.weights import Weight, layer_weights, padded_vocab, recurrent_elements


def operators(arch: Architecture, dtypes: Dtypes, sharding: Sharding | None = None) -> list[Operator]:
    """The operators of one step of `arch` on one rank, equal ones once with their number a stage.

    Collectives stand in their own operators; the pipeline hand-over is run by every stage but the last. InputError for
    a sharding that the model does not allow.
    """
    sharding = sharding or Sharding()
    check_sharding(arch, sharding)
    counts: dict[Operator, list[int]] = {}
    for stage, run in enumerate(stages(arch, sharding.pipeline)):
        found: list[Operator] = []
        if stage == 0:
            found += _before(arch, dtypes, sharding)
        for index in run:
            found += _layer(arch.layers[index], arch, dtypes, sharding)
        if stage == sharding.pipeline - 1:
            found += _after(arch, dtypes, sharding)
        else:
            found += _handover(arch, dtypes, sharding)
        for operator in found:
            counts.setdefault(operator, [0] * sharding.pipeline)[stage] += 1
    return [replace(operator, stages=tuple(count)) for operator, count in counts.items()]


def _before(arch: Architecture, dtypes: Dtypes, sharding: Sharding) -> Iterator[Operator]:
    row = dtypes.embedding.bytes(arch.hidden)
    yield Operator(name="embed_tokens", kind="embedding", read_a_row=row, written_a_row=row, dtype=dtypes.embedding)
    yield from _allreduce("embedding", arch, dtypes, sharding)


def _after(arch: Architecture, dtypes: Dtypes, sharding: Sharding) -> Iterator[Operator]:
    yield _norm("final_norm", arch, dtypes)
    width = arch.vocab if sharding.tensor == 1 else split(padded_vocab(arch), sharding.tensor)
    yield Gemm(
        name="lm_head", rows="logits", n=width, k=arch.hidden, dtype=dtypes.embedding, activation=dtypes.activation
    )
    if sharding.tensor > 1:
        yield Collective(
            name="logits_allgather",
            kind="allgather",
            rows="logits",
            ranks=sharding.tensor,
            bytes_a_row=dtypes.activation.bytes(padded_vocab(arch)),
        )
    logits = arch.vocab * 4
    yield Operator(
        name="sampler",
        kind="sampler",
        rows="logits",
        read_a_row=dtypes.activation.bytes(arch.vocab) + logits,
        written_a_row=logits,
    )


def _handover(arch: Architecture, dtypes: Dtypes, sharding: Sharding) -> Iterator[Operator]:
    """Hidden state and residual go to the next stage; each tensor rank sends its slice of both (vLLM)."""
    size = split(dtypes.activation.bytes(2 * arch.hidden), sharding.tensor)
    yield Collective(name="stage_handover", kind="sendrecv", ranks=2, group="pipeline", bytes_a_row=size)


def _layer(layer: Layer, arch: Architecture, dtypes: Dtypes, sharding: Sharding) -> Iterator[Operator]:
    held = {w.name: w for w in layer_weights(layer, arch, sharding)}
    if layer.mixer is not None:
        yield _norm("input_norm", arch, dtypes)
        yield from _mixer(layer, arch, dtypes, sharding, held)
        yield from _allreduce("mixer", arch, dtypes, sharding)
    if layer.mlp is not None:
        yield _norm("post_attention_norm", arch, dtypes)
        yield from _mlp(layer.mlp, arch, dtypes, sharding, held)
    for _ in range(layer.norms - (layer.mixer is not None) - (layer.mlp is not None)):
        yield _norm("output_norm", arch, dtypes)


def _mixer(
    layer: Layer, arch: Architecture, dtypes: Dtypes, sharding: Sharding, held: dict[str, Weight]
) -> Iterator[Operator]:
    a, tp = dtypes.activation, sharding.tensor
    kept = layer_kv(layer.mixer, dtypes, tp)
    match layer.mixer:
        case Attention() as m:
            heads, kv = split(m.heads, tp), split(m.kv_heads, tp)
            turned = (heads + kv) * m.head_dim
            yield from _gemm(held["qkv_proj"], dtypes)
            if m.qk_norm:
                yield _move("qk_norm", "norm", a.bytes(turned), a.bytes(turned))
            yield _move("rope", "elementwise", a.bytes(turned), a.bytes(turned))
            assert kept is not None
            yield _move("kv_write", "elementwise", a.bytes(2 * kv * m.head_dim), kept.bytes_per_token)
            kinds: tuple[Kind, ...] = ("context_attention", "generation_attention")
            for kind in kinds:
                yield AttentionKernel(
                    name=kind,
                    kind=kind,
                    heads=heads,
                    kv_heads=kv,
                    qk_dim=m.head_dim,
                    v_dim=m.head_dim,
                    kv_token_bytes=kept.bytes_per_token,
                    window=m.window,
                    dtype=dtypes.kv,
                    activation=a,
                )
            if m.gate:
                yield _move(
                    "attention_gate", "elementwise", a.bytes(2 * heads * m.head_dim), a.bytes(heads * m.head_dim)
                )
            yield from _gemm(held["o_proj"], dtypes)
        case LatentAttention() as m:
            yield from _latent(m, dtypes, tp, held)
        case GatedDeltaNet() | Mamba2() as m:
            state, conv = recurrent_elements(m, tp)
            out = held["out_proj"].k
            wide = conv // (m.conv_kernel - 1)
            entry = ("in_proj_qkvz", "in_proj_ba") if isinstance(m, GatedDeltaNet) else ("in_proj",)
            for name in entry:
                yield from _gemm(held[name], dtypes)
            yield _move("conv1d", "elementwise", a.bytes(wide), a.bytes(wide))
            assert kept is not None
            yield Recurrence(
                name="recurrence",
                heads=split(m.value_heads if isinstance(m, GatedDeltaNet) else m.heads, tp),
                state=state,
                state_bytes=kept.state_bytes,
                read_a_row=a.bytes(wide + out),
                written_a_row=a.bytes(out),
                dtype=a,
            )
            yield _move("gated_norm", "norm", a.bytes(2 * out), a.bytes(out))
            yield from _gemm(held["out_proj"], dtypes)


def _latent(m: LatentAttention, dtypes: Dtypes, tp: int, held: dict[str, Weight]) -> Iterator[Operator]:
    """Prefills rebuild keys and values from the latent; decodes attend in the latent with absorbed projections
    (DeepSeek-V2, arXiv:2405.04434, appendix C). Both cost the FLOPs of `kv_b_proj` once a new token."""
    a, heads = dtypes.activation, split(m.heads, tp)
    for name in ("q_kv_a_proj", "q_proj", "kv_a_proj"):
        if name in held:
            yield from _gemm(held[name], dtypes)
    ranks = m.kv_lora_rank + (m.q_lora_rank or 0)
    yield _move("latent_norm", "norm", a.bytes(ranks), a.bytes(ranks))
    if "q_b_proj" in held:
        yield from _gemm(held["q_b_proj"], dtypes)
    turned = (heads + 1) * m.qk_rope_dim
    yield _move("rope", "elementwise", a.bytes(turned), a.bytes(turned))
    yield _move("kv_write", "elementwise", a.bytes(m.latent), dtypes.kv.bytes(m.latent))
    if m.index_heads:
        for name in ("index_q_proj", "index_k_proj", "index_weights"):
            yield from _gemm(held[name], dtypes)
        kept = layer_kv(m, dtypes, tp)
        assert kept is not None
        yield Indexer(
            name="indexer",
            heads=m.index_heads,
            head_dim=m.index_dim,
            kv_token_bytes=kept.bytes_per_token - dtypes.kv.bytes(m.latent),
            read_a_row=a.bytes(m.index_heads * m.index_dim),
        )
    up = held["kv_b_proj"]
    yield from _gemm(up, dtypes)
    size, keys = dtypes.kv.bytes(m.latent), m.index_topk or None
    yield AttentionKernel(
        name="mla_context",
        kind="mla_context",
        heads=heads,
        kv_heads=heads,
        qk_dim=m.qk_nope_dim + m.qk_rope_dim,
        v_dim=m.v_dim,
        kv_token_bytes=size,
        window=keys,
        expand=2 * up.n * up.k,
        dtype=dtypes.kv,
        activation=a,
    )
    yield AttentionKernel(
        name="mla_generation",
        kind="mla_generation",
        heads=heads,
        kv_heads=1,
        qk_dim=m.latent,
        v_dim=m.kv_lora_rank,
        kv_token_bytes=size,
        window=keys,
        dtype=dtypes.kv,
        activation=a,
    )
    yield from _gemm(held["o_proj"], dtypes)


def _mlp(
    mlp: object, arch: Architecture, dtypes: Dtypes, sharding: Sharding, held: dict[str, Weight]
) -> Iterator[Operator]:
    if not isinstance(mlp, MoE):
        yield from _dense("", dtypes, held)
        yield from _allreduce("mlp", arch, dtypes, sharding)
        return
    a = dtypes.activation
    width = mlp.latent or arch.hidden
    yield from _gemm(held["router"], dtypes)
    yield _move("topk", "elementwise", 4 * mlp.experts, 8 * mlp.top_k)
    if mlp.latent:
        yield from _gemm(held["latent_in_proj"], dtypes)
    spread = sharding.data > 1
    if spread:
        yield _exchange("moe_dispatch", mlp, width, dtypes, sharding)
    down = held["experts_down"]
    yield Experts(
        name="experts",
        experts=mlp.experts,
        local_experts=down.copies,
        top_k=mlp.top_k,
        hidden=width,
        inter=down.k,
        gated=mlp.gated,
        data=sharding.data,
        dtype=dtypes.expert,
        activation=a,
    )
    yield _move("moe_sum", "elementwise", a.bytes(mlp.top_k * width), a.bytes(width))
    if spread:
        yield _exchange("moe_combine", mlp, width, dtypes, sharding)
    if mlp.latent:
        yield from _gemm(held["latent_out_proj"], dtypes)
    if mlp.shared_inter:
        yield from _dense("shared_", dtypes, held)
    if mlp.shared_gate:
        yield from _gemm(held["shared_gate"], dtypes)
    yield from _allreduce("mlp", arch, dtypes, sharding)


def _dense(prefix: str, dtypes: Dtypes, held: dict[str, Weight]) -> Iterator[Operator]:
    a = dtypes.activation
    up = held.get(f"{prefix}gate_up_proj") or held[f"{prefix}up_proj"]
    down = held[f"{prefix}down_proj"]
    yield from _gemm(up, dtypes)
    yield _move(f"{prefix}activation", "elementwise", a.bytes(up.n), a.bytes(down.k))
    yield from _gemm(down, dtypes)


def _gemm(weight: Weight, dtypes: Dtypes) -> Iterator[Operator]:
    """The product, and before it the quantisation of its input where it runs in fewer bits than the activations."""
    small = dtypes.of(weight.part)
    if small.compute in ("fp8", "int8", "nvfp4"):
        a = dtypes.activation
        bits = small.bits if small.compute == "nvfp4" else 8
        yield _move(f"{weight.name}_quantise", "elementwise", a.bytes(weight.k), -int(-weight.k * bits // 8))
    yield Gemm(name=weight.name, n=weight.n, k=weight.k, dtype=small, activation=dtypes.activation)


def _move(name: str, kind: Kind, read: int, written: int) -> Operator:
    return Operator(name=name, kind=kind, read_a_row=read, written_a_row=written)


def _norm(name: str, arch: Architecture, dtypes: Dtypes) -> Operator:
    """Norm fused with the addition of the residual: reads both, writes both."""
    size = dtypes.activation.bytes(2 * arch.hidden)
    return _move(name, "norm", size, size)


def _allreduce(name: str, arch: Architecture, dtypes: Dtypes, sharding: Sharding) -> Iterator[Operator]:
    if sharding.tensor > 1:
        yield Collective(
            name=f"{name}_allreduce",
            kind="allreduce",
            ranks=sharding.tensor,
            bytes_a_row=dtypes.activation.bytes(arch.hidden),
        )


def _exchange(name: str, mlp: MoE, width: int, dtypes: Dtypes, sharding: Sharding) -> Collective:
    """Tokens go to the ranks that hold their experts and come back: one copy for every rank that a token's `top_k`
    experts are expected on, or all ranks when every rank holds a share of every expert. Tensor ranks hold the same
    tokens and share the work."""
    homes = sharding.expert
    copies = sharding.expert_tensor * homes * (1 - (1 - 1 / homes) ** mlp.top_k)
    size = round(dtypes.activation.bytes(width) * copies / sharding.tensor)
    return Collective(
        name=name, kind="alltoall", ranks=sharding.tensor * sharding.data, group="expert", bytes_a_row=size
    )
