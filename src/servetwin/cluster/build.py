"""From a resolved scenario to a cluster that can run."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from servetwin import catalog
from servetwin.cluster.compiled import fleet_for
from servetwin.cluster.engines import Running, replica_engines, scheduler_options
from servetwin.cluster.loop import Cluster, Progress
from servetwin.cluster.network import links_of, network_of
from servetwin.cluster.requests import RequestMaker
from servetwin.cluster.routing.named import new_policy
from servetwin.cluster.routing.policies import Policy
from servetwin.cluster.routing.router import Limits, Router
from servetwin.engine.log import StepLog
from servetwin.engine.rank import Rank
from servetwin.errors import InputError
from servetwin.fabric.network import Network
from servetwin.scenario.placement import devices_of, placed
from servetwin.scenario.schema import Pool, Scenario
from servetwin.timing.choose import Pricing, pricing_for
from servetwin.timing.protocol import StepTimer
from servetwin.workload.identity import shares_prompts
from servetwin.workload.streams import stream
from servetwin.workload.table import RequestTable


@dataclass(frozen=True)
class Replica:
    """One replica of a pool: its engines (one, or one a data-parallel rank) and the devices that they run on."""

    pool: Pool
    engines: tuple[int, ...]
    devices: tuple[int, ...]
    """in rank order (see `scenario.placement`)"""
    pricing: Pricing
    """how their steps are priced"""
    in_step: bool
    """whether its data-parallel ranks keep step with each other"""


@dataclass(frozen=True)
class Built:
    """A cluster ready to run, and what results want to know about how it was built."""

    cluster: Cluster
    log: StepLog
    pools: list[str]
    """name of each engine's pool"""
    pricing: list[Pricing]
    """how each engine's steps are priced"""
    replicas: list[Replica]
    network: Network | None
    """what joins the devices; None where nothing goes over it"""


def build(
    scenario: Scenario,
    table: RequestTable,
    *,
    base: Path,
    log: StepLog,
    record_tokens: bool = False,
    coalesce: bool = True,
    progress: Progress | None = None,
) -> Built:
    """Engines, router and loop for a resolved scenario.

    Raises:
        InputError: a pool asks for something that is not simulated yet, cannot be priced, or does not fit its device.
    """
    table = replace(table, models=tuple(map(_model_id, table.models)))
    cluster = Cluster(table, _router(scenario), scenario.model, progress)
    placement = placed(scenario.pools, scenario.nodes)
    joined = scenario.timing.source != "linear" and any(devices_of(pool) > 1 for pool in scenario.pools)
    network = network_of(scenario, placement, base) if joined else None
    built = Built(cluster, log, [], [], [], network)
    engines = sum(pool.replicas * pool.parallelism.data for pool in scenario.pools)
    # With one engine, what happens next is known; signals that are stale show moments which a run must not pass.
    ahead = engines > 1 and not scenario.routing.refresh
    running = Running(cluster, log, scenario.seed, coalesce, shares_prompts(table), ahead, engines == 1)
    for index, pool in enumerate(scenario.pools):
        try:
            _add(pool, scenario, placement.replicas[index], placement.layout, base, built, running)
        except InputError as error:
            raise _in_pool(error, index) from None
    requests = RequestMaker(table, record_tokens)
    cluster.requests = requests
    models = [replica.pool.model or scenario.model for replica in built.replicas for _ in replica.engines]
    cluster.router.connect(cluster.engines, models, requests.chain)
    cluster.fleet = fleet_for(cluster.engines, log, cluster.router, table, record_tokens)
    return built


def _add(
    pool: Pool,
    scenario: Scenario,
    replicas: list[tuple[int, ...]],
    layout: Callable[[Sequence[int]], Hashable],
    base: Path,
    built: Built,
    running: Running,
) -> None:
    """The engines of a pool, on the devices of each of its replicas."""
    _check_supported(pool)
    pricing = pricing_for(scenario, pool, base)
    options = scheduler_options(pool, base, pricing.kv_factor)
    timers: dict[Hashable, StepTimer] = {}  # replicas whose devices are joined alike share what has been priced once
    for devices in replicas:
        where = layout(devices) if built.network else None
        if where not in timers:
            timers[where] = pricing.new_timer(links_of(built.network, pool, devices) if built.network else None)
        found = list(replica_engines(pool, options, pricing, timers[where], base, running))
        running.cluster.engines += found
        numbers, in_step = tuple(engine.number for engine in found), isinstance(found[0], Rank)
        built.replicas.append(Replica(pool, numbers, devices, pricing, in_step))
        built.pools.extend([pool.name] * len(found))
        built.pricing.extend([pricing] * len(found))


def _in_pool(error: InputError, index: int) -> InputError:
    """`error` of a pool as one of the scenario: which pool it was, where that is not known yet."""
    if error.where is None and error.field and error.field.split(".")[0] in Pool.model_fields:
        error.field = f"pools[{index}].{error.field}"
    return error.at(field=f"pools[{index}]")


def _model_id(name: str) -> str:
    """The model that requests ask for by `name`, as pools name theirs."""
    try:
        return catalog.model(name).id
    except InputError:
        return name


def _check_supported(pool: Pool) -> None:
    if pool.role != "unified":
        raise InputError("prefill and decode pools are not simulated yet", field="role", found=pool.role)


def _router(scenario: Scenario) -> Router:
    routing = scenario.routing

    def policy(model: str) -> Policy:
        purpose = "routing" if model == scenario.model else f"routing {model}"
        return new_policy(routing, stream(scenario.seed, purpose))

    limits = Limits(
        routing.max_waiting, routing.max_in_flight, routing.when_full == "reject", queue_timeout=routing.queue_timeout
    )
    return Router(routing.policy, policy, routing.refresh or 0, limits)
