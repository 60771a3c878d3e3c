"""One rank of a data-parallel group in lock step, and the stages of a pipeline, priced by every timer."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servetwin.errors import InputError
from servetwin.scenario.load import from_data
from servetwin.scenario.resolve import resolve
from servetwin.timing.choose import pricing_for
from servetwin.timing.operators import OperatorTimer
from servetwin.timing.overlay import CalibratedTimer, overlay_of
from servetwin.timing.protocol import StepTimer
from servetwin.timing.shape import StepShape
from servetwin.timing.stages import apportion
from servetwin.timing.strict import StrictTimer

LINEAR = {"source": "linear", "base_ns": 5_000_000, "per_prefill_token_ns": 20_000, "per_decode_seq_ns": 50_000}
NOTHING = StepShape(0, 0, 0, 0, 0, 0, 0, 0, 0)
EXPERTS = "Qwen/Qwen3-30B-A3B"
HYBRID = "Qwen/Qwen3-Next-80B-A3B-Instruct"


@st.composite
def shapes(draw: st.DrawFn, prefills: bool = True) -> StepShape:
    chunks = draw(st.lists(st.tuples(st.integers(2, 900), st.integers(0, 4000)), max_size=3)) if prefills else []
    contexts = draw(st.lists(st.integers(1, 5000), min_size=0 if chunks else 1, max_size=12))
    return StepShape(
        len(chunks),
        sum(q for q, _ in chunks),
        sum(c for _, c in chunks),
        sum(q * c + q * (q + 1) // 2 for q, c in chunks),
        len(contexts),
        len(contexts),
        sum(contexts),
        max(contexts, default=0),
        min(contexts, default=0),
    )


def timer_for(source: str | dict[str, Any], model: str, device: str = "h200_sxm", **pool: Any) -> StepTimer:
    data = {
        "model": model,
        "workload": {"arrivals": {"process": "all_at_once"}, "requests": 1, "input_tokens": 10, "output_tokens": 5},
        "pools": [{"device": device, **pool}],
        "timing": source if isinstance(source, dict) else {"source": source},
    }
    scenario = resolve(from_data(data, None, Path()), Path())
    return pricing_for(scenario, scenario.pools[0], Path()).new_timer()


def calibrated(timer: StepTimer) -> StepTimer:
    return CalibratedTimer(timer, overlay_of({"prefill_factor": 1.3, "decode_factor": 0.9}, "test"))


OVERLAY = str(Path(__file__).with_name("overlay.yaml"))
GROUP = {"parallelism": {"data": 4, "expert": 4}}
TIMERS: dict[str, tuple[Any, int]] = {
    "linear": (lambda: timer_for(LINEAR, "meta-llama/Llama-3.1-8B"), 1),
    "dense": (lambda: timer_for("auto", "meta-llama/Llama-3.1-8B"), 1),
    "alone": (lambda: timer_for("auto", EXPERTS), 1),
    "group": (lambda: timer_for("auto", EXPERTS, **GROUP), 4),
    "eager": (lambda: timer_for("roofline", EXPERTS, **GROUP, engine={"enforce_eager": True}), 4),
    "dealt out": (lambda: timer_for("auto", EXPERTS, parallelism={"tensor": 2, "data": 2, "expert": 4}), 2),
    "widths": (lambda: timer_for("auto", EXPERTS, parallelism={"tensor": 2, "data": 2}), 2),
    "alltoall": (lambda: timer_for("auto", EXPERTS, **GROUP, experts={"communication": "alltoall"}), 4),
    "zipf": (
        lambda: timer_for(
            "auto", EXPERTS, **GROUP, experts={"routing": "zipf", "exponent": 0.8, "rebalance_interval": 1000}
        ),
        4,
    ),
    "recurrent": (lambda: timer_for("roofline", HYBRID, parallelism={"tensor": 2, "data": 2, "expert": 4}), 2),
    "context": (lambda: timer_for("auto", EXPERTS, parallelism={"tensor": 8, "context": 2}), 1),
    "factors on operators": (lambda: timer_for({"source": "auto", "overlay": OVERLAY}, EXPERTS, **GROUP), 4),
    "calibrated": (lambda: calibrated(timer_for("auto", EXPERTS, **GROUP)), 4),
}


@pytest.fixture(scope="module")
def timers() -> dict[str, tuple[StepTimer, StepTimer]]:
    """Two of each, with ledgers of their own; made when first asked for."""
    return {}


def two(timers: dict[str, tuple[StepTimer, StepTimer]], name: str) -> tuple[StepTimer, StepTimer]:
    if name not in timers:
        timers[name] = TIMERS[name][0](), TIMERS[name][0]()
    return timers[name]


@pytest.mark.parametrize("name", TIMERS)
def test_a_step_is_that_of_a_group_whose_ranks_are_alike(
    timers: dict[str, tuple[StepTimer, StepTimer]], name: str
) -> None:
    one, other = two(timers, name)
    ranks = TIMERS[name][1]

    @settings(max_examples=25, deadline=None, database=None)
    @given(shapes())
    def check(shape: StepShape) -> None:
        assert one.lockstep_ns(shape, shape.tokens, ranks * shape.tokens) == other.step_ns(shape)
        assert one.ledger == other.ledger

    check()


@pytest.mark.parametrize("name", TIMERS)
def test_a_run_is_its_steps(timers: dict[str, tuple[StepTimer, StepTimer]], name: str) -> None:
    at_once, singly = two(timers, name)

    @settings(max_examples=20, deadline=None, database=None)
    @given(
        st.one_of(shapes(prefills=False), st.just(NOTHING)), st.integers(0, 12), st.integers(0, 40), st.integers(0, 99)
    )
    def check(shape: StepShape, steps: int, padding: int, others: int) -> None:
        tokens = max(1, shape.tokens + padding)
        expected = [singly.lockstep_ns(shape.later(i), tokens, tokens + others) for i in range(steps)]
        assert at_once.lockstep_run_ns(shape, steps, tokens, tokens + others) == expected
        assert at_once.ledger == singly.ledger

    check()


@pytest.mark.parametrize("name", TIMERS)
def test_the_ledger_holds_what_was_priced(timers: dict[str, tuple[StepTimer, StepTimer]], name: str) -> None:
    timer, _ = two(timers, name)
    for shape, tokens, gathered in (
        (NOTHING, 1, 9),
        (NOTHING, 64, 256),
        (StepShape(1, 700, 20, 700 * 20 + 700 * 701 // 2, 5, 5, 900, 300, 20), 800, 3000),
        (StepShape(1, 700, 20, 700 * 20 + 700 * 701 // 2, 0, 0, 0, 0, 0), 700, 2800),
    ):
        before = sum(astuple(timer.ledger))
        ns = timer.lockstep_ns(shape, tokens, gathered)
        assert ns >= 1
        assert sum(astuple(timer.ledger)) - before == ns


@pytest.mark.parametrize("name", [name for name in TIMERS if name not in ("linear", "calibrated")])
def test_a_dummy_batch_computes_no_attention_and_no_logits(
    timers: dict[str, tuple[StepTimer, StepTimer]], name: str
) -> None:
    timer, _ = two(timers, name)
    assert isinstance(timer, OperatorTimer)
    ranks = TIMERS[name][1]
    shape = StepShape(0, 0, 0, 0, 8, 8, 8000, 1000, 1000)
    left_out = {
        part.operator.name
        for part in timer.parts
        if part.operator.rows in ("logits", "decodes") or "attention" in part.operator.kind
    }
    assert {"lm_head", "sampler", "generation_attention"} <= left_out
    kept = sum(ns for operator, ns, _, _ in timer.explain(shape) if operator not in left_out)
    assert timer.lockstep_ns(NOTHING, 8, 8 * ranks) == kept


@pytest.mark.parametrize("name", ["group", "eager", "dealt out", "widths", "alltoall", "zipf"])
def test_the_tokens_of_other_ranks_cost_experts_and_gathering(
    timers: dict[str, tuple[StepTimer, StepTimer]], name: str
) -> None:
    timer, _ = two(timers, name)
    shape = StepShape(0, 0, 0, 0, 8, 8, 8000, 1000, 1000)
    prices = [timer.lockstep_ns(shape, 8, gathered) for gathered in (8, 32, 64, 256, 1024, 8192)]
    assert prices == sorted(prices) and prices[0] < prices[-1]


def test_dense_models_do_not_see_other_ranks() -> None:
    timer = timer_for("auto", "meta-llama/Llama-3.1-8B", parallelism={"data": 2})
    shape = StepShape(0, 0, 0, 0, 8, 8, 8000, 1000, 1000)
    assert timer.lockstep_ns(shape, 8, 8) == timer.lockstep_ns(shape, 8, 5000) == timer.step_ns(shape)


def test_padding_to_captured_graphs_is_alike_on_every_rank() -> None:
    """9 tokens become 16 on each of 4 ranks."""
    graphs = timer_for("roofline", EXPERTS, **GROUP)
    eager = timer_for("roofline", EXPERTS, **GROUP, engine={"enforce_eager": True})
    shape = StepShape(0, 0, 0, 0, 9, 9, 9000, 1000, 1000)
    assert graphs.lockstep_ns(shape, 9, 36) == eager.lockstep_ns(shape, 16, 64) == graphs.lockstep_ns(shape, 16, 64)


def test_strict_refuses_what_lies_beyond_in_lock_step_too() -> None:
    timer = StrictTimer(timer_for("silicon", "mistralai/Mistral-7B-v0.3", "h100_sxm"))
    shape = StepShape(0, 0, 0, 0, 8, 8, 8000, 1000, 1000)
    assert timer.lockstep_ns(shape, 8, 8) == timer.timer.step_ns(shape)
    assert timer.lockstep_run_ns(shape, 3, 8, 8) == timer.timer.run_ns(shape, 3)
    with pytest.raises(InputError, match="lies beyond what was measured"):
        timer.lockstep_ns(shape, 10_000_000, 10_000_000)
    with pytest.raises(InputError, match="lies beyond what was measured"):
        timer.lockstep_run_ns(shape, 2, 10_000_000, 10_000_000)


@given(st.integers(0, 10**12), st.lists(st.integers(0, 10**6), min_size=1, max_size=9))
def test_apportioning_is_exact(ns: int, weights: list[int]) -> None:
    parts = apportion(ns, weights)
    assert sum(parts) == ns and len(parts) == len(weights) and min(parts) >= 0
    assert apportion(sum(weights), weights) == weights
    if sum(weights):
        for part, weight in zip(parts, weights, strict=True):
            assert abs(part - ns * weight / sum(weights)) <= 1 + 1e-3


PIPELINE: dict[str, Any] = {"parallelism": {"tensor": 2, "pipeline": 4}}


class TestStages:
    @pytest.mark.parametrize("case", ["operators", "linear", "calibrated", "context", "one"])
    def test_stages_sum_to_the_step_and_book_nothing(self, case: str) -> None:
        timer = {
            "operators": lambda: timer_for("auto", EXPERTS, **PIPELINE),
            "linear": lambda: timer_for(LINEAR, EXPERTS, **PIPELINE),
            "calibrated": lambda: calibrated(timer_for("auto", EXPERTS, **PIPELINE)),
            "context": lambda: timer_for("auto", EXPERTS, parallelism={"tensor": 8, "pipeline": 3, "context": 2}),
            "one": lambda: timer_for("auto", EXPERTS),
        }[case]()
        stages = {"one": 1, "context": 3}.get(case, 4)

        @settings(max_examples=25, deadline=None, database=None)
        @given(shapes())
        def check(shape: StepShape) -> None:
            before = timer.ledger.copy()
            parts = timer.stage_ns(shape)
            assert timer.ledger == before
            assert len(parts) == stages
            assert sum(parts) == timer.step_ns(shape)

        check()

    @pytest.mark.parametrize("case", ["operators", "hybrid", "linear", "calibrated", "strict", "context"])
    def test_of_a_run_are_those_of_its_steps(self, case: str) -> None:
        timer = {
            "operators": lambda: timer_for("auto", EXPERTS, **PIPELINE),
            "hybrid": lambda: timer_for("auto", HYBRID, **PIPELINE),
            "linear": lambda: timer_for(LINEAR, EXPERTS, **PIPELINE),
            "calibrated": lambda: calibrated(timer_for("auto", EXPERTS, **PIPELINE)),
            "strict": lambda: StrictTimer(timer_for("auto", "meta-llama/Llama-3.1-8B", "h100_sxm")),
            "context": lambda: timer_for("auto", EXPERTS, parallelism={"tensor": 8, "pipeline": 3, "context": 2}),
        }[case]()

        @settings(max_examples=25, deadline=None, database=None)
        @given(shapes(prefills=False), st.integers(0, 100), st.integers(0, 3))
        def check(shape: StepShape, steps: int, drafts: int) -> None:
            shape = shape._replace(decode_tokens=shape.decode_seqs * (1 + drafts))
            before = timer.ledger.copy()
            each = [timer.stage_ns(shape.later(i)) for i in range(steps)]
            assert [list(stages) for stages in timer.run_stage_ns(shape, steps)] == each
            assert timer.ledger == before

        check()

    def test_the_first_embeds_the_last_samples_and_the_others_hand_over(self) -> None:
        timer = timer_for("auto", "meta-llama/Llama-3.1-8B", **PIPELINE)
        shape = StepShape(0, 0, 0, 0, 64, 64, 64_000, 1000, 1000)
        assert isinstance(timer, OperatorTimer)
        ns = {name: time for name, time, _, _ in timer.explain(shape)}
        embedding = ns["embed_tokens"] + ns["embedding_allreduce"]
        head = ns["final_norm"] + ns["lm_head"] + ns["logits_allgather"] + ns["sampler"]
        handover = ns["stage_handover"] / 3
        layers = (sum(ns.values()) - embedding - head - ns["stage_handover"]) / 4
        wanted = [embedding + layers + handover, layers + handover, layers + handover, layers + head]
        assert timer.stage_ns(shape) == pytest.approx(wanted, abs=len(ns))
        assert head > 0.1 * layers

    def test_left_over_layers_count_where_they_are(self) -> None:
        """48 layers on 5 stages: 9, 10, 10, 10, 9."""
        timer = timer_for("roofline", EXPERTS, parallelism={"pipeline": 5})
        first, second, third, fourth, _ = timer.stage_ns(StepShape(0, 0, 0, 0, 64, 64, 64_000, 1000, 1000))
        assert second == pytest.approx(third, abs=99) and third == pytest.approx(fourth, abs=99)
        assert first / second == pytest.approx(0.9, abs=0.02)
