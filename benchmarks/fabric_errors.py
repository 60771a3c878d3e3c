"""How far collectives priced from catalogue links are from the measured tables that come with the package.

python benchmarks/fabric_errors.py          the errors in percent, by table, device, group size and message size
python benchmarks/fabric_errors.py --fit    how the constants of the default were fitted
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from servetwin import catalog
from servetwin.fabric.build import Computer, build_topology, inside_of
from servetwin.fabric.collectives import exchange_ns, ring_allreduce_ns, ring_gather_ns
from servetwin.fabric.group import Fabric
from servetwin.fabric.reference import Dimension, ReferenceRings
from servetwin.timing.kernels.tables import KernelTables

DEVICES = ("a100_sxm", "h100_sxm", "h200_sxm", "b200_sxm", "l40s", "rtx_pro_6000")
TABLES = {
    "vLLM allreduce": "allreduce",
    "NCCL allreduce": "allreduce",
    "NCCL allgather": "allgather",
    "NCCL reducescatter": "reducescatter",
    "NCCL alltoall": "alltoall",
}
NCCL = {"allreduce": "all_reduce", "allgather": "all_gather", "reducescatter": "reduce_scatter", "alltoall": "alltoall"}
SIZES = (2**12, 2**16, 2**19, 2**22, 2**25, 2**28)


def measured(table: str, device: str, ranks: int) -> Callable[[int], float]:
    tables = KernelTables.for_device(device)
    curve = tables.allreduce_curve(ranks) if table.startswith("vLLM") else tables.nccl_curve(NCCL[TABLES[table]], ranks)
    assert curve is not None
    return curve.ns


def default(table: str, device: str, ranks: int) -> Callable[[int], float]:
    """The fabric's price over a node of eight devices, of which the first `ranks` are the group. NCCL's all-reduce is
    held against its ring alone, since `auto` may take the engine's own kernel."""
    topology = build_topology([Computer(8, inside_of(catalog.device(device), 8))])
    algorithm = "ring" if table == "NCCL allreduce" else "auto"
    return Fabric(topology, algorithm).law(TABLES[table], [range(ranks)]).ns


def plain_ring(table: str, device: str, ranks: int) -> Callable[[int], float]:
    """What a scenario without a network, on a device without tables, is priced at."""
    scale_up = catalog.device(device).scale_up
    assert scale_up is not None
    kind, link = TABLES[table], (scale_up.bandwidth, scale_up.link.latency_ns)
    law = {"allreduce": ring_allreduce_ns, "alltoall": exchange_ns}.get(kind, ring_gather_ns)
    return lambda size: law(ranks, size, *link)


def reference(table: str, device: str, ranks: int) -> Callable[[int], float]:
    kind = TABLES[table]
    found = catalog.device(device)
    assert found.scale_up is not None
    link = Dimension(ranks, found.scale_up.bandwidth, found.scale_up.link.latency_ns)
    rings = ReferenceRings((link,), found.memory_bandwidth)
    if kind == "allreduce":
        return rings.allreduce
    return rings.reducescatter if kind == "reducescatter" else lambda size: rings.allgather(size / ranks)


MODELS = {"default": default, "plain ring": plain_ring, "reference": reference}


def errors(table: str, model: str, device: str, ranks: int) -> list[float]:
    """Relative errors at `SIZES`."""
    price, truth = MODELS[model](table, device, ranks), measured(table, device, ranks)
    return [price(size) / truth(size) - 1 for size in SIZES]


def points(device: str, ranks: Sequence[int]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Latency of the rounds, time of the bytes at the published rate, and measured time, of NCCL's rings."""
    scale_up = catalog.device(device).scale_up
    assert scale_up is not None
    rows = []
    for n, (table, passes) in product(ranks, [("allreduce", 2), ("allgather", 1), ("reducescatter", 1)]):
        truth = measured(f"NCCL {table}", device, n)
        for size in (2**e for e in range(9, 30)):
            moved = passes * (n - 1) / n * size
            rows.append((passes * (n - 1) * scale_up.link.latency_ns, moved / scale_up.bandwidth * 1e9, truth(size)))
    latency, bytes_ns, truth_ns = np.array(rows, dtype=np.float64).T
    return latency, bytes_ns, truth_ns


def misfit(data: tuple[NDArray[np.float64], ...], small_ns: float, small: float, big_ns: float, big: float) -> float:
    """Mean |log(model / measured)| of two protocols, the quicker of which is used."""
    latency, bytes_ns, truth = data
    model = latency + np.minimum(small_ns + bytes_ns / small, big_ns + bytes_ns / big)
    return float(np.abs(np.log(model / truth)).mean())


def fit() -> None:
    grid = list(
        product(
            range(2500, 6001, 500), np.arange(0.16, 0.6, 0.02), range(6000, 26001, 1000), np.arange(0.6, 0.96, 0.02)
        )
    )
    data = points("h100_sxm", (2, 4, 8))
    small_ns, small, big_ns, big = best = min(grid, key=lambda values: misfit(data, *values))
    print(f"h100_sxm: {small_ns} ns at share {small:.2f}, {big_ns} ns at {big:.2f}; error {misfit(data, *best):.3f}")

    def pcie(device: str, share: float) -> float:
        return misfit(points(device, (2,)), small_ns, small / big * share, big_ns, share)

    share = min(np.arange(0.4, 0.9, 0.04), key=lambda share: pcie("rtx_pro_6000", share))
    print(f"rtx_pro_6000 with 2 devices: share {share:.2f}; error {pcie('rtx_pro_6000', share):.3f}")
    for device, ranks in (("h200_sxm", (2, 4, 8)), ("a100_sxm", (2, 4, 8)), ("b200_sxm", (2, 4, 8)), ("gb200", (2, 4))):
        print(f"{device}, not fitted to: error {misfit(points(device, ranks), *best):.3f}")
    print(f"l40s with 2 devices, not fitted to: error {pcie('l40s', share):.3f}")


def main() -> None:
    sizes = " | ".join(f"{size // 2**20} MiB" if size >= 2**20 else f"{size // 2**10} KiB" for size in SIZES)
    for table in TABLES:
        print(f"\n{table}\n\n| device | ranks | {sizes} |\n| --- | ---: |{' ---: |' * len(SIZES)}")
        for device in DEVICES:
            for ranks in (2, 4, 8):
                cells = [f"{100 * error:+.0f}" for error in errors(table, "default", device, ranks)]
                print(f"| {device} | {ranks} | {' | '.join(cells)} |")
    print(f"\n| mean of the absolute errors | {' | '.join(MODELS)} |\n| --- |{' ---: |' * len(MODELS)}")
    for table in TABLES:
        for device in DEVICES:
            found = [[abs(e) for n in (2, 4, 8) for e in errors(table, model, device, n)] for model in MODELS]
            print(f"| {table}, {device} | {' | '.join(f'{100 * sum(f) / len(f):.0f}' for f in found)} |")


if __name__ == "__main__":
    fit() if "--fit" in sys.argv else main()
