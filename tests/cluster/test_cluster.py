"""Arrivals, routing and closed loops."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from running import LINEAR, MS, Ran, Row, run, scenario_of, table_of
from servetwin.engine.request import Status
from servetwin.timing.host import HostOverhead


def busiest(ran: Ran) -> int:
    """Most requests that were in the system at once."""
    changes = [(request.arrival_ns, 1) for request in ran.requests]
    changes += [(request.finish_ns, -1) for request in ran.requests]
    inside = most = 0
    for _, change in sorted(changes):  # who leaves at a moment makes room for who comes
        inside += change
        most = max(most, inside)
    return most


class TestClosedLoop:
    @pytest.mark.parametrize("concurrency", [1, 3, 16, 100])
    @pytest.mark.parametrize("replicas", [1, 3])
    def test_holds_its_concurrency(self, concurrency: int, replicas: int) -> None:
        rows = [Row(prompt=20 + 7 * i % 50, output=1 + 13 * i % 40) for i in range(60)]
        ran = run(scenario_of(replicas=replicas), table_of(rows, concurrency=concurrency))
        assert busiest(ran) == min(concurrency, 60)
        starts = [request.arrival_ns for request in ran.requests]
        assert starts == sorted(starts), "in row order"
        ends = sorted(request.finish_ns for request in ran.requests)
        assert starts[concurrency:] == ends[: max(0, 60 - concurrency)], "one comes when one leaves"

    def test_failures_make_room(self) -> None:
        rows = [Row(prompt=9000 if i % 2 else 20, output=5) for i in range(3000)]
        ran = run(scenario_of({"max_model_len": 512}), table_of(rows, concurrency=2))
        assert Counter(request.status for request in ran.requests) == {Status.FINISHED: 1500, Status.FAILED: 1500}

    def test_all_fail(self) -> None:
        """More than Python's recursion would bear."""
        rows = [Row(prompt=9000)] * 3000
        ran = run(scenario_of({"max_model_len": 512}), table_of(rows, concurrency=5))
        assert all(request.status == Status.FAILED for request in ran.requests)
        assert len(ran.requests) == 3000

    def test_aborts_make_room(self) -> None:
        rows = [Row(prompt=20, output=100, abort_ns=50 * MS) for _ in range(6)]
        ran = run(scenario_of(), table_of(rows, concurrency=2))
        assert [request.status for request in ran.requests] == [Status.ABORTED] * 6
        assert busiest(ran) == 2


class TestRouting:
    ROWS = tuple(Row(i * 20 * MS, prompt=50, output=20) for i in range(90))

    def shares(self, routing: str, rows: tuple[Row, ...] = ROWS, seed: int = 0) -> list[int]:
        ran = run(scenario_of(replicas=3, routing=routing, seed=seed), table_of(rows))
        assert len(ran.requests) == len(rows)
        counts = Counter(request.engine for request in ran.requests)
        return [counts[number] for number in range(3)]

    def test_round_robin(self) -> None:
        ran = run(scenario_of(replicas=3, routing="round_robin"), table_of(self.ROWS))
        assert [request.engine for request in ran.requests] == [i % 3 for i in range(90)]

    def test_random(self) -> None:
        shares = self.shares("random")
        assert sum(shares) == 90
        assert min(shares) >= 18, "a fair draw is below this once in 1000 times"
        assert shares == self.shares("random")
        assert shares != self.shares("random", seed=1)

    def test_least_loaded(self) -> None:
        assert self.shares("least_loaded", tuple(Row(0, prompt=50, output=20) for _ in range(90))) == [30, 30, 30]

    def test_least_loaded_avoids_a_busy_replica(self) -> None:
        rows = [Row(0, 50, 500), *(Row((1000 + 300 * i) * MS, 50, 5) for i in range(5))]
        ran = run(scenario_of(replicas=2, routing="least_loaded"), table_of(rows))
        assert [request.engine for request in ran.requests] == [0, 1, 1, 1, 1, 1]

    def test_replicas_halve_the_queue(self) -> None:
        rows = [Row(0, prompt=400, output=2) for _ in range(40)]
        ends = []
        for replicas in (1, 2):
            ran = run(scenario_of({"max_num_seqs": 1}, replicas=replicas), table_of(rows))
            ends.append(max(request.finish_ns for request in ran.requests))
        assert ends[0] == 2 * ends[1]

    def test_pools_keep_their_own_steps(self) -> None:
        ran = run(scenario_of(replicas=3, routing="round_robin"), table_of(self.ROWS))
        for request in ran.requests:
            assert {step["engine"] for step in ran.steps()} == {0, 1, 2}
            assert request.finish_ns in {s["end_ns"] for s in ran.steps() if s["engine"] == request.engine}


class TestArrivals:
    def test_need_not_be_sorted(self) -> None:
        rows = [Row(at * MS, prompt=10, output=2) for at in (300, 100, 200)]
        ran = run(scenario_of(), table_of(rows))
        assert [request.scheduled_ns for request in ran.requests] == [300 * MS, 100 * MS, 200 * MS]

    def test_the_front_end_takes_its_time(self) -> None:
        def with_front_end(engine: object) -> None:
            engine.host = HostOverhead(request_ns=2 * MS)  # type: ignore[attr-defined]

        ran = run(scenario_of(), table_of([Row(5 * MS, 10, 2)]), prepare=with_front_end)
        assert ran.requests[0].arrival_ns == 5 * MS
        assert ran.requests[0].scheduled_ns == 7 * MS

    def test_prompts_are_tokenised_in_batches(self) -> None:
        """Those that come within 2 ms together; who comes meanwhile waits for the batch to end, and 2 ms more."""

        def with_front_end(engine: object) -> None:
            engine.host = HostOverhead(request_ns=3 * MS, request_token_ns=100_000)  # type: ignore[attr-defined]

        rows = [Row(0, 10, 2), Row(1 * MS, 30, 2), Row(4 * MS, 20, 2), Row(200 * MS, 50, 2)]
        ran = run(scenario_of(), table_of(rows), prepare=with_front_end)
        # A batch of 40 tokens from 2 to 6 ms; one of 20 from 8 to 10; alone, 50 tokens from 202 to 207.
        assert [request.queued_ns // MS for request in ran.requests] == [9, 9, 13, 210]
        assert [request.arrival_ns // MS for request in ran.requests] == [0, 1, 4, 200]

    def test_a_burst_is_tokenised_32_at_a_time(self) -> None:
        def with_front_end(engine: object) -> None:
            engine.host = HostOverhead(request_token_ns=100_000)  # type: ignore[attr-defined]

        ran = run(scenario_of(), table_of([Row(0, 10, 2)] * 40, concurrency=40), prepare=with_front_end)
        assert Counter(request.queued_ns // MS for request in ran.requests) == {34: 32, 44: 8}

    def test_a_client_gives_up_while_its_prompt_is_tokenised(self) -> None:
        def with_front_end(engine: object) -> None:
            engine.host = HostOverhead(request_token_ns=100_000)  # type: ignore[attr-defined]

        rows = [Row(0, 100, 20, abort_ns=5 * MS), Row(0, 10, 2)]
        ran = run(scenario_of(), table_of(rows), prepare=with_front_end)
        assert (ran.status(0), ran.status(1)) == (Status.ABORTED, Status.FINISHED)
        assert ran.requests[0].scheduled_ns == -1 and ran.requests[0].finish_ns >= 13 * MS

    @pytest.mark.parametrize("seed", range(6))
    def test_running_ahead_changes_nothing_behind_a_front_end(self, seed: int) -> None:
        def with_front_end(engine: object) -> None:
            engine.host = HostOverhead(request_ns=MS, request_token_ns=20_000)  # type: ignore[attr-defined]

        rng = np.random.default_rng(seed)
        rows = [
            Row(int(at) * 1000, prompt=int(prompt), output=int(output))
            for at, prompt, output in zip(
                np.sort(rng.integers(0, 900_000, 60)), rng.integers(1, 300, 60), rng.integers(1, 60, 60), strict=True
            )
        ]
        closed = None if seed % 2 else 5
        ends = [
            [
                (request.queued_ns, request.first_token_ns, request.finish_ns)
                for request in run(
                    scenario_of(replicas=1 + seed % 3),
                    table_of(rows, concurrency=closed),
                    prepare=with_front_end,
                    coalesce=coalesce,
                ).requests
            ]
            for coalesce in (True, False)
        ]
        assert ends[0] == ends[1]

    def test_a_client_gives_up_before_its_request_has_arrived(self) -> None:
        def with_front_end(engine: object) -> None:
            engine.host = HostOverhead(request_ns=2 * MS)  # type: ignore[attr-defined]

        ran = run(scenario_of(), table_of([Row(5 * MS, 10, 2, abort_ns=6 * MS), Row()]), prepare=with_front_end)
        assert ran.status(0) == Status.ABORTED
        assert ran.requests[0].scheduled_ns == -1
        assert ran.status(1) == Status.FINISHED


class TestQueueingTheory:
    """A server with one place and a fixed time per step is a queue that theory knows."""

    COUNT = 25_000
    SERVICE = 10 * MS

    def waiting(self, rate: float, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
        random = np.random.default_rng(11)
        arrival = np.cumsum(random.exponential(1e9 / rate, self.COUNT)).astype(int)
        rows = [Row(at, 1, n) for at, n in zip(arrival.tolist(), outputs.tolist(), strict=True)]
        timing = {"source": "linear", "base_ns": self.SERVICE}
        engine = {"max_num_seqs": 1, "async_scheduling": False, "enable_prefix_caching": False}
        ran = run(scenario_of(engine, timing=timing), table_of(rows), expand=False)
        started = np.array([request.scheduled_ns for request in ran.requests])
        finished = np.array([request.finish_ns for request in ran.requests])
        assert (finished - started == outputs * self.SERVICE).all()
        return arrival, started - arrival

    def lindley(self, arrival: np.ndarray, service: np.ndarray) -> list[int]:  # type: ignore[type-arg]
        """Waiting times, one after the other: who comes next waits for what is left of the work before."""
        waits, wait = [0], 0
        for gap, work in zip(np.diff(arrival).tolist(), service.tolist(), strict=False):
            wait = max(0, wait + work - gap)
            waits.append(wait)
        return waits

    @pytest.mark.parametrize("load", [0.3, 0.6])
    def test_m_d_1(self, load: float) -> None:
        outputs = np.ones(self.COUNT, np.int64)
        arrival, waits = self.waiting(load * 100, outputs)
        assert waits.tolist() == self.lindley(arrival, outputs * self.SERVICE)
        # Pollaczek-Khinchine: with service time D, W = rho D / (2 (1 - rho)).
        assert waits.mean() == pytest.approx(load * self.SERVICE / (2 * (1 - load)), rel=0.04)

    def test_m_g_1(self) -> None:
        outputs = np.random.default_rng(5).integers(1, 6, self.COUNT)
        service = outputs * self.SERVICE
        load = 0.5
        arrival, waits = self.waiting(load * 1e9 / (3 * self.SERVICE), outputs)
        assert waits.tolist() == self.lindley(arrival, service)
        # W = lambda E[S^2] / (2 (1 - rho)), E[S^2] of 1 to 5 equally likely = 11 D^2.
        rate = load / (3 * self.SERVICE)
        assert waits.mean() == pytest.approx(rate * 11 * self.SERVICE**2 / (2 * (1 - load)), rel=0.04)


def test_work_is_conserved_over_the_law() -> None:
    """Busy time = steps x base + tokens x their price, whatever the batches were."""
    rows = [Row(i * 3 * MS, prompt=30, output=12) for i in range(50)]
    ran = run(scenario_of(timing=LINEAR | {"per_context_token_ns": 0}, replicas=2), table_of(rows))
    steps = ran.steps()
    busy = sum(step["end_ns"] - step["start_ns"] for step in steps)
    assert busy == len(steps) * 5 * MS + 50 * 30 * 20_000 + 50 * 11 * 50_000
