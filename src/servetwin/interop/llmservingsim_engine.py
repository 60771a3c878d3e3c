"""What an instance of LLMServingSim 2.0 is in a scenario: its model, and the options of its engine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servetwin import catalog
from servetwin.errors import InputError, nearest
from servetwin.interop.llmservingsim_bench import Bench
from servetwin.interop.llmservingsim_cluster import Instance, json_fields
from servetwin.interop.llmservingsim_options import ENGINE, MEMORY_SHARE, WHERE, Flags
from servetwin.model import architecture_of, load_architecture
from servetwin.scenario.defaults import longest_sequence

ENGINE_VERSION = "vllm-0.19"
"""The vLLM whose scheduler that project follows."""
SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "fp8": "fp8", "int8": "int8"}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")


@dataclass(frozen=True)
class Model:
    """A model as the repository describes it. `reference` is what a scenario calls it."""

    path: Path
    reference: str
    layers: int
    longest: int
    experts: int
    """of each layer that has any; 0: a dense model"""
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
            field=f"{instance.place}.model_name",
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
        experts=next((config[key] for key in _EXPERTS if isinstance(config.get(key), int)), 0),
        dtype=str(config.get("torch_dtype") or config.get("dtype") or "bfloat16").removeprefix("torch."),
    )


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
        # vLLM's front end adds up the blocks of its data-parallel ranks (`wait_for_engine_startup`)
        options["num_gpu_blocks_override"] = run.blocks // run.data
    return options | settings, dtype, kv_dtype


def _check_settings(run: Bench, settings: Mapping[str, Any], given: Flags, instance: Instance, cluster: Path) -> None:
    """Refuse a flag or a field that contradicts the run. The share of memory may differ: in that project it is chosen
    to arrive at the real number of KV blocks."""
    for name, real in run.settings.items():
        if name == MEMORY_SHARE or settings.get(name) == real:
            continue
        for where, explicit, field in (
            (str(cluster), instance.engine, f"{instance.place}.{name}"),
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
