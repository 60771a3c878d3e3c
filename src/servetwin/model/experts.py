"""The operators of a mixture-of-experts layer: router, what is exchanged, the routed and the shared experts.

How tokens meet the experts, as vLLM does it (0.19 to 0.33), by the layout of tensor (t) and data (d) ranks:

- d = 1: all ranks hold the same tokens; each computes its share, and an all-reduce over the t ranks adds up.
- d > 1, `allgather_reducescatter` (vLLM's default --all2all-backend): the hidden states of all ranks are gathered,
  with the experts picked and their weights; every rank computes its experts for all of them; a reduce-scatter adds up
  and returns each rank's own (`MoEPrepareAndFinalizeNaiveDPEPModular`).
- d > 1, `alltoall` (DeepEP and the like): each token is sent to the ranks that hold one of its experts, and back.

Hidden states go to the experts in the format in which these multiply, and come back as activations.

With t > 1 and whole experts spread (expert > 1), the t ranks first deal their common tokens out (sequence parallel),
so that the exchange is one over all t x d ranks, and an all-gather over t restores every rank's tokens. With t > 1 and
only widths spread (expert = 1), the exchange is over the d ranks and the all-reduce over t remains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import comb
from typing import Literal

from servetwin.errors import InputError
from servetwin.model.dtypes import Dtypes
from servetwin.model.expert_placement import RankLoads
from servetwin.model.kernels import Collective, ExpertExchange, Experts, Operator
from servetwin.model.layers import Architecture, MoE
from servetwin.model.products import dense, move, product
from servetwin.model.sharding import Sharding, split
from servetwin.model.weights import Weight

Communication = Literal["auto", "allgather_reducescatter", "alltoall", "allreduce"]

_CHOICE_BYTES = 4 + 4
"""of an expert that a token picked: its number and its weight (int32, float32)"""


@dataclass(frozen=True)
class ExpertOptions:
    """What an engine may choose about its experts."""

    communication: Communication = "auto"
    routing: Callable[[MoE, int], RankLoads | None] | None = None
    """what the ranks have to do in a layer (its shape and its number among the expert layers); None: even routing"""
    rebalance_interval: int | None = None
    """steps between two rearrangements of the experts; None: never"""


AS_VLLM = ExpertOptions()


def expert_layer(
    mlp: MoE,
    number: int,
    arch: Architecture,
    dtypes: Dtypes,
    sharding: Sharding,
    held: dict[str, Weight],
    options: ExpertOptions,
) -> Iterator[Operator]:
    """The operators of expert layer `number`, the collectives that end it included."""
    a, spread = dtypes.activation, sharding.data > 1
    alltoall = _communication(sharding, options) == "alltoall"
    own = sharding.tensor if sharding.sequence_parallel else 1
    width = mlp.latent or arch.hidden

    def parted(found: Iterator[Operator]) -> Iterator[Operator]:
        return (replace(op, parts=own) for op in found)

    def met(op: Operator) -> Operator:
        """`op` over what meets at the experts of this rank."""
        return replace(op, rows="gathered", data=sharding.data) if spread else op

    yield from parted(product(held["router"], dtypes))
    yield replace(move("topk", "elementwise", 4 * mlp.experts, _CHOICE_BYTES * mlp.top_k), parts=own)
    if mlp.latent:
        yield from parted(product(held["latent_in_proj"], dtypes))
    if spread:
        yield _dispatch(mlp, width, dtypes, sharding, alltoall)
    down = held["experts_down"]
    yield met(
        Experts(
            name="experts",
            experts=mlp.experts,
            local_experts=down.copies,
            top_k=mlp.top_k,
            hidden=width,
            inter=down.k,
            gated=mlp.gated,
            redundant=sharding.redundant,
            routing=None if options.routing is None else options.routing(mlp, number),
            dtype=dtypes.expert,
            activation=a,
        )
    )
    yield met(move("moe_sum", "elementwise", a.bytes(mlp.top_k * width), a.bytes(width)))
    if spread:
        yield _combine(mlp, width, dtypes, sharding, alltoall)
    if mlp.latent:
        yield from parted(product(held["latent_out_proj"], dtypes))
    if mlp.shared_inter:
        yield from parted(dense("shared_", dtypes, held))
    if mlp.shared_gate:
        yield from parted(product(held["shared_gate"], dtypes))
    if sharding.tensor > 1:
        yield Collective(
            name="mlp_allgather" if sharding.sequence_parallel else "mlp_allreduce",
            kind="allgather" if sharding.sequence_parallel else "allreduce",
            ranks=sharding.tensor,
            bytes_a_row=a.bytes(arch.hidden),
        )


def rebalancing(
    arch: Architecture, dtypes: Dtypes, sharding: Sharding, weights: list[list[Weight]], options: ExpertOptions
) -> Iterator[Operator]:
    """Moving the weights of experts to other ranks every `rebalance_interval` steps; `weights` of the layers of a
    stage.

    A rearrangement fills the slots anew: of the experts that a rank then holds, it had 1/ranks before, and receives the
    rest from the others. That is the price of loads that change beyond recognition between two rearrangements, and so
    an upper bound (vLLM also moves only what changes). The time is spread evenly over the steps between, because then a
    step's price depends on its shape alone and not on its number, and runs of steps stay priceable in one go.
    """
    if options.rebalance_interval is None or sharding.expert == 1:
        return
    ranks = sharding.expert
    held = sum(dtypes.expert.bytes(w.elements) for layer in weights for w in layer if w.part == "expert")
    if held:
        yield Collective(
            name="expert_rebalancing",
            kind="alltoall",
            rows="step",
            every=options.rebalance_interval,
            ranks=ranks,
            group="expert",
            bytes_a_row=held,
        )


def _communication(sharding: Sharding, options: ExpertOptions) -> Communication:
    """The exchange used, `auto` resolved. InputError for one that does not go with the layout."""
    field, wanted = "experts.communication", options.communication
    if sharding.data == 1:
        if wanted not in ("auto", "allreduce"):
            message = "without data parallelism all ranks hold the same tokens and only add up"
            raise InputError(message, field=field, found=wanted, allowed="auto, allreduce")
        return "allreduce"
    if wanted == "allreduce":
        message = "data-parallel ranks hold different tokens"
        raise InputError(message, field=field, found=wanted, allowed="auto, allgather_reducescatter, alltoall")
    if wanted == "alltoall" and sharding.expert != sharding.tensor * sharding.data:
        message = "all-to-all kernels need whole experts, spread over all ranks"
        allowed = f"with parallelism.expert: {sharding.tensor * sharding.data}"
        raise InputError(message, field=field, found=wanted, allowed=allowed)
    return "alltoall" if wanted == "alltoall" else "allgather_reducescatter"


def _group(sharding: Sharding) -> int:
    """Ranks of the exchange."""
    return sharding.data * (sharding.tensor if sharding.sequence_parallel else 1)


def _dispatch(mlp: MoE, width: int, dtypes: Dtypes, sharding: Sharding, alltoall: bool) -> Operator:
    sent = _sent_bytes(width, dtypes)
    if alltoall:
        return _exchange("dispatch", mlp, width, sent, sharding)
    return Collective(
        name="moe_dispatch",
        kind="allgather",
        rows="gathered",
        data=sharding.data,
        ranks=_group(sharding),
        group="expert",
        bytes_a_row=sent + _CHOICE_BYTES * mlp.top_k,
    )


def _combine(mlp: MoE, width: int, dtypes: Dtypes, sharding: Sharding, alltoall: bool) -> Operator:
    if alltoall:
        return _exchange("combine", mlp, width, dtypes.activation.bytes(width), sharding)
    return Collective(
        name="moe_combine",
        kind="reducescatter",
        rows="gathered",
        data=sharding.data,
        ranks=_group(sharding),
        group="expert",
        bytes_a_row=dtypes.activation.bytes(width),
    )


def _sent_bytes(width: int, dtypes: Dtypes) -> int:
    """Bytes of one hidden state on its way to the experts."""
    small = dtypes.expert
    if small.compute not in ("fp8", "int8", "nvfp4"):
        return dtypes.activation.bytes(width)
    return -int(-width * (small.bits if small.compute == "nvfp4" else 8) // 8)


def _exchange(
    phase: Literal["dispatch", "combine"], mlp: MoE, width: int, size: int, sharding: Sharding
) -> ExpertExchange:
    """`size` bytes for each rank that holds one of a token's experts, itself included: with e of E experts a rank, a
    rank is missed with probability C(E-e, k) / C(E, k)."""
    ranks = sharding.expert
    local = split(mlp.experts, ranks)
    homes = ranks * (1 - comb(mlp.experts - local, mlp.top_k) / comb(mlp.experts, mlp.top_k))
    return ExpertExchange(
        name=f"moe_{phase}",
        phase=phase,
        parts=sharding.tensor,
        ranks=ranks,
        group="expert",
        bytes_a_row=round(size * homes),
        hidden=width,
        top_k=mlp.top_k,
        experts=mlp.experts,
    )
