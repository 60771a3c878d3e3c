"""Writing out every default of a scenario, and refusing what contradicts itself or the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from servetwin import catalog
from servetwin.errors import InputError
from servetwin.scenario.defaults import longest_sequence, resolved_engine
from servetwin.scenario.hardware import Nic, Node
from servetwin.scenario.names import language_part, model_config, model_path
from servetwin.scenario.placement import default_host, placed
from servetwin.scenario.schema import (
    Empirical,
    Lengths,
    Parallelism,
    Pool,
    Scenario,
    SessionWorkload,
    TraceWorkload,
    Workload,
)

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def resolve(scenario: Scenario, base: Path = Path()) -> Scenario:
    """`scenario` with every default written out and every path absolute; resolving it again changes nothing.

    Relative paths start at `base`. Raises InputError for options that contradict each other or the model.
    """
    _check_roles(scenario)
    pools = []
    for index, pool in enumerate(scenario.pools):
        try:
            pools.append(_resolved_pool(pool, scenario.model, base))
        except InputError as error:
            error.field = f"pools[{index}].{error.field}" if error.field else f"pools[{index}]"
            raise error.at() from None
    nodes = scenario.nodes and [_resolved_node(node, index) for index, node in enumerate(scenario.nodes)]
    placement = placed(pools, nodes)
    if nodes is not None:
        pools = [pool.model_copy(update={"placement": placement.text(index)}) for index, pool in enumerate(pools)]
    timing, network = scenario.timing, scenario.network
    if timing.overlay is not None:
        timing = timing.model_copy(update={"overlay": _absolute(timing.overlay, base)})
    if network is not None and network.graph is not None:
        network = network.model_copy(update={"graph": _absolute(network.graph, base)})
    changes = {
        "model": _resolved_model(scenario.model, base),
        "workload": _resolved_workload(scenario, base),
        "nodes": nodes,
        "network": network,
        "pools": pools,
        "routing": scenario.routing.resolved(),
        "timing": timing,
    }
    return scenario.model_copy(update=changes)


def _resolved_model(name: str, base: Path) -> str:
    path = model_path(name, base)
    return str(path.resolve()) if path else catalog.model(name).id


def _resolved_node(node: Node, index: int) -> Node:
    """`node` with what its host says of memory and network cards written out."""
    host = catalog.host(node.host or default_host(catalog.device(next(iter(node.devices))).id))
    nic = node.nic or Nic()
    link = catalog.link(nic.link) if nic.link else host.nic
    if link is not None:
        count = nic.count or (host.nics if nic.link is None else 1)
        bandwidth, latency = nic.bandwidth or link.bandwidth, link.latency_ns if nic.latency is None else nic.latency
        nic = Nic(link=link.id, count=count, bandwidth=bandwidth, latency=latency)
    return node.model_copy(
        update={
            "devices": {catalog.device(kind).id: count for kind, count in node.devices.items()},
            "host": host.id,
            "memory_size": node.memory_size or host.memory_bytes,
            "memory_bandwidth": node.memory_bandwidth or host.memory_bandwidth,
            "nic": nic,
        }
    )


def _absolute(path: str, base: Path) -> str:
    """`path` as it can be found from anywhere, so that the resolved scenario runs from the result folder too."""
    return str((base / path).resolve())


def _resolved_workload(scenario: Scenario, base: Path) -> Workload:
    workload = scenario.workload
    if isinstance(workload, TraceWorkload):
        return workload.model_copy(update={"trace": _absolute(workload.trace, base)})
    names = ["input_tokens", "output_tokens"]
    changes: dict[str, Any] = {}
    if isinstance(workload, SessionWorkload):
        names += ["turns", "first_input_tokens"]
        if fan_out := workload.fan_out:
            lengths = {
                name: _resolved_lengths(getattr(fan_out, name), base)
                for name in ("width", "input_tokens", "output_tokens")
            }
            changes["fan_out"] = fan_out.model_copy(update=lengths)
    changes |= {name: _resolved_lengths(getattr(workload, name), base) for name in names}
    if workload.models:
        changes["models"] = {_asked_model(name, base): weight for name, weight in workload.models.items()}
    if workload.arrivals.process == "gamma" and workload.arrivals.burstiness is None:
        changes["arrivals"] = workload.arrivals.model_copy(update={"burstiness": 1.0})
    if workload.prefixes:
        tokens = _resolved_lengths(workload.prefixes.tokens, base)
        changes["prefixes"] = workload.prefixes.model_copy(update={"tokens": tokens})
    return workload.model_copy(update=changes)


def _asked_model(name: str, base: Path) -> str:
    """The model that requests ask for by `name`, as pools name theirs. InputError when there is none."""
    try:
        model_config(name, base)
    except InputError as error:
        raise error.at(field="workload.models") from None
    return _resolved_model(name, base)


def _resolved_lengths(lengths: Lengths, base: Path) -> Lengths:
    if isinstance(lengths, Empirical):
        return lengths.model_copy(update={"file": _absolute(lengths.file, base)})
    return lengths


def _check_roles(scenario: Scenario) -> None:
    roles = {pool.role for pool in scenario.pools}
    for role, other in (("prefill", "decode"), ("decode", "prefill")):
        if role in roles and other not in roles:
            index = next(i for i, pool in enumerate(scenario.pools) if pool.role == role)
            message = f"a {role} pool needs a {other} pool beside it"
            allowed = f"add a pool with role: {other}"
            raise InputError(message, field=f"pools[{index}].role", found=role, allowed=allowed)


def _resolved_pool(pool: Pool, model: str, base: Path) -> Pool:
    """`pool` with its model and the options of its engine filled in."""
    config = language_part(model_config(pool.model or model, base))
    device = catalog.device(pool.device)
    _check_parallelism(pool.parallelism, config, pool.experts.redundant_experts if pool.experts else 0)
    override = pool.device_overrides
    memory = (override.memory_size if override else None) or device.visible_bytes
    engine = resolved_engine(pool.engine, device.id, memory, pool.parallelism.pipeline, longest_sequence(config))
    experts = pool.experts
    if experts is not None and experts.popularity is not None:
        experts = experts.model_copy(update={"popularity": _absolute(experts.popularity, base)})
    changes = {
        "model": _resolved_model(pool.model or model, base),
        "device": device.id,
        "engine": engine,
        "experts": experts,
    }
    return pool.model_copy(update=changes)


def _check_parallelism(degrees: Parallelism, config: Mapping[str, Any], redundant: int) -> None:
    """`redundant` copies of experts stand beside the model's own."""
    heads, layers = config.get("num_attention_heads"), config.get("num_hidden_layers")
    if isinstance(heads, int) and heads % degrees.tensor:
        message = f"the model's {heads} attention heads cannot be split evenly"
        allowed = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise InputError(message, field="parallelism.tensor", found=degrees.tensor, allowed=allowed)
    if isinstance(layers, int) and layers < degrees.pipeline:
        message = "the model has fewer layers than stages"
        raise InputError(message, field="parallelism.pipeline", found=degrees.pipeline, allowed=f"1 to {layers}")
    if degrees.expert == 1:
        return
    experts = next((config[key] for key in _EXPERTS if isinstance(config.get(key), int)), None)
    if experts is None:
        raise InputError("the model has no experts", field="parallelism.expert", found=degrees.expert, allowed="1")
    experts += redundant
    devices = degrees.tensor * degrees.data
    fitting = [n for n in range(1, devices + 1) if devices % n == 0 and experts % n == 0]
    if degrees.expert not in fitting:
        copies = f" (with {redundant} redundant ones)" if redundant else ""
        message = f"{experts} experts{copies} on tensor * data = {devices} devices cannot be split evenly"
        listed = ", ".join(map(str, fitting))
        raise InputError(message, field="parallelism.expert", found=degrees.expert, allowed=listed)
