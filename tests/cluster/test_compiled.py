"""Engines stepped by compiled code give, to the last bit, what they give in Python."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from running import LINEAR, MS, Row, gaps_of, scenario_of, table_of
from servetwin.cluster import compiled
from servetwin.cluster.build import Built, build
from servetwin.engine.engine import Engine
from servetwin.engine.log import StepLog
from servetwin.engine.request import Request
from servetwin.scenario.schema import Scenario
from servetwin.timing.host import HostOverhead
from servetwin.workload.table import RequestTable
from workloads import engines, tables

pytest.importorskip("numba", reason="compiled engines need the extra numba")

FIELDS = [
    "row", "engine", "arrival_ns", "queued_ns", "scheduled_ns", "first_token_ns", "last_token_ns", "finish_ns",
    "outputs", "known", "status", "reason", "preemptions", "cached_tokens",
]  # fmt: skip
SLOW_HOST = HostOverhead(
    step_ns=500_000, seq_ns=1_000, gap_ns=300_000, gap_seq_ns=700, request_ns=1_500_000, request_token_ns=900
)


def run(scenario: Scenario, table: RequestTable, fleet: bool, host: HostOverhead | None, expand: bool) -> Built:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "WORTHWHILE", 0 if fleet else 1 << 62)
        patch.setattr(compiled, "WORTH_COMPILING", 0)
        if host is not None:
            patch.setattr("servetwin.timing.choose.NO_OVERHEAD", host)
        built = build(scenario, table, base=Path(), log=StepLog(expand=expand))
    if not fleet:
        assert built.cluster.fleet is None
    built.cluster.run()
    return built


def everything(built: Built) -> dict[str, Any]:
    cluster = built.cluster
    gaps = Counter[int]()
    for engine in cluster.engines:
        gaps.update(gaps_of(engine))

    def facts(request: Request) -> list[Any]:
        return [getattr(request, name) for name in FIELDS]

    return {
        "requests": [facts(request) for request in sorted(cluster.ended_requests, key=lambda request: request.row)],
        "gaps": gaps,
        "priced": [engine.timer.ledger for engine in cluster.engines],
        "engines": [(e.steps, e.scheduler.prefix_queries, e.scheduler.preemptions) for e in cluster.engines],
        "steps": {name: column.tolist() for name, column in built.log.table().items()},
    }


def assert_equal(
    scenario: Scenario, table: RequestTable, host: HostOverhead | None = None, expand: bool = False
) -> tuple[list[Engine], list[bool]]:
    """The engines that were to be compiled, and whether they were to the end."""
    ours, theirs = (run(scenario, table, fleet, host, expand) for fleet in (True, False))
    mine, reference = everything(ours), everything(theirs)
    for name in mine:
        assert mine[name] == reference[name], name
    fleet = ours.cluster.fleet
    return ours.cluster.engines, fleet.holds if fleet is not None else []


@settings(max_examples=250, deadline=None)
@given(
    tables(),
    engines,
    st.integers(1, 3),
    st.sampled_from(["round_robin", "join_shortest_queue", "random", "least_loaded", "power_of_two"]),
    st.sampled_from([None, SLOW_HOST]),
    st.booleans(),
)
def test_linear_law(
    table: RequestTable, engine: dict[str, Any], replicas: int, policy: str, host: HostOverhead | None, expand: bool
) -> None:
    table = without_patience(table)
    scenario = scenario_of(engine, replicas=replicas, routing=policy)
    assert_equal(scenario, table, host, expand)


def without_patience(table: RequestTable) -> RequestTable:
    """Requests of their own prompts whose clients never give up, which is what compiled engines are for."""
    from dataclasses import replace

    return replace(table, segments=None, abort_ns=None)


@settings(max_examples=150, deadline=None)
@given(
    tables(),
    engines,
    st.integers(1, 2),
    st.sampled_from([0, 16, 64]),
    st.booleans(),
    st.booleans(),
)
def test_chunks_and_thresholds(
    table: RequestTable, engine: dict[str, Any], replicas: int, threshold: int, adaptive: bool, chunked: bool
) -> None:
    engine |= {
        "long_prefill_token_threshold": threshold,
        "long_prefill_token_threshold_adaptive": adaptive,
        "enable_chunked_prefill": chunked,
        "scheduling_policy": "fcfs",
    }
    if chunked:
        engine["max_num_batched_tokens"] = 48
    assert_equal(scenario_of(engine, replicas=replicas), without_patience(table))


@settings(max_examples=60, deadline=None)
@given(tables(), st.booleans(), st.sampled_from(["meta-llama/Llama-3.1-8B", "mistralai/Mixtral-8x7B-Instruct-v0.1"]))
def test_measured_kernels(table: RequestTable, asynchronous: bool, model: str) -> None:
    engine = {"async_scheduling": asynchronous, "max_num_seqs": 16, "num_gpu_blocks_override": 200}
    scenario = scenario_of(engine, model=model, replicas=2, timing={"source": "auto"})
    _, held = assert_equal(scenario, without_patience(table))
    assert held, "these kernels are measured"


def test_calibrated_kernels() -> None:
    overlay = str(Path(__file__).parents[1] / "timing" / "overlay.yaml")
    rows = [Row(i * 20 * MS, prompt=50 + i * 37 % 900, output=1 + i * 53 % 200) for i in range(200)]
    scenario = scenario_of(replicas=2, timing={"source": "auto", "overlay": overlay})
    _, held = assert_equal(scenario, table_of(rows))
    assert held == [True] * 2


def test_all_of_a_run_is_compiled() -> None:
    rows = [Row(i * 20 * MS, prompt=50 + i * 37 % 400, output=1 + i * 53 % 200) for i in range(300)]
    engines, held = assert_equal(scenario_of(replicas=3, timing={"source": "auto"}), table_of(rows))
    assert len(engines) == 3 and held == [True] * 3


def test_an_engine_leaves_when_a_request_has_to_give_way() -> None:
    rows = [Row(i * MS, prompt=60, output=100) for i in range(40)]
    options = {"num_gpu_blocks_override": 40, "max_model_len": 320, "async_scheduling": True}
    engines, held = assert_equal(scenario_of(options, replicas=2), table_of(rows))
    assert held == [False] * 2 and all(engine.scheduler.preemptions for engine in engines)


def test_a_request_that_never_fits_fails_as_ever() -> None:
    rows = [Row(prompt=20), Row(MS, prompt=200), Row(2 * MS, prompt=30)]
    options = {"num_gpu_blocks_override": 10, "max_model_len": 320}
    engines, held = assert_equal(scenario_of(options), table_of(rows))
    assert len(engines) == 1 and held == [False]


@pytest.mark.parametrize("waits", [{"max_in_flight": 3}, {"max_in_flight": 3, "when_full": "reject"}])
def test_limits_of_the_router(waits: dict[str, Any]) -> None:
    rows = [Row(i * 3 * MS, prompt=40 + i, output=30 + i % 7) for i in range(60)]
    routing = {"policy": "least_loaded", **waits}
    _, held = assert_equal(scenario_of(replicas=2, routing=routing), table_of(rows))
    assert held == [True] * 2


@pytest.mark.parametrize("option", [{"scheduling_policy": "priority"}, {"prefill_schedule_interval": 3}])
def test_other_engines_are_left_to_python(option: dict[str, Any]) -> None:
    _, held = assert_equal(scenario_of(option), table_of([Row(i * MS) for i in range(9)]))
    assert not held, LINEAR


def test_code_compiled_from_another_text_is_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from servetwin.engine.compiled import kept

    monkeypatch.setattr(kept, "_folder", lambda: tmp_path)
    old = [tmp_path / name for name in ("kernel.advance-26.py311.nbi", "steps.update-9.py311.1.nbc")]
    for file in [*old, tmp_path / "other.nbi"]:
        file.write_bytes(b"")
    (tmp_path / kept.NOTE).write_text("the digest of another text")
    assert not kept.compiled_before()
    kept.throw_away_older()
    assert not any(file.exists() for file in old) and (tmp_path / "other.nbi").exists()
    assert not kept.compiled_before()
    old[0].write_bytes(b"")
    kept.throw_away_older()
    assert kept.compiled_before(), "made from the present text"
