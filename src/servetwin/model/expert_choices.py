"""From the `experts` section of a scenario to the routing laws and placements of a model's layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from servetwin.errors import InputError
from servetwin.model.expert_placement import WINDOW, RankLoads, by_load, in_order
from servetwin.model.expert_routing import (
    ExpertLaw,
    Independent,
    Sampled,
    measured,
    own_law,
    read_popularity,
    zipf,
)
from servetwin.model.experts import AS_VLLM, ExpertOptions
from servetwin.model.layers import Architecture, MoE
from servetwin.model.sharding import Sharding
from servetwin.scenario.experts import ExpertChoices

MakeLaw = Callable[[MoE, int], ExpertLaw]
"""The law of an expert layer, by its shape and its number."""


def expert_options(
    choices: ExpertChoices | None, arch: Architecture, sharding: Sharding, *, seed: int, base: Path, domain: int
) -> ExpertOptions:
    """What `choices` mean for `arch`; `domain` is the number of devices that one node joins.

    Raises InputError for a model without experts, an unknown law, or a popularity file that does not fit the model.
    """
    if choices is None:
        return AS_VLLM
    if not arch.is_moe:
        raise InputError("the model has no experts", field="experts", allowed="leave it out")
    rearranged = sharding.redundant > 0 or choices.rebalance_interval is not None
    if choices.rebalance_interval is not None and sharding.expert == 1:
        message = "there is nothing to rearrange on a single rank of experts"
        field, allowed = "experts.rebalance_interval", "with parallelism.expert above 1"
        raise InputError(message, field=field, found=choices.rebalance_interval, allowed=allowed)
    if choices.routing == "balanced" and not sharding.redundant:
        return ExpertOptions(choices.communication, None, choices.rebalance_interval)
    make, differ = _law(choices, arch, seed, base)
    known: dict[tuple[MoE, int], RankLoads] = {}
    nodes = max(1, sharding.expert // domain)

    def routing(moe: MoE, number: int) -> RankLoads:
        layer = number if differ else 0
        found = known.get((moe, layer))
        if found is None:
            law = make(moe, layer)
            ranks = sharding.expert
            if rearranged:
                seen = law.outcomes(WINDOW)
                load = np.mean([outcome.pairs for outcome in seen], axis=0)
                experts, rank = by_load(load, sharding.redundant, ranks, nodes, moe.groups)
            else:
                experts, rank = in_order(moe.experts, ranks)
            found = known[moe, layer] = RankLoads(law, experts, rank, ranks)
        return found

    return ExpertOptions(choices.communication, routing, choices.rebalance_interval)


def _law(choices: ExpertChoices, arch: Architecture, seed: int, base: Path) -> tuple[MakeLaw, bool]:
    """The law, and whether layers differ."""
    match choices.routing:
        case "balanced":
            return lambda moe, layer: Independent(np.full(moe.experts, moe.top_k / moe.experts)), False
        case "random":
            return lambda moe, layer: Sampled(moe.experts, moe.top_k, layer, seed), False
        case "zipf":
            exponent = choices.exponent
            assert exponent is not None
            return lambda moe, layer: zipf(moe.experts, moe.top_k, exponent, layer, seed), choices.per_layer
        case "measured":
            counts = _popularity(choices, arch, base)
            return lambda moe, layer: measured(counts[layer], moe.top_k), len(counts) > 1
        case name:
            own = own_law(name)
            return (
                lambda moe, layer: own(experts=moe.experts, top_k=moe.top_k, layer=layer, seed=seed)
            ), choices.per_layer


def _popularity(choices: ExpertChoices, arch: Architecture, base: Path) -> list[list[float]]:
    assert choices.popularity is not None
    path = base / choices.popularity
    layers = [layer.mlp for layer in arch.layers if isinstance(layer.mlp, MoE)]
    counts = read_popularity(path, layers[0].experts, layers[0].top_k)
    if len(counts) not in (1, len(layers)):
        found, allowed = f"{len(counts)} layers", f"1 or {len(layers)}"
        message = "not as many layers as the model has with experts"
        raise InputError(message, where=str(path), found=found, allowed=allowed)
    return counts
