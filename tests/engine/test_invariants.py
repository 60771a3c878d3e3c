"""The numbered invariants (B1-B3, S1-S5, C1-C2) and the sums hold on random workloads under random options."""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple
from itertools import pairwise
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from groups import pipelined
from running import gaps_of, run, scenario_of
from servetwin.interop.steptrace import StepTrace, replay
from servetwin.timing.host import HostOverhead
from servetwin.workload.table import RequestTable
from watching import watched
from workloads import engines, tables


@settings(max_examples=120, deadline=None)
@given(tables(), engines, st.integers(1, 3), st.booleans(), st.booleans())
def test_of_a_cluster(
    table: RequestTable, engine: dict[str, Any], replicas: int, coalesce: bool, slow_host: bool
) -> None:
    host = HostOverhead(300_000, 1_000, 200_000, 500, 1_500_000) if slow_host else HostOverhead()

    def prepare(engine: Any) -> None:
        engine.host = host

    with watched() as schedulers:
        ran = run(scenario_of(engine, replicas=replicas), table, coalesce=coalesce, prepare=prepare)
    cluster = ran.built.cluster
    assert ran.clock == sorted(ran.clock), "C1: the clock went back"
    assert Counter(request.row for request in cluster.ended_requests) == Counter(range(len(table))), "C2"
    assert not cluster.unfinished
    for request in ran.requests:
        assert request.finished
        times = [request.arrival_ns, request.queued_ns, request.scheduled_ns, request.first_token_ns]
        times = [time for time in times if time >= 0]
        if request.status.name == "FINISHED":
            times += [*(request.token_ns or []), request.finish_ns]
            assert times[-1] == request.last_token_ns
        assert times == sorted(times)
        assert request.token_ns is not None
        assert len(request.token_ns) == request.outputs == request.known - request.prompt
    if not coalesce:  # a coalesced run hands out its tokens without passing the scheduler
        for scheduler in schedulers:
            scheduler.check_end()
    steps = ran.steps()
    scheduled = Counter[tuple[int, int]]()
    for number, step, _, tokens in ran.log.schedule or []:
        scheduled[number, step] += tokens
    priced = 0
    for number, one in enumerate(ran.engines):
        mine = [step for step in steps if step["engine"] == number]
        assert [step["step"] for step in mine] == list(range(len(mine)))
        assert all(step["end_ns"] - step["start_ns"] >= 1 for step in mine), "a step takes at least 1 ns"
        assert all(a["end_ns"] <= b["start_ns"] for a, b in pairwise(mine)), "one device, one step"
        gaps = sum(host.gap(step["prefill_seqs"] + step["decode_seqs"]) for step in mine)
        priced += sum(step["end_ns"] - step["start_ns"] for step in mine) - gaps
        for step in mine:
            assert scheduled[number, step["step"]] == step["prefill_tokens"] + step["decode_seqs"]
            assert step["kv_blocks_used"] <= one.scheduler.options.usable_blocks
        assert one.scheduler.kv.pool.used == 0
        told = sum(step["preempted"] for step in mine)
        assert one.scheduler.preemptions == told + schedulers[number].preempted_in_vain
    ledgers = {id(engine.timer.ledger): engine.timer.ledger for engine in ran.engines}  # equal engines share one
    assert sum(sum(astuple(ledger)) for ledger in ledgers.values()) == priced, "all time priced is accounted for"
    tokens = sum(request.outputs - 1 for request in ran.requests if request.outputs)
    assert sum(count for engine in ran.engines for count in gaps_of(engine).values()) == tokens
    spans = sum(r.last_token_ns - r.first_token_ns for r in ran.requests if r.outputs)
    assert sum(gap * count for engine in ran.engines for gap, count in gaps_of(engine).items()) == spans


@settings(max_examples=80, deadline=None)
@given(
    tables(), engines, st.integers(1, 4), st.sampled_from([0, 1, 5]), st.sampled_from([0.0, 0.5, 1.0]), st.booleans()
)
def test_of_stages_and_drafts(
    table: RequestTable, engine: dict[str, Any], stages: int, drafts: int, accepted: float, coalesce: bool
) -> None:
    engine |= {"num_speculative_tokens": drafts, "spec_acceptance_rate": accepted, "max_num_batched_tokens": 64}
    engine["async_scheduling"] &= stages == 1
    with watched() as schedulers:
        ran = run(pipelined(scenario_of(engine), stages), table, coalesce=coalesce)
    assert all(request.finished for request in ran.requests)
    for request in ran.requests:
        assert request.token_ns == sorted(request.token_ns or [])
        assert len(request.token_ns or []) == request.outputs == request.known - request.prompt
    if not coalesce:
        for scheduler in schedulers:
            scheduler.check_end()


@settings(max_examples=60, deadline=None)
@given(tables(), engines)
def test_same_input_same_run(table: RequestTable, engine: dict[str, Any]) -> None:
    scenario = scenario_of(engine, replicas=2, routing="random", seed=7)
    assert run(scenario, table).everything() == run(scenario, table).everything()


configs: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "num_blocks": st.sampled_from([42, 60, 300]),
        "budget": st.sampled_from([48, 128, 512]),
        "max_seqs": st.sampled_from([2, 8, 32]),
        "max_model_len": st.just(512),
        "prefix": st.booleans(),
        "async": st.booleans(),
    },
    optional={
        "scheduling_policy": st.just("priority"),
        "long_prefill_token_threshold": st.sampled_from([16, 100]),
        "long_prefill_token_threshold_adaptive": st.booleans(),
        "scheduler_reserve_full_isl": st.booleans(),
        "watermark": st.sampled_from([0.0, 0.1]),
        "prefill_schedule_interval": st.sampled_from([1, 3]),
        "max_num_active_seqs": st.sampled_from([1, 5]),
    },
)
kinds: st.SearchStrategy[dict[str, Any]] = st.sampled_from(
    [
        {},
        {"pp": 2, "async": False},
        {"pp": 3, "async": False},
        {"pp": 4, "async": False, "attn": "hybrid", "window": 64},
        {"num_spec": 3},
        {"attn": "hybrid", "window": 64},
        {"attn": "swa", "window": 100},
        {"attn": "swa", "window": 50, "num_spec": 2},
    ]
)
trace_requests = st.lists(
    st.fixed_dictionaries(
        {
            "at": st.integers(0, 400_000_000),
            "prompt": st.lists(
                st.tuples(st.sampled_from([0, 1, 2, 5, 6]), st.sampled_from([1, 16, 40, 90])), min_size=1, max_size=4
            ),
            "max_tokens": st.integers(1, 150),
        },
        optional={"stop": st.integers(1, 40), "prio": st.integers(0, 2), "abort_in": st.integers(0, 300_000_000)},
    ),
    min_size=1,
    max_size=16,
)


def replay_watched(
    config: dict[str, Any], requests: list[dict[str, Any]], *, rides: bool = True, **extra: Any
) -> list[dict[str, Any]]:
    records = []
    for number, request in enumerate(requests):
        record = {"kind": "req", "r": number, **request, **extra}
        if "abort_in" in record:
            record["abort_at"] = record["at"] + record.pop("abort_in")
        records.append(record)
    law = {"base": 5_000_000, "per_prefill_token": 20_000, "per_decode_seq": 50_000, "per_context_token": 1}
    header = {"kind": "header", "scenario": "random", "config": config, "latency_ns": law}
    with watched("servetwin.interop.steptrace") as schedulers:
        steps, ended = replay(StepTrace(Path("random"), header, records), rides)
    assert all(request.finished for request in ended)
    assert all(step["e"] > step.get("b", step["t"]) for step in steps)
    for scheduler in schedulers:
        scheduler.check_end()
    return steps


@settings(max_examples=120, deadline=None)
@given(configs, kinds, trace_requests)
def test_of_one_scheduler(config: dict[str, Any], kind: dict[str, Any], requests: list[dict[str, Any]]) -> None:
    """Options that scenarios do not reach: draft tokens, sliding windows, pipeline stages; and requests that ride take
    the same steps as requests that are scheduled one by one."""
    assert replay_watched(config | kind, requests) == replay_watched(config | kind, requests, rides=False)


@settings(max_examples=40, deadline=None)
@given(configs, trace_requests, st.sampled_from([1, 1, 2, 3]))
def test_of_a_decode_engine(config: dict[str, Any], requests: list[dict[str, Any]], stages: int) -> None:
    config |= {"kv_role": "kv_consumer", "pp": stages, "async": config["async"] and stages == 1}
    steps = replay_watched(config, requests, kv="do_remote_prefill")
    assert steps == replay_watched(config, requests, kv="do_remote_prefill", rides=False)


@settings(max_examples=40, deadline=None)
@given(configs, trace_requests)
def test_of_a_prefill_engine(config: dict[str, Any], requests: list[dict[str, Any]]) -> None:
    replay_watched(config | {"kv_role": "kv_producer"}, requests, kv="do_remote_decode", max_tokens=1)
