"""`servetwin show`: one entry of the catalogue, its facts and their sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from servetwin.errors import InputError, nearest

Facts = dict[str, Any]


def show(
    what: Annotated[str, typer.Argument(metavar="device|model|engine|link|host|profile", help="The kind of entry.")],
    name: Annotated[str, typer.Argument(metavar="ID", help="As `servetwin list` prints it.")],
) -> None:
    """Show what is known about a device, model, engine, link, host or profile, and where it is known from."""
    from servetwin.scenario.document import write

    if what not in ENTRIES:
        hint = nearest(what, ENTRIES)
        raise InputError("not a kind of entry", where="show", found=what, allowed=", ".join(ENTRIES), hint=hint)
    typer.echo(write(ENTRIES[what](name)), nl=False)


def _entry(kind: str) -> Callable[[str], Facts]:
    def look_up(name: str) -> Facts:
        from servetwin import catalog

        return _facts(getattr(catalog, kind)(name))

    return look_up


def _device(name: str) -> Facts:
    """A device, and the measured profiles that exist of it (without one, its steps are priced by the roofline)."""
    from servetwin import catalog
    from servetwin.catalog.profiles import all_profiles

    entry = catalog.device(name)
    facts = _facts(entry)
    sources = facts.pop("sources", None)
    found = [profile.id for profile in all_profiles() if profile.device == entry.id]
    return {**facts, "profiles": found or "none", **({"sources": sources} if sources else {})}


def _profile(name: str) -> Facts:
    from servetwin.catalog.profiles import by_id

    entry = by_id(name)
    return {"id": entry.id, "folder": str(entry.folder), **entry.data}


def _facts(entry: Any) -> Facts:
    """The fields of a catalogue entry that are known, with units, sources last."""
    known = {field.name: getattr(entry, field.name) for field in fields(entry)}
    sources = known.pop("sources", None)
    facts = {name: _shown(name, value) for name, value in known.items() if value is not None}
    return {**facts, "sources": dict(sources)} if sources else facts


def _shown(name: str, value: Any) -> Any:
    """A value of the field `name` as a person reads it; the ends of the names tell the units."""
    from servetwin.catalog import units

    if is_dataclass(value):
        return _facts(value)
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, Path):
        return str(value)
    if name == "peak":
        return {kind: units.format_flops(peak) for kind, peak in value.items()}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, bool | str):
        return value
    for end, formatted in (
        ("_bytes", units.format_bytes),
        ("bandwidth", units.format_rate),
        ("_ns", units.format_duration),
        ("_w", units.format_watts),
    ):
        if name.endswith(end):
            return formatted(value)
    return value


ENTRIES: dict[str, Callable[[str], Facts]] = {
    "device": _device,
    **{kind: _entry(kind) for kind in ("model", "engine", "link", "host")},
    "profile": _profile,
}
