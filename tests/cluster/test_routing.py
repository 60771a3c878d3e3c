"""Each policy chooses what its formula says, from the engines as they are (or were)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from random import Random as PythonRandom
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from running import LINEAR, MS, Ran, Row, run, scenario_of, table_of
from servetwin.cluster.build import build
from servetwin.cluster.routing.candidates import Candidates
from servetwin.cluster.routing.policies import ConsistentHash, Policy, first_of_least
from servetwin.cluster.routing.router import Router
from servetwin.engine.engine import Engine
from servetwin.engine.log import StepLog
from servetwin.engine.request import Request, Status
from servetwin.scenario.routing import POLICIES
from servetwin.workload.table import RequestTable
from workloads import tables

SMALL = {"num_gpu_blocks_override": 60, "max_num_seqs": 3, "max_model_len": 320, "block_size": 16}
PREFIX = {"policy": "weighted", "scorers": {"queue": 2, "kv_usage": 2, "prefix": 3, "session": 0.5, "in_flight": 0.1}}


def rows_of(seed: int, count: int = 40) -> list[Row]:
    """Requests with shared prefixes, in sessions, that overlap."""
    random = PythonRandom(seed)
    return [
        Row(
            random.randrange(400) * MS,
            output=random.choice([1, 5, 40, 90]),
            segments=[(random.randrange(3), 64), (1000 + i, random.randrange(1, 60))],
            session=random.randrange(-1, 6),
        )
        for i in range(count)
    ]


class Naive:
    """Policies written out engine by engine in exact arithmetic, from the engines themselves."""

    def __init__(self, engines: Sequence[Engine], in_flight: Callable[[int], int]) -> None:
        self.engines, self.sent = engines, in_flight
        self.start = 0

    def running(self, i: int) -> int:
        return len(self.engines[i].scheduler.running)

    def waiting(self, i: int) -> int:
        return self.sent(i) - self.running(i)

    def usage(self, i: int) -> Fraction:
        pool = self.engines[i].scheduler.kv.pool
        return Fraction(pool.used, pool.usable)

    def least(self, score: Callable[[int], Any]) -> int:
        count = len(self.engines)
        return min(((self.start + i) % count for i in range(count)), key=score)

    def least_loaded(self) -> int:
        return min(range(len(self.engines)), key=self.sent)

    def join_shortest_queue(self) -> int:
        chosen = self.least(self.sent)
        self.start = (chosen + 1) % len(self.engines)
        return chosen

    def least_kv_usage(self) -> int:
        chosen = self.least(self.usage)
        self.start = (chosen + 1) % len(self.engines)
        return chosen

    def llmservingsim_load(self) -> int:
        chosen = self.least(lambda i: Fraction(4 * self.waiting(i) + self.running(i), 3))
        self.start = (self.start + 1) % len(self.engines)
        return chosen

    def vllm_dp(self) -> int:
        chosen = self.least(lambda i: self.sent(i) + self.waiting(i) * 6 * max(0, self.usage(i) - Fraction(1, 2)))
        self.start = (self.start + 1) % len(self.engines)
        return chosen


class Checked:
    """A policy whose choices are compared with those of `Naive`."""

    def __init__(self, policy: Policy, name: str) -> None:
        self.policy, self.name = policy, name
        self.naive: Naive | None = None
        self.choices = 0

    def choose(self, request: Request, candidates: Candidates, now: int) -> int:
        if self.naive is None:
            self.naive = Naive(candidates.engines, lambda i: int(candidates.in_flight[i]))
        for i in range(len(candidates)):
            assert candidates.running[i] == self.naive.running(i)
            assert candidates.waiting[i] == self.naive.waiting(i)
            assert candidates.load[i] == candidates.in_flight[i]
            assert candidates.kv_usage[i] == float(self.naive.usage(i))
        chosen = self.policy.choose(request, candidates, now)
        assert chosen == getattr(self.naive, self.name)()
        self.choices += 1
        return chosen


@pytest.mark.parametrize(
    "name", ["least_loaded", "join_shortest_queue", "least_kv_usage", "llmservingsim_load", "vllm_dp"]
)
@pytest.mark.parametrize("front_end", [False, True])
def test_choices_are_those_of_the_formula(name: str, front_end: bool) -> None:
    for seed in range(4):
        scenario = scenario_of(SMALL, replicas=4, routing={"policy": name, "refresh": "0s"})
        table = table_of(rows_of(seed, 60), concurrency=None if seed % 2 else 9)
        built = build(scenario, replace(table, at_engine=not front_end), base=Path(), log=StepLog())
        router = built.cluster.router
        checked = _checked(router, name)
        built.cluster.run()
        assert checked.choices == 60
        assert len(built.cluster.ended_requests) == 60


def _checked(router: Router, name: str) -> Checked:
    (model, (policy, candidates)), *_ = router._served.items()
    checked = Checked(policy, name)
    router._served[model] = checked, candidates
    return checked


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.data())
def test_first_of_least(scores: list[int], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(scores) - 1))
    order = [(start + i) % len(scores) for i in range(len(scores))]
    assert first_of_least(np.array(scores), start) == min(order, key=lambda i: scores[i])


class TestShares:
    def engines(self, ran: Ran) -> list[int]:
        return [request.engine for request in ran.requests]

    def test_equal_engines_take_turns(self) -> None:
        rows = [Row(i * 1000 * MS, prompt=20, output=2) for i in range(9)]
        for policy in ("join_shortest_queue", "least_kv_usage", "llmservingsim_load", "vllm_dp", "prefix_aware"):
            assert self.engines(run(scenario_of(replicas=3, routing=policy), table_of(rows))) == [0, 1, 2] * 3

    def test_llmservingsim_counts_waiting_four_times(self) -> None:
        """One engine runs three requests, the other one runs one and lets one wait: 3 against 1 + 4."""
        rows = [Row(0, 20, 100), Row(0, 20, 100), Row(1, 20, 100), Row(50 * MS, 20, 2)]
        scenario = scenario_of({"max_num_seqs": 1}, replicas=2, routing="llmservingsim_load")
        assert self.engines(run(scenario, table_of(rows)))[:3] == [0, 1, 0]

    def test_a_session_stays_where_it_began(self) -> None:
        rows = rows_of(1, 60)
        for policy in ("session_affinity", "consistent_hash"):
            ran = run(scenario_of(SMALL, replicas=4, routing=policy), table_of(rows))
            of_session: dict[int, set[int]] = {}
            for row, request in zip(rows, ran.requests, strict=True):
                if row.session >= 0:
                    of_session.setdefault(row.session, set()).add(request.engine)
            assert all(len(engines) == 1 for engines in of_session.values())
            assert len({engine for engines in of_session.values() for engine in engines}) > 1

    def test_consistent_hash_moves_only_what_a_new_engine_takes_over(self) -> None:
        def homes(engines: int) -> list[int]:
            policy, candidates = ConsistentHash(), _Some(engines)
            requests = [Request(i, 0, 1, 1, session=i) for i in range(3000)]
            return [policy.choose(request, candidates, 0) for request in requests]  # type: ignore[arg-type]

        before, after = homes(9), homes(10)
        assert all(new in (old, 9) for old, new in zip(before, after, strict=True))
        assert 200 < sum(new == 9 for new in after) < 400
        assert min(before.count(i) for i in range(9)) > 250

    def test_power_of_two_avoids_the_longer_queue(self) -> None:
        rows = [Row(0, 20, 300)] * 200
        two, one = (run(scenario_of(replicas=8, routing=p), table_of(rows)) for p in ("power_of_two", "random"))
        most = [max(self.engines(ran).count(i) for i in range(8)) for ran in (two, one)]
        assert most[0] <= 25 + 3 < most[1]


class _Some:
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count


class TestPrefixes:
    """Four prefixes of 64 blocks, asked for in turn, on four engines."""

    ROWS = tuple(
        Row(i * 300 * MS, output=3, segments=[(i * 7 % 4, 1024), (1000 + i, 20)], session=i * 7 % 4) for i in range(80)
    )

    def hits(self, routing: dict[str, Any] | str) -> int:
        ran = run(scenario_of(replicas=4, routing=routing), table_of(self.ROWS))
        return sum(request.cached_tokens for request in ran.requests)

    @pytest.mark.parametrize("index", ["exact", "approximate"])
    @pytest.mark.parametrize("policy", ["prefix_aware", "weighted"])
    def test_every_prefix_is_computed_once(self, index: str, policy: str) -> None:
        routing: dict[str, Any] = {"policy": policy, "prefix_index": index}
        if policy == "weighted":
            routing["scorers"] = {"prefix": 3, "queue": 1}
        assert self.hits(routing) == 76 * 1024
        assert self.hits("random") < 70 * 1024

    def test_load_outweighs_a_short_prefix(self) -> None:
        """All want the same prefix at once: with a small weight they spread, with a large one they queue."""
        rows = [Row(0, output=3, segments=[(1, 512), (1000, 20)]), *(
            Row(500 * MS + i, output=200, segments=[(1, 512), (1001 + i, 300)]) for i in range(12)
        )]  # fmt: skip
        spread = [
            len({request.engine for request in run(
                scenario_of(replicas=4, routing={"policy": "prefix_aware", "overlap_weight": weight}), table_of(rows)
            ).requests})
            for weight in (0.1, 100)
        ]  # fmt: skip
        assert spread == [4, 1]

    def test_looking_changes_nothing(self) -> None:
        scenario = scenario_of(SMALL, replicas=2, routing="round_robin")

        class Looks:
            def __init__(self, policy: Policy) -> None:
                self.policy = policy

            def choose(self, request: Request, candidates: Candidates, now: int) -> int:
                found = candidates.cached_tokens(request)
                for i, engine in enumerate(candidates.engines):
                    chain = candidates.chain(request, 16)
                    assert chain is not None
                    assert found[i] == engine.scheduler.kv.lookup(chain, request.prompt - 1).tokens
                return self.policy.choose(request, candidates, now)

        outcomes = []
        for looks in (False, True):
            built = build(scenario, table_of(rows_of(3, 60)), base=Path(), log=StepLog())
            if looks:
                (model, (policy, candidates)), *_ = built.cluster.router._served.items()
                built.cluster.router._served[model] = Looks(policy), candidates
            built.cluster.run()
            outcomes.append([(r.row, r.engine, r.finish_ns, r.cached_tokens) for r in built.cluster.ended_requests])
        assert outcomes[0] == outcomes[1]


ROUTINGS: list[dict[str, Any]] = [
    PREFIX if policy == "weighted" else {"policy": policy} for policy in POLICIES
] + [
    {"policy": "prefix_aware", "prefix_index": "approximate"},
    {"policy": "session_affinity", "fallback": "power_of_two"},
]  # fmt: skip

limits = st.fixed_dictionaries(
    {},
    optional={
        "max_waiting": st.sampled_from([1, 4]),
        "max_in_flight": st.sampled_from([2, 7]),
        "queue_timeout": st.sampled_from(["30ms", "400ms"]),
    },
)


@settings(max_examples=150, deadline=None)
@given(
    tables(),
    st.sampled_from(ROUTINGS),
    limits,
    st.sampled_from(["0s", "1ms", "37ms", "1s"]),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
)
def test_running_ahead_changes_no_choice(
    table: RequestTable, routing: dict[str, Any], limited: dict[str, Any], refresh: str, replicas: int,
    front_end: bool, asynchronous: bool,
) -> None:  # fmt: skip
    routing = routing | limited | {"refresh": refresh}
    if "max_in_flight" in limited and "queue_timeout" in limited:
        routing["when_full"] = "reject"
    table = replace(table, at_engine=not front_end, session=np.arange(len(table)) % 5 - 1)
    scenario = scenario_of(SMALL | {"async_scheduling": asynchronous}, replicas=replicas, routing=routing)
    ours, theirs = (run(scenario, table, coalesce=coalesce).everything() for coalesce in (True, False))
    for name in ours:
        assert ours[name] == theirs[name], name
    assert [request["row"] for request in ours["requests"]] == list(range(len(table))), "every request ends once"
    assert all(request["status"] >= Status.FINISHED for request in ours["requests"])
    assert all(request["finish_ns"] >= request["arrival_ns"] for request in ours["requests"])


@pytest.mark.parametrize("refresh", ["0s", "60ms", "200ms"])
@pytest.mark.parametrize("concurrency", [None, 5])
@pytest.mark.parametrize("limit", [None, 4])
def test_kv_usage_is_never_that_of_the_future(refresh: str, concurrency: int | None, limit: int | None) -> None:
    """Long runs of decode steps, in which nothing changes but the blocks in use, which decide every choice."""
    for seed in range(12):
        random = PythonRandom(seed)
        rows = [
            Row(random.randrange(3000) * MS, prompt=random.randrange(1, 60), output=random.randrange(5, 200))
            for _ in range(24)
        ]
        routing = {"policy": "least_kv_usage", "refresh": refresh, "max_in_flight": limit}
        engine = {"num_gpu_blocks_override": 500, "max_model_len": 320, "block_size": 1}
        # A prefill takes as long as many decode steps of the engines beside it.
        scenario = scenario_of(
            engine, replicas=2 + seed % 2, routing=routing, timing=LINEAR | {"per_prefill_token_ns": MS}
        )
        table = table_of(rows, concurrency=concurrency)
        ours, theirs = (run(scenario, table, coalesce=coalesce).everything() for coalesce in (True, False))
        assert ours["requests"] == theirs["requests"]


@settings(max_examples=40, deadline=None)
@given(tables(), st.sampled_from(ROUTINGS), st.integers(1, 4))
def test_the_clock_never_goes_back_and_the_same_seed_gives_the_same(
    table: RequestTable, routing: dict[str, Any], replicas: int
) -> None:
    scenario = scenario_of(SMALL, replicas=replicas, routing=routing)
    one, other = (run(scenario, table) for _ in range(2))
    assert one.everything() == other.everything()
    assert one.clock == sorted(one.clock)


@settings(max_examples=40, deadline=None)
@given(tables(), st.sampled_from(ROUTINGS), st.integers(2, 4))
def test_a_refresh_at_every_moment_is_no_staleness(table: RequestTable, routing: dict[str, Any], replicas: int) -> None:
    """Signals of a refresh of 1 ns show everything but what happens at the very moment of the choice."""
    apart = np.sort(table.arrival_ns) + np.arange(len(table))
    table = replace(table, arrival_ns=apart, abort_ns=None, concurrency=None)
    live, fresh = (
        run(scenario_of(SMALL, replicas=replicas, routing=routing | {"refresh": refresh}), table)
        for refresh in ("0s", "1ns")
    )
    assert live.everything() == fresh.everything()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 2000), min_size=1, max_size=40),
    st.integers(1, 60),
    st.integers(1, 40),
    st.integers(1, 4),
    st.sampled_from([1, 2, 16]),
)
def test_an_idle_replica_more_never_hurts(
    arrivals_ms: list[int], prompt: int, output: int, replicas: int, seqs: int
) -> None:
    """Identical requests under join-shortest-queue."""
    table = table_of([Row(at * MS, prompt, output) for at in sorted(arrivals_ms)])
    engine = {"max_num_seqs": seqs, "enable_prefix_caching": False}
    means = []
    for count in (replicas, replicas + 1):
        ran = run(scenario_of(engine, replicas=count, routing="join_shortest_queue"), table, expand=False)
        means.append(sum(request.finish_ns - request.arrival_ns for request in ran.requests))
    assert means[1] <= means[0]


class TestStaleness:
    def test_within_an_interval_the_router_sees_nothing_new(self) -> None:
        """Ten requests within one interval: least_loaded sees two idle engines each time, and takes the first."""
        rows = [Row((101 + i) * MS, 50, 100) for i in range(10)] + [Row(201 * MS, 50, 5)]
        ran = run(scenario_of(replicas=2, routing={"policy": "least_loaded", "refresh": "100ms"}), table_of(rows))
        assert [request.engine for request in ran.requests] == [0] * 10 + [1]

    def test_a_snapshot_is_older_than_what_happens_at_its_moment(self) -> None:
        rows = [Row(100 * MS, 50, 100), Row(100 * MS, 50, 100), Row(200 * MS, 50, 5)]
        ran = run(scenario_of(replicas=2, routing={"policy": "least_loaded", "refresh": "100ms"}), table_of(rows))
        assert [request.engine for request in ran.requests] == [0, 0, 1]

    def test_own_counts_are_never_stale(self) -> None:
        rows = [Row((101 + i) * MS, 50, 100) for i in range(10)]
        routing = {"policy": "weighted", "scorers": {"in_flight": 1}, "refresh": "1s"}
        ran = run(scenario_of(replicas=2, routing=routing), table_of(rows))
        assert [request.engine for request in ran.requests] == [0, 1] * 5

    def test_prefix_aware_counts_what_it_sent_until_it_shows(self) -> None:
        """Requests begin at once, but the blocks that they hold show only after a second."""
        rows = [Row(101 * MS, prompt=3000, output=100), *(Row((500 + i) * MS, prompt=64, output=100) for i in range(6))]
        routing = {"policy": "prefix_aware", "refresh": "1s"}
        ran = run(scenario_of(replicas=2, routing=routing), table_of(rows))
        assert [request.engine for request in ran.requests] == [0, 1, 1, 1, 1, 1, 1]

    def test_vllm_refreshes_every_100_ms(self) -> None:
        assert scenario_of(routing="vllm_dp").routing.refresh == 100 * MS
        assert scenario_of(routing="least_loaded").routing.refresh == 0


def test_the_next_moment_that_stale_signals_may_show() -> None:
    router = Router("any", lambda model: ConsistentHash(), refresh=100)
    assert router.boundary(250, 470) == 400, "a choice at 470 sees the engines as of 400"
    assert router.boundary(250, 299) is None, "what it sees has passed"
    assert router.boundary(400, 450) is None
    assert router.boundary(250, None) == router.boundary(200, None) == 300, "a choice may come at any time"
    assert Router("any", lambda model: ConsistentHash()).boundary(250, None) is None
