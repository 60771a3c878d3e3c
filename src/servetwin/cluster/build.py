"""From a resolved scenario to a cluster that can run."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from servetwin import catalog
from servetwin.cluster.loop import Cluster, Progress
from servetwin.cluster.network import links_of, network_of
from servetwin.cluster.routing.named import new_policy
from servetwin.cluster.routing.policies import Policy
from servetwin.cluster.routing.router import Limits, Router
from servetwin.engine.engine import Engine
from servetwin.engine.lockstep import LockStep
from servetwin.engine.log import StepLog
from servetwin.engine.options import SchedulerOptions
from servetwin.engine.rank import Rank
from servetwin.engine.request import Request
from servetwin.engine.scheduler import AcceptedDrafts, Scheduler
from servetwin.errors import InputError
from servetwin.memory.capacity import Reserve, block_layout, kv_capacity
from servetwin.memory.kv import Chain
from servetwin.memory.prefix import OwnChain, PrefixChain, SegmentChain
from servetwin.model import dtypes_of, load_architecture
from servetwin.model.layers import MoE
from servetwin.scenario.placement import devices_of, placed
from servetwin.scenario.schema import Pool, Scenario
from servetwin.timing.choose import Pricing, pricing_for, sharding_of
from servetwin.timing.graphs import capture_sizes
from servetwin.timing.protocol import StepTimer
from servetwin.workload.identity import keys_of, prompt_of, shares_prompts
from servetwin.workload.streams import stream
from servetwin.workload.table import Ints, RequestTable

T = TypeVar("T")

IDLE_POLL_NS = 1_000_000
"""vLLM's engine core sleeps 1 ms when it has requests but nothing to run (`_process_engine_step`)."""


@dataclass(frozen=True)
class Built:
    """A cluster ready to run, and what results want to know about how it was built."""

    cluster: Cluster
    log: StepLog
    pools: list[str]
    """name of each engine's pool"""
    pricing: list[Pricing]
    """how each engine's steps are priced"""


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
    cluster = Cluster(table, _router(scenario), scenario.model, progress)
    built = Built(cluster, log, [], [])
    shared = shares_prompts(table)
    placement = placed(scenario.pools, scenario.nodes)
    joined = scenario.timing.source != "linear" and any(devices_of(pool) > 1 for pool in scenario.pools)
    network = network_of(scenario, placement, base) if joined else None
    # With one engine, what happens next is known; signals that are stale show moments which a run must not pass.
    engines = sum(pool.replicas * pool.parallelism.data for pool in scenario.pools)
    runs_ahead = engines > 1 and not scenario.routing.refresh
    for index, pool in enumerate(scenario.pools):
        try:
            _check_supported(pool)
            pricing = pricing_for(scenario, pool, base)
            options = scheduler_options(pool, base, pricing.kv_factor)
        except InputError as error:
            raise error.at(field=f"pools[{index}]") from None
        timers: dict[Hashable, StepTimer] = {}  # equal engines share what has been priced once
        for devices in placement.replicas[index]:
            where = placement.layout(devices) if network else None
            if where not in timers:
                try:
                    links = links_of(network, pool, devices) if network else None
                except InputError as error:
                    raise error.at(field=f"pools[{index}]") from None
                timers[where] = pricing.new_timer(links)
            group = _lock_step(pool, base) if pool.parallelism.data > 1 else None
            for _ in range(pool.parallelism.data):
                number = len(cluster.engines)
                cluster.engines.append(
                    _engine(
                        number,
                        group,
                        options,
                        pricing,
                        timers[where],
                        pool,
                        scenario.seed,
                        cluster,
                        log,
                        coalesce,
                        shared,
                        runs_ahead,
                    )
                )
                built.pools.append(pool.name or f"pool{index}")
                built.pricing.append(pricing)
    cluster.requests = requests = _RequestMaker(table, record_tokens)
    models = [
        pool.model or scenario.model for pool in scenario.pools for _ in range(pool.replicas * pool.parallelism.data)
    ]
    cluster.router.connect(cluster.engines, models, requests.chain)
    return built


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


def scheduler_options(pool: Pool, base: Path, kv_factor: float = 1.0) -> SchedulerOptions:
    """The scheduler's options of a pool's engines, its KV blocks included (their estimate times `kv_factor`)."""
    engine = pool.engine
    arch = load_architecture(_model_reference(pool, base))
    dtypes = dtypes_of(arch, engine.dtype, engine.quantization, engine.kv_cache_dtype)
    facts = catalog.engine(_given(engine.version)).facts
    block_size = _given(engine.block_size)
    sharding = sharding_of(pool)
    if engine.num_gpu_blocks_override is not None:
        blocks = engine.num_gpu_blocks_override
        groups, block_size = block_layout(arch, dtypes, sharding, block_size)
    else:
        device, override = catalog.device(pool.device), pool.device_overrides
        capacity = kv_capacity(
            arch,
            dtypes,
            sharding,
            device_memory_bytes=(override.memory_size if override else None) or device.visible_bytes,
            gpu_memory_utilization=_given(engine.gpu_memory_utilization),
            block_size=block_size,
            max_num_batched_tokens=_given(engine.max_num_batched_tokens),
            max_num_seqs=_given(engine.max_num_seqs),
            max_model_len=_given(engine.max_model_len),
            reserve=Reserve(graphs=0) if engine.enforce_eager else None,
        )
        blocks, block_size = int(capacity.num_gpu_blocks * kv_factor), capacity.block_size
        groups = capacity.groups
    if blocks < 2:
        raise InputError("no KV block is left for requests (block 0 is the null block)", field="engine", found=blocks)
    return SchedulerOptions(
        usable_blocks=blocks - 1,
        max_num_batched_tokens=_given(engine.max_num_batched_tokens),
        max_num_seqs=_given(engine.max_num_seqs),
        max_model_len=_given(engine.max_model_len),
        block_size=block_size,
        max_num_active_seqs=engine.max_num_active_seqs,
        enable_prefix_caching=_given(engine.enable_prefix_caching),
        enable_chunked_prefill=_given(engine.enable_chunked_prefill),
        long_prefill_token_threshold=_given(engine.long_prefill_token_threshold),
        long_prefill_token_threshold_adaptive=bool(engine.long_prefill_token_threshold_adaptive),
        scheduler_reserve_full_isl=_given(engine.scheduler_reserve_full_isl),
        watermark=_given(engine.watermark),
        priority=engine.scheduling_policy == "priority",
        async_scheduling=_given(engine.async_scheduling),
        pipeline=pool.parallelism.pipeline,
        speculative_tokens=engine.num_speculative_tokens or 0,
        prefill_schedule_interval=_given(engine.prefill_schedule_interval),
        windows=tuple("state" if group.kind == "state" else group.window for group in groups),
        **facts.get("scheduler", {}),
    )


def _given(value: T | None) -> T:
    assert value is not None, "the scenario has not been resolved"
    return value


def _model_reference(pool: Pool, base: Path) -> str | Path:
    path = base / _given(pool.model)
    return path if path.exists() else _given(pool.model)


def _lock_step(pool: Pool, base: Path) -> LockStep | None:
    """The group of a replica's data-parallel ranks; None for dense models, whose ranks are independent engines."""
    if not any(isinstance(layer.mlp, MoE) for layer in load_architecture(_model_reference(pool, base)).layers):
        return None
    engine = pool.engine
    graphs: list[int] = []
    if catalog.device(pool.device).kind == "gpu" and not engine.enforce_eager:
        graphs = capture_sizes(_given(engine.max_num_seqs), engine.num_speculative_tokens or 0)
    return LockStep(graphs=graphs, **catalog.engine(_given(engine.version)).facts.get("lockstep", {}))


def _engine(
    number: int,
    group: LockStep | None,
    options: SchedulerOptions,
    pricing: Pricing,
    timer: StepTimer,
    pool: Pool,
    seed: int,
    cluster: Cluster,
    log: StepLog,
    coalesce: bool,
    shared: bool,
    runs_ahead: bool,
) -> Engine:
    accepted = None
    if options.speculative_tokens:
        rate = _given(pool.engine.spec_acceptance_rate)
        accepted = _acceptance(rate, stream(seed, f"acceptance {number}"))
    # Ranks keep step with each other: they wait for the horizon.
    new_engine = partial(Engine, runs_ahead=runs_ahead) if group is None else partial(Rank, group)
    engine: Engine = new_engine(
        number,
        Scheduler(options, options.new_kv_cache(shared or not coalesce), accepted=accepted, rides=coalesce),
        timer,
        log,
        cluster.ended,
        host=pricing.host,
        poll_ns=IDLE_POLL_NS,
        horizon=(lambda: cluster.horizon(engine)) if coalesce else None,
    )
    return engine


def _acceptance(rate: float, random: np.random.Generator) -> AcceptedDrafts:
    """Draft tokens are accepted one after the other with probability `rate`, up to the first that is not."""

    def accepted(request: Request, drafts: int) -> int:
        for i, draw in enumerate(random.random(drafts).tolist()):
            if draw >= rate:
                return i
        return drafts

    return accepted


class _RequestMaker:
    """Turns rows of the workload into requests when they arrive, so that memory holds only those in the system."""

    def __init__(self, table: RequestTable, record_tokens: bool) -> None:
        self._table, self._record, self._shared = table, record_tokens, shares_prompts(table)
        self._input, self._output = _numbers(table.input_tokens), _numbers(table.output_tokens)
        self._priority = None if table.priority is None else _numbers(table.priority)
        self._session = None if table.session is None else _numbers(table.session)
        self._abort = None if table.abort_ns is None else _numbers(table.abort_ns)
        self._arrival = _numbers(table.arrival_ns) if self._abort else []
        self._chains: dict[tuple[int, int], Chain] = {}

    def new(self, row: int, time: int) -> Request:
        prompt, output = self._input[row], self._output[row]
        request = Request(
            row,
            time,
            prompt,
            output,
            stop_after=None if self._table.output_known else output,
            priority=self._priority[row] if self._priority else 0,
            session=self._session[row] if self._session else -1,
            # Where a request is released later than the table says, its client's patience keeps its length.
            abort_ns=time + self._abort[row] - self._arrival[row] if self._abort and self._abort[row] >= 0 else -1,
        )
        if self._record:
            request.token_ns = []
        return request

    def place(self, request: Request, engine: Engine) -> None:
        options, row = engine.scheduler.options, request.row
        if not self._table.output_known:
            request.max_tokens = max(1, options.max_model_len - request.prompt)
        if options.enable_prefix_caching:
            chain = self.chain(row, options.block_size)
            request.chain = OwnChain(row) if chain is None else chain
        self._chains.clear()

    def chain(self, row: int, block_size: int) -> Chain | None:
        """Names of the prefixes of a prompt that may be shared; the request that is routed takes over what was made to
        look it up."""
        if not self._shared:
            return None
        chain = self._chains.get((row, block_size))
        if chain is None:
            chain = self._chains[row, block_size] = _chain(self._table, row, block_size)
        return chain


def _chain(table: RequestTable, row: int, block_size: int) -> Chain:
    if table.token_ids is not None:
        return PrefixChain(keys_of(table, row, block_size).key)
    return SegmentChain(prompt_of(table, row), table.output_seed(row), block_size)


def _numbers(column: Ints) -> memoryview:
    """A column, to be read item by item: as fast as a list, in a fifth of the room."""
    return np.ascontiguousarray(column, np.int64).data
