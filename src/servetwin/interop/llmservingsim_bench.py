"""A real vLLM run recorded by `python -m bench run` of LLMServingSim: `meta.json` and `requests.jsonl`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from servetwin.catalog.fields import Fields, count, one_of, text
from servetwin.errors import InputError
from servetwin.interop.llmservingsim_cluster import json_fields
from servetwin.interop.llmservingsim_options import MEMORY_SHARE, dtype, kv_dtype, number, share, switch, whole
from servetwin.workload.table import Ints, RequestTable

_SETTINGS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "max_num_seqs": ("max_num_seqs", count),
    "max_num_batched_tokens": ("max_num_batched_tokens", count),
    "max_model_len": ("max_model_len", count),
    "block_size": ("block_size", count),
    "gpu_memory_utilization": (MEMORY_SHARE, share),
    "enable_prefix_caching": ("enable_prefix_caching", switch),
    "enable_chunked_prefill": ("enable_chunked_prefill", switch),
    "long_prefill_token_threshold": ("long_prefill_token_threshold", whole),
    "scheduler_reserve_full_isl": ("reserve_full_isl", switch),
    "async_scheduling": ("async_scheduling", switch),
    "enforce_eager": ("enforce_eager", switch),
    "policy": ("scheduling_policy", lambda value: one_of(value, ("fcfs", "priority"))),
}
"""vLLM's name of a setting -> the name used in the import, and how it is read."""
_KWARGS = {
    **_SETTINGS,
    "scheduling_policy": _SETTINGS["policy"],
    "dtype": ("dtype", lambda value: None if value == "auto" else dtype(value)),
    "kv_cache_dtype": ("kv_cache_dtype", kv_dtype),
}
_DEGREES = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
_NO_EFFECT = ("model", "tokenizer", "seed", "load_format", "trust_remote_code", "disable_log_stats")


@dataclass(frozen=True)
class Bench:
    """What a real run says about its engine and its requests."""

    where: str
    model: str
    version: str | None
    """of vLLM, as it calls itself"""
    settings: Mapping[str, Any]
    """what the engine, or each data-parallel rank of it, ran with; what the run does not state is left out"""
    tensor: int
    pipeline: int
    data: int
    expert_parallel: bool
    """whole experts on the ranks, over the tensor and data-parallel ones, instead of a part of every expert"""
    blocks: int | None
    """KV blocks that the engine had, over all data-parallel ranks"""
    memory: int | None
    """bytes of the device, as the driver reports them"""
    dataset: str | None
    dataset_sha256: str | None
    requests: int | None
    """how many were sent"""
    rows: Mapping[int, tuple[int, int, float]]
    """row of the workload -> input tokens, output tokens, moment at which the engine queued it (s)"""


def read_bench(folder: Path) -> Bench:
    """The run in `folder`, or in its sub-folder `vllm`. Raises InputError for what is missing or damaged."""
    if not (folder / "meta.json").is_file() and (folder / "vllm" / "meta.json").is_file():
        folder = folder / "vllm"
    meta = json_fields(folder / "meta.json")
    kwargs = meta.maybe_group("engine_kwargs") or Fields({}, meta.where)
    settings = _settings(kwargs, _KWARGS)
    degrees = [kwargs.maybe(name, count, 1) for name in _DEGREES]
    expert_parallel = kwargs.maybe("enable_expert_parallel", switch, False)
    for name in _NO_EFFECT:
        kwargs.has(name)
    refused = [f"engine_kwargs.{name}" for name, value in kwargs.rest().items() if value not in (None, False)]
    if refused:
        raise InputError("cannot be imported: " + ", ".join(refused), where=meta.where)
    for part in _resolved(meta):
        settings |= _settings(part, _SETTINGS)
    cache = meta.maybe_group("kv_cache") or Fields({}, meta.where)
    hardware = meta.maybe_group("hardware") or Fields({}, meta.where)
    return Bench(
        where=meta.where,
        model=meta.get("model", text),
        version=meta.maybe("vllm_version", text, None),
        settings=settings | _settings(cache, _SETTINGS),
        tensor=degrees[0],
        pipeline=degrees[1],
        data=degrees[2],
        expert_parallel=expert_parallel,
        blocks=cache.maybe("num_gpu_blocks", count, None),
        memory=hardware.maybe("total_memory", count, None),
        dataset=meta.maybe("dataset_path", text, None),
        dataset_sha256=meta.maybe("dataset_hash", text, None),
        requests=meta.maybe("num_requests", count, None),
        rows=_rows(folder / "requests.jsonl"),
    )


def queued(bench: Bench, table: RequestTable, workload: str) -> tuple[int, Ints]:
    """How many rows of the workload were sent, and when the engine queued each (ns from the first).

    Raises InputError naming the request when the run and the workload do not belong together.
    """
    where = str(Path(bench.where).with_name("requests.jsonl"))
    sent = bench.requests or len(bench.rows)
    for row in range(sent):
        name = f"bench-{row}"
        if row not in bench.rows:
            message = f"lacks the moment at which this request was queued, one of {sent}"
            raise InputError(message, where=where, field=name)
        if row >= len(table):
            allowed = f"a workload of {sent} requests"
            raise InputError(f"{workload} has no such row", where=where, field=name, found=len(table), allowed=allowed)
        real = bench.rows[row][:2]
        lengths = int(table.input_tokens[row]), int(table.output_tokens[row])
        if real != lengths:
            message = f"lengths differ from row {row} of {workload} (input and output tokens)"
            raise InputError(message, where=where, field=name, found=real, allowed=str(lengths))
    if extra := [row for row in bench.rows if row >= sent]:
        raise InputError(f"more requests than meta.json says ({sent})", where=where, field=f"bench-{min(extra)}")
    moments = np.array([bench.rows[row][2] for row in range(sent)])
    return sent, np.rint((moments - moments.min()) * 1e9).astype(np.int64)


def _settings(fields: Fields, names: Mapping[str, tuple[str, Callable[[Any], Any]]]) -> dict[str, Any]:
    found = {ours: fields.get(theirs, read) for theirs, (ours, read) in names.items() if fields.has(theirs)}
    return {name: value for name, value in found.items() if value is not None}


def _resolved(meta: Fields) -> list[Fields]:
    """`resolved_config` and the sections in it: the engine's whole configuration, where the run recorded it."""
    at = "resolved_config"
    everything = meta.maybe_group(at) or Fields({}, meta.where, at)
    sections = ((name, part) for name, part in everything.rest().items() if isinstance(part, dict))
    return [everything, *(Fields(part, meta.where, f"{at}.{name}") for name, part in sections)]


def _rows(path: Path) -> dict[int, tuple[int, int, float]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError("no such file", where=str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {error}", where=str(path)) from None
    rows: dict[int, tuple[int, int, float]] = {}
    for at, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = json_fields(path, line, f"line {at}")
        row.path = f"line {at}"
        name = row.get("request_id", text)
        match = re.fullmatch(r"bench-([0-9]{1,9})", name)
        if match is None:
            allowed = "bench-0, bench-1, …"
            raise InputError("wrong request_id", where=str(path), field=row.path, found=name, allowed=allowed)
        if int(match[1]) in rows:
            raise InputError("occurs twice", where=str(path), field=row.path, found=name)
        lengths = row.get("input_toks", whole), row.get("output_toks", whole)
        if row.has("queued_ts"):  # null: the engine never had it
            rows[int(match[1])] = (*lengths, row.get("queued_ts", number))
    if not rows:
        raise InputError("holds no request", where=str(path))
    return rows
