"""From the fields of a YAML file to an entry of the catalogue."""

from __future__ import annotations

from collections.abc import Callable

from servetwin.catalog.entries import Device, EngineVersion, Host, Link, ModelEntry, Published, ScaleUp
from servetwin.catalog.fields import Fields, count, one_of, positive, text, texts
from servetwin.catalog.units import bytes_of, duration_ns, flops_of, rate_of, watts_of
from servetwin.errors import InputError

KINDS_OF_DEVICE = ("gpu", "tpu", "npu")
NUMBER_FORMATS = ("fp64", "fp32", "tf32", "bf16", "fp16", "fp8", "int8", "fp6", "fp4", "int4")
LAUNCH_NS = 2_000
"""Kernel launch latency of a device that states none: an assumption, of the order seen with captured graphs."""

FindLink = Callable[[str], Link]
"""Turns the name of a link into the link."""


def read_link(id: str, fields: Fields, _find: FindLink) -> Link:
    link = Link(
        id=id,
        name=fields.maybe("name", text, id),
        bandwidth=fields.quantity("bandwidth", positive(rate_of)),
        latency_ns=fields.quantity("latency", duration_ns),
        sources=fields.sources,
    )
    fields.done()
    return link


def read_device(id: str, fields: Fields, find: FindLink) -> Device:
    memory = fields.group("memory")
    wires = fields.maybe_group("interconnect")
    size = memory.get("size", positive(bytes_of))
    device = Device(
        id=id,
        name=fields.maybe("name", text, id),
        vendor=fields.maybe("vendor", text, ""),
        kind=fields.maybe("kind", lambda value: one_of(value, KINDS_OF_DEVICE), "gpu"),
        memory_bytes=size,
        visible_bytes=memory.maybe_quantity("visible", positive(bytes_of), size),
        memory_bandwidth=memory.get("bandwidth", positive(rate_of)),
        memory_type=memory.maybe("type", text, ""),
        peak=_peak(fields.group("peak")),
        scale_up=_scale_up(wires.maybe_group("scale_up"), find) if wires else None,
        host_link=_link_of(wires.maybe_group("host"), find) if wires else None,
        tdp_w=fields.maybe_quantity("tdp", positive(watts_of), None),
        idle_w=fields.maybe_quantity("idle", positive(watts_of), None),
        launch_ns=fields.maybe_quantity("launch_latency", duration_ns, LAUNCH_NS),
        compute_units=fields.maybe_quantity("compute_units", count, None),
        sources=fields.sources,
    )
    for part in (memory, wires, fields):
        if part:
            part.done()
    return device


def read_host(id: str, fields: Fields, find: FindLink) -> Host:
    memory = fields.group("memory")
    nic = fields.maybe_group("nic")
    host = Host(
        id=id,
        name=fields.maybe("name", text, id),
        sockets=fields.quantity("sockets", count),
        cores=fields.quantity("cores", count),
        memory_bytes=memory.get("size", positive(bytes_of)),
        memory_bandwidth=memory.get("bandwidth", positive(rate_of)),
        memory_type=memory.maybe("type", text, ""),
        devices=fields.maybe_quantity("devices", count, None),
        nics=nic.maybe("count", count, 1) if nic else 0,
        nic=_link_of(nic, find),
        max_w=fields.maybe_quantity("max_power", positive(watts_of), None),
        sources=fields.sources,
    )
    memory.done()
    fields.done()
    return host


def read_model(id: str, fields: Fields, _find: FindLink) -> ModelEntry:
    published = fields.maybe_group("published")
    model = ModelEntry(
        id=_same_id(fields, id.replace("__", "/", 1)),
        aliases=fields.maybe("aliases", texts, ()),
        config=fields.group("config").rest(),
        published=_published(published) if published else None,
        sources=fields.sources,
    )
    fields.done()
    return model


def read_engine(id: str, fields: Fields, _find: FindLink) -> EngineVersion:
    return EngineVersion(_same_id(fields, id), fields.rest(), fields.sources)


def open_entry(data: object, where: str) -> Fields:
    """The fields of an entry, with its sources read and its aliases (which only look-up uses) checked."""
    fields = Fields(data, where)
    fields.sources = fields.maybe("sources", _sources, {})
    fields.maybe("aliases", texts, ())
    return fields


def _same_id(fields: Fields, id: str) -> str:
    """The id that follows from the name of the file; one that is written in it must agree."""
    return fields.maybe("id", lambda value: one_of(value, [id]), id)


def _sources(value: object) -> dict[str, str]:
    named = Fields(value, "", "sources")
    return {key: named.get(key, text) for key in named.rest()}


def _published(fields: Fields) -> Published:
    published = Published(
        parameters=fields.get("parameters", count),
        digits=fields.maybe("digits", count, None),
        counts=fields.maybe("counts", text, None),
        active_parameters=fields.maybe("active_parameters", count, None),
        kv_bytes_per_token=fields.maybe_quantity("kv_bytes_per_token", count, None),
    )
    fields.done()
    return published


def _peak(fields: Fields) -> dict[str, float]:
    peak = {name: fields.get(name, positive(flops_of)) for name in NUMBER_FORMATS if fields.has(name)}
    fields.done()
    if not peak:
        raise InputError("no number format has a peak", where=fields.where, field=fields.path)
    return peak


def _scale_up(fields: Fields | None, find: FindLink) -> ScaleUp | None:
    if fields is None:
        return None
    link = fields.get("link", lambda value: _link(value, fields, find))
    scale_up = ScaleUp(link, fields.maybe("bandwidth", positive(rate_of), link.bandwidth), fields.get("domain", count))
    fields.done()
    return scale_up


def _link_of(fields: Fields | None, find: FindLink) -> Link | None:
    """The link of a group that names nothing else."""
    if fields is None:
        return None
    link = fields.get("link", lambda value: _link(value, fields, find))
    fields.done()
    return link


def _link(value: object, fields: Fields, find: FindLink) -> Link:
    """A link by name, or written out in place."""
    if not isinstance(value, dict):
        return find(text(value))
    return read_link("inline", fields.group("link"), find)
