"""Which source prices the steps of a pool."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from servetwin import catalog
from servetwin.catalog import Device, profiles
from servetwin.errors import InputError
from servetwin.fabric.link import DeviceLink
from servetwin.model import Architecture, Dtypes, Sharding, dtypes_of, load_architecture
from servetwin.model.expert_choices import expert_options
from servetwin.model.kernels import Collective, Experts, Operator
from servetwin.model.operators import operators
from servetwin.model.sharding import stages
from servetwin.scenario.schema import Pool, Scenario
from servetwin.timing.collectives import WithCollectives
from servetwin.timing.graphs import graph_sizes, padding
from servetwin.timing.host import NO_OVERHEAD, HostOverhead
from servetwin.timing.kernels.tables import KernelTables
from servetwin.timing.linear import LinearTimer
from servetwin.timing.links import Links, LinkSource
from servetwin.timing.operators import OperatorTimer, Source
from servetwin.timing.overlay import CalibratedSource, CalibratedTimer, Overlay, read_overlay
from servetwin.timing.profile import ProfileTimer
from servetwin.timing.protocol import StepTimer
from servetwin.timing.roofline import MEMORY_EFFICIENCY, Roofline
from servetwin.timing.silicon import Silicon
from servetwin.timing.strict import StrictTimer
from servetwin.timing.uncertainty import Spread


class NewTimer(Protocol):
    """Makes a timer with a ledger of its own. `links` are those between the devices of the replica it is for; None =
    the pool's link, or else the device's own."""

    def __call__(self, links: Links | None = None) -> StepTimer: ...


@dataclass(frozen=True)
class Pricing:
    """How the steps of one pool are priced."""

    source: str
    new_timer: NewTimer
    host: HostOverhead
    hashes: dict[str, str] = field(default_factory=dict)
    spread: Spread | None = None
    """relative errors of operator prices, where steps are sums of operators"""
    collectives: tuple[Collective, ...] = ()
    """what the ranks of a replica exchange in a step; empty where steps are priced by a law that knows none"""
    kv_factor: float = 1.0
    """on the KV blocks that fit by estimate"""


def pricing_for(scenario: Scenario, pool: Pool, base: Path) -> Pricing:
    """The pricing of a pool of a resolved scenario, its calibration overlay included.

    Raises:
        InputError: the source asked for does not know this model on this device.
    """
    overlay = Overlay()
    path = None
    if scenario.timing.overlay is not None:
        path = base / scenario.timing.overlay
        overlay = read_overlay(path)
    pricing = _uncalibrated(scenario, pool, base, overlay)
    if scenario.timing.strict_measured:
        lenient = pricing.new_timer
        pricing = replace(pricing, new_timer=lambda links=None: StrictTimer(lenient(links)))
    if path is None:
        return pricing
    hashes = pricing.hashes | {f"overlay {path.name}": hashlib.sha256(path.read_bytes()).hexdigest()}
    return replace(pricing, host=overlay.host(pricing.host), hashes=hashes, kv_factor=overlay.kv_factor or 1.0)


def _uncalibrated(scenario: Scenario, pool: Pool, base: Path, overlay: Overlay) -> Pricing:
    """The pricing but for the host terms of the overlay."""
    timing, degrees = scenario.timing, pool.parallelism
    if timing.source == "linear":
        assert timing.base_ns is not None
        law = (
            timing.base_ns,
            timing.per_prefill_token_ns or 0,
            timing.per_decode_seq_ns or 0,
            timing.per_context_token_ns or 0,
            degrees.pipeline,
        )
        return Pricing("linear", lambda links=None: LinearTimer(*law), NO_OVERHEAD)
    assert pool.model is not None
    path = base / pool.model
    arch = load_architecture(path if path.exists() else pool.model)
    engine = pool.engine
    dtypes = dtypes_of(arch, engine.dtype, engine.quantization, engine.kv_cache_dtype)
    sharding = sharding_of(pool)
    device = catalog.device(pool.device)
    host = host_of(pool)
    domain = device.scale_up.domain if device.scale_up else 1
    experts = expert_options(pool.experts, arch, sharding, seed=scenario.seed, base=base, domain=domain)
    found = operators(arch, dtypes, sharding, experts)
    collectives = tuple(op for op in found if isinstance(op, Collective))
    if timing.source in ("auto", "profile"):
        profiled = _profiled(scenario, pool, arch, dtypes, sharding, device, found)
        if profiled is not None:
            folder, bare, digest = profiled
            scaled: NewTimer = lambda links=None: CalibratedTimer(bare(links), overlay)  # noqa: E731
            new_timer = scaled if overlay.scales_devices else bare
            hashes = {f"profile {folder}": digest}
            return Pricing(f"profile {folder}", new_timer, host, hashes, collectives=collectives)
    bandwidth = pool.device_overrides.memory_bandwidth if pool.device_overrides else None
    measured: list[Source] = []
    hashes = {}
    tables = None
    if timing.source in ("auto", "silicon"):
        tables = _kernel_tables(device, required=timing.source == "silicon")
        if tables is not None:
            measured.append(Silicon(tables, sharding, moe_backend=engine.moe_backend))
            hashes[f"kernels {device.id}"] = profiles.profile_hash(tables.profile.profile.folder)
    roofline = Roofline(device, bandwidth)
    pool_link = _link(pool, device)

    def sources(links: Links | None) -> list[Source]:
        priced: list[Source] = [*_by_precedence(measured, links, pool_link), roofline]
        if not overlay.scales_devices:
            return priced
        reach = (bandwidth or device.memory_bandwidth) * MEMORY_EFFICIENCY
        return [CalibratedSource(source, overlay, reach) for source in priced]

    graphs = graph_sizes(pool)
    padded = padding(graphs) if graphs else None
    name = " > ".join(source.name for source in sources(None))
    new_timer = lambda links=None: OperatorTimer(found, sources(links), padded)  # noqa: E731
    return Pricing(name, new_timer, host, hashes, Spread(tables), collectives)


def _by_precedence(measured: list[Source], network: Links | None, pool_link: DeviceLink | None) -> list[Source]:
    """What prices collectives first. Links that a person described come before a table measured on another machine; a
    table comes before the catalogue's links, but for a group over several nodes, since tables are of one node."""
    links = network or pool_link
    if links is not None and links.explicit:
        return [LinkSource(links), *measured]
    across = [LinkSource(network, only_across_nodes=True)] if network is not None and measured else []
    return [*across, *measured, LinkSource(links)]


def sharding_of(pool: Pool) -> Sharding:
    """How a replica of the pool is spread over its devices."""
    degrees = pool.parallelism
    redundant = pool.experts.redundant_experts if pool.experts else 0
    return Sharding(degrees.tensor, degrees.pipeline, degrees.data, degrees.expert, redundant, degrees.context)


def _kernel_tables(device: Device, required: bool) -> KernelTables | None:
    try:
        return KernelTables.for_device(device.id)
    except InputError:
        if required:
            raise
        return None


def host_of(pool: Pool) -> HostOverhead:
    """Host times of the pool's engine version."""
    assert pool.engine.version is not None
    return HostOverhead(**catalog.engine(pool.engine.version).facts.get("host", {}))


def _profiled(
    scenario: Scenario,
    pool: Pool,
    arch: Architecture,
    dtypes: Dtypes,
    sharding: Sharding,
    device: Device,
    found: Sequence[Operator],
) -> tuple[str, NewTimer, str] | None:
    """The measured profile that prices the pool, None when there is none and none was asked for. A profile that was
    measured at other tensor-parallel degrees alone, or without dealing out the KV, prices nothing here."""
    wanted = scenario.timing.profile
    asked = wanted is not None or scenario.timing.source == "profile"
    if wanted is not None:
        folder = profiles.by_id(wanted).folder
    else:
        there = profiles.find(device.id, pool.model or scenario.model, dtypes.attention.name, dtypes.kv.name, "layers")
        if there is None:
            if asked:
                raise InputError(
                    f"no measured profile of {pool.model} on {device.id}",
                    field="timing.source",
                    found="profile",
                    allowed="import one (servetwin import llmservingsim-profile), or source: auto",
                )
            return None
        folder = there
    if sharding.context > 1:
        if asked:
            raise InputError(
                "a profile measured attention over the whole KV of a sequence",
                field="parallelism.context",
                found=sharding.context,
                allowed="1, or timing.source: auto without a named profile",
            )
        return None
    if not asked and sharding.tensor not in profiles.read_profile(folder).tensor:
        return None
    collectives = [op for op in found if isinstance(op, Collective)]
    experts = [op for op in found if isinstance(op, Experts)]
    layers = [len(run) for run in stages(arch, sharding.pipeline)]
    split = (experts, sharding.expert_tensor, layers)
    pool_link = _link(pool, device)
    beside: list[Source] = []
    if collectives and pool.link is None:
        tables = _kernel_tables(device, required=False)
        beside = [Silicon(tables, sharding)] if tables is not None else []
    first = ProfileTimer.load(folder, sharding.tensor, len(arch.layers), *split)
    loaded = [first]  # tables take longer to prepare than a short run does to simulate: the first engine gets these

    def new_timer(links: Links | None = None) -> StepTimer:
        timer = loaded.pop() if loaded else ProfileTimer(first.profile, sharding.tensor, len(arch.layers), *split)
        if not collectives:
            return timer
        return WithCollectives(timer, collectives, _by_precedence(beside, links, pool_link))

    return first.profile.id, new_timer, profiles.profile_hash(folder)


def _link(pool: Pool, device: Device) -> DeviceLink | None:
    if pool.link is not None:
        return DeviceLink(pool.link.bandwidth, pool.link.latency)
    if device.scale_up is None:
        return None
    return DeviceLink(device.scale_up.bandwidth, device.scale_up.link.latency_ns, explicit=False)
