"""From the wheel to kernel profiles: one folder a device."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from servetwin.catalog.profiles import HEADER, SCHEMA
from servetwin.errors import InputError, nearest
from servetwin.interop.aiconfigurator.clean import WIGGLE, holes, monotone, must_clean, to_nanoseconds, wiggle
from servetwin.interop.aiconfigurator.errors import leave_one_out
from servetwin.interop.aiconfigurator.host import host_entry
from servetwin.interop.aiconfigurator.sources import DEVICES, VERSION, VLLM, VLLM_DEFAULT, Raw, Wheel
from servetwin.timing.kernels.profile import LAYOUTS, Columns, Device

_BANNER = "# Derived from NVIDIA AIConfigurator (Apache-2.0, see NOTICE) by servetwin.interop.aiconfigurator.\n"

UNEVEN = 0.1
"""Share of kernel shapes out of line above which a table is flagged."""
LEAST_SHAPES = {"gemm": 100, "mla_context": 4, "mla_generation": 4}
"""Fewer measured shapes than this are flagged as sparse."""


def convert(wheel: Path, output: Path, systems: list[str] | None = None) -> dict[str, Path]:
    """Write a kernel profile for each system (default: all that have tables); returns the folders by device id.

    The same wheel and libraries give the same bytes. Raises `InputError` for another wheel or an unknown system.
    """
    source = Wheel(wheel)
    for system in systems or []:
        if system not in DEVICES:
            hint = nearest(system, DEVICES)
            raise InputError("no such system", field="--system", found=system, allowed=", ".join(DEVICES), hint=hint)
    return {DEVICES[system]: _convert_system(source, system, output / DEVICES[system]) for system in systems or DEVICES}


def _convert_system(wheel: Wheel, system: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    peak = _peak(wheel.system(system))
    device = Device(DEVICES[system], **peak)
    tables: dict[str, dict[str, Any]] = {}
    kept: dict[str, Columns] = {}
    for raw in wheel.tables(system):
        kept[raw.name], tables[raw.name] = _convert_table(raw, device, folder)
        host = host_entry(raw.name, kept[raw.name], kept) if raw.kind == "gemm" else None
        if host is not None:
            tables[raw.name]["quality"]["flags"].append("host_bound")
            tables[raw.name]["host"] = host
    header = {
        "schema": SCHEMA,
        "kind": "kernels",
        "device": device.name,
        "engine": {"name": "vllm", "version": VLLM.get(system, VLLM_DEFAULT)},
        "provenance": {
            "package": "aiconfigurator-core",
            "version": VERSION,
            "wheel": wheel.path.name,
            "sha256": wheel.sha256,
            "licence": "Apache-2.0",
            "copyright": "NVIDIA CORPORATION & AFFILIATES",
            "system": system,
            "cleaned_cells": sum(entry["quality"]["cleaned_cells"] for entry in tables.values()),
        },
        "peak": peak,
        "tables": tables,
    }
    text = _BANNER + yaml.safe_dump(header, sort_keys=False, width=120, allow_unicode=True)
    (folder / HEADER).write_text(text, encoding="utf-8", newline="\n")
    return folder


def _convert_table(raw: Raw, device: Device, folder: Path) -> tuple[Columns, dict[str, Any]]:
    columns, merged = to_nanoseconds(raw.path, raw.kind, raw.columns)
    before = wiggle(raw.kind, columns)
    measured = columns["ns"]
    if must_clean(raw.kind, before):
        columns = monotone(raw.kind, columns)
    after = wiggle(raw.kind, columns)
    missing = holes(raw.kind, columns)
    file = f"{raw.name}.parquet"
    _write(folder / file, raw.kind, columns)
    return columns, {
        "kind": raw.kind,
        **(dict(zip(("dtype", "backend"), raw.formats, strict=True)) if raw.kind == "moe" else {}),
        "file": file,
        "sha256": hashlib.sha256((folder / file).read_bytes()).hexdigest(),
        "rows": len(columns["ns"]),
        "source": raw.path,
        "kernels": list(raw.kernels),
        "quality": {
            "duplicates": merged,
            "holes": missing,
            "wiggle": round(before, 4),
            "wiggle_after": round(after, 4),
            "envelope": must_clean(raw.kind, before),
            "cleaned_cells": int((columns["ns"] < measured).sum()),
            "lowered_by_a_third": int((columns["ns"] * WIGGLE < measured).sum()),
            "flags": _flags(raw.kind, columns, before, after, missing),
        },
        "error": leave_one_out(raw.kind, raw.formats[0] if raw.formats else "", columns, device),
    }


def _flags(kind: str, columns: Columns, before: float, after: float, missing: int) -> list[str]:
    """What a reader should know: `cleaned`, `uneven` (times that fall as work grows, left as they are), `sparse`
    (few shapes, the rest stand-ins), `holes` (large sizes not timed, filled in proportion)."""
    shapes = len(np.unique(np.stack([columns[name] for name in LAYOUTS[kind].keys], axis=1), axis=0))
    flags = {
        "cleaned": must_clean(kind, before),
        "uneven": after > UNEVEN,
        "sparse": shapes < LEAST_SHAPES.get(kind, 0),
        "holes": missing > 0,
    }
    return [flag for flag, true in flags.items() if true]


def _write(path: Path, kind: str, columns: Columns) -> None:
    names = LAYOUTS[kind].columns
    table = pa.table({name: pa.array(columns[name].astype(np.int32), type=pa.int32()) for name in names})
    keys = list(names[:-1])
    pq.write_table(
        table,
        path,
        compression="zstd",
        compression_level=19,
        use_dictionary=keys,  # type: ignore[arg-type]
        column_encoding={"ns": "BYTE_STREAM_SPLIT"},
        write_statistics=False,
        row_group_size=1 << 20,
        store_schema=False,
    )


def _peak(system: dict[str, Any]) -> dict[str, Any]:
    gpu = system["gpu"]
    names = {"bf16": "bfloat16_tc_flops", "fp8": "fp8_tc_flops", "int8": "int8_tc_flops", "fp4": "fp4_tc_flops"}
    return {
        "memory_bandwidth": float(gpu["mem_bw"]),
        "memory_efficiency": float(gpu["mem_bw_empirical_scaling_factor"]),
        "launch_ns": round(float(gpu["mem_empirical_constant_latency"]) * 1e9, 3),
        "flops": {name: float(gpu[field]) for name, field in names.items() if gpu.get(field)},
    }
