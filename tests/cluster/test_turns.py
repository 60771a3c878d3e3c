"""Turns of sessions: when they are released, what fails with them, what they find in the prefix cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from running import LINEAR, MS, Ran, run, scenario_of
from servetwin.engine.engine import Engine
from servetwin.engine.request import Status
from servetwin.timing.host import HostOverhead
from servetwin.workload.dependence import Dependence
from servetwin.workload.table import RequestTable
from session_tables import session_tables
from workloads import engines

POLICIES = st.sampled_from(["round_robin", "least_loaded", "random"])
SLOW_HOST = HostOverhead(step_ns=500_000, seq_ns=1_000, gap_ns=300_000, gap_seq_ns=700, request_ns=1_500_000)


def sessions_of(
    parents: list[list[int]], *, delay: int = 0, prompt: int = 40, output: int = 5, **columns: Any
) -> RequestTable:
    """One session; each row waits for `parents` and extends the first of them by `prompt` tokens."""
    count = len(parents)
    extends = np.array([row[0] if row else -1 for row in parents])
    prompts = np.full(count, prompt)
    for row, before in enumerate(extends.tolist()):
        if before >= 0:
            prompts[row] += prompts[before] + output
    given = {
        "arrival_ns": np.zeros(count, np.int64),
        "input_tokens": prompts,
        "output_tokens": np.full(count, output),
        "session": np.zeros(count, np.int64),
        "waits_for": Dependence.of(parents, [delay if row else 0 for row in parents]),
        "extends": extends,
    }
    return RequestTable(**{**given, **columns})


def assert_released_rightly(ran: Ran, table: RequestTable) -> None:
    """Every row ended once; turns came exactly when they should, or failed with a turn before them."""
    requests = ran.requests
    assert [request.row for request in requests] == list(range(len(table)))
    assert table.waits_for is not None
    for request in requests:
        before = [requests[parent] for parent in table.waits_for[request.row].tolist()]
        broken = [parent for parent in before if parent.status != Status.FINISHED]
        if broken:
            first = min(parent.finish_ns for parent in broken)
            assert request.status == Status.FAILED and request.engine == -1 and request.scheduled_ns == -1
            assert request.arrival_ns == request.finish_ns == first
            ends = {Status.FAILED: "failed", Status.ABORTED: "was aborted"}
            assert request.reason in {
                f"the turn before it, request {parent.row}, {ends[parent.status]}" for parent in broken
            }
        elif before:
            last = max(parent.finish_ns for parent in before)
            assert request.arrival_ns == last + table.waits_for.delay_ns[request.row]
        elif table.concurrency is None:
            assert request.arrival_ns == table.arrival_ns[request.row]
        assert request.scheduled_ns == -1 or request.scheduled_ns >= request.arrival_ns


@settings(max_examples=150, deadline=None)
@given(session_tables(), engines, st.integers(1, 3), POLICIES)
def test_random_graphs(table: RequestTable, engine: dict[str, Any], replicas: int, routing: str) -> None:
    scenario = scenario_of(engine, replicas=replicas, routing=routing)
    ran = run(scenario, table)
    assert_released_rightly(ran, table)
    for one in ran.engines:
        assert not one.scheduler.running and one.scheduler.kv.pool.used == 0
    assert run(scenario, table).everything() == ran.everything()


@settings(max_examples=150, deadline=None)
@given(session_tables(), engines, st.integers(1, 3), POLICIES, st.booleans())
def test_coalesced_is_single_stepped(
    table: RequestTable, engine: dict[str, Any], replicas: int, routing: str, slow_host: bool
) -> None:
    def prepare(engine: Engine) -> None:
        engine.host = SLOW_HOST if slow_host else engine.host

    scenario = scenario_of(engine, replicas=replicas, routing=routing)
    ours = run(scenario, table, prepare=prepare).everything()
    theirs = run(scenario, table, prepare=prepare, coalesce=False).everything()
    for name in ours:
        assert ours[name] == theirs[name], name


@settings(max_examples=60, deadline=None)
@given(session_tables(), st.integers(1, 2))
def test_a_closed_loop_holds_so_many_sessions(table: RequestTable, replicas: int) -> None:
    if table.concurrency is None:
        return
    ran = run(scenario_of({"max_model_len": 320}, replicas=replicas), table)
    assert_released_rightly(ran, table)
    units = table.units()
    changes = []
    for unit in range(units.max() + 1):
        mine = [ran.requests[row] for row in np.flatnonzero(units == unit)]
        changes += [(min(r.arrival_ns for r in mine), 1), (max(r.finish_ns for r in mine), -1)]
    inside = 0
    for _, change in sorted(changes):
        inside += change
        # A root with a time of its own may come later than its session's place was given to it.
        assert inside <= table.concurrency


class TestChain:
    def test_times_by_hand(self) -> None:
        """Steps of 5 ms, alone in the engine: 5 outputs take 5 steps, then the tool runs."""
        law = {"source": "linear", "base_ns": 5 * MS}
        table = sessions_of([[], [0], [1]], delay=7 * MS)
        ran = run(scenario_of({"async_scheduling": False}, timing=law), table)
        assert [(r.arrival_ns, r.finish_ns) for r in ran.requests] == [
            (0, 25 * MS),
            (32 * MS, 57 * MS),
            (64 * MS, 89 * MS),
        ]
        assert [r.session for r in ran.requests] == [0, 0, 0]

    @pytest.mark.parametrize("prompt", [16, 40, 41, 200])
    @pytest.mark.parametrize("output", [1, 5, 16, 50])
    @pytest.mark.parametrize("sessions", [1, 4])
    def test_prefix_hits_are_those_counted_by_hand(self, prompt: int, output: int, sessions: int) -> None:
        """Of a turn with p prompt and o output tokens the KV of p + o - 1 is computed; its full blocks are found."""
        turns = 6
        parents: list[list[int]] = [[] for _ in range(sessions)]  # row by row, one turn of each session
        for turn in range(1, turns):
            parents += [[(turn - 1) * sessions + number] for number in range(sessions)]
        table = sessions_of(parents, delay=MS, prompt=prompt, output=output, session=np.arange(len(parents)) % sessions)
        ran = run(scenario_of(), table)
        for request in ran.requests:
            before = request.row - sessions
            hit = 0 if before < 0 else (int(table.input_tokens[before]) + output - 1) // 16 * 16
            assert request.cached_tokens == hit
        hits = sum(engine.scheduler.prefix_hits for engine in ran.engines)
        assert hits == sum(request.cached_tokens for request in ran.requests)

    def test_sessions_interleave(self) -> None:
        """While one session's tool runs, another one's turn does."""
        table = sessions_of([[], [0], [], [2]], delay=50 * MS, session=np.array([0, 0, 1, 1]))
        ran = run(scenario_of({"max_num_seqs": 1}, timing={"source": "linear", "base_ns": 5 * MS}), table)
        first, second, third, fourth = (request.scheduled_ns for request in ran.requests)
        assert first < third < second < fourth


class TestFanOut:
    def test_join_waits_for_the_last(self) -> None:
        outputs = np.array([3, 2, 30, 9, 4])
        table = sessions_of([[], [0], [0], [0], [1, 2, 3]], delay=10 * MS, output_tokens=outputs, extends=None)
        ran = run(scenario_of(), table)
        root, *branches, join = ran.requests
        assert {branch.arrival_ns for branch in branches} == {root.finish_ns + 10 * MS}
        assert (
            join.arrival_ns == max(branch.finish_ns for branch in branches) + 10 * MS == branches[1].finish_ns + 10 * MS
        )

    def test_branches_share_the_conversation_before_them(self) -> None:
        ran = run(scenario_of(), sessions_of([[], [0], [0], [0]], prompt=100, output=20))
        assert [request.cached_tokens for request in ran.requests] == [0, 112, 112, 112]


class TestFailure:
    def test_descendants_fail_and_the_run_goes_on(self) -> None:
        prompts = np.array([40, 9000, 60, 80, 40])
        table = sessions_of(
            [[], [0], [1], [2], []], input_tokens=prompts, extends=None, session=np.array([0, 0, 0, 0, 1])
        )
        ran = run(scenario_of({"max_model_len": 512}), table)
        assert [request.status.name for request in ran.requests] == [
            "FINISHED", "FAILED", "FAILED", "FAILED", "FINISHED",
        ]  # fmt: skip
        assert [request.reason for request in ran.requests[2:4]] == [
            "the turn before it, request 1, failed",
            "the turn before it, request 2, failed",
        ]

    def test_an_aborted_turn(self) -> None:
        table = sessions_of([[], [0]], output=500, abort_ns=np.array([50 * MS, -1]))
        ran = run(scenario_of(), table)
        assert [request.status for request in ran.requests] == [Status.ABORTED, Status.FAILED]
        assert ran.requests[1].reason == "the turn before it, request 0, was aborted"
        assert ran.requests[1].arrival_ns == ran.requests[1].finish_ns == ran.requests[0].finish_ns

    def test_places_of_failed_sessions_are_given_on(self) -> None:
        """More than Python's recursion would bear, in every direction."""
        count = 3000
        parents = [[] if row % 3 == 0 else [row - 1] for row in range(count)]
        table = sessions_of(parents, prompt=9000, session=np.arange(count) // 3, concurrency=2)
        ran = run(scenario_of({"max_model_len": 512}), table)
        assert len(ran.requests) == count and all(request.status == Status.FAILED for request in ran.requests)
        chain = sessions_of([[], *([row] for row in range(count - 1))], prompt=9000, concurrency=1)
        ran = run(scenario_of({"max_model_len": 512}), chain)
        assert len(ran.requests) == count

    def test_an_output_cut_short_is_quoted_whole(self) -> None:
        """The longest sequence ends turn 0 after 12 of 30 outputs; turn 1 is as long as the workload says."""
        table = sessions_of([[], [0]], prompt=100, output=30)
        ran = run(scenario_of({"max_model_len": 112}), table)
        assert ran.requests[0].status == Status.FINISHED and ran.requests[0].outputs == 12
        assert ran.requests[1].prompt == 230 and ran.requests[1].status == Status.FAILED
        assert ran.requests[1].reason == "its prompt of 230 tokens leaves no room for output in max_model_len 112"


@pytest.mark.parametrize("shortest", [0, 200 * MS])
def test_many_engines_still_coalesce_between_tools(shortest: int) -> None:
    """Engines run ahead, and are told when a turn reaches them."""
    parents: list[list[int]] = [[] if row < 6 else [row - 6] for row in range(60)]
    table = sessions_of(parents, delay=200 * MS, output=200, session=np.arange(60) % 6)
    assert table.waits_for is not None
    table.waits_for.delay_ns[-1] = shortest
    ran = run(scenario_of(replicas=3, timing=LINEAR), table, expand=False)
    rows = len(ran.steps()) / sum(step["steps"] for step in ran.steps())
    assert rows < 0.1


def test_a_model_that_no_pool_serves() -> None:
    models = ("meta-llama/Llama-3.1-70B", "meta-llama/Llama-3.1-8B")
    table = sessions_of([[], [], [0]], model=np.array([0, 1, 1]), models=models)
    refused, served, after = run(scenario_of(), table).requests
    assert (refused.status, refused.reason) == (Status.FAILED, "no pool serves model meta-llama/Llama-3.1-70B")
    assert served.status == Status.FINISHED
    assert (after.status, after.reason) == (Status.FAILED, "the turn before it, request 0, failed")
