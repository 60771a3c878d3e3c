"""One function: scenario in, run out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from running import MS, scenario_of
from servetwin.results.files import write_run
from servetwin.results.run import REQUEST_COLUMNS, STEP_COLUMNS, Run
from servetwin.scenario.load import from_data
from servetwin.simulation import simulate

CHAT: dict[str, Any] = {
    "arrivals": {"process": "poisson", "rate": 20},
    "requests": 80,
    "input_tokens": {"distribution": "uniform", "min": 5, "max": 300},
    "output_tokens": {"distribution": "uniform", "min": 1, "max": 120},
    "prefixes": {"groups": 4, "tokens": 100},
    "priorities": [1, 1],
}
SMALL = {"num_gpu_blocks_override": 150, "max_model_len": 600, "max_num_seqs": 12}
ALL = frozenset({"steps", "tokens", "schedule"})


def equal(a: Run, b: Run, *, steps: bool = True) -> None:
    for name in REQUEST_COLUMNS:
        assert list(a.requests[name]) == list(b.requests[name]), name
    for name in STEP_COLUMNS if steps else ():
        assert a.steps[name].tolist() == b.steps[name].tolist(), name
    assert [column.tolist() for column in a.itl] == [column.tolist() for column in b.itl]
    assert (a.priced_ns, a.assumed_ns) == (b.priced_ns, b.assumed_ns)
    assert (a.prefix_hits, a.prefix_queries) == (b.prefix_hits, b.prefix_queries)


@pytest.mark.parametrize("timing", ["linear", "roofline"])
@pytest.mark.parametrize("routing", ["round_robin", "least_loaded", "random"])
def test_coalescing_changes_nothing(timing: str, routing: str) -> None:
    law = {"source": "roofline"} if timing == "roofline" else None
    scenario = scenario_of(SMALL, workload=CHAT, timing=law, replicas=2, routing=routing)
    at_once, singly = simulate(scenario, record=ALL), simulate(scenario, record=ALL, coalesce=False)
    equal(at_once, singly)
    assert at_once.token_ns is not None
    assert singly.token_ns is not None
    assert [row.tolist() for row in at_once.token_ns] == [row.tolist() for row in singly.token_ns]
    assert at_once.schedule is not None
    assert singly.schedule is not None
    for name in at_once.schedule:
        assert at_once.schedule[name].tolist() == singly.schedule[name].tolist(), name
    compact = simulate(scenario)
    equal(compact, singly, steps=False)
    assert compact.steps["steps"].sum() == len(singly.steps["step"])
    assert compact.events < singly.events
    assert compact.schedule is None
    assert compact.token_ns is None


def test_same_scenario_and_seed_same_bytes(tmp_path: Path) -> None:
    scenario = scenario_of(SMALL, workload=CHAT, replicas=3, routing="random", seed=5)
    for name in ("a", "b"):
        write_run(simulate(scenario, record=ALL), tmp_path / name, overwrite=False)
    tables = sorted(path.name for path in (tmp_path / "a").glob("*.parquet"))
    assert tables == ["requests.parquet", "schedule.parquet", "steps.parquet"]
    for table in (*tables, "scenario.yaml"):
        assert (tmp_path / "a" / table).read_bytes() == (tmp_path / "b" / table).read_bytes(), table


def test_another_seed_another_run() -> None:
    one, other = (simulate(scenario_of(SMALL, workload=CHAT, seed=seed)) for seed in (1, 2))
    assert one.ints("arrival_ns").tolist() != other.ints("arrival_ns").tolist()


def test_columns() -> None:
    run = simulate(scenario_of(SMALL, workload=CHAT, replicas=2), record=ALL)
    assert set(run.requests) == set(REQUEST_COLUMNS)
    assert set(run.steps) == set(STEP_COLUMNS)
    assert run.ints("request").tolist() == list(range(80))
    assert set(run.requests["pool"]) == {"pool0"}
    order = list(zip(run.steps["engine"].tolist(), run.steps["step"].tolist(), strict=True))
    assert order == sorted(order)
    assert run.token_ns is not None
    for tokens, n, first, last in zip(
        run.token_ns, run.ints("output_tokens"), run.ints("first_token_ns"), run.ints("finish_ns"), strict=True
    ):
        assert len(tokens) == n
        assert (tokens[0], tokens[-1]) == (first, last)
    assert run.schedule is not None
    computed = np.bincount(run.schedule["request"], weights=run.schedule["tokens"]).astype(int)
    expected = run.ints("input_tokens") - run.ints("cached_tokens") + run.ints("output_tokens") - 1
    whole = run.ints("preemptions") == 0
    assert (computed[whole] == expected[whole]).all()
    assert (computed[~whole] >= expected[~whole]).all()
    assert whole.sum() >= 20


def test_priced_time_is_device_time() -> None:
    run = simulate(scenario_of(SMALL, workload=CHAT), record=ALL)
    assert sum(run.priced_ns.values()) == (run.steps["end_ns"] - run.steps["start_ns"]).sum()
    assert run.assumed_ns == 0


def test_roofline_is_analytic_and_assumed() -> None:
    run = simulate(scenario_of(SMALL, workload=CHAT, timing={"source": "roofline"}))
    assert run.priced_ns["analytic"] == sum(run.priced_ns.values())
    assert run.priced_ns["analytic"] >= run.assumed_ns > 0


class TestInterrupted:
    def interrupted(self, at: int) -> Run:
        """A run that is interrupted when so many requests have ended."""
        struck = False

        def strike(ended: int, requests: int, now: int) -> None:
            nonlocal struck
            if not struck and ended >= at:
                struck = True
                raise KeyboardInterrupt

        one_by_one = CHAT | {"requests": 300}
        return simulate(scenario_of(SMALL, workload=one_by_one), record=ALL, coalesce=False, progress=strike)

    def test_keeps_what_has_finished(self) -> None:
        run = self.interrupted(50)
        assert run.partial
        assert 50 <= len(run) < 300
        assert run.has_status("finished").all()
        whole = simulate(scenario_of(SMALL, workload=CHAT | {"requests": 300}))
        assert not whole.partial
        rows = run.ints("request")
        assert run.ints("finish_ns").tolist() == whole.ints("finish_ns")[rows].tolist()

    def test_can_be_written(self, tmp_path: Path) -> None:
        write_run(self.interrupted(50), tmp_path / "run", overwrite=False)
        assert (tmp_path / "run/summary.json").is_file()

    def test_before_anything_has_finished(self, tmp_path: Path) -> None:
        run = self.interrupted(0)
        assert run.partial
        write_run(run, tmp_path / "run", overwrite=False)


def test_progress_ends_with_the_whole() -> None:
    told: list[tuple[int, int, int]] = []
    run = simulate(scenario_of(SMALL, workload=CHAT), coalesce=False, progress=lambda *now: told.append(now))
    assert told[-1][:2] == (80, 80)
    assert told == sorted(told)
    assert len(told) > 1
    assert told[-1][2] <= run.ints("finish_ns").max()


def test_nothing_can_be_served() -> None:
    run = simulate(scenario_of({"max_model_len": 100}, workload=CHAT | {"input_tokens": 100, "prefixes": None}))
    assert run.has_status("failed").all()
    assert set(run.requests["reason"]) == {"its prompt of 100 tokens leaves no room for output in max_model_len 100"}
    assert len(run.steps["step"]) == 0


def test_recorded_time_does_not_depend_on_what_is_recorded() -> None:
    scenario = scenario_of(SMALL, workload=CHAT)
    plain = simulate(scenario)
    for record in ("steps", "tokens", "schedule"):
        equal(plain, simulate(scenario, record=frozenset({record})), steps=record != "steps")


def test_session_order_of_steps_in_time() -> None:
    run = simulate(scenario_of(SMALL, workload=CHAT), record=ALL)
    assert (run.steps["start_ns"][1:] >= run.steps["end_ns"][:-1]).all()
    assert (run.steps["end_ns"] - run.steps["start_ns"] >= 5 * MS).all()


def test_why_requests_failed_is_noted() -> None:
    workload = {**CHAT, "models": {"meta-llama/Llama-3.1-8B": 1, "Qwen/Qwen3-8B": 1}}
    run = simulate(scenario_of(SMALL, workload=workload))
    failed = list(run.requests["status"]).count("failed")
    assert failed > 0
    assert run.notes == [f"{failed} failed, the first of them: no pool serves model Qwen/Qwen3-8B"]
    assert simulate(scenario_of(SMALL, workload=CHAT)).notes == []
    long = {**CHAT, "input_tokens": {"distribution": "uniform", "min": 700, "max": 900}}
    (note,) = simulate(scenario_of(SMALL, workload=long)).notes
    assert note.startswith("80 failed, the first of them: its prompt of ")


def test_a_bandwidth_that_changes_nothing_is_said_so() -> None:
    data = {
        "model": "meta-llama/Llama-3.1-8B",
        "workload": {"arrivals": {"process": "all_at_once"}, "requests": 1, "input_tokens": 10, "output_tokens": 2},
        "pools": [{"device": "h100_sxm", "device_overrides": {"memory_bandwidth": "10TB/s"}}],
    }
    (note,) = simulate(from_data(data, None, Path())).notes
    assert note == (
        "pool pool0: memory_bandwidth 10TB/s changes only what the roofline prices; what was measured on h100_sxm "
        "keeps its time (timing.source: roofline prices all of it)"
    )
    assert not simulate(from_data(data | {"timing": {"source": "roofline"}}, None, Path())).notes
