"""`servetwin list`: what the catalogue holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from servetwin.cli.table import print_table
from servetwin.errors import InputError, nearest

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def list_(
    what: Annotated[str, typer.Argument(metavar="devices|models|engines|links|hosts|profiles", help="Which entries.")],
) -> None:
    """List the devices, models, engines, links, hosts or profiles that can be named in a scenario."""
    if what not in TABLES:
        hint = nearest(what, TABLES)
        raise InputError("not a kind of entry", where="list", found=what, allowed=", ".join(TABLES), hint=hint)
    print_table(*TABLES[what]())


def _devices() -> Table:
    from servetwin import catalog
    from servetwin.catalog.units import format_bytes, format_flops, format_rate

    def row(name: str) -> tuple[str, ...]:
        entry = catalog.device(name)
        peak = entry.peak.get("bf16") or entry.peak.get("fp16")
        speed = format_flops(peak) if peak else "-"
        return entry.id, entry.name, format_bytes(entry.memory_bytes), format_rate(entry.memory_bandwidth), speed

    heads = ("ID", "Name", "Memory", "Bandwidth", "16-bit peak")
    return heads, [row(name) for name in catalog.names("devices")]


def _models() -> Table:
    from servetwin import catalog
    from servetwin.scenario.defaults import longest_sequence
    from servetwin.scenario.names import language_part

    def row(name: str) -> tuple[str, ...]:
        entry = catalog.model(name)
        parameters = f"{entry.published.parameters / 1e9:.4g} B" if entry.published else "-"
        return entry.id, parameters, str(longest_sequence(language_part(entry.config)))

    return ("ID", "Parameters", "Longest sequence"), [row(name) for name in catalog.names("models")]


def _engines() -> Table:
    from servetwin import catalog

    return ("ID",), [(name,) for name in catalog.names("engines")]


def _links() -> Table:
    from servetwin import catalog
    from servetwin.catalog.units import format_duration, format_rate

    def row(name: str) -> tuple[str, ...]:
        entry = catalog.link(name)
        return entry.id, entry.name, format_rate(entry.bandwidth), format_duration(entry.latency_ns)

    return ("ID", "Name", "Bandwidth (one way)", "Latency"), [row(name) for name in catalog.names("links")]


def _hosts() -> Table:
    from servetwin import catalog
    from servetwin.catalog.units import format_bytes, format_rate

    def row(name: str) -> tuple[str, ...]:
        entry = catalog.host(name)
        cards = f"{entry.nics} x {entry.nic.id}" if entry.nic and entry.nics else "-"
        memory, speed = format_bytes(entry.memory_bytes), format_rate(entry.memory_bandwidth)
        return entry.id, entry.name, memory, speed, cards

    heads = ("ID", "Name", "Memory", "Bandwidth", "Network cards")
    return heads, [row(name) for name in catalog.names("hosts")]


def _profiles() -> Table:
    from servetwin.catalog.profiles import all_profiles

    heads = ("ID", "Kind", "Device", "Model", "Weights", "KV", "Tensor")
    return heads, [
        (
            entry.id,
            entry.kind,
            entry.device,
            entry.model,
            entry.dtype,
            entry.kv_dtype,
            ", ".join(map(str, entry.tensor)),
        )
        for entry in all_profiles()
    ]


TABLES: dict[str, Callable[[], Table]] = {
    "devices": _devices,
    "models": _models,
    "engines": _engines,
    "links": _links,
    "hosts": _hosts,
    "profiles": _profiles,
}
