"""What the catalogue knows about a device, a link, a host, a model and an engine version.

Rates are bytes per second in one direction, sizes bytes, times nanoseconds, powers watts, and arithmetic peaks dense
(without structured sparsity) operations per second.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Link:
    """A data path."""

    id: str
    name: str
    bandwidth: float
    """B/s in one direction"""
    latency_ns: int
    """one way, for a small message"""
    sources: dict[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class ScaleUp:
    """The fabric that joins the devices of one domain."""

    link: Link
    bandwidth: float
    """B/s in one direction of one device, over all its links"""
    domain: int
    """devices that reach each other at this bandwidth"""


@dataclass(frozen=True, slots=True)
class Device:
    """An accelerator."""

    id: str
    name: str
    vendor: str
    kind: str
    memory_bytes: int
    """nominal capacity"""
    visible_bytes: int
    """what an application sees as total memory (below nominal by driver and ECC); nominal where not known"""
    memory_bandwidth: float
    memory_type: str
    peak: dict[str, float] = field(hash=False)
    """dense operations per second by number format (`bf16`, `fp8`, ...)"""
    scale_up: ScaleUp | None
    host_link: Link | None
    tdp_w: float | None
    idle_w: float | None
    launch_ns: int
    compute_units: int | None
    """streaming multiprocessors, compute units or cores"""
    sources: dict[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Host:
    """The computer around the devices."""

    id: str
    name: str
    sockets: int
    cores: int
    """physical cores over all sockets"""
    memory_bytes: int
    memory_bandwidth: float
    """B/s over all sockets"""
    memory_type: str
    devices: int | None
    """accelerators in the box, where it is sold with a fixed number"""
    nic: Link | None
    nics: int
    max_w: float | None
    """power of the whole box at most, accelerators included"""
    sources: dict[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Published:
    """What the makers of a model say about it."""

    parameters: int
    digits: int | None
    """significant digits of `parameters`; None when it is exact"""
    counts: str | None
    """what `parameters` adds to or leaves out of the language model; None when it is just that"""
    active_parameters: int | None
    """parameters that one token passes through, rounded; makers differ in whether embeddings count"""
    kv_bytes_per_token: int | None
    """bytes of KV cache a token at two bytes a number"""


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A model: the keys of its Hugging Face `config.json` that decide computation and memory."""

    id: str
    aliases: tuple[str, ...]
    config: dict[str, Any] = field(hash=False)
    published: Published | None
    sources: dict[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class EngineVersion:
    """The semantics of one version of a serving engine, as named facts."""

    id: str
    facts: dict[str, Any] = field(hash=False)
    sources: dict[str, str] = field(default_factory=dict, hash=False)
