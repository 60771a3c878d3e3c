"""Properties of the timer on a tiny profile whose times follow simple formulas."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from profile_bundle import attention_us
from profile_shapes import shape

from servetwin.errors import InputError
from servetwin.timing.profile import ProfileTimer
from servetwin.timing.shape import StepShape

prefill_lists = st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 9000)), max_size=4)
decode_lists = st.lists(st.integers(1, 9000), max_size=48)


def attention(timer: ProfileTimer, step: StepShape) -> int:
    return next(ns for name, ns, _ in timer.explain(step) if name == "attention") // timer.layers


@given(prefills=prefill_lists, decodes=decode_lists)
def test_ledger_and_explanation_add_up_to_the_step(
    tiny: Path, prefills: list[tuple[int, int]], decodes: list[int]
) -> None:
    timer = ProfileTimer.load(tiny, 1)
    step = shape(prefills, decodes)
    duration = timer.step_ns(step)
    assert isinstance(duration, int)
    assert duration >= 1
    assert sum(astuple(timer.ledger)) == duration
    explained = timer.explain(step)
    assert sum(ns for _, ns, _ in explained) == duration
    for how in ("measured", "interpolated", "extrapolated"):
        assert getattr(timer.ledger, how) == sum(ns for _, ns, found in explained if found == how)
    assert timer.ledger.analytic == 0


@given(decodes=st.lists(st.integers(1, 9000), min_size=1, max_size=48), steps=st.integers(0, 60))
def test_a_run_is_its_steps(tiny: Path, decodes: list[int], steps: int) -> None:
    at_once, one_by_one = ProfileTimer.load(tiny, 1), ProfileTimer.load(tiny, 1)
    step = shape([], decodes)
    assert at_once.run_ns(step, steps) == [one_by_one.step_ns(step.later(i)) for i in range(steps)]
    assert at_once.ledger == one_by_one.ledger


def test_a_run_with_draft_tokens(timer: ProfileTimer) -> None:
    step = shape([], [500, 700, 900])._replace(decode_tokens=9)
    assert timer.run_ns(step, 5) == [timer.step_ns(step.later(i)) for i in range(5)]
    assert attention(timer, step) == attention(timer, shape([], [500, 700, 900])), "attention is that of three decodes"
    assert timer.step_ns(step) > timer.step_ns(shape([], [500, 700, 900])), "the drafts are dense work"


def test_a_run_of_prefills_is_refused(timer: ProfileTimer) -> None:
    with pytest.raises(ValueError, match="pure decode"):
        timer.run_ns(shape([(16, 0)], []), 3)


@given(
    chunk=st.integers(16, 4000),
    history=st.integers(0, 9000),
    decodes=st.integers(1, 60),
    mean=st.integers(16, 5000),
    more=st.integers(0, 8000),
)
def test_one_token_changes_little(
    timer: ProfileTimer, chunk: int, history: int, decodes: int, mean: int, more: int
) -> None:
    """No coordinate has a step: a token more costs at most twice what it does in the formula."""

    def ns(chunk: int, history: int, mean: int, longest: int) -> int:
        contexts = shape([(chunk, history)], [mean] * decodes)
        return attention(timer, contexts._replace(decode_max=longest if decodes > 1 else mean))

    here = ns(chunk, history, mean, mean + more)
    for there, price in (
        (ns(chunk + 1, history, mean, mean + more), 0.05 * (history + 4 * chunk)),  # the grid's chunks lie 4 apart
        (ns(chunk, history + 1, mean, mean + more), 0.05 * chunk),
        (ns(chunk, history, mean, mean + more + 1), 10 * decodes),
        (ns(chunk, history, mean + 1, mean + 1 + more), 10 * decodes),
    ):
        assert abs(there - here) <= 2 * price + 2


@given(
    chunk=st.integers(1, 5000), history=st.integers(0, 9000), decodes=st.integers(0, 64), context=st.integers(16, 9000)
)
def test_attention_grows(timer: ProfileTimer, chunk: int, history: int, decodes: int, context: int) -> None:
    here = timer.attention_ns(chunk, history, decodes, context)
    assert timer.attention_ns(chunk + 16, history, decodes, context) >= here - 1
    assert timer.attention_ns(chunk, history + 16, decodes, context) >= here - 1
    if decodes:
        assert timer.attention_ns(chunk, history, decodes + 1, context) >= here - 1
        assert timer.attention_ns(chunk, history, decodes, context + 16) >= here - 1


@pytest.mark.parametrize(
    ("chunk", "history", "decodes", "context"),
    [
        (256, 1024, 32, 1024),  # a slice that was not measured
        (256, 1024, 48, 1024),  # more decodes than ever measured
        (0, 0, 64, 1024),
        (1024, 8192, 4, 256),
        (2048, 0, 0, 0),  # two of the longest measured chunks, one after the other
        (4096, 1024, 8, 1024),
        (16, 0, 8, 16000),
    ],
)
def test_outside_the_grid_the_formula_goes_on(
    timer: ProfileTimer, chunk: int, history: int, decodes: int, context: int
) -> None:
    ns = timer.attention_ns(chunk, history, decodes, context)
    assert ns == pytest.approx(1000 * attention_us(chunk, history, decodes, context), rel=0.02)


def test_one_prefill_is_its_own_coordinate(timer: ProfileTimer) -> None:
    assert attention(timer, shape([(256, 1024)], [])) == timer.attention_ns(256, 1024, 0, 0)
    assert attention(timer, shape([(200, 333)], [64] * 4)) == timer.attention_ns(200, 333, 4, 64)


def test_several_prefills_cost_their_own_pairs(timer: ProfileTimer) -> None:
    """Sums of new and computed tokens would charge every prefill for the history of all."""
    two = attention(timer, shape([(128, 4096), (128, 0)], []))
    pairs = 128 * 4096 + 2 * 128 * 129 // 2
    assert two == pytest.approx(5000 + 0.05 * pairs, rel=0.01)
    assert two < 0.6 * timer.attention_ns(256, 4096, 0, 0)
    fresh = attention(timer, shape([(256, 0), (256, 0), (512, 0)], []))
    assert timer.attention_ns(512, 0, 0, 0) < fresh < timer.attention_ns(1024, 0, 0, 0)


def test_unequal_contexts(timer: ProfileTimer) -> None:
    """The tiny skew shots lie a third of the way up."""
    equal, skewed = shape([], [1000] * 8), shape([], [500] * 7 + [4500])
    low, high = attention(timer, equal), timer.attention_ns(0, 0, 8, 4500)
    assert (attention(timer, skewed) - low) / (high - low) == pytest.approx(1 / 3, abs=0.05)


def test_tensor_degrees(tiny: Path) -> None:
    one, two = ProfileTimer.load(tiny, 1), ProfileTimer.load(tiny, 2)
    assert two.dense_ns("qkv_proj", 512) == pytest.approx(one.dense_ns("qkv_proj", 512) / 2, rel=0.01)
    assert two.dense_ns("layernorm", 512) == one.dense_ns("layernorm", 512), "norms are not split over ranks"
    assert (one.all_reduces(), two.all_reduces()) == (0, 1 + 2 * 4)
    with pytest.raises(InputError, match=r"found 4; allowed: 1, 2"):
        ProfileTimer.load(tiny, 4)


def test_layers_scale_the_block_only(tiny: Path) -> None:
    step = shape([(256, 0)], [100] * 4)
    one, two, three = (ProfileTimer.load(tiny, 1, layers).step_ns(step) for layers in (1, 2, 3))
    assert three - two == two - one > 0
    assert ProfileTimer.load(tiny, 1).layers == 4, "the profile says how many layers the model has"
