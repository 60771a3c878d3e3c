"""Runs of unchanged decode batches, carried out in one go, give exactly what single steps give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groups import pipelined
from running import LINEAR, MS, Ran, Row, run, scenario_of, table_of
from servetwin.engine.batch import Batch
from servetwin.engine.engine import Engine
from servetwin.engine.scheduler import Scheduler
from servetwin.memory.blocks import BlockPool
from servetwin.timing.host import HostOverhead
from servetwin.timing.profile import ProfileTimer
from servetwin.workload.table import RequestTable
from workloads import engines, tables

ROUTING = ["round_robin", "join_shortest_queue", "random", "least_kv_usage", "prefix_aware"]
SLOW_HOST = HostOverhead(
    step_ns=500_000, seq_ns=1_000, gap_ns=300_000, gap_seq_ns=700, request_ns=1_500_000, request_token_ns=900
)


def assert_equal(scenario: Any, table: RequestTable, prepare: Callable[[Engine], None] | None = None) -> Ran:
    coalesced = run(scenario, table, prepare=prepare)
    single = run(scenario, table, coalesce=False, prepare=prepare)
    ours, theirs = coalesced.everything(), single.everything()
    for name in ours:
        assert ours[name] == theirs[name], name
    compact = run(scenario, table, expand=False, prepare=prepare)
    assert compact.everything()["requests"] == ours["requests"]
    assert sum(row["steps"] for row in compact.steps()) == len(ours["steps"])
    return compact


@settings(max_examples=120, deadline=None)
@given(tables(), engines, st.integers(1, 3), st.sampled_from(ROUTING), st.booleans())
def test_linear_law(
    table: RequestTable, engine: dict[str, Any], replicas: int, routing: str, context_counts: bool
) -> None:
    timing = LINEAR | {"per_context_token_ns": 1 if context_counts else 0}
    assert_equal(scenario_of(engine, replicas=replicas, routing=routing, timing=timing), table)


@settings(max_examples=200, deadline=None)
@given(
    tables(),
    engines,
    st.integers(2, 4),
    st.sampled_from([32, 100, 512]),
    st.integers(1, 3),
    st.sampled_from(ROUTING),
    st.booleans(),
)
def test_pipeline_stages(
    table: RequestTable,
    engine: dict[str, Any],
    stages: int,
    budget: int,
    replicas: int,
    routing: str,
    slow_host: bool,
) -> None:
    """Small budgets spread prompts over several batches in flight, so that many of them hold decodes later."""
    engine |= {"max_num_batched_tokens": budget, "max_num_seqs": min(budget, engine["max_num_seqs"])}
    scenario = pipelined(scenario_of(engine, replicas=replicas, routing=routing), stages)
    compact = assert_equal(scenario, table, slow if slow_host else None)
    assert all(engine.scheduler.kv.pool.used == 0 for engine in compact.engines)


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    stages=st.integers(2, 4),
    blocks=st.sampled_from([30, 60, 90, 400]),
    replicas=st.integers(1, 2),
    model=st.sampled_from(["meta-llama/Llama-3.1-8B", "openai/gpt-oss-20b"]),
    source=st.sampled_from(["linear", "roofline", "auto"]),
    slow_host=st.booleans(),
)
def test_a_full_pipeline(
    seed: int, stages: int, blocks: int, replicas: int, model: str, source: str, slow_host: bool
) -> None:
    """Prompts come at once and are computed in small pieces, so that batches of decodes of different sizes take
    turns."""
    random = Random(seed)
    rows = []
    for _ in range(random.randrange(6, 24)):
        arrival, abort = random.choice([0, random.randrange(900 * MS)]), random.randrange(900 * MS)
        prompt, output = random.randrange(1, 130), random.randrange(30, 190)
        rows.append(Row(arrival, prompt, output, abort_ns=arrival + abort if random.random() < 0.1 else -1))
    options = {
        "async_scheduling": False,
        "enable_prefix_caching": random.random() < 0.7,
        "num_gpu_blocks_override": blocks,
        "max_num_seqs": random.choice([6, 16]),
        "max_num_batched_tokens": random.choice([24, 40, 64]),
        "max_model_len": 320,
        "block_size": 16,
        "prefill_schedule_interval": random.choice([1, 1, 3]),
        "scheduling_policy": random.choice(["fcfs", "priority"]),
    }
    timing = LINEAR if source == "linear" else {"source": source}
    routing = random.choice(ROUTING)
    scenario = pipelined(scenario_of(options, model=model, replicas=replicas, timing=timing, routing=routing), stages)
    assert_equal(scenario, table_of(rows), slow if slow_host else None)


@pytest.mark.parametrize("seed", [0, 4, 6, 9, 11, 16])
def test_riders_of_all_lanes_give_way(seed: int) -> None:
    """Seeds of a search: prompts in small pieces that want more than the budget and more blocks than are free, while
    others decode in other batches in flight."""
    random = Random(seed)
    rows = [
        Row(
            random.choice([0, 0, random.randrange(900 * MS)]),
            prompt=random.choice([random.randrange(1, 30), random.randrange(60, 250)]),
            output=random.randrange(10, 120),
        )
        for _ in range(random.randrange(4, 14))
    ]
    options = {
        "async_scheduling": False,
        "enable_prefix_caching": random.random() < 0.5,
        "num_gpu_blocks_override": random.choice([25, 30, 45]),
        "max_num_seqs": 6,
        "max_num_batched_tokens": random.choice([24, 40]),
        "max_model_len": 320,
        "block_size": 16,
        "long_prefill_token_threshold": random.choice([8, 12]),
    }
    assert_equal(pipelined(scenario_of(options), random.randrange(2, 5)), table_of(rows))


@settings(max_examples=200, deadline=None)
@given(
    tables(),
    engines,
    st.sampled_from([1, 2, 3, 7, 20]),
    st.sampled_from([0.0, 1.0]),
    st.sampled_from([1, 1, 1, 2]),
    st.integers(1, 2),
    st.sampled_from(["meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B", "openai/gpt-oss-20b"]),
    st.booleans(),
)
def test_drafts_with_a_certain_fate(
    table: RequestTable,
    engine: dict[str, Any],
    drafts: int,
    accepted: float,
    stages: int,
    replicas: int,
    model: str,
    slow_host: bool,
) -> None:
    engine |= {"num_speculative_tokens": drafts, "spec_acceptance_rate": accepted}
    scenario = scenario_of(engine, model=model, replicas=replicas, routing="least_kv_usage")
    assert_equal(pipelined(scenario, stages), table, slow if slow_host else None)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("accepted", [0.0, 1.0])
@pytest.mark.parametrize("prompt", [100, 199, 290, 316])
def test_drafts_up_to_the_length_of_the_model(prompt: int, accepted: float, asynchronous: bool) -> None:
    for drafts in (1, 6, 17):
        options = {"num_speculative_tokens": drafts, "spec_acceptance_rate": accepted, "max_model_len": 320}
        rows = [Row(prompt=prompt + i, output=300) for i in range(3)]
        assert_equal(scenario_of(options | {"async_scheduling": asynchronous}), table_of(rows))


WINDOW_OF_128, RECURRENT_STATE = "openai/gpt-oss-20b", "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"


@settings(max_examples=120, deadline=None)
@given(tables(), engines, st.sampled_from([WINDOW_OF_128, WINDOW_OF_128, RECURRENT_STATE]), st.integers(1, 2))
def test_several_groups_of_layers(table: RequestTable, engine: dict[str, Any], model: str, replicas: int) -> None:
    engine |= {"num_gpu_blocks_override": 2 * engine["num_gpu_blocks_override"] - 1}
    scenario = scenario_of(engine, model=model, replicas=replicas, routing="least_kv_usage")
    assert_equal(scenario, table)
    assert findable_at_end(run(scenario, table)) == findable_at_end(run(scenario, table, coalesce=False))


@pytest.mark.parametrize("seed", [21, 70, 71, 87, 101])
def test_blocks_come_and_go_in_running_order(seed: int) -> None:
    """Seeds of a search, with most of which it shows when riders do not keep to the order: requests whose prompts are
    computed in small chunks while others decode, in a cache that is always full."""
    random = Random(seed)
    rows = [
        Row(random.randrange(2000) * MS, prompt=random.randrange(1, 300), output=random.randint(5, 300))
        for _ in range(40)
    ]
    options = {
        "async_scheduling": random.random() < 0.3,
        "num_gpu_blocks_override": random.choice([120, 200, 300, 500]),
        "max_num_seqs": 16,
        "max_num_batched_tokens": random.choice([32, 64, 128]),
        "max_model_len": 640,
        "block_size": 16,
        "long_prefill_token_threshold": random.choice([0, 8, 24]),
        "version": random.choice(["vllm-0.33", "vllm-0.19"]),
    }
    scenario, table = scenario_of(options, model=WINDOW_OF_128), table_of(rows)
    coalesced, single = run(scenario, table), run(scenario, table, coalesce=False)
    assert coalesced.everything() == single.everything()
    assert findable_at_end(coalesced) == findable_at_end(single)


def findable_at_end(ran: Ran) -> list[list[Any]]:
    """What the free blocks of each engine cache, in the order in which they would be taken."""
    pools = [engine.scheduler.kv.pool for engine in ran.engines]
    assert all(isinstance(pool, BlockPool) for pool in pools)
    return [[pool._key[block] for block in pool._queue[pool._head :] if block] for pool in pools]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_while_somebody_waits_for_blocks(data: st.DataObject) -> None:
    """A cache that is full most of the time, and prompts that share prefixes, or that quote what others answer while
    those are still at it."""
    random = Random(data.draw(st.integers(0, 2**32)))
    distinct = data.draw(st.booleans())
    size = data.draw(st.sampled_from([4, 16]))

    def row(number: int) -> Row:
        segments = random.choice([[(0, 40)], [(0, 40), (random.randint(1, 2), 24)], [(9, 30), (-1, 8), (3, 20)]])
        if number and random.random() < 0.4:  # as far as request 0 has come, perhaps
            segments = [(7, 30), (-1, random.randrange(1, 90))]
        segments = [*segments, (1000 + number, random.randrange(1, 50))] if number else [(7, 30)]
        arrival, prompt = random.randrange(400) * MS, sum(length for _, length in segments)
        output = 150 if number == 0 else random.randint(1, 160)
        return Row(arrival if number else 0, prompt=prompt, output=output, segments=None if distinct else segments)

    options = {
        "async_scheduling": data.draw(st.booleans()),
        "enable_prefix_caching": data.draw(st.sampled_from([True, True, False])),
        "num_gpu_blocks_override": data.draw(st.integers(22, 45)) * (16 // size),
        "max_num_batched_tokens": 512,
        "max_model_len": 320,
        "block_size": size,
        "watermark": data.draw(st.sampled_from([0.0, 0.05])),
        "scheduling_policy": data.draw(st.sampled_from(["fcfs", "priority"])),
    }
    assert_equal(scenario_of(options), table_of([row(number) for number in range(data.draw(st.integers(2, 20)))]))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_runs_go_on_while_the_head_of_the_queue_is_refused(asynchronous: bool, shared: bool) -> None:
    segments = [(0, 40)] if shared else []
    rows = [
        Row(i * MS, prompt=100, output=180, segments=[*segments, (100 + i, 100 - 40 * shared)] if shared else None)
        for i in range(12)
    ]
    options = {"async_scheduling": asynchronous, "num_gpu_blocks_override": 46, "max_model_len": 320}
    compact = assert_equal(scenario_of(options | {"max_num_batched_tokens": 512}), table_of(rows))
    waited = [row["steps"] for row in compact.steps() if row["waiting"]]
    assert sum(waited) > 5 * len(waited), "most of them in runs"


@pytest.mark.parametrize("blocks", range(16, 24))
def test_what_a_rider_makes_findable_may_let_the_head_of_the_queue_in(blocks: int) -> None:
    """Request 1 quotes 80 tokens of the answer that request 0 is still giving."""
    rows = [
        Row(prompt=30, output=150, segments=[(7, 30)]),
        Row(10 * MS, prompt=230, output=3, segments=[(7, 30), (-1, 80), (5, 120)]),
    ]
    options = {"async_scheduling": False, "num_gpu_blocks_override": blocks, "max_model_len": 250}
    compact = assert_equal(scenario_of(options | {"max_num_batched_tokens": 512}), table_of(rows))
    assert sum(row["steps"] for row in compact.steps()) > 2 * len(compact.steps())


@settings(max_examples=60, deadline=None)
@given(tables(), engines, st.integers(2, 5))
def test_prefills_at_intervals(table: RequestTable, engine: dict[str, Any], interval: int) -> None:
    assert_equal(scenario_of(engine | {"prefill_schedule_interval": interval}), table)


def slow(engine: Engine) -> None:
    engine.host = SLOW_HOST


@settings(max_examples=40, deadline=None)
@given(tables(), engines, st.integers(1, 2))
def test_time_spent_by_the_host(table: RequestTable, engine: dict[str, Any], replicas: int) -> None:
    assert_equal(scenario_of(engine, replicas=replicas), table, slow)


@settings(max_examples=25, deadline=None)
@given(tables(most=10), engines)
def test_roofline(table: RequestTable, engine: dict[str, Any]) -> None:
    assert_equal(scenario_of(engine, timing={"source": "roofline"}), table)


@settings(max_examples=25, deadline=None)
@given(tables(most=10), engines, st.integers(1, 3))
def test_kernel_tables(table: RequestTable, engine: dict[str, Any], replicas: int) -> None:
    """A run that is cut short takes what its last steps would have taken out of the ledger again."""
    assert_equal(scenario_of(engine, replicas=replicas, timing={"source": "auto"}), table)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small measured profile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "profile"))
        from profile_bundle import write_bundle
    from servetwin.interop.llmservingsim_profile import import_profile

    root = tmp_path_factory.mktemp("profile")
    return import_profile(write_bundle(root), "tiny", root / "profiles", layers=4)


@settings(max_examples=25, deadline=None)
@given(table=tables(most=10), engine=engines)
def test_measured_profile(profile: Path, table: RequestTable, engine: dict[str, Any]) -> None:
    def measured(engine: Engine) -> None:
        engine.timer = ProfileTimer.load(profile, 1)

    assert_equal(scenario_of(engine), table, measured)


@pytest.mark.parametrize("model", ["meta-llama/Llama-3.1-8B", WINDOW_OF_128])
@pytest.mark.parametrize("options", [{}, {"prefill_schedule_interval": 4}])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_long_runs_are_really_coalesced(asynchronous: bool, options: dict[str, Any], model: str) -> None:
    rows = [Row(i * 50 * MS, prompt=100, output=800) for i in range(8)]
    compact = assert_equal(scenario_of({"async_scheduling": asynchronous} | options, model=model), table_of(rows))
    steps = compact.steps()
    assert sum(row["steps"] for row in steps) > 10 * len(steps)


@pytest.fixture
def scheduled(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """The batches that were scheduled one by one."""
    batches: list[Batch] = []
    schedule = Scheduler.schedule

    def noted(self: Scheduler, now: int) -> Batch:
        batches.append(schedule(self, now))
        return batches[-1]

    monkeypatch.setattr(Scheduler, "schedule", noted)
    return batches


@pytest.mark.parametrize("stages", [2, 4])
def test_turns_are_really_taken_in_runs(stages: int, scheduled: list[Batch]) -> None:
    options = {"max_num_batched_tokens": 120, "async_scheduling": False}
    scenario = pipelined(scenario_of(options), stages)
    steps = run(scenario, table_of([Row(prompt=60, output=800) for _ in range(8)])).steps()
    assert len(steps) > 790 * stages, "there is one batch in flight, not one a stage"
    assert len(steps) > 20 * len(scheduled)


@pytest.mark.parametrize("accepted", [0.0, 1.0])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_drafts_are_really_run(accepted: float, asynchronous: bool, scheduled: list[Batch]) -> None:
    options = {"num_speculative_tokens": 3, "spec_acceptance_rate": accepted, "async_scheduling": asynchronous}
    rows = [Row(i * 50 * MS, prompt=100, output=1600) for i in range(8)]
    assert len(run(scenario_of(options), table_of(rows)).steps()) > 8 * len(scheduled)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("delay", range(0, 12 * MS, MS // 2))
def test_an_arrival_at_any_moment_of_a_run(asynchronous: bool, delay: int) -> None:
    rows = [Row(prompt=50, output=60), Row(100 * MS + delay, prompt=30, output=5)]
    assert_equal(scenario_of({"async_scheduling": asynchronous}), table_of(rows))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_arrival_exactly_at_a_step_boundary(asynchronous: bool) -> None:
    law = {"source": "linear", "base_ns": 10}
    for at in range(200, 240):
        rows = [Row(prompt=50, output=60), Row(at, prompt=30, output=5)]
        assert_equal(scenario_of({"async_scheduling": asynchronous}, timing=law), table_of(rows))
