"""The header of a kernel profile and its tables, each read only when something asks for it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from servetwin.errors import InputError, nearest

SCHEMA = 1
"""Version of the profile layout: `profile.yaml` beside Parquet files of integer columns."""

Columns = dict[str, NDArray[np.int64]]


class Layout(NamedTuple):
    """Columns of one kind of table: `keys` name a kernel's shape, `axes` the sizes over which it was timed."""

    keys: tuple[str, ...]
    axes: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """Column order in the file, which is also its sort order; `ns` is the time in nanoseconds."""
        return (*self.keys, *self.axes, "ns")


LAYOUTS: dict[str, Layout] = {
    "gemm": Layout(("n", "k"), ("m",)),
    "context_attention": Layout(("head_dim", "window", "kv_heads", "heads"), ("batch", "length")),
    "generation_attention": Layout(("head_dim", "window", "kv_heads", "heads"), ("batch", "length")),
    "moe": Layout(("hidden", "inter", "topk", "experts", "tp", "ep", "skew"), ("tokens",)),
    "mla_context": Layout(("heads",), ("batch", "length")),
    "mla_generation": Layout(("heads",), ("batch", "length")),
    "mla_bmm": Layout(("heads",), ("tokens",)),
    "allreduce": Layout(("gpus",), ("bytes",)),
    "nccl": Layout(("gpus",), ("bytes",)),
    "quantize": Layout(("k",), ("m",)),
}


@dataclass(frozen=True)
class Device:
    """Peak rates of the device, against which times are compared when one shape stands in for another.

    `memory_bandwidth` is in bytes/s, `flops` in operations/s by number format (dense). `memory_efficiency` and
    `launch_ns` price kernels that have no table (see `KernelTables.elementwise_ns`).
    """

    name: str
    memory_bandwidth: float
    memory_efficiency: float
    launch_ns: float
    flops: dict[str, float] = field(hash=False)


class KernelProfile:
    """A folder with `profile.yaml` and one Parquet file a table.

    `tables` maps a table's name (`gemm_fp8`, `generation_attention_bf16`, `allreduce_graph`) to its header: kind,
    file, sha256, rows, source, quality and interpolation error.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        header = _read_header(folder / "profile.yaml")
        self.header = header
        self.engine: dict[str, str] = header["engine"]
        self.tables: dict[str, dict[str, Any]] = header["tables"]
        self._columns: dict[str, Columns] = {}

    @cached_property
    def device(self) -> Device:
        peak = self.header["peak"]
        return Device(
            name=self.header["device"],
            memory_bandwidth=float(peak["memory_bandwidth"]),
            memory_efficiency=float(peak["memory_efficiency"]),
            launch_ns=float(peak["launch_ns"]),
            flops={name: float(rate) for name, rate in peak["flops"].items()},
        )

    def columns(self, table: str) -> Columns | None:
        """The columns of a table as int64 arrays in file order (sorted by key, then size); None when it has none.

        Raises `InputError` when the file is missing or is not the one that the header describes.
        """
        if table not in self.tables:
            return None
        if table not in self._columns:
            self._columns[table] = self._read(table)
        return self._columns[table]

    def _read(self, table: str) -> Columns:
        import pyarrow as pa
        import pyarrow.parquet as pq

        entry = self.tables[table]
        path = self.folder / entry["file"]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"kernel table {table!r} cannot be read: {error.strerror}", where=str(path)) from error
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise InputError(f"kernel table {table!r} is not the file that profile.yaml describes", where=str(path))
        # pq.read_table would import pyarrow.dataset, which takes longer than all reading.
        read = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
        return {name: read.column(name).to_numpy().astype(np.int64) for name in LAYOUTS[entry["kind"]].columns}


def shipped() -> dict[str, Path]:
    """Folders of the kernel profiles that come with the package, by device id, in name order."""
    import servetwin.catalog

    root = Path(servetwin.catalog.__path__[0]) / "profiles" / "kernels"
    return {path.parent.name: path.parent for path in sorted(root.glob("*/profile.yaml"))}


def shipped_folder(device: str) -> Path:
    """Folder of the kernel profile of a device; `InputError` when none comes with the package."""
    folders = shipped()
    if device not in folders:
        raise InputError(
            "no measured kernels for this device",
            field="device",
            found=device,
            allowed=", ".join(folders),
            hint=nearest(device, folders),
        )
    return folders[device]


def _read_header(path: Path) -> dict[str, Any]:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"kernel profile cannot be read: {error.strerror}", where=str(path)) from error
    try:
        header = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise InputError(f"not YAML: {error}", where=str(path)) from error
    if not isinstance(header, dict) or header.get("kind") != "kernels":
        raise InputError("not a kernel profile", where=str(path), field="kind", allowed="kernels")
    if header.get("schema") != SCHEMA:
        found = header.get("schema")
        raise InputError("unknown profile layout", where=str(path), field="schema", found=found, allowed=str(SCHEMA))
    return header
