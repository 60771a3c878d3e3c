"""Writing out every default of a scenario, and refusing what contradicts itself or the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from servetwin import catalog
from servetwin.errors import InputError
from servetwin.scenario.defaults import longest_sequence, resolved_engine
from servetwin.scenario.names import language_part, model_config, model_path
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
    config = language_part(model_config(scenario.model, base))
    _check_roles(scenario)
    pools = []
    for index, pool in enumerate(scenario.pools):
        try:
            pools.append(_resolved_pool(pool, config))
        except InputError as error:
            error.field = f"pools[{index}].{error.field}" if error.field else f"pools[{index}]"
            raise error.at() from None
    path = model_path(scenario.model, base)
    timing = scenario.timing
    if timing.overlay is not None:
        timing = timing.model_copy(update={"overlay": _absolute(timing.overlay, base)})
    changes = {
        "model": str(path.resolve()) if path else catalog.model(scenario.model).id,
        "workload": _resolved_workload(scenario.workload, base),
        "pools": pools,
        "timing": timing,
    }
    return scenario.model_copy(update=changes)


def _absolute(path: str, base: Path) -> str:
    """`path` as it can be found from anywhere, so that the resolved scenario runs from the result folder too."""
    return str((base / path).resolve())


def _resolved_workload(workload: Workload, base: Path) -> Workload:
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
    if workload.arrivals.process == "gamma" and workload.arrivals.burstiness is None:
        changes["arrivals"] = workload.arrivals.model_copy(update={"burstiness": 1.0})
    if workload.prefixes:
        tokens = _resolved_lengths(workload.prefixes.tokens, base)
        changes["prefixes"] = workload.prefixes.model_copy(update={"tokens": tokens})
    return workload.model_copy(update=changes)


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


def _resolved_pool(pool: Pool, config: Mapping[str, Any]) -> Pool:
    """`pool` with the options of its engine filled in."""
    device = catalog.device(pool.device)
    _check_parallelism(pool.parallelism, config)
    override = pool.device_overrides
    memory = (override.memory_size if override else None) or device.visible_bytes
    engine = resolved_engine(pool.engine, device.id, memory, pool.parallelism.pipeline, longest_sequence(config))
    return pool.model_copy(update={"device": device.id, "engine": engine})


def _check_parallelism(degrees: Parallelism, config: Mapping[str, Any]) -> None:
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
    devices = degrees.tensor * degrees.data
    fitting = [n for n in range(1, devices + 1) if devices % n == 0 and experts % n == 0]
    if degrees.expert not in fitting:
        message = f"{experts} experts on tensor * data = {devices} devices cannot be split evenly"
        listed = ", ".join(map(str, fitting))
        raise InputError(message, field="parallelism.expert", found=degrees.expert, allowed=listed)
