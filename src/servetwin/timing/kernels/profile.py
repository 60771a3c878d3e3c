"""The header of a kernel profile and its tables, each read only when something asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from servetwin.catalog.profiles import HEADER, Profile
from servetwin.errors import InputError

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
    "alltoall": Layout(("ep", "hidden", "topk", "experts"), ("tokens",)),
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
    """A profile folder of kind `kernels`; each of its tables is read when it is first asked for.

    `tables` maps a table's name (`gemm_fp8`, `generation_attention_bf16`, `allreduce_graph`) to its header: kind,
    file, sha256, rows, source, quality and interpolation error.
    """

    def __init__(self, profile: Profile) -> None:
        """Raises `InputError` for a profile of another kind."""
        if profile.kind != "kernels":
            where, found = str(profile.folder / HEADER), profile.kind
            raise InputError("not a kernel profile", where=where, field="kind", found=found, allowed="kernels")
        self.profile = profile
        self.tables: Mapping[str, Any] = profile.data["tables"]
        self._columns: dict[str, Columns] = {}

    @cached_property
    def device(self) -> Device:
        """The device's peak rates; `InputError` when the header lacks one."""
        try:
            peak = self.profile.data["peak"]
            return Device(
                name=self.profile.device,
                memory_bandwidth=float(peak["memory_bandwidth"]),
                memory_efficiency=float(peak["memory_efficiency"]),
                launch_ns=float(peak["launch_ns"]),
                flops={name: float(rate) for name, rate in peak["flops"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            where = str(self.profile.folder / HEADER)
            raise InputError(f"malformed: {error!r}", where=where, field="peak") from None

    def columns(self, table: str) -> Columns | None:
        """The columns of a table as int64 arrays in file order (sorted by key, then size); None when it has none.

        Raises `InputError` when the file is missing, or is not the one that the header describes.
        """
        if table not in self.tables:
            return None
        if table not in self._columns:
            self._columns[table] = self._read(table)
        return self._columns[table]

    def _read(self, table: str) -> Columns:
        import pyarrow.parquet as pq

        # pq.read_table would import pyarrow.dataset, which takes longer than all reading.
        read = pq.ParquetFile(self.profile.table(table)).read(use_threads=False)
        kind = self.tables[table]["kind"]
        return {name: read.column(name).to_numpy().astype(np.int64) for name in LAYOUTS[kind].columns}
