"""What a lock-step group does, case by case."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from groups import GRAPHS, GroupRan, pipelined, run_groups
from running import LINEAR, MS, Ran, Row, run, scenario_of, table_of
from servetwin.cluster.build import build
from servetwin.engine.lockstep import LockStep
from servetwin.engine.log import StepLog
from servetwin.engine.rank import Rank
from servetwin.engine.request import Status
from servetwin.scenario.load import from_data
from servetwin.scenario.resolve import resolve
from servetwin.scenario.schema import Scenario
from servetwin.timing.host import HostOverhead
from watching import watched

LAW = {"base_ns": 1000, "per_prefill_token_ns": 0, "per_decode_seq_ns": 0, "per_context_token_ns": 0}
SYNC, ASYNC = {"async_scheduling": False}, {"async_scheduling": True}
BOTH = pytest.mark.parametrize("engine", [SYNC, ASYNC], ids=["sync", "async"])


def serve(
    rows: Sequence[Row], engine: dict[str, Any], *, ranks: int = 2, pipeline: int = 1, **options: Any
) -> GroupRan:
    """Row i goes to rank i modulo `ranks`; passes take 1000 ns unless a law is given."""
    scenario = pipelined(scenario_of(engine, replicas=ranks, routing="round_robin"), pipeline)
    options = {"law": LAW, "check_every": 32, "checks_first": False} | options
    with watched() as schedulers:
        ran = run_groups(scenario, table_of(rows), data=ranks, coalesce=False, **options)
    for scheduler in schedulers:
        scheduler.check_end()
    passes = ran.passes()
    assert all(member == passes[0] for member in passes)
    return ran


def moe(engine: dict[str, Any] | None = None, *, model: str = "Qwen/Qwen3-30B-A3B", **pool: Any) -> Scenario:
    timing = pool.pop("timing", LINEAR)
    data = {
        "model": model,
        "workload": {"arrivals": {"process": "all_at_once"}, "requests": 1, "input_tokens": 10, "output_tokens": 10},
        "pools": [{"device": "h100_sxm", "engine": engine or {}} | pool],
        "timing": timing,
    }
    return resolve(from_data(data, None, Path()), Path())


class TestPasses:
    @BOTH
    @pytest.mark.parametrize("graphs", [(), (1, 2, 4), GRAPHS])
    def test_take_as_long_as_the_slowest_rank_at_its_padded_tokens(
        self, engine: dict[str, Any], graphs: tuple[int, ...]
    ) -> None:
        law = {"base_ns": 1000, "per_prefill_token_ns": 7, "per_decode_seq_ns": 50, "per_context_token_ns": 1}
        rows = [Row(i * 3000, prompt=5 + 37 * i % 90, output=3 + 5 * i) for i in range(11)]
        ran = serve(rows, engine, ranks=3, graphs=graphs, law=law | {"per_padding_ns": 11, "per_gathered_ns": 3})
        by_step: dict[int, list[dict[str, int]]] = {}
        for step in ran.steps():
            by_step.setdefault(step["step"], []).append(step)
        padded = alone = 0
        for members in by_step.values():
            own = [step["prefill_tokens"] + step["decode_seqs"] for step in members]
            brought = [tokens or 1 for tokens in own]
            fitting = [size for size in graphs if size >= max(brought)]
            computed = [fitting[0]] * 3 if fitting else brought
            padded, alone = padded + bool(fitting), alone + (not fitting)
            slowest = max(
                1000
                + 7 * step["prefill_tokens"]
                + 50 * step["decode_seqs"]
                + sum(step[name] for name in ("prefill_context", "decode_context"))
                + tokens
                + 11 * (size - tokens)
                + 3 * sum(computed)
                for step, tokens, size in zip(members, own, computed, strict=True)
            )
            assert {step["end_ns"] - step["start_ns"] for step in members} == {slowest}
        assert bool(padded) == bool(graphs)
        assert alone

    def test_start_when_the_last_host_is_ready(self) -> None:
        host = HostOverhead(step_ns=300, seq_ns=10, gap_ns=50, gap_seq_ns=1)
        ran = serve([Row(0, output=3), Row(0, output=3), Row(0, output=3)], SYNC, host=host)
        first, second = ran.passes()[0][:2]
        assert first == (320, 320 + 1000 + 50 + 2)  # the rank with two requests comes last, and hands over last
        assert second == (first[1] + 320, first[1] + 320 + 1052)

    @pytest.mark.parametrize(("counts", "graphs", "computed"), [
        ((3, 1), (1, 2, 4, 8), [4, 4]),
        ((8, 1), (1, 2, 4, 8), [8, 8]),
        ((9, 1), (1, 2, 4, 8), [9, 1]),
        ((3, 1), (), [3, 1]),
    ])  # fmt: skip
    def test_padding(self, counts: tuple[int, int], graphs: tuple[int, ...], computed: list[int]) -> None:
        assert LockStep(graphs=graphs).computed(counts) == computed


class TestDummyBatches:
    @BOTH
    def test_fill_the_wave_of_a_rank_without_requests(self, engine: dict[str, Any]) -> None:
        ran = serve([Row(0, output=5)], engine)
        assert [len(member) for member in ran.passes()] == [32, 32]
        idle = [step for step in ran.dummies() if step["engine"] == 1]
        assert len(idle) == 32
        assert len(ran.dummies()) == 32 + 32 - 5
        assert ran.groups[0].waves == 1
        assert ran.requests[0].token_ns == [1000, 2000, 3000, 4000, 5000]

    def test_keep_an_idle_rank_one_pass_behind(self) -> None:
        """A dummy batch goes to the device as soon as the pass before has begun, and nothing is looked at before all
        have come to its own: a request that arrives during pass 2 runs in pass 3 on a busy rank, but in pass 4 on an
        idle one."""
        busy = serve([Row(0, output=20), Row(0, output=1), Row(1500)], SYNC).requests[2]
        idle = serve([Row(0, output=20), Row(1500)], SYNC).requests[1]
        assert (busy.scheduled_ns, busy.first_token_ns) == (2000, 3000)
        assert (idle.scheduled_ns, idle.first_token_ns) == (2000, 4000)

    def test_keep_an_idle_rank_one_pass_behind_when_scheduling_ahead(self) -> None:
        busy = serve([Row(0, output=20), Row(0, output=1), Row(1500)], ASYNC).requests[2]
        idle = serve([Row(0, output=20), Row(1500)], ASYNC).requests[1]
        assert (busy.scheduled_ns, busy.first_token_ns) == (2000, 4000)
        assert (idle.scheduled_ns, idle.first_token_ns) == (2000, 5000)

    def test_are_as_wide_as_decodes_with_drafts(self) -> None:
        engine = SYNC | {"num_speculative_tokens": 3, "spec_acceptance_rate": 0.5}
        law = LAW | {"per_gathered_ns": 10}
        scenario = scenario_of(engine, replicas=2, routing="round_robin")
        ran = run_groups(scenario, table_of([Row(0, prompt=4, output=9)]), data=2, law=law)
        last = ran.steps()[-1]
        assert last["end_ns"] - last["start_ns"] == 1000 + 10 * (4 + 4)


class TestWaves:
    def test_end_at_a_check_without_unfinished_requests(self) -> None:
        ran = serve([Row(0, output=33)], SYNC)
        assert len(ran.passes()[0]) == 64
        assert ran.groups[0].waves == 1

    @pytest.mark.parametrize(("output", "passes"), [(1, 1), (2, 16), (16, 16), (17, 32)])
    def test_are_checked_after_the_first_pass_too_by_newer_engines(self, output: int, passes: int) -> None:
        ran = serve([Row(0, output=output)], SYNC, check_every=16, checks_first=True)
        assert len(ran.passes()[0]) == passes

    def test_start_anew_with_a_request_to_a_paused_group(self) -> None:
        ran = serve([Row(0, output=2), Row(100_000, output=3)], SYNC)
        assert ran.groups[0].waves == 2
        assert len(ran.passes()[0]) == 64
        assert ran.passes()[0][32] == (100_000, 101_000)
        assert ran.requests[1].token_ns == [101_000, 102_000, 103_000]

    def test_start_anew_with_a_request_that_the_check_did_not_see(self) -> None:
        """It lies in the inbox of the idle rank, which waits for the others at the check; the pause ends at once."""
        ran = serve([Row(0, output=32), Row(31_500, output=2)], SYNC)
        assert ran.groups[0].waves == 2
        assert ran.requests[1].scheduled_ns == 32_000
        assert ran.requests[1].token_ns == [33_000, 34_000]

    def test_outlast_the_end_of_all_requests_elsewhere(self) -> None:
        """A request that arrives among the dummy batches waits for them."""
        ran = serve([Row(0, output=2), Row(10_500, output=2)], SYNC)
        assert ran.groups[0].waves == 1
        assert ran.requests[1].first_token_ns == 13_000


class TestOneRank:
    """What happens to one rank leaves the others in step."""

    @BOTH
    def test_preempts(self, engine: dict[str, Any]) -> None:
        engine = engine | {"num_gpu_blocks_override": 12, "max_model_len": 160, "max_num_batched_tokens": 512}
        rows = [Row(0, prompt=40, output=100 if i % 2 == 0 else 5) for i in range(6)]
        ran = serve(rows, engine)
        assert ran.engines[0].scheduler.preemptions > 0
        assert ran.engines[1].scheduler.preemptions == 0
        assert all(request.status == Status.FINISHED for request in ran.requests)

    @BOTH
    @pytest.mark.parametrize("abort", [0, 500, 1000, 4500])
    def test_loses_a_client(self, engine: dict[str, Any], abort: int) -> None:
        ran = serve([Row(0, output=50, abort_ns=abort), Row(0, output=9)], engine)
        assert ran.status(0) == Status.ABORTED
        assert ran.status(1) == Status.FINISHED

    @BOTH
    @pytest.mark.parametrize("at", [0, 1500, 10**6])
    def test_has_a_request_that_can_never_be_served(self, engine: dict[str, Any], at: int) -> None:
        engine = engine | {"num_gpu_blocks_override": 11, "max_model_len": 512}
        rows = [Row(0, output=9), Row(at, prompt=161), Row(at, output=4), Row(at, output=6)]
        ran = serve(rows, engine)
        assert ran.status(1) == Status.FAILED
        assert ran.requests[1].reason == "it needs 11 KV blocks and the engine has 10"
        assert [ran.status(i) for i in (0, 2, 3)] == [Status.FINISHED] * 3

    @BOTH
    def test_has_nothing_but_a_request_that_can_never_be_served(self, engine: dict[str, Any]) -> None:
        ran = serve([Row(5, prompt=161)], engine | {"num_gpu_blocks_override": 11, "max_model_len": 512})
        assert ran.status(0) == Status.FAILED
        assert ran.passes() == [[], []]

    @pytest.mark.parametrize("pipeline", [2, 3])
    def test_preempts_in_a_pipeline_with_nothing_else_to_run(self, pipeline: int) -> None:
        engine = SYNC | {"num_gpu_blocks_override": 11, "max_model_len": 160, "version": "vllm-0.19"}
        engine |= {"scheduling_policy": "priority", "scheduler_reserve_full_isl": False, "max_num_batched_tokens": 320}
        lengths = [(48, 78), (10, 3), (78, 2), (10, 3), (25, 92)]
        ran = serve([Row(0, prompt=prompt, output=output) for prompt, output in lengths], engine, pipeline=pipeline)
        assert [request.outputs for request in ran.requests] == [output for _, output in lengths]
        assert ran.engines[0].scheduler.preemptions > 0

    @pytest.mark.parametrize("pipeline", [2, 3])
    def test_drains_before_the_others_in_a_pipeline(self, pipeline: int) -> None:
        rows = [Row(0, output=2 if i % 2 else 70) for i in range(8)] + [Row(50_000, output=3)]
        ran = serve(rows, SYNC, pipeline=pipeline)
        passes = ran.passes()[0]
        assert all(request.status == Status.FINISHED for request in ran.requests)
        assert any(a[1] > b[0] for a, b in pairwise(passes)), "stages work at the same time"
        part = 1000 // pipeline
        assert all(b[0] >= a[0] + part for a, b in pairwise(passes))


@BOTH
@pytest.mark.parametrize("both", [False, True])
def test_long_runs_are_really_carried_out_in_one_go(engine: dict[str, Any], both: bool) -> None:
    rows = [Row(i * 50 * MS, prompt=100, output=1500) for i in range(8)]
    scenario = scenario_of(engine, replicas=2, routing="round_robin" if both else "least_loaded")
    table = table_of(rows if both else rows[:1])
    compact = run_groups(scenario, table, data=2, expand=False).steps()
    assert sum(step["steps"] for step in compact) > 10 * len(compact)


class TestPrefillInterval:
    def test_counts_the_passes_of_the_wave(self) -> None:
        """Where decodes run, new prompts wait for a pass whose number is a multiple of the interval, on all ranks."""
        engine = SYNC | {"prefill_schedule_interval": 4}
        rows = [Row(0, output=60), Row(0, output=60), *(Row(1100 + 2900 * i, output=3) for i in range(9))]
        ran = serve(rows, engine)
        late = [step for step in ran.steps() if step["prefill_seqs"] and step["step"]]
        assert len({step["engine"] for step in late}) == 2
        assert late
        assert all(step["step"] % 4 == 0 for step in late)


class TestBuilding:
    def built(self, scenario: Scenario) -> list[Any]:
        return build(scenario, table_of([Row()]), base=Path(), log=StepLog()).cluster.engines

    def test_ranks_of_a_dense_model_are_engines_of_their_own(self) -> None:
        engines = self.built(moe(model="meta-llama/Llama-3.1-8B", replicas=2, parallelism={"data": 3}))
        assert len(engines) == 6
        assert not any(isinstance(engine, Rank) for engine in engines)

    @pytest.mark.parametrize(("version", "checks"), [("vllm-0.19", (32, False)), ("vllm-0.33", (16, True))])
    def test_ranks_of_a_mixture_of_experts_are_in_step(self, version: str, checks: tuple[int, bool]) -> None:
        engines = self.built(moe({"version": version}, replicas=2, parallelism={"data": 2, "expert": 2}))
        groups = [engine.group for engine in engines]
        assert groups[0] is groups[1] is not groups[2]
        assert groups[2] is groups[3]
        assert (groups[0].check_every, groups[0].checks_first) == checks
        assert groups[0].graphs[:4] == [1, 2, 4, 8]

    def test_an_eager_group_is_not_padded(self) -> None:
        engines = self.built(moe({"enforce_eager": True}, parallelism={"data": 2, "expert": 2}))
        assert not engines[0].group.graphs

    @BOTH
    @pytest.mark.parametrize("source", ["auto", "roofline", "linear"])
    def test_with_real_prices_many_passes_at_once_are_what_single_ones_are(
        self, engine: dict[str, Any], source: str
    ) -> None:
        rows = [Row(i * 40 * MS, prompt=30 + 61 * i % 200, output=20 + 37 * i % 150) for i in range(12)]
        timing = LINEAR if source == "linear" else {"source": source}
        scenario = moe(engine, parallelism={"data": 2, "expert": 2}, timing=timing)
        ours, theirs = (run(scenario, table_of(rows), coalesce=coalesce) for coalesce in (True, False))
        self.same(ours, theirs)
        compact = run(scenario, table_of(rows), expand=False).steps()
        assert sum(step["steps"] for step in compact) == len(theirs.steps()) > 2 * len(compact)

    def test_with_pipeline_stages(self) -> None:
        rows = [Row(i * 7 * MS, prompt=50, output=10 + 20 * (i % 2)) for i in range(10)]
        scenario = moe(SYNC, parallelism={"data": 2, "expert": 2, "pipeline": 2}, timing={"source": "roofline"})
        ran = run(scenario, table_of(rows))
        assert all(request.status == Status.FINISHED for request in ran.requests)

    def same(self, ours: Ran, theirs: Ran) -> None:
        one, other = ours.everything(), theirs.everything()
        for name in one:
            assert one[name] == other[name], name
