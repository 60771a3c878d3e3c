"""Which source prices the steps of a pool."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from servetwin import catalog
from servetwin.catalog import Device, profiles
from servetwin.errors import InputError
from servetwin.fabric.link import DeviceLink
from servetwin.model import Architecture, Dtypes, Sharding, dtypes_of, load_architecture
from servetwin.model.kernels import Collective
from servetwin.model.operators import operators
from servetwin.scenario.schema import Pool, Scenario
from servetwin.timing.graphs import capture_sizes, padding
from servetwin.timing.host import NO_OVERHEAD, HostOverhead
from servetwin.timing.kernels.tables import KernelTables
from servetwin.timing.linear import LinearTimer
from servetwin.timing.links import Links, LinkSource
from servetwin.timing.operators import OperatorTimer, Source
from servetwin.timing.overlay import CalibratedSource, CalibratedTimer, Overlay, read_overlay
from servetwin.timing.profile import ProfileTimer
from servetwin.timing.protocol import StepTimer
from servetwin.timing.roofline import MEMORY_EFFICIENCY, Roofline
from servetwin.timing.shape import StepShape
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
    timing = scenario.timing
    if timing.source == "linear":
        assert timing.base_ns is not None
        law = (
            timing.base_ns,
            timing.per_prefill_token_ns or 0,
            timing.per_decode_seq_ns or 0,
            timing.per_context_token_ns or 0,
        )
        return Pricing("linear", lambda links=None: LinearTimer(*law), NO_OVERHEAD)
    assert pool.model is not None
    path = base / pool.model
    arch = load_architecture(path if path.exists() else pool.model)
    engine = pool.engine
    dtypes = dtypes_of(arch, engine.dtype, engine.quantization, engine.kv_cache_dtype)
    degrees = pool.parallelism
    sharding = Sharding(degrees.tensor, degrees.pipeline, 1, degrees.expert)
    device = catalog.device(pool.device)
    host = host_of(pool)
    if timing.source in ("auto", "profile"):
        profiled = _profiled(scenario, pool, arch, dtypes, sharding, device)
        if profiled is not None:
            folder, bare, digest = profiled
            scaled: NewTimer = lambda links=None: CalibratedTimer(bare(links), overlay)  # noqa: E731
            new_timer = scaled if overlay.scales_devices else bare
            return Pricing(f"profile {folder}", new_timer, host, {f"profile {folder}": digest})
    bandwidth = pool.device_overrides.memory_bandwidth if pool.device_overrides else None
    measured: list[Source] = []
    hashes: dict[str, str] = {}
    tables = None
    if timing.source in ("auto", "silicon"):
        tables = _kernel_tables(device, required=timing.source == "silicon")
        if tables is not None:
            measured.append(Silicon(tables, sharding, moe_backend=engine.moe_backend))
            hashes[f"kernels {device.id}"] = profiles.profile_hash(tables.profile.profile.folder)
    roofline = Roofline(device, bandwidth)
    pool_link = _link(pool, device)

    def sources(links: Links | None) -> list[Source]:
        found = [*_by_precedence(measured, links, pool_link), roofline]
        if not overlay.scales_devices:
            return found
        reach = (bandwidth or device.memory_bandwidth) * MEMORY_EFFICIENCY
        return [CalibratedSource(source, overlay, reach) for source in found]

    found = operators(arch, dtypes, sharding)
    assert engine.max_num_seqs is not None
    padded = None
    if device.kind == "gpu" and not engine.enforce_eager:
        padded = padding(capture_sizes(engine.max_num_seqs, engine.num_speculative_tokens or 0))
    name = " > ".join(source.name for source in sources(None))
    return Pricing(name, lambda links=None: OperatorTimer(found, sources(links), padded), host, hashes, Spread(tables))


def _by_precedence(measured: list[Source], network: Links | None, pool_link: DeviceLink | None) -> list[Source]:
    """What prices collectives first. Links that a person described come before a table measured on another machine; a
    table comes before the catalogue's links, but for a group over several nodes, since tables are of one node."""
    links = network or pool_link
    if links is not None and links.explicit:
        return [LinkSource(links), *measured]
    across = [LinkSource(network, only_across_nodes=True)] if network is not None and measured else []
    return [*across, *measured, LinkSource(links)]


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
    scenario: Scenario, pool: Pool, arch: Architecture, dtypes: Dtypes, sharding: Sharding, device: Device
) -> tuple[str, NewTimer, str] | None:
    wanted = scenario.timing.profile
    if wanted is not None:
        folder = profiles.by_id(wanted).folder
    else:
        found = profiles.find(device.id, pool.model or scenario.model, dtypes.attention.name, dtypes.kv.name, "layers")
        if found is None:
            if scenario.timing.source == "profile":
                raise InputError(
                    f"no measured profile of {pool.model} on {device.id}",
                    field="timing.source",
                    found="profile",
                    allowed="import one (servetwin import llmservingsim-profile), or source: auto",
                )
            return None
        folder = found
    layers = len(arch.layers)
    pool_link = _link(pool, device) if sharding.tensor * sharding.pipeline > 1 else None
    collectives = [op for op in operators(arch, dtypes, sharding) if isinstance(op, Collective)]
    first = ProfileTimer.load(folder, sharding.tensor, layers)
    loaded = [first]  # tables take longer to prepare than a short run does to simulate: the first engine gets these

    def new_timer(links: Links | None = None) -> StepTimer:
        timer = loaded.pop() if loaded else ProfileTimer(first.profile, sharding.tensor, layers)
        between = links or pool_link
        return timer if between is None or not collectives else _WithCollectives(timer, collectives, between)

    return first.profile.id, new_timer, profiles.profile_hash(folder)


def _link(pool: Pool, device: Device) -> DeviceLink | None:
    if pool.link is not None:
        return DeviceLink(pool.link.bandwidth, pool.link.latency)
    if device.scale_up is None:
        return None
    return DeviceLink(device.scale_up.bandwidth, device.scale_up.link.latency_ns, explicit=False)


class _WithCollectives:
    """A measured profile of one rank, and beside it the collectives over the links, which it does not hold."""

    def __init__(self, ranks: StepTimer, collectives: list[Collective], links: Links) -> None:
        self.ranks, self._collectives, self._links = ranks, collectives, links
        self.ledger = ranks.ledger
        self._priced: dict[tuple[int, int], int] = {}

    def step_ns(self, shape: StepShape) -> int:
        exchanged = self._exchanged(shape)
        self.ledger.analytic += exchanged
        return self.ranks.step_ns(shape) + exchanged

    def run_ns(self, shape: StepShape, steps: int) -> list[int]:
        exchanged = self._exchanged(shape)
        self.ledger.analytic += exchanged * steps
        return [ns + exchanged for ns in self.ranks.run_ns(shape, steps)]

    def _exchanged(self, shape: StepShape) -> int:
        key = shape.tokens, shape.logits
        found = self._priced.get(key)
        if found is None:
            found = self._priced[key] = sum(
                round(self._links.collective_ns(op, op.count(shape)) * sum(op.stages)) for op in self._collectives
            )
        return found
