"""The links of a cluster file of LLMServingSim 2.0: inside a node, and between nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from servetwin.catalog.units import format_duration, format_rate
from servetwin.errors import InputError
from servetwin.interop.llmservingsim_cluster import GIB, Cluster
from servetwin.interop.llmservingsim_replicas import Replica


@dataclass(frozen=True)
class Link:
    """B/s in one direction, and ns before the first byte arrives."""

    bandwidth: float
    latency: int

    def section(self) -> dict[str, Any]:
        """As a scenario writes it."""
        return {"bandwidth": format_rate(self.bandwidth), "latency": format_duration(self.latency)}


GUESSED = {"rtx_pro_6000": ((16.0, 20_000.0), Link(15.92e9, 6_600))}
"""Links that the shipped files guess, as bandwidth (GiB/s) and latency (ns), and what that project measured later:
all-reduces, all-gathers and reduce-scatters inside CUDA graphs on RTX PRO 6000 over PCIe 5 (its changelog of 2026)."""


@dataclass(frozen=True)
class Links:
    inside: Link
    between: Link | None
    """None: there is one node"""
    spanned: bool
    """a replica has devices in several nodes, so that one link does not say all of it"""
    guessed: bool
    """a guess of the file inside its nodes, which some collective crosses, was replaced by what was measured"""


def read_links(cluster: Cluster, replicas: Sequence[Replica], devices: Sequence[str]) -> Links:
    """The links of a cluster; `devices` are the kinds of device in it.

    Its network has a dimension for each way of splitting work, and every dimension its own links; here a link belongs
    to a place. Raises InputError where two dimensions have different links at one place, as these cannot be told apart.
    """
    pairs = _pairs(cluster)
    alone = len(cluster.hosts) == 1
    inside: list[tuple[float, float]] = []
    if any(replica.first.tensor > 1 for replica in replicas):
        inside.append(pairs[0])
    outer_inside = False
    if any(instance.group is not None for instance in cluster.instances):
        if any(replica.first.pipeline > 1 for replica in replicas):
            inside.append(pairs[-2])
        nodes = [[member.node for member in replica.members] for replica in replicas]
        outer_inside = any(len(set(of)) < len(of) for of in nodes)
    else:  # the last dimension holds pipeline stages and instances, and instances exchange nothing
        outer_inside = any(replica.first.pipeline > 1 for replica in replicas)
    if outer_inside:
        inside.append(pairs[-1])
    if len(set(inside)) > 1:
        message = "cannot be imported: links that differ between the dimensions inside a node"
        field = "link_bw" if len({bandwidth for bandwidth, _ in inside}) > 1 else "link_latency"
        found = getattr(cluster, field)
        raise InputError(message, where=str(cluster.path), field=field, found=found, allowed="equal numbers")
    near = inside[0] if inside else pairs[0]
    guess, measured = GUESSED.get(devices[0], (None, None)) if len(set(devices)) == 1 else (None, None)
    used = measured if measured is not None and near == guess else None
    return Links(
        inside=used or _link(near),
        between=None if alone else _link(pairs[-1]),
        spanned=any(len({member.node for member in replica.members}) > 1 for replica in replicas),
        guessed=used is not None and bool(inside),
    )


def _link(pair: tuple[float, float]) -> Link:
    return Link(pair[0] * GIB, round(pair[1]))


def _pairs(cluster: Cluster) -> list[tuple[float, float]]:
    """Bandwidth and latency of every dimension."""
    dimensions = _dimensions(cluster)
    columns = []
    for name in ("link_bw", "link_latency"):
        values = getattr(cluster, name)
        if not isinstance(values, list):
            values = [values] * dimensions
        if len(values) != dimensions:
            allowed = f"one number, or a list of {dimensions}"
            raise InputError("has the wrong length", where=str(cluster.path), field=name, found=values, allowed=allowed)
        columns.append(values)
    if not all(columns[0]):
        raise InputError("must be more than 0", where=str(cluster.path), field="link_bw", found=cluster.link_bw)
    return list(zip(*columns, strict=True))


def _dimensions(cluster: Cluster) -> int:
    """How many dimensions that project's network has: of the first data-parallel group if there is one (tensor,
    pipeline if any, data), else what is inside an instance, and stages or instances."""
    first = next((instance for instance in cluster.instances if instance.group is not None), None)
    if first is not None:
        return 2 + (first.pipeline > 1)
    devices = sum(instance.devices for instance in cluster.instances)
    stages = sum(instance.pipeline for instance in cluster.instances)
    return 1 + ((len(cluster.instances) if devices == stages else stages) > 1)
