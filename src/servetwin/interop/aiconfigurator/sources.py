"""What is taken from the AIConfigurator wheel: the pinned release, its systems, and its tables in our columns."""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray

from servetwin.errors import InputError

VERSION = "0.12.0"
SHA256 = "aadc4aad0a00bf8a61c477c62bef43de479849c3aa0b1c3078068e08309eccc4"
ROOT = "aiconfigurator_core/systems"

DEVICES = {
    "a100_sxm": "a100_sxm",
    "b200_sxm": "b200_sxm",
    "b300_sxm": "b300_sxm",
    "b60": "arc_pro_b60",
    "gb200": "gb200",
    "gb300": "gb300",
    "h100_sxm": "h100_sxm",
    "h200_sxm": "h200_sxm",
    "l40s": "l40s",
    "rtx_pro_6000_server": "rtx_pro_6000",
}
"""Our device id for each system of the wheel that has tables."""

VLLM = {"a100_sxm": "0.14.0", "b60": "0.26.0"}
"""vLLM version that `query_versions.yaml` calls current, where it is not the default."""
VLLM_DEFAULT = "0.24.0"

FORMATS = {"bfloat16": "bf16", "half": "bf16"}
"""Number formats with another name here."""

BACKENDS = {
    "marlin": "marlin",
    "flashinfer_trtllm": "flashinfer_trtllm",
    "flashinfer_cutlass": "flashinfer_cutlass",
    "triton": "triton",
    "vllm_fused_moe": "triton",
    "xpu": "xpu",
}
"""vLLM's name (`--moe-backend`) of the expert kernels behind a `kernel_source`, by what the latter contains. The
`fused_moe` of vLLM 0.14 is the Triton kernel."""

Columns = dict[str, NDArray[Any]]


class Source(NamedTuple):
    """One kind of table in the wheel: where it lies, its columns in our names, and what splits it into files."""

    kind: str
    family: str
    file: str
    columns: dict[str, str]
    split: tuple[str, ...] = ()
    only: tuple[tuple[str, str], ...] = ()
    """rows to take, by column value, where the column exists"""
    name: str = ""
    """name of the table when it is not the kind followed by the split values"""
    unit_ms: float = 1.0
    """what `latency` counts in: milliseconds, but microseconds in `moe_a2a_perf`"""


_ATTENTION = {
    "head_dim": "head_dim",
    "window": "window_size",
    "kv_heads": "num_key_value_heads",
    "heads": "num_heads",
    "batch": "batch_size",
}
_MOE = {
    "hidden": "hidden_size",
    "inter": "inter_size",
    "topk": "topk",
    "experts": "num_experts",
    "tp": "moe_tp_size",
    "ep": "moe_ep_size",
    "skew": "distribution",
    "tokens": "num_tokens",
}
_MLA = {"heads": "num_heads", "batch": "batch_size"}
_BF16 = (("attn_dtype", "bfloat16"), ("mla_dtype", "bfloat16"))
_OPS = ("all_reduce", "all_gather", "reduce_scatter", "alltoall")

SOURCES = (
    Source("gemm", "gemm", "gemm_perf", {"n": "n", "k": "k", "m": "m"}, ("gemm_dtype",)),
    Source(
        "context_attention", "attention", "context_attention_perf",
        {**_ATTENTION, "length": "isl"}, ("kv_cache_dtype",), _BF16,
    ),
    Source(
        "generation_attention", "attention", "generation_attention_perf",
        {**_ATTENTION, "length": "isl+step"}, ("kv_cache_dtype",), _BF16,
    ),
    Source("moe", "moe", "moe_perf", _MOE, ("moe_dtype", "backend")),
    Source(
        "mla_context", "mla", "mla_context_module_perf",
        {**_MLA, "length": "isl"}, ("gemm_type", "kv_cache_dtype"), _BF16,
    ),
    Source(
        "mla_generation", "mla", "mla_generation_module_perf",
        {**_MLA, "length": "isl+step"}, ("gemm_type", "kv_cache_dtype"), _BF16,
    ),
    *(
        Source(
            "mla_bmm", "mla_bmm", "mla_bmm_perf", {"heads": "num_heads", "tokens": "num_tokens"},
            only=(("op_name", f"mla_gen_{part}"), ("bmm_dtype", "bfloat16")), name=f"mla_bmm_{part}",
        )
        for part in ("pre", "post")
    ),
    *(
        Source(
            "allreduce", "comm", "custom_allreduce_perf", {"gpus": "num_gpus", "bytes": "2*message_size"},
            only=(("backend", f"vllm_{mode}"),), name=f"allreduce_{mode}",
        )
        for mode in ("graph", "eager")
    ),
    *(
        Source(
            "nccl", "comm", "nccl_perf", {"gpus": "num_gpus", "bytes": "2*message_size"},
            only=(("op_name", op), ("nccl_dtype", "half")), name=f"nccl_{op}",
        )
        for op in _OPS
    ),
    Source(
        "alltoall", "comm", "moe_a2a_perf",
        {"ep": "ep_size", "hidden": "hidden_size", "topk": "topk", "experts": "num_experts", "tokens": "num_tokens"},
        ("comm_backend", "phase"), (("comm_dtype", "default"),), unit_ms=1e-3,
    ),
    Source("quantize", "quantize", "scale_matrix_perf", {"k": "k", "m": "m"}, name="quantize_static"),
    Source("quantize", "quantize", "computescale_perf", {"k": "k", "m": "m"}, name="quantize_dynamic"),
)  # fmt: skip
"""Collectives count elements of two bytes (bf16, half); `step` is the context that was there before the new token."""


@dataclass(frozen=True)
class Raw:
    """One table as collected: our key and axis columns (int64), `ms`, and where it came from."""

    name: str
    kind: str
    columns: Columns
    path: str
    kernels: tuple[str, ...]
    formats: tuple[str, ...] = ()
    """what split it off: number formats, of experts also the backend"""


class Wheel:
    """The pinned wheel, opened. Raises `InputError` when the file is another one."""

    def __init__(self, path: Path) -> None:
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
        if digest != SHA256:
            raise InputError(
                f"not the wheel of aiconfigurator-core {VERSION} that these rules were made for",
                where=str(path),
                field="sha256",
                found=digest,
                allowed=SHA256,
            )
        self.path, self.sha256 = path, digest
        self._zip = zipfile.ZipFile(path)
        self._names = self._zip.namelist()
        metadata = next(name for name in self._names if name.endswith(".dist-info/METADATA"))
        fields = self._zip.read(metadata).decode().split("\n\n")[0].splitlines()
        if f"Version: {VERSION}" not in fields:
            raise InputError("another version", where=str(path), field="Version", allowed=VERSION)

    def system(self, system: str) -> dict[str, Any]:
        """The system description (peak rates)."""
        described: dict[str, Any] = yaml.safe_load(self._zip.read(f"{ROOT}/{system}.yaml"))
        return described

    def tables(self, system: str) -> Iterator[Raw]:
        """All tables of a system that we take, split by number format, in a fixed order."""
        static: Raw | None = None
        for source in SOURCES:
            path = self._find(system, source)
            if path is None:
                continue
            table = pq.read_table(pa.BufferReader(self._zip.read(path)))
            for column, value in source.only:
                if column in table.column_names:
                    table = table.filter(pc.field(column) == value)
                elif column == "backend" and value == "vllm_graph":
                    table = table.slice(0, 0)
            if not table.num_rows:
                continue
            for raw in _split(source, table, path.removeprefix(f"{ROOT}/data/")):
                yield raw if raw.name != "quantize_dynamic" else _add(raw, static)
                static = raw

    def _find(self, system: str, source: Source) -> str | None:
        """The current version's table, else the newest release that is older; comm libraries: the newest."""
        backend = "vllm" if source.kind != "nccl" else "nccl"
        pattern = re.compile(rf"{ROOT}/data/{system}/{source.family}/{backend}/(\d+(?:\.\d+)*)/{source.file}\.parquet")
        found = {_version(match[1]): match[0] for name in self._names if (match := pattern.fullmatch(name))}
        if source.kind != "nccl":
            current = _version(VLLM.get(system, VLLM_DEFAULT))
            found = {version: name for version, name in found.items() if version <= current}
        return found[max(found)] if found else None


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _split(source: Source, table: pa.Table, path: str) -> Iterator[Raw]:
    if source.kind == "moe":
        backends = [_backend(str(kernel)) for kernel in table.column("kernel_source").to_pylist()]
        table = table.append_column("backend", pa.array(backends))
    by = [column for column in source.split if column in table.column_names]
    combinations = table.select(by).group_by(by).aggregate([]).to_pylist() if by else [{}]
    for combination in sorted(combinations, key=lambda row: tuple(row.values())):
        part = table
        for column, value in combination.items():
            part = part.filter(pc.field(column) == value)
        formats = tuple(FORMATS.get(value, value) for value in combination.values())
        columns: Columns = {ours: _column(part, theirs) for ours, theirs in source.columns.items()}
        columns["ms"] = part.column("latency").to_numpy().astype(np.float64) * source.unit_ms
        kernels = tuple(sorted({str(kernel) for kernel in part.column("kernel_source").to_pylist()}))
        yield Raw(source.name or "_".join([source.kind, *formats]), source.kind, columns, path, kernels, formats)


def _backend(kernel: str) -> str:
    for part, backend in BACKENDS.items():
        if part in kernel:
            return backend
    raise InputError("an expert kernel of no known backend", field="kernel_source", found=kernel)


def _add(extra: Raw, base: Raw | None) -> Raw:
    """`computescale` holds what a dynamic scale takes more than a static one, down to 0: give the whole time."""
    if base is None or base.name != "quantize_static":
        raise InputError("no static times to add to", where=extra.path)
    known = dict(zip(zip(base.columns["k"], base.columns["m"], strict=True), base.columns["ms"], strict=True))
    k, m, ms = (extra.columns[name] for name in ("k", "m", "ms"))
    times = [known[a, b] + more for a, b, more in zip(k, m, ms, strict=True)]
    return replace(extra, columns={**extra.columns, "ms": np.array(times)})


def _column(table: pa.Table, name: str) -> NDArray[np.int64]:
    if name == "isl+step":
        return _column(table, "isl") + _column(table, "step")
    if name.startswith("2*"):
        return 2 * _column(table, name[2:])
    if name == "window_size" and name not in table.column_names:
        return np.zeros(table.num_rows, dtype=np.int64)
    column = table.column(name)
    if name == "distribution":
        codes = {"balanced": 0, "power_law_1.01": 101, "power_law_1.2": 120}
        return np.array([codes[str(value)] for value in column.to_pylist()], dtype=np.int64)
    return column.to_numpy().astype(np.int64)
