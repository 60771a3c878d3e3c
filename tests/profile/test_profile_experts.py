"""Experts spread over ranks, priced from a block that was measured whole; and when a profile prices at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profile_bundle import write_bundle
from profile_shapes import shape

from servetwin.catalog import profiles
from servetwin.errors import InputError
from servetwin.interop.llmservingsim_profile import import_profile
from servetwin.model.kernels import Experts
from servetwin.scenario.load import from_data
from servetwin.scenario.resolve import resolve
from servetwin.timing.choose import Pricing, pricing_for
from servetwin.timing.collectives import WithCollectives
from servetwin.timing.operators import OperatorTimer
from servetwin.timing.profile import ProfileTimer
from servetwin.timing.shape import StepShape

EVEN = Experts(name="experts", experts=16, local_experts=16, top_k=2, hidden=0, inter=0, stages=(3,))
decode_lists = st.lists(st.integers(1, 9000), max_size=30)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 experts of which 2 are picked, 3 layers, degrees 1 and 2; a block takes 10 + hit + tokens / 4 us."""
    root = tmp_path_factory.mktemp("mixture")
    return import_profile(write_bundle(root, "qwen3_moe", (1, 2)), "tiny", root / "profiles", layers=3)


def moe(timer: ProfileTimer, step: StepShape) -> tuple[int, str]:
    return next((ns // 3, how) for name, ns, how in timer.explain(step) if name == "moe")


def test_all_experts_on_one_rank_are_the_measured_block(mixture: Path) -> None:
    told, default = ProfileTimer.load(mixture, 1, 3, [EVEN]), ProfileTimer.load(mixture, 1)
    for step in (shape([], [100]), shape([(64, 0)], [5] * 9)):
        assert told.step_ns(step) == default.step_ns(step)
        assert told.explain(step) == default.explain(step)
    assert told.ledger == default.ledger


def test_a_rank_of_an_expert_parallel_group_has_its_pairs_and_experts(mixture: Path) -> None:
    """256 tokens on 4 ranks: 128 pairs a rank, as of 64 tokens alone, over all of its 4 experts."""
    spread = replace(EVEN, local_experts=4)
    timer = ProfileTimer.load(mixture, 1, 3, [spread], width=1)
    ns, how = moe(timer, shape([(256, 0)], []))
    assert (ns, how) == (pytest.approx(10_000 + 4_000 + 16_000, abs=1), "interpolated")


def test_the_group_brings_its_tokens(mixture: Path) -> None:
    gathered = replace(EVEN, local_experts=4, rows="gathered", data=4)
    timer = ProfileTimer.load(mixture, 1, 3, [gathered], width=1)
    alone = ProfileTimer.load(mixture, 1, 3, [replace(EVEN, local_experts=4)], width=1)
    assert moe(timer, shape([(64, 0)], [])) == moe(alone, shape([(256, 0)], []))


def test_cut_experts_are_beyond_what_was_measured(mixture: Path) -> None:
    timer = ProfileTimer.load(mixture, 2, 3, [EVEN], width=2)
    assert timer.step_ns(shape([], [9] * 16)) == ProfileTimer.load(mixture, 2).step_ns(shape([], [9] * 16))
    assert moe(timer, shape([], [9] * 16))[1] == "extrapolated"


@settings(deadline=None)
@given(decodes=decode_lists, steps=st.integers(0, 20), padding=st.integers(0, 40), others=st.integers(0, 90))
def test_a_run_in_lock_step_is_its_steps(
    mixture: Path, decodes: list[int], steps: int, padding: int, others: int
) -> None:
    gathered = replace(EVEN, local_experts=4, rows="gathered", data=4)
    at_once, singly = (ProfileTimer.load(mixture, 1, 3, [gathered], width=1) for _ in range(2))
    step = shape([], decodes)
    tokens = max(1, step.tokens + padding)
    each = [singly.lockstep_ns(step.later(i), tokens, tokens + others) for i in range(steps)]
    assert at_once.lockstep_run_ns(step, steps, tokens, tokens + others) == each
    assert at_once.ledger == singly.ledger
    if decodes:
        assert at_once.lockstep_ns(step, step.tokens, 4 * step.tokens) == singly.step_ns(step)
        assert at_once.ledger == singly.ledger


def test_a_dummy_batch_has_no_head_and_no_attention(mixture: Path) -> None:
    timer = ProfileTimer.load(mixture, 1)
    ns = {name: time for name, time, _ in timer.explain(shape([], [100] * 8))}
    nothing = StepShape(0, 0, 0, 0, 0, 0, 0, 0, 0)
    assert timer.lockstep_ns(nothing, 8, 8) == sum(ns.values()) - ns["attention"] - ns["lm_head"] - ns["sampler"]


def test_stages(mixture: Path) -> None:
    whole = ProfileTimer.load(mixture, 1)
    timer = ProfileTimer.load(mixture, 1, 3, [replace(EVEN, stages=(1, 2))], width=1, stages=(1, 2))
    step = shape([(64, 100)], [700] * 4)
    first, last = timer.stage_ns(step)
    assert first + last == whole.step_ns(step) == timer.step_ns(step)
    ns = {name: time for name, time, _ in whole.explain(step)}
    once = ns["embedding"] + ns["final_layernorm"] + ns["lm_head"] + ns["sampler"]
    assert first == ns["embedding"] + (whole.step_ns(step) - once) // 3


class TestChoice:
    """A profile of the tiny bundle, offered as one of Llama-3.1-8B on an RTX PRO 6000 at degrees 1 and 2."""

    def pricing(self, monkeypatch: pytest.MonkeyPatch, tiny: Path, source: str = "auto", **degrees: int) -> Pricing:
        monkeypatch.setattr(profiles, "find", lambda *_: tiny)
        monkeypatch.setattr(profiles, "by_id", lambda _: profiles.read_profile(tiny))
        data: dict[str, Any] = {
            "model": "meta-llama/Llama-3.1-8B",
            "workload": {"arrivals": {"process": "all_at_once"}, "requests": 1, "input_tokens": 10, "output_tokens": 5},
            "pools": [{"device": "h100_sxm", "parallelism": degrees}],
            "timing": {"source": source},
        }
        scenario = resolve(from_data(data, None, Path()), Path())
        return pricing_for(scenario, scenario.pools[0], Path())

    def test_a_measured_degree(self, monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
        assert isinstance(self.pricing(monkeypatch, tiny, tensor=1).new_timer(), ProfileTimer)
        two = self.pricing(monkeypatch, tiny, tensor=2).new_timer()
        assert isinstance(two, WithCollectives) and two.ranks.tensor == 2

    def test_another_degree_is_priced_by_operators_and_says_so(
        self, monkeypatch: pytest.MonkeyPatch, tiny: Path
    ) -> None:
        pricing = self.pricing(monkeypatch, tiny, tensor=4)
        assert pricing.source == "silicon > link > roofline"
        assert isinstance(pricing.new_timer(), OperatorTimer)

    def test_another_degree_is_refused_where_the_profile_was_asked_for(
        self, monkeypatch: pytest.MonkeyPatch, tiny: Path
    ) -> None:
        with pytest.raises(
            InputError, match=r"degree was not measured; found 4; allowed: 1, 2, or timing.source: auto"
        ):
            self.pricing(monkeypatch, tiny, "profile", tensor=4)

    def test_collectives_in_lock_step_and_by_stage(self, monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
        timer = self.pricing(monkeypatch, tiny, tensor=2, pipeline=2).new_timer()
        assert isinstance(timer, WithCollectives)
        step = shape([(64, 100)], [700] * 4)
        before = timer.ledger.copy()
        stages = timer.stage_ns(step)
        assert timer.ledger == before and len(stages) == 2
        assert sum(stages) == timer.step_ns(step) == timer.lockstep_ns(step, step.tokens, step.tokens)
        decode = shape([], [700] * 4)
        each = [timer.lockstep_ns(decode.later(i), 9, 18) for i in range(3)]
        assert timer.lockstep_run_ns(decode, 3, 9, 18) == each
        assert timer.run_stage_ns(decode, 3) == [timer.stage_ns(decode.later(i)) for i in range(3)]
