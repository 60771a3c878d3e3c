"""A model's step as operators, in the order and with the fusions of vLLM (q, k, v in one matrix; gate and up in one).

    >>> sum(op.flops(shape) * sum(op.stages) for op in operators(arch, dtypes, Sharding()))

Every operator is one rank's share. Weights are those of `servetwin.model.weights`, so that FLOPs, traffic and memory
agree by construction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from servetwin.model.dtypes import Dtypes
from servetwin.model.experts import AS_VLLM, ExpertOptions, expert_layer, rebalancing
from servetwin.model.kernels import AttentionKernel, Collective, Gemm, Indexer, Kind, Operator, Recurrence
from servetwin.model.kv import layer_kv
from servetwin.model.layers import Architecture, Attention, GatedDeltaNet, LatentAttention, Layer, Mamba2, MoE
from servetwin.model.products import dense, move, product
from servetwin.model.sharding import Sharding, check_sharding, split, stages
from servetwin.model.weights import Weight, layer_weights, padded_vocab, recurrent_elements


def operators(
    arch: Architecture, dtypes: Dtypes, sharding: Sharding | None = None, experts: ExpertOptions = AS_VLLM
) -> list[Operator]:
    """The operators of one step of `arch` on one rank, equal ones once with their number a stage.

    Collectives stand in their own operators; the pipeline hand-over is run by every stage but the last. InputError for
    a sharding that the model does not allow, or an exchange between experts that it does not.
    """
    sharding = sharding or Sharding()
    check_sharding(arch, sharding)
    counts: dict[Operator, list[int]] = {}
    number = 0
    for stage, run in enumerate(stages(arch, sharding.pipeline)):
        found: list[Operator] = []
        if stage == 0:
            found += _before(arch, dtypes, sharding)
        for index in run:
            found += _layer(arch.layers[index], number, arch, dtypes, sharding, experts)
            number += isinstance(arch.layers[index].mlp, MoE)
        held = [layer_weights(arch.layers[index], arch, sharding) for index in run]
        found += rebalancing(arch, dtypes, sharding, held, experts)
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


def _layer(
    layer: Layer, number: int, arch: Architecture, dtypes: Dtypes, sharding: Sharding, experts: ExpertOptions
) -> Iterator[Operator]:
    """`number`: of the layer among those with experts."""
    held = {w.name: w for w in layer_weights(layer, arch, sharding)}
    if layer.mixer is not None:
        yield _norm("input_norm", arch, dtypes)
        yield from _mixer(layer, arch, dtypes, sharding, held)
        yield from _allreduce("mixer", arch, dtypes, sharding)
    if layer.mlp is not None:
        yield _norm("post_attention_norm", arch, dtypes)
        if isinstance(layer.mlp, MoE):
            yield from expert_layer(layer.mlp, number, arch, dtypes, sharding, held, experts)
        else:
            yield from dense("", dtypes, held)
            yield from _allreduce("mlp", arch, dtypes, sharding)
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
            yield from product(held["qkv_proj"], dtypes)
            if m.qk_norm:
                yield move("qk_norm", "norm", a.bytes(turned), a.bytes(turned))
            yield move("rope", "elementwise", a.bytes(turned), a.bytes(turned))
            assert kept is not None
            yield move("kv_write", "elementwise", a.bytes(2 * kv * m.head_dim), kept.bytes_per_token)
            kinds: tuple[Kind, ...] = ("context_attention", "generation_attention")
            for kind in kinds:
                kernel = AttentionKernel(
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
                yield from [kernel] if kernel.is_context else _dealt_out(kernel, sharding)
            if m.gate:
                yield move(
                    "attention_gate", "elementwise", a.bytes(2 * heads * m.head_dim), a.bytes(heads * m.head_dim)
                )
            yield from product(held["o_proj"], dtypes)
        case LatentAttention() as m:
            yield from _latent(m, dtypes, sharding, held)
        case GatedDeltaNet() | Mamba2() as m:
            state, conv = recurrent_elements(m, tp)
            out = held["out_proj"].k
            wide = conv // (m.conv_kernel - 1)
            entry = ("in_proj_qkvz", "in_proj_ba") if isinstance(m, GatedDeltaNet) else ("in_proj",)
            for name in entry:
                yield from product(held[name], dtypes)
            yield move("conv1d", "elementwise", a.bytes(wide), a.bytes(wide))
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
            yield move("gated_norm", "norm", a.bytes(2 * out), a.bytes(out))
            yield from product(held["out_proj"], dtypes)


def _latent(m: LatentAttention, dtypes: Dtypes, sharding: Sharding, held: dict[str, Weight]) -> Iterator[Operator]:
    """Prefills rebuild keys and values from the latent; decodes attend in the latent with absorbed projections
    (DeepSeek-V2, arXiv:2405.04434, appendix C). Both cost the FLOPs of `kv_b_proj` once a new token."""
    a, tp = dtypes.activation, sharding.tensor
    heads = split(m.heads, tp)
    for name in ("q_kv_a_proj", "q_proj", "kv_a_proj"):
        if name in held:
            yield from product(held[name], dtypes)
    ranks = m.kv_lora_rank + (m.q_lora_rank or 0)
    yield move("latent_norm", "norm", a.bytes(ranks), a.bytes(ranks))
    if "q_b_proj" in held:
        yield from product(held["q_b_proj"], dtypes)
    turned = (heads + 1) * m.qk_rope_dim
    yield move("rope", "elementwise", a.bytes(turned), a.bytes(turned))
    yield move("kv_write", "elementwise", a.bytes(m.latent), dtypes.kv.bytes(m.latent))
    if m.index_heads:
        for name in ("index_q_proj", "index_k_proj", "index_weights"):
            yield from product(held[name], dtypes)
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
    yield from product(up, dtypes)
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
    generation = AttentionKernel(
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
    yield from _dealt_out(generation, sharding)
    yield from product(held["o_proj"], dtypes)


def _dealt_out(kernel: AttentionKernel, sharding: Sharding) -> Iterator[Operator]:
    """Decode attention, its KV dealt out over `context` ranks: each gathers the queries of all of them, attends to its
    part of the tokens, and the partial outputs are merged by their log-sum-exp (gathered in float32) and scattered back
    to the ranks of the heads. vLLM's decode context parallel; Helix parallelism (arXiv:2507.07120, 2.1) is alike."""
    ranks = sharding.context
    if ranks == 1:
        yield kernel
        return
    a, heads = kernel.activation, kernel.heads * ranks
    yield Collective(
        name="query_allgather",
        kind="allgather",
        rows="decodes",
        ranks=ranks,
        bytes_a_row=a.bytes(heads * kernel.qk_dim),
    )
    yield replace(kernel, heads=heads, context=ranks)
    yield Collective(name="lse_allgather", kind="allgather", rows="decodes", ranks=ranks, bytes_a_row=4 * heads * ranks)
    yield Collective(
        name="attention_reducescatter",
        kind="reducescatter",
        rows="decodes",
        ranks=ranks,
        bytes_a_row=a.bytes(heads * kernel.v_dim),
    )


def _norm(name: str, arch: Architecture, dtypes: Dtypes) -> Operator:
    """Norm fused with the addition of the residual: reads both, writes both."""
    size = dtypes.activation.bytes(2 * arch.hidden)
    return move(name, "norm", size, size)


def _allreduce(name: str, arch: Architecture, dtypes: Dtypes, sharding: Sharding) -> Iterator[Operator]:
    if sharding.tensor > 1:
        yield Collective(
            name=f"{name}_allreduce",
            kind="allreduce",
            ranks=sharding.tensor,
            bytes_a_row=dtypes.activation.bytes(arch.hidden),
        )
