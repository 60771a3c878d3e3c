"""What a single engine of LLMServingSim 2.0 is in a scenario: its model, and its options."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servetwin import catalog
from servetwin.errors import InputError, nearest
from servetwin.interop.llmservingsim_bench import Bench
from servetwin.interop.llmservingsim_cluster import INSTANCE, Instance, json_fields
from servetwin.interop.llmservingsim_options import ENGINE, MEMORY_SHARE, WHERE, Flags
from servetwin.model import architecture_of, load_architecture
from servetwin.scenario.defaults import longest_sequence

ENGINE_VERSION = "vllm-0.19"
"""The vLLM whose scheduler that project follows."""
SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "fp8": "fp8", "int8": "int8"}
_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")


@dataclass(frozen=True)
class Model:
    """A model as the repository describes it. `reference` is what a scenario calls it."""

    path: Path
    reference: str
    layers: int
    longest: int
    experts: bool
    dtype: str


def read_model(instance: Instance, repo: Path, cluster: Path) -> Model:
    folder = repo / "configs" / "model"
    name = instance.model
    path = folder / f"{name}.json"
    if ".." in name or not _NAME.fullmatch(name) or not path.is_file():
        names = sorted(found.relative_to(folder).with_suffix("").as_posix() for found in folder.glob("*/*.json"))
        raise InputError(
            f"no such model configuration in {folder}",
            where=str(cluster),
            field=f"{INSTANCE}.model_name",
            found=name,
            allowed=", ".join(names) or "a file <model_name>.json there",
            hint=nearest(name, names),
        )
    config = json_fields(path).rest()
    arch = load_architecture(path)
    longest = longest_sequence(config)
    try:
        entry = catalog.model(name)
    except InputError:
        known = False
    else:
        known = architecture_of(entry.config) == arch and longest_sequence(entry.config) == longest
    return Model(
        path=path,
        reference=entry.id if known else str(path.resolve()),
        layers=len(arch.layers),
        longest=longest,
        experts="num_experts" in config or "num_local_experts" in config,
        dtype=str(config.get("torch_dtype") or config.get("dtype") or "bfloat16").removeprefix("torch."),
    )


def check_experts(instance: Instance, given: Flags, model: Model, cluster: Path) -> None:
    """What that project does with the experts of a model, beyond what a single engine without it shows."""
    if not model.experts:
        return
    if given.expert_routing != "BALANCED":
        raise InputError("cannot be imported", where=WHERE, field="--expert-routing-policy", found=given.expert_routing)
    if instance.expert is None and instance.tensor > 1:
        message = "cannot be imported: expert parallelism, which a model with experts gets of tp_size"
        field, allowed = f"{INSTANCE}.ep_size", "ep_size: 1"
        raise InputError(message, where=str(cluster), field=field, found=instance.tensor, allowed=allowed)


def check_run(run: Bench, instance: Instance, cluster: Path) -> None:
    of_run = {"model_name": run.model, "tp_size": run.tensor, "pp_size": run.pipeline}
    of_file = {"model_name": instance.model, "tp_size": instance.tensor, "pp_size": instance.pipeline}
    for name, found in of_file.items():
        if found != of_run[name]:
            message = f"is not what the run in {run.where} had"
            field, allowed = f"{INSTANCE}.{name}", str(of_run[name])
            raise InputError(message, where=str(cluster), field=field, found=found, allowed=allowed)


def engine_options(
    instance: Instance, given: Flags, run: Bench | None, model: Model, cluster: Path
) -> tuple[dict[str, Any], str, str]:
    """The options of the engine, and the dtypes of weights and KV cache as that project names them."""
    settings: dict[str, Any] = {name: default for name, (_, default) in ENGINE.items()} | {MEMORY_SHARE: 0.9}
    settings |= given.engine | dict(instance.engine)
    if settings["max_num_batched_tokens"] == 0 or settings["max_num_batched_tokens"] > model.longest:
        settings["max_num_batched_tokens"] = model.longest
    if run is not None:
        _check_settings(run, settings, given, instance, cluster)
        settings |= run.settings
    dtype, kv_dtype = settings.pop("dtype") or model.dtype, settings.pop("kv_cache_dtype")
    if dtype not in SHORT:
        message, allowed = "unknown number format", ", ".join(SHORT)
        raise InputError(message, where=str(model.path), field="torch_dtype", found=dtype, allowed=allowed)
    options: dict[str, Any] = {"version": _version(run)}
    options |= {"quantization": dtype} if dtype in ("fp8", "int8") else {"dtype": dtype}
    options |= {"kv_cache_dtype": kv_dtype} if kv_dtype != "auto" else {}
    options["gpu_memory_utilization"] = settings.pop(MEMORY_SHARE)
    options["scheduler_reserve_full_isl"] = settings.pop("reserve_full_isl")
    if run is not None and run.blocks is not None:
        options["num_gpu_blocks_override"] = run.blocks
    return options | settings, dtype, kv_dtype


def _check_settings(run: Bench, settings: Mapping[str, Any], given: Flags, instance: Instance, cluster: Path) -> None:
    """Refuse a flag or a field that contradicts the run. The share of memory may differ: in that project it is chosen
    to arrive at the real number of KV blocks."""
    for name, real in run.settings.items():
        if name == MEMORY_SHARE or settings.get(name) == real:
            continue
        for where, explicit, field in (
            (str(cluster), instance.engine, f"{INSTANCE}.{name}"),
            (WHERE, given.engine, "--" + name.replace("_", "-")),
        ):
            if name in explicit:
                message = f"is not what the run in {run.where} had"
                raise InputError(message, where=where, field=field, found=explicit[name], allowed=str(real))


def _version(run: Bench | None) -> str:
    """The catalogue's entry for the vLLM of the run: the newest that is not newer than it."""
    if run is None or run.version is None:
        return ENGINE_VERSION
    match = re.match(r"v?([0-9]+)\.([0-9]+)", run.version)
    if match is None:
        raise InputError("not a version", where=run.where, field="vllm_version", found=run.version, allowed="0.19.0")
    known = {tuple(map(int, re.findall("[0-9]+", name))): name for name in catalog.names("engines")}
    older = [release for release in known if release <= (int(match[1]), int(match[2]))]
    if not older:
        message, allowed = "is older than every version that is known", ", ".join(known.values())
        raise InputError(message, where=run.where, field="vllm_version", found=run.version, allowed=allowed)
    return known[max(older)]
