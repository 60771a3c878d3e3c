"""Who is let in, and who gives up: limits, the queue in the router, timeouts, patience."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from running import MS, Ran, Row, run, scenario_of, table_of
from servetwin.cluster.build import build
from servetwin.engine.engine import Engine
from servetwin.engine.log import StepLog
from servetwin.engine.request import Request, Status
from servetwin.simulation import simulate
from servetwin.timing.host import HostOverhead
from servetwin.workload import build as build_workload

ONE_AT_A_TIME = {"max_num_seqs": 1, "async_scheduling": False, "enable_prefix_caching": False}
LAW = {"source": "linear", "base_ns": 10 * MS}


def ran(rows: list[Row], replicas: int = 1, concurrency: int | None = None, **routing: Any) -> Ran:
    """Engines that serve one request at a time, 10 ms a token."""
    scenario = scenario_of(ONE_AT_A_TIME, replicas=replicas, timing=LAW, routing=routing)
    table = replace(table_of(rows, concurrency=concurrency), at_engine=True)
    one, other = run(scenario, table), run(scenario, table, coalesce=False)
    assert one.everything() == other.everything()
    return one


def status(ran: Ran) -> list[str]:
    return [
        "FAIL" if r.status == Status.FAILED else "STOP" if r.status == Status.ABORTED else "ok" for r in ran.requests
    ]


def in_engines(ran: Ran) -> int:
    """Most requests that were in the engines at once, from when each was sent there to its end."""
    changes = [(r.queued_ns, 1) for r in ran.requests if r.engine >= 0 and r.scheduled_ns >= 0]
    changes += [(r.finish_ns, -1) for r in ran.requests if r.engine >= 0 and r.scheduled_ns >= 0]
    inside = most = 0
    for _, change in sorted(changes):
        inside += change
        most = max(most, inside)
    return most


class TestMaxWaiting:
    def test_an_engine_refuses_what_it_cannot_queue(self) -> None:
        rows = [Row(0, 5, 10), *(Row((10 + i) * MS, 5, 10) for i in range(5)), Row(500 * MS, 5, 1)]
        found = ran(rows, max_waiting=2)
        assert status(found) == ["ok"] * 3 + ["FAIL"] * 3 + ["ok"]
        refused = found.requests[3]
        assert refused.reason == "rejected: 2 requests wait in its engine, max_waiting is 2"
        assert refused.finish_ns == refused.arrival_ns
        assert refused.engine == 0
        assert refused.scheduled_ns == -1

    def test_at_one_moment_all_but_so_many_are_refused(self) -> None:
        assert status(ran([Row(0, 5, 3)] * 6, replicas=2, max_waiting=2)) == ["ok"] * 4 + ["FAIL"] * 2


class TestMaxInFlight:
    ROWS = tuple(Row(i * MS, 5, 4) for i in range(8))

    def test_excess_waits_first_come_first_served(self) -> None:
        found = ran(list(self.ROWS), replicas=2, max_in_flight=2)
        assert status(found) == ["ok"] * 8
        starts = [request.scheduled_ns for request in found.requests]
        assert starts == sorted(starts)
        assert [request.engine for request in found.requests] == [0, 1] * 4
        assert in_engines(found) == 2
        assert all(request.arrival_ns == row.arrival_ns for request, row in zip(found.requests, self.ROWS, strict=True))

    def test_excess_is_refused(self) -> None:
        found = ran(list(self.ROWS), replicas=2, max_in_flight=2, when_full="reject")
        assert status(found) == ["ok"] * 2 + ["FAIL"] * 6
        assert found.requests[2].reason == "rejected: max_in_flight 2 is reached"
        assert found.requests[2].engine == -1

    def test_in_a_closed_loop(self) -> None:
        found = ran([Row(0, 5, 4)] * 12, replicas=3, concurrency=6, max_in_flight=2)
        assert status(found) == ["ok"] * 12
        assert in_engines(found) == 2

    def test_a_client_may_give_up_in_the_router(self) -> None:
        rows = [Row(0, 5, 10), Row(1, 5, 10, abort_ns=50 * MS), Row(2, 5, 10)]
        found = ran(rows, max_in_flight=1)
        assert status(found) == ["ok", "STOP", "ok"]
        gone = found.requests[1]
        assert (gone.finish_ns, gone.engine, gone.reason) == (50 * MS, -1, "aborted by the client")
        assert found.requests[2].scheduled_ns == 100 * MS

    def test_a_result_has_no_pool_for_who_was_in_none(self) -> None:
        workload = {"arrivals": {"process": "all_at_once"}, "requests": 3, "input_tokens": 5, "output_tokens": 5}
        routing = {"policy": "least_loaded", "max_in_flight": 1, "when_full": "reject"}
        result = simulate(scenario_of(workload=workload, routing=routing, timing=LAW))
        assert list(result.requests["pool"]) == ["pool0", "", ""]
        assert list(result.requests["status"]) == ["finished", "failed", "failed"]


class TestQueueTimeout:
    def test_in_the_engines_queue(self) -> None:
        rows = [Row(0, 5, 10), Row(0, 5, 1), Row(65 * MS, 5, 1)]
        found = ran(rows, queue_timeout="60ms")
        assert status(found) == ["ok", "FAIL", "ok"]
        assert found.requests[1].reason == "timed out after 60ms in the queue"
        # The engine looks at its inbox when the step that runs has ended.
        assert found.requests[1].finish_ns == 60 * MS
        assert found.requests[2].scheduled_ns == 100 * MS

    def test_in_the_router(self) -> None:
        found = ran([Row(0, 5, 10), Row(0, 5, 1), Row(65 * MS, 5, 1)], queue_timeout="55ms", max_in_flight=1)
        assert status(found) == ["ok", "FAIL", "ok"]
        assert (found.requests[1].finish_ns, found.requests[1].engine) == (55 * MS, -1)

    def test_counts_from_the_arrival_through_both_queues(self) -> None:
        rows = [Row(0, 5, 5), Row(0, 5, 5), Row(1 * MS, 5, 1)]
        found = ran(rows, queue_timeout="70ms", max_in_flight=2)
        assert status(found) == ["ok", "ok", "FAIL"], "50 ms in the router, the rest in the engine"
        assert found.requests[2].engine == 0

    def test_who_has_begun_is_not_timed_out(self) -> None:
        assert status(ran([Row(0, 5, 100)], queue_timeout="1ms")) == ["ok"]

    def test_on_the_way_to_the_engine(self) -> None:
        def with_front_end(engine: Engine) -> None:
            engine.host = HostOverhead(request_ns=2 * MS)

        scenario = scenario_of(timing=LAW, routing={"queue_timeout": "1us"})
        found = run(scenario, table_of([Row(0, 5, 5)]), prepare=with_front_end)
        assert status(found) == ["FAIL"]
        assert found.requests[0].finish_ns == 2 * MS


class TestPatience:
    def test_is_drawn_and_ends_requests(self) -> None:
        workload: dict[str, Any] = {
            "arrivals": {"process": "poisson", "rate": 8},
            "requests": 2000,
            "input_tokens": 5,
            "output_tokens": 10,
            "patience": {"distribution": "exponential", "mean": "200ms"},
        }
        scenario = scenario_of(ONE_AT_A_TIME, workload=workload, timing=LAW, routing="round_robin")
        result = simulate(scenario)
        aborted = result.has_status("aborted")
        assert 0.3 < aborted.mean() < 0.8
        waited = result.ints("finish_ns") - result.ints("arrival_ns")
        table = build_workload(scenario.workload, 0, Path())
        assert table.abort_ns is not None
        patience = table.abort_ns - table.arrival_ns
        assert (waited[aborted] >= patience[aborted]).all()
        assert (waited[~aborted] <= patience[~aborted] + 10 * MS).all(), "who leaves in the last step is too late"
        assert patience.mean() == pytest.approx(200 * MS, rel=0.1)

    @pytest.mark.parametrize(
        ("patience", "mean", "deviation"),
        [
            ("3s", 3000, 0),
            ({"distribution": "uniform", "min": "1s", "max": "4s"}, 2500, 3000 / 12**0.5),
            ({"distribution": "exponential", "mean": "2s"}, 2000, 2000),
            ({"distribution": "lognormal", "median": "1s", "sigma": 0.5}, 1000 * np.exp(1 / 8), 604),
        ],
    )
    def test_distributions(self, patience: Any, mean: float, deviation: float) -> None:
        workload = {
            "arrivals": {"process": "constant", "rate": 10}, "requests": 20_000, "input_tokens": 5, "output_tokens": 5,
            "patience": patience,
        }  # fmt: skip
        table = build_workload(scenario_of(workload=workload).workload, 3, Path())
        assert table.abort_ns is not None
        drawn = (table.abort_ns - table.arrival_ns) / MS
        assert drawn.mean() == pytest.approx(mean, rel=0.03)
        assert drawn.std() == pytest.approx(deviation, rel=0.05)

    def test_in_a_closed_loop_it_counts_from_the_release(self) -> None:
        found = ran([Row(0, 5, 10, abort_ns=35 * MS)] * 3, concurrency=1)
        assert status(found) == ["STOP"] * 3
        assert [request.finish_ns for request in found.requests] == [40 * MS, 80 * MS, 120 * MS]


class TestModels:
    def test_requests_go_only_where_their_model_is_served(self) -> None:
        """Two engines serve one model, one serves another, and a third model is asked for too."""
        rows = [Row(i * MS, 5, 4) for i in range(12)]
        table = replace(table_of(rows), model=np.array([0, 1, 2, 0, 1, 0] * 2), models=("a", "b", "c"), at_engine=True)
        scenario = scenario_of(ONE_AT_A_TIME, replicas=3, timing=LAW, routing="round_robin")
        built = build(scenario, table, base=Path(), log=StepLog())
        router = built.cluster.router
        router._served.clear()
        router.connect(built.cluster.engines, ["a", "b", "a"], lambda row, block_size: None)
        built.cluster.run()
        requests = sorted(built.cluster.ended_requests, key=lambda request: request.row)
        assert [request.engine for request in requests] == [0, 1, -1, 2, 1, 0, 2, 1, -1, 0, 1, 2]
        assert requests[2].reason == "no pool serves model c"
        assert requests[2].status == Status.FAILED


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_limits_hold(data: st.DataObject) -> None:
    draw = data.draw
    rows = draw(
        st.lists(
            st.builds(
                Row,
                st.integers(0, 300).map(lambda ms: ms * MS),
                st.integers(1, 40),
                st.integers(1, 30),
            ),
            min_size=1,
            max_size=30,
        )
    )
    most, timeout = draw(st.sampled_from([1, 2, 5])), draw(st.sampled_from([None, 20, 90]))
    replicas, concurrency = draw(st.integers(1, 3)), draw(st.sampled_from([None, 1, 4]))
    routing: dict[str, Any] = {"max_in_flight": most}
    if timeout:
        routing["queue_timeout"] = f"{timeout}ms"
    found = ran(rows, replicas, concurrency, **routing)
    assert in_engines(found) <= most
    for request in found.requests:
        begun = request.scheduled_ns >= 0
        assert begun == (request.status == Status.FINISHED)
        if timeout:
            assert begun == (not request.reason.startswith("timed out"))
            wait = (request.scheduled_ns if begun else request.finish_ns) - request.arrival_ns
            assert wait <= timeout * MS if begun else timeout * MS <= wait <= (timeout + 10) * MS
        else:
            assert begun
    if not timeout:
        _fifo(found.requests)


def _fifo(requests: list[Request]) -> None:
    """Nobody is sent to an engine before somebody who came earlier."""
    by_arrival = sorted(requests, key=lambda request: (request.arrival_ns, request.row))
    sent = [request.queued_ns for request in by_arrival]
    assert sent == sorted(sent)
