"""What one engine does with requests at the edges, and in which order it serves them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from groups import pipelined
from running import LINEAR, MS, Ran, Row, gaps_of, run, scenario_of, table_of
from servetwin.engine.request import Status
from servetwin.errors import InputError
from watching import watched


def serve(rows: Sequence[Row], engine: dict[str, Any] | None = None, **workload: Any) -> Ran:
    with watched() as schedulers:
        ran = run(scenario_of(engine), table_of(rows, **workload), coalesce=False)
    for scheduler in schedulers:
        scheduler.check_end()
    assert len(ran.requests) == len(rows)
    return ran


NEIGHBOURS = [Row(0, prompt=50, output=20), Row(300 * MS, prompt=50, output=20)]
ASYNC = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


class TestRequestsThatCanNeverBeServed:
    """They fail with their reason, and the run goes on."""

    def ends(self, row: Row, engine: dict[str, Any], reason: str) -> None:
        for rows in ([NEIGHBOURS[0], row, NEIGHBOURS[1]], [row], [row, row, row]):
            ran = serve(rows, engine)
            for request in ran.requests:
                if request.prompt == row.prompt:
                    assert request.status == Status.FAILED
                    assert request.reason == reason
                    assert (request.outputs, request.scheduled_ns, request.first_token_ns) == (0, -1, -1)
                    assert request.finish_ns >= request.arrival_ns
                else:
                    assert (request.status, request.outputs) == (Status.FINISHED, 20)

    @ASYNC
    @pytest.mark.parametrize("prompt", [512, 513, 9000])
    def test_longer_than_the_context(self, asynchronous: bool, prompt: int) -> None:
        reason = f"its prompt of {prompt} tokens leaves no room for output in max_model_len 512"
        self.ends(Row(MS, prompt), {"max_model_len": 512, "async_scheduling": asynchronous}, reason)

    @ASYNC
    @pytest.mark.parametrize("caching", [False, True])
    def test_larger_than_the_kv_cache(self, asynchronous: bool, caching: bool) -> None:
        engine = {"num_gpu_blocks_override": 11, "max_model_len": 512, "async_scheduling": asynchronous}
        engine["enable_prefix_caching"] = caching
        self.ends(Row(MS, 161), engine, "it needs 11 KV blocks and the engine has 10")

    @ASYNC
    def test_longer_than_a_step_that_may_not_be_chunked(self, asynchronous: bool) -> None:
        engine = {"enable_chunked_prefill": False, "max_num_batched_tokens": 512, "max_model_len": 512}
        engine |= {"max_num_seqs": 8, "async_scheduling": asynchronous}
        serve([Row(prompt=511)], engine)
        with pytest.raises(InputError, match="max_num_batched_tokens"):
            scenario_of(engine | {"max_num_batched_tokens": 256})

    @ASYNC
    def test_outgrows_the_kv_cache(self, asynchronous: bool) -> None:
        """Its prompt fits, its answer does not."""
        engine = {"num_gpu_blocks_override": 11, "max_model_len": 512, "async_scheduling": asynchronous}
        ran = serve([Row(prompt=100, output=400), *NEIGHBOURS], engine)
        assert [request.status for request in ran.requests] == [Status.FAILED, Status.FINISHED, Status.FINISHED]
        assert ran.requests[0].outputs >= 60, "it got what fitted"
        assert ran.requests[0].reason == "it needs 11 KV blocks and the engine has 10"

    @ASYNC
    def test_exactly_fills_the_kv_cache(self, asynchronous: bool) -> None:
        engine = {"num_gpu_blocks_override": 11, "max_model_len": 512, "async_scheduling": asynchronous}
        assert serve([Row(prompt=160, output=1)], engine).status(0) == Status.FINISHED
        assert serve([Row(prompt=100, output=61)], engine).status(0) == Status.FINISHED


@ASYNC
def test_answers_of_one_token(asynchronous: bool) -> None:
    ran = serve([Row(i * MS, prompt=10, output=1) for i in range(20)], {"async_scheduling": asynchronous})
    for request in ran.requests:
        assert request.first_token_ns == request.last_token_ns == request.finish_ns
        assert request.token_ns == [request.finish_ns]
    assert gaps_of(ran.engines[0]) == {}


@ASYNC
def test_a_prompt_of_one_token(asynchronous: bool) -> None:
    ran = serve([Row(prompt=1, output=3)], {"async_scheduling": asynchronous})
    assert ran.requests[0].outputs == 3
    assert [step["prefill_seqs"] for step in ran.steps()] == [0, 0, 0], "one new token is a decode for the kernels"


@ASYNC
def test_the_context_ends_an_answer(asynchronous: bool) -> None:
    ran = serve([Row(prompt=50, output=100)], {"max_model_len": 64, "async_scheduling": asynchronous})
    assert (ran.requests[0].outputs, ran.requests[0].reason) == (14, "length")


def test_one_request_by_hand() -> None:
    """base 5 ms; prompt 100 tokens at 20 us; then decodes at 50 us; 1 ns for each token of context."""
    ran = serve([Row(7, prompt=100, output=3)], {"async_scheduling": False})
    first = 5 * MS + 100 * 20_000 + 100
    second, third = 5 * MS + 50_000 + 101, 5 * MS + 50_000 + 102
    assert ran.requests[0].token_ns == [7 + first, 7 + first + second, 7 + first + second + third]
    assert gaps_of(ran.engines[0]) == {second: 1, third: 1}


def test_a_stop_that_nobody_foresees_costs_one_step_ahead() -> None:
    sync = serve([Row(output=5)], {"async_scheduling": False}, output_known=False)
    ahead = serve([Row(output=5)], {"async_scheduling": True}, output_known=False)
    foreseen = serve([Row(output=5)], {"async_scheduling": True})
    assert [len(ran.steps()) for ran in (sync, ahead, foreseen)] == [5, 6, 5]
    assert sync.requests[0].token_ns == ahead.requests[0].token_ns == foreseen.requests[0].token_ns


ONE_PLACE = {"max_num_seqs": 1, "async_scheduling": False}
CACHING = {"async_scheduling": False, "enable_prefix_caching": True}


class TestOrder:
    def served(self, priorities: list[int], engine: dict[str, Any]) -> list[int]:
        rows = [Row(i, prompt=10, output=3, priority=p) for i, p in enumerate(priorities)]
        ran = serve(rows, ONE_PLACE | engine)
        return sorted(range(len(rows)), key=lambda row: ran.requests[row].scheduled_ns)

    def test_first_come_first_served(self) -> None:
        assert self.served([2, 0, 1, 0], {}) == [0, 1, 2, 3]

    def test_by_priority_then_arrival(self) -> None:
        assert self.served([2, 1, 0, 1, 0], {"scheduling_policy": "priority"}) == [0, 2, 4, 1, 3]

    def test_the_least_important_is_preempted(self) -> None:
        engine = {"scheduling_policy": "priority", "num_gpu_blocks_override": 31, "max_model_len": 400}
        rows = [Row(0, 100, 150, priority=1), Row(1, 100, 150, priority=2), Row(2, 100, 150, priority=0)]
        ran = serve(rows, engine)
        assert ran.requests[1].preemptions > 0
        assert ran.requests[2].preemptions == 0

    def test_the_last_come_is_preempted(self) -> None:
        engine = {"num_gpu_blocks_override": 31, "max_model_len": 400}
        ran = serve([Row(i, 100, 150) for i in range(3)], engine)
        preempted = [request.preemptions for request in ran.requests]
        assert preempted[0] == 0
        assert preempted[2] > 0
        assert [request.row for request in ran.built.cluster.ended_requests] == [0, 1, 2]

    @pytest.mark.parametrize("version", ["vllm-0.19", "vllm-0.32", "vllm-0.33"])
    @ASYNC
    def test_a_request_that_preempts_itself_is_not_forgotten(self, version: str, asynchronous: bool) -> None:
        """The step that would have held it stays empty, although another one runs (older engines stop trying)."""
        engine = {"scheduling_policy": "priority", "num_gpu_blocks_override": 21, "max_model_len": 320}
        engine |= {"version": version, "async_scheduling": asynchronous, "enable_prefix_caching": False}
        for prompt in range(96, 113):
            ran = serve([Row(0, 100, 150, priority=1), Row(10 * MS, prompt, 150, priority=0)], engine)
            assert [request.status for request in ran.requests] == [Status.FINISHED] * 2


class TestPrefixCaching:
    def cached(self, rows: Sequence[Row], **engine: Any) -> list[int]:
        return [request.cached_tokens for request in serve(rows, CACHING | engine).requests]

    @pytest.mark.parametrize(("prompt", "hit"), [(15, 0), (16, 0), (17, 16), (64, 48), (65, 64)])
    def test_the_last_prompt_token_is_always_computed(self, prompt: int, hit: int) -> None:
        assert self.cached([Row(0, segments=[(1, prompt)]), Row(50 * MS, segments=[(1, prompt)])]) == [0, hit]

    def test_off(self) -> None:
        rows = [Row(0, segments=[(1, 64)]), Row(50 * MS, segments=[(1, 64)])]
        assert self.cached(rows, enable_prefix_caching=False) == [0, 0]

    def test_same_step(self) -> None:
        """Blocks are findable as soon as they are scheduled."""
        assert self.cached([Row(0, segments=[(1, 64)]), Row(0, segments=[(1, 64)])]) == [0, 48]

    def test_a_prefix_counts_only_from_the_start(self) -> None:
        assert self.cached([Row(0, segments=[(1, 64)]), Row(50 * MS, segments=[(2, 16), (1, 64)])]) == [0, 0]

    def test_the_next_turn_finds_the_answer_before(self) -> None:
        first = Row(0, segments=[(1, 64)], output=33)
        second = Row(900 * MS, segments=[(1, 64), (-1, 33), (2, 10)])
        assert self.cached([first, second]) == [0, 96], "64 + 32 whole blocks: the KV of the last output is not there"

    def test_the_oldest_prefix_is_evicted(self) -> None:
        """10 blocks: the prompts of A, B and C (4 blocks each, one more for the answer) do not all stay."""
        a, b, c = ([(seed, 64)] for seed in (1, 2, 3))
        asked = [Row(i * 200 * MS, segments=segments, output=2) for i, segments in enumerate([a, b, c, c, b, a])]
        hits = self.cached(asked, num_gpu_blocks_override=11, max_model_len=128)
        assert hits[3] == 48, "C is the newest"
        assert hits[5] < 48, "A is the oldest"


def test_a_watermark_keeps_blocks_free() -> None:
    rows = [Row(0, prompt=64, output=60) for _ in range(4)]
    engine = {"num_gpu_blocks_override": 21, "max_model_len": 256, "async_scheduling": False}
    free = serve(rows, engine | {"watermark": 0.0}).steps()[0]
    kept = serve(rows, engine | {"watermark": 0.25}).steps()[0]
    assert (free["running"], free["kv_blocks_used"]) == (4, 16)
    assert (kept["running"], kept["kv_blocks_used"]) == (3, 12), "a fourth would leave 4 of 5 blocks"


def test_whole_prompts_are_reserved() -> None:
    """A prompt of several chunks is admitted only when all of it fits."""
    engine = {"num_gpu_blocks_override": 21, "max_model_len": 300, "max_num_batched_tokens": 64, "max_num_seqs": 8}
    engine |= {"async_scheduling": False}
    rows = [Row(0, prompt=200, output=5), Row(0, prompt=200, output=5)]
    with_reservation = serve(rows, engine | {"scheduler_reserve_full_isl": True})
    without = serve(rows, engine | {"scheduler_reserve_full_isl": False})
    assert with_reservation.engines[0].scheduler.preemptions == 0
    assert without.engines[0].scheduler.preemptions > 0


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_abort_frees_the_blocks(asynchronous: bool) -> None:
    rows = [Row(0, 100, 300, abort_ns=200 * MS), Row(0, 10, 5, abort_ns=0), Row(3 * MS, 10, 5, abort_ns=900 * MS)]
    ran = serve(rows, {"async_scheduling": asynchronous})
    aborted, at_once, finished = ran.requests
    assert (aborted.status, aborted.reason) == (Status.ABORTED, "aborted by the client")
    assert 0 < aborted.outputs < 300
    assert aborted.finish_ns - 200 * MS < 10 * MS, "at the end of the step"
    assert (at_once.status, at_once.outputs) == (Status.ABORTED, 0)
    assert finished.status == Status.FINISHED


def test_the_law_is_per_step() -> None:
    """Two equal requests at once take the time of one and their own marginal costs."""
    timing = LINEAR | {"per_context_token_ns": 0}
    alone = run(scenario_of({}, timing=timing), table_of([Row(prompt=100, output=10)])).requests[0]
    both = run(scenario_of({}, timing=timing), table_of([Row(prompt=100, output=10)] * 2)).requests[0]
    assert both.finish_ns - alone.finish_ns == 100 * 20_000 + 9 * 50_000


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("version", ["vllm-0.19", "vllm-0.33"])
def test_a_step_that_only_preempted_is_tried_again_behind_empty_ones(stages: int, version: str) -> None:
    """With room for several batches, the one that preempted may lie behind an empty one that is looked at first."""
    engine = {"async_scheduling": False, "num_gpu_blocks_override": 11, "max_model_len": 160, "version": version}
    engine |= {"scheduling_policy": "priority", "scheduler_reserve_full_isl": False, "max_num_batched_tokens": 320}
    rows = [Row(0, prompt=48, output=78), Row(0, prompt=78, output=2), Row(0, prompt=25, output=92)]
    ran = run(pipelined(scenario_of(engine), stages), table_of(rows))
    assert [request.outputs for request in ran.requests] == [78, 2, 92]


def test_what_waited_for_its_outputs_does_not_hide_that_the_first_can_never_be_served() -> None:
    """The first request has grown beyond what the cache of two groups holds when it is preempted; behind it waits one
    that was passed over until its outputs had come."""
    engine = {"async_scheduling": False, "num_gpu_blocks_override": 25, "max_num_batched_tokens": 40}
    engine |= {"max_model_len": 320, "max_num_seqs": 12, "long_prefill_token_threshold": 12}
    rows = [Row(prompt=187, output=118), Row(prompt=76, output=105), Row(prompt=103, output=106), Row(0, 12, 119)]
    ran = run(pipelined(scenario_of(engine, model="openai/gpt-oss-20b"), 4), table_of(rows))
    assert [request.status for request in ran.requests] == [Status.FAILED, *[Status.FINISHED] * 3]
    assert "24" in ran.requests[0].reason


@pytest.mark.parametrize("coalesce", [False, True])
def test_requests_that_would_give_way_to_each_other_for_ever_fail(coalesce: bool) -> None:
    """Three prompts in small chunks, of which the cache holds two at a time: each pushes the next one out before its
    own first token."""
    engine = {"async_scheduling": False, "num_gpu_blocks_override": 25, "max_num_batched_tokens": 24}
    engine |= {"max_model_len": 320, "max_num_seqs": 12, "long_prefill_token_threshold": 12}
    engine |= {"scheduling_policy": "priority", "scheduler_reserve_full_isl": False}
    sizes = [(77, 31), (163, 103), (15, 10), (167, 58), (79, 97), (11, 78), (241, 98), (243, 71)]
    rows = [Row(prompt=prompt, output=output) for prompt, output in sizes] + [Row(35 * MS, 29, 100, priority=1)]
    scenario = pipelined(scenario_of(engine, model="openai/gpt-oss-20b"), 3)
    ran = run(scenario, table_of(rows), coalesce=coalesce)
    failed = [request for request in ran.requests if request.status != Status.FINISHED]
    assert failed and all(request.reason.startswith("the engine's 24 KV blocks do not hold it") for request in failed)
    assert any(request.reason.endswith("give way to each other for ever") for request in failed)
