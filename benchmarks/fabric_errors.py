"""How far collectives priced from catalogue links are from the measured tables that come with the package.

    python benchmarks/fabric_errors.py

Prints, by device and group size, the relative error in percent at each message size: of the fabric's default, of the
plain ring over the link's published rate, and of the reference's ring over the same link.
"""

from __future__ import annotations

from collections.abc import Callable

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
    main()
