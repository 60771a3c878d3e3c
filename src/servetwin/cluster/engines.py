"""From a resolved pool to the engines of its replicas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from servetwin import catalog
from servetwin.cluster.loop import Cluster
from servetwin.engine.engine import Engine
from servetwin.engine.lockstep import LockStep
from servetwin.engine.log import StepLog
from servetwin.engine.options import SchedulerOptions
from servetwin.engine.rank import Rank
from servetwin.engine.request import Request
from servetwin.engine.scheduler import AcceptedDrafts, Scheduler
from servetwin.errors import InputError
from servetwin.memory.capacity import Reserve, block_layout, kv_capacity
from servetwin.model import dtypes_of, load_architecture
from servetwin.model.layers import MoE
from servetwin.scenario.schema import Pool
from servetwin.timing.choose import Pricing, sharding_of
from servetwin.timing.graphs import graph_sizes
from servetwin.timing.protocol import StepTimer
from servetwin.workload.streams import stream

T = TypeVar("T")

IDLE_POLL_NS = 1_000_000
"""vLLM's engine core sleeps 1 ms when it has requests but nothing to run (`_process_engine_step`)."""


@dataclass(frozen=True)
class Running:
    """What all engines of a run have in common."""

    cluster: Cluster
    log: StepLog
    seed: int
    coalesce: bool
    shared: bool
    """requests may have prompts in common"""
    runs_ahead: bool
    """engines need not wait for each other (see `Engine`)"""
    alone: bool
    """there is one engine"""


def replica_engines(
    pool: Pool, options: SchedulerOptions, pricing: Pricing, timer: StepTimer, base: Path, running: Running
) -> Iterator[Engine]:
    """The engines of one replica: one, or one a data-parallel rank. Those of a mixture of experts keep step."""
    data = pool.parallelism.data
    group = _lock_step(pool, base) if data > 1 else None
    # Ranks keep step with each other: they wait for the horizon.
    new_engine: Callable[..., Engine] = (
        partial(Rank, group) if group else partial(Engine, runs_ahead=running.runs_ahead, alone=running.alone)
    )
    first = len(running.cluster.engines)
    for number in range(first, first + data):
        yield _engine(new_engine, number, pool, options, pricing, timer, running)


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
        accepted_drafts=_always_accepted(engine.num_speculative_tokens or 0, engine.spec_acceptance_rate),
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
    facts = catalog.engine(_given(pool.engine.version)).facts
    return LockStep(graphs=graph_sizes(pool), **facts.get("lockstep", {}))


def _engine(
    new_engine: Callable[..., Engine],
    number: int,
    pool: Pool,
    options: SchedulerOptions,
    pricing: Pricing,
    timer: StepTimer,
    running: Running,
) -> Engine:
    accepted = None
    if options.speculative_tokens:
        rate = _given(pool.engine.spec_acceptance_rate)
        accepted = _acceptance(rate, stream(running.seed, f"acceptance {number}"))
    cluster, coalesce = running.cluster, running.coalesce
    kv = options.new_kv_cache(running.shared or not coalesce)
    engine: Engine = new_engine(
        number,
        Scheduler(options, kv, accepted=accepted, rides=coalesce),
        timer,
        running.log,
        cluster.ended,
        host=pricing.host,
        poll_ns=IDLE_POLL_NS,
        horizon=(lambda: cluster.horizon(engine)) if coalesce else None,
    )
    return engine


def _always_accepted(drafts: int, rate: float | None) -> int | None:
    """How many of `drafts` are accepted in every step, where chance has no part in it."""
    return int(drafts * rate) if drafts and rate in (0.0, 1.0) else None


def _acceptance(rate: float, random: np.random.Generator) -> AcceptedDrafts:
    """Draft tokens are accepted one after the other with probability `rate`, up to the first that is not."""

    if rate in (0.0, 1.0):
        return lambda request, drafts: int(rate) * drafts

    def accepted(request: Request, drafts: int) -> int:
        for i, draw in enumerate(random.random(drafts).tolist()):
            if draw >= rate:
                return i
        return drafts

    return accepted
