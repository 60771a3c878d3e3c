"""The default against measured tables, also of devices that its constants were not fitted to."""

from __future__ import annotations

import pytest

from servetwin import catalog
from servetwin.fabric.build import Computer, build_topology, inside_of
from servetwin.fabric.collectives import ring_allreduce_ns, ring_gather_ns
from servetwin.fabric.group import Fabric
from servetwin.timing.kernels.tables import KernelTables

NCCL = {"allreduce": "all_reduce", "allgather": "all_gather", "reducescatter": "reduce_scatter"}
SIZES = [2**e for e in range(12, 30)]


def errors(device: str, kind: str, ranks: int) -> tuple[float, float]:
    """Mean relative error over sizes from 4 KiB to 512 MiB: of the fabric, and of a ring at the published rate."""
    found = catalog.device(device)
    assert found.scale_up is not None
    law = Fabric(build_topology([Computer(8, inside_of(found, 8))]), "ring").law(kind, [range(ranks)])
    curve = KernelTables.for_device(device).nccl_curve(NCCL[kind], ranks)
    assert curve is not None
    plain = ring_allreduce_ns if kind == "allreduce" else ring_gather_ns
    link = found.scale_up.bandwidth, found.scale_up.link.latency_ns
    ours = [abs(law.ns(size) / curve.ns(size) - 1) for size in SIZES]
    theirs = [abs(plain(ranks, size, *link) / curve.ns(size) - 1) for size in SIZES]
    return sum(ours) / len(SIZES), sum(theirs) / len(SIZES)


@pytest.mark.parametrize("kind", NCCL)
@pytest.mark.parametrize(("device", "most"), [("h200_sxm", 0.12), ("a100_sxm", 0.33), ("b200_sxm", 0.30)])
def test_switches_that_were_not_fitted_to(device: str, most: float, kind: str) -> None:
    """Over groups of 2, 4 and 8. H200 has the fabric of the H100 of the fit; the calls of A100 and B200 take longer."""
    found = [errors(device, kind, ranks) for ranks in (2, 4, 8)]
    ours, plain = (sum(each) / 3 for each in zip(*found, strict=True))
    assert ours < most
    assert ours < 0.5 * plain


@pytest.mark.parametrize("kind", NCCL)
def test_pcie_that_was_not_fitted_to(kind: str) -> None:
    """Two L40S, where the share of PCIe was fitted to two RTX PRO 6000. More L40S do not reach each other directly but
    through the memory of the host, which no link of the catalogue describes."""
    ours, plain = errors("l40s", kind, 2)
    assert ours < 0.17
    assert ours < 0.5 * plain
