"""Lock-step groups on random workloads: one rank is a plain engine; many passes at once are what single ones are; all
ends."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from groups import GRAPHS, GroupRan, pipelined, run_groups
from running import MS, run, scenario_of
from servetwin.engine.rank import Stage
from servetwin.timing.host import NO_OVERHEAD, HostOverhead
from servetwin.workload.table import RequestTable
from watching import watched
from workloads import engines, tables

SLOW = HostOverhead(step_ns=500_000, seq_ns=1_000, gap_ns=300_000, gap_seq_ns=700, request_ns=1_500_000)
HOST_BOUND = HostOverhead(step_ns=9_000_000, seq_ns=100_000, gap_ns=300_000)
DRAFTS = {"num_speculative_tokens": 3, "spec_acceptance_rate": 0.0}
hosts = st.sampled_from([NO_OVERHEAD, SLOW, HOST_BOUND])
groups: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "graphs": st.sampled_from([(), (1, 2, 4), GRAPHS]),
        "check_every": st.sampled_from([32, 16, 5, 1]),
        "checks_first": st.booleans(),
        "law": st.fixed_dictionaries(
            {
                "per_padding_ns": st.sampled_from([0, 10_000]),
                "per_gathered_ns": st.sampled_from([0, 700]),
                "per_context_token_ns": st.sampled_from([0, 1]),
                "base_ns": st.sampled_from([1, 5 * MS]),
            }
        ),
    }
)
policies = st.sampled_from(["round_robin", "least_loaded", "random"])
routings: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "policy": policies,
        "refresh": st.sampled_from([None, None, 20 * MS]),
        "max_in_flight": st.sampled_from([None, None, 3]),
        "queue_timeout": st.sampled_from([None, None, 200 * MS]),
    }
)


def check(ran: GroupRan, data: int) -> None:
    """What must hold of every run."""
    assert ran.clock == sorted(ran.clock), "C1"
    rows = Counter(request.row for request in ran.requests)
    assert set(rows.values()) <= {1}
    assert not ran.built.cluster.unfinished, "C2"
    passes = ran.passes()
    for first in range(0, len(passes), data):
        members = passes[first : first + data]
        assert all(member == members[0] for member in members), "L1: same times on all ranks"
    for group in ran.groups:
        assert not group.pending, "L3"
        assert all(rank.stage is Stage.PAUSED for rank in group.ranks)
        assert not group.running
    for one in ran.engines:
        assert one.scheduler.kv.pool.used == 0


@settings(max_examples=100, deadline=None)
@given(tables(), engines, st.integers(1, 2), policies, hosts, st.booleans())
def test_a_group_of_one_is_a_plain_engine(
    table: RequestTable, engine: dict[str, Any], replicas: int, routing: str, host: HostOverhead, coalesce: bool
) -> None:
    scenario = scenario_of(engine, replicas=replicas, routing=routing)

    def slow(engine: Any) -> None:
        engine.host = host

    plain = run(scenario, table, coalesce=coalesce, prepare=slow).everything()
    group = run_groups(scenario, table, data=1, host=host, coalesce=coalesce).everything()
    for name in plain:
        assert group[name] == plain[name], name


@settings(max_examples=100, deadline=None)
@given(
    tables(),
    engines,
    st.sampled_from([(2, 2), (3, 3), (4, 2), (3, 1)]),
    routings,
    hosts,
    groups,
    st.sampled_from([{}, {}, {"prefill_schedule_interval": 3}, DRAFTS, DRAFTS | {"spec_acceptance_rate": 1.0}]),
)
def test_many_passes_at_once(
    table: RequestTable,
    engine: dict[str, Any],
    shape: tuple[int, int],
    routing: dict[str, Any],
    host: HostOverhead,
    group: dict[str, Any],
    more: dict[str, Any],
) -> None:
    replicas, data = shape
    scenario = scenario_of(engine | more, replicas=replicas)
    scenario = scenario.model_copy(update={"routing": scenario.routing.model_copy(update=routing)})
    coalesced = run_groups(scenario, table, data=data, host=host, **group)
    with watched() as schedulers:
        single = run_groups(scenario, table, data=data, host=host, coalesce=False, **group)
    for scheduler in schedulers:
        scheduler.check_end()
    check(single, data)
    check(coalesced, data)
    ours, theirs = coalesced.everything(), single.everything()
    for name in ours:
        assert ours[name] == theirs[name], name
    assert [g.waves for g in coalesced.groups] == [g.waves for g in single.groups]
    compact = run_groups(scenario, table, data=data, host=host, expand=False, **group)
    assert compact.everything()["requests"] == ours["requests"]
    assert sum(row["steps"] for row in compact.steps()) == len(ours["steps"])


@settings(max_examples=100, deadline=None)
@given(tables(), engines, st.sampled_from([2, 3]), st.sampled_from([2, 3]), hosts, groups, st.sampled_from([1, 3]))
def test_pipeline_stages_and_prefill_intervals(
    table: RequestTable,
    engine: dict[str, Any],
    data: int,
    pipeline: int,
    host: HostOverhead,
    group: dict[str, Any],
    interval: int,
) -> None:
    engine = engine | {"async_scheduling": False, "prefill_schedule_interval": interval}
    scenario = pipelined(scenario_of(engine, replicas=data), pipeline)
    with watched() as schedulers:
        ran = run_groups(scenario, table, data=data, host=host, coalesce=False, **group)
    for scheduler in schedulers:
        scheduler.check_end()
    check(ran, data)
    assert run_groups(scenario, table, data=data, host=host, **group).everything() == ran.everything()
    assert len(ran.requests) == len(table)
    for member in ran.passes():
        assert all(a[1] <= b[1] for a, b in pairwise(member))
