"""Curves and surfaces never leave what their points bound."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servetwin.timing.kernels.attention import (
    ContextAttention,
    GenerationAttention,
    Surface,
    causal_pairs,
    prefills,
    surface_of,
)
from servetwin.timing.kernels.curve import Curve, PowerCurve, bracket

point = st.tuples(st.integers(1, 10**6), st.integers(1000, 10**9))
points = st.lists(point, min_size=2, max_size=12, unique_by=lambda p: p[0])


@given(points, st.floats(0.5, 2e6), st.sampled_from([Curve, PowerCurve]))
def test_a_look_up_lies_between_its_two_neighbours(pairs: list[tuple[int, int]], size: float, kind: type) -> None:
    xs, ys = zip(*sorted(pairs), strict=True)
    time = kind(xs, ys).ns(size)
    if size <= xs[0]:
        assert time == ys[0]
    elif size <= xs[-1]:
        i = next(i for i in range(1, len(xs)) if size <= xs[i])
        low, high = sorted(ys[i - 1 : i + 1])
        assert low * (1 - 1e-9) <= time <= high * (1 + 1e-9)
    else:
        assert time == pytest.approx(ys[-1] * size / xs[-1])


@given(points, st.sampled_from([Curve, PowerCurve]))
def test_points_are_met_exactly_and_without_a_jump(pairs: list[tuple[int, int]], kind: type) -> None:
    xs, ys = zip(*sorted(pairs), strict=True)
    curve = kind(xs, ys)
    for x, y in zip(xs, ys, strict=True):
        assert curve.ns(x) == y
        assert curve.how(x) == "measured"
        assert curve.ns(x - 1e-9) == pytest.approx(y, rel=1e-2)


@given(points, st.lists(st.floats(0, 3e6), min_size=1, max_size=50), st.booleans())
def test_many_equals_one_by_one_bit_for_bit(pairs: list[tuple[int, int]], sizes: list[float], affine: bool) -> None:
    xs, ys = zip(*sorted(pairs), strict=True)
    curve = Curve(xs, ys, affine=affine)
    assert curve.many(np.array(sizes)).tolist() == [curve.ns(size) for size in sizes]


@given(points, st.floats(0.5, 2e6), st.sampled_from([Curve, PowerCurve]), st.sampled_from(["measured", "extrapolated"]))
def test_a_price_is_the_time_and_how_it_is_known(
    pairs: list[tuple[int, int]], size: float, kind: type, how: str
) -> None:
    xs, ys = zip(*sorted(pairs), strict=True)
    curve = kind(xs, ys, how)
    assert curve.price(size) == (curve.ns(size), curve.how(size))
    within = "interpolated" if xs[0] <= size <= xs[-1] and how == "measured" else "extrapolated"
    assert curve.how(size) == (how if size in xs else within)


def test_a_limit_must_be_a_point() -> None:
    with pytest.raises(ValueError, match="limit"):
        Curve([1, 4], [5, 6], limit=3)


def test_how_a_size_is_known() -> None:
    curve = Curve([1, 4, 16, 64], [5, 6, 7, 9], limit=16)
    assert [curve.how(size) for size in (1, 2, 16, 17, 64, 0.5)] == [
        "measured", "interpolated", "measured", "extrapolated", "extrapolated", "extrapolated",
    ]  # fmt: skip
    assert Curve([1, 4], [5, 6], "extrapolated").how(1) == "extrapolated"


@pytest.mark.parametrize(("xs", "ys"), [([], []), ([1, 1], [2, 2]), ([1, 2], [0, 3]), ([2, 1], [1, 1])])
def test_a_curve_of_nonsense_is_refused(xs: list[int], ys: list[int]) -> None:
    with pytest.raises(ValueError, match="positive times"):
        Curve(xs, ys)


def test_bracket() -> None:
    assert bracket([2, 4, 8], 5) == (4, 8, 0.25)
    assert bracket([2, 4, 8], 4) == (4, 4, 0.0)
    assert bracket([2, 4, 8], 1) == (2, 2, 0.0)
    assert bracket([2, 4, 8], 9) == (8, 8, 0.0)


def test_pairs_of_a_window() -> None:
    for window in (1, 3, 7, 100):
        for length in range(1, 30):
            assert causal_pairs(length, window) == sum(min(i + 1, window) for i in range(length))


@given(st.lists(st.tuples(st.integers(1, 4000), st.integers(0, 4000)), min_size=1, max_size=8))
def test_a_batch_keeps_its_exact_pairs(chunks: list[tuple[int, int]]) -> None:
    tokens = sum(q for q, _ in chunks)
    pairs = sum(q * c + q * (q + 1) // 2 for q, c in chunks)
    at = prefills(len(chunks), tokens, pairs)
    assert at.pairs * len(chunks) == pytest.approx(pairs)
    assert at.fresh <= at.pairs * (1 + 1e-9) <= at.whole * (1 + 1e-6)


def affine_surface() -> Surface:
    """300 ns a launch, 2 ns a sequence, 0.01 ns a pair."""
    batches, lengths = [1, 2, 4, 8], [1, 16, 64, 256, 1024, 4096]
    times = np.array([[300 + 2 * b + 0.01 * b * causal_pairs(length) for length in lengths] for b in batches])
    return Surface(batches, lengths, times, [4096] * 4, "measured")


@settings(max_examples=200)
@given(st.integers(1, 8), st.sampled_from([1, 16, 64, 256, 1024]), st.integers(0, 3000))
def test_a_prefix_costs_its_pairs(seqs: int, new: int, before: int) -> None:
    attention = ContextAttention(affine_surface(), 0, 0)
    pairs = seqs * (new * before + new * (new + 1) // 2)
    fresh = attention.ns(seqs, seqs * new, seqs * new * (new + 1) // 2)
    whole = attention.ns(seqs, seqs * (new + before), seqs * (new + before) * (new + before + 1) // 2)
    time = attention.ns(seqs, seqs * new, pairs)
    assert fresh * (1 - 1e-9) <= time <= whole * (1 + 1e-9)
    if new + before in (16, 64, 256, 1024, 4096) and seqs in (1, 2, 4, 8):
        assert time == pytest.approx(300 + 2 * seqs + 0.01 * pairs, rel=1e-6)


def test_a_window_caps_the_cost_of_a_prefix() -> None:
    times = np.array([[100.0, 200.0, 400.0]])
    attention = ContextAttention(Surface([1], [64, 128, 256], times, [256], "measured"), 128, 0)
    costs = [attention.ns(1, 64, 64 * before + 64 * 65 // 2) for before in (0, 64, 128, 10_000)]
    assert costs[0] < costs[1] < costs[2]
    assert costs[3] == pytest.approx(costs[2], rel=0.03)


@given(st.integers(1, 300), st.integers(0, 10**6), st.integers(1, 64))
def test_decode_steps_in_a_row_equal_single_steps(seqs: int, context: int, steps: int) -> None:
    times = np.array([[10.0, 11.0, 17.0, 60.0], [10.0, 14.0, 30.0, 200.0]])
    attention = GenerationAttention(Surface([1, 64], [2, 256, 4096, 65536], times, [65536, 65536], "measured"), 0, 0)
    run = attention.run(seqs, context, steps)
    assert run.tolist() == [attention.ns(seqs, context + i * seqs) for i in range(steps)]
    assert (np.diff(run) >= 0).all()


def test_holes_are_filled_upwards_and_marked() -> None:
    columns = {
        "batch": np.array([1, 1, 1, 2, 2]),
        "length": np.array([8, 16, 32, 8, 16]),
        "ns": np.array([10, 20, 50, 15, 30]),
    }
    surface = surface_of(columns, float)
    assert surface.ns.tolist() == [[10, 20, 50], [15, 30, 100]]
    assert surface.limits == [32, 16]
    attention = GenerationAttention(surface, 0, 0)
    assert attention.how(2, 2 * 15) == "measured"
    assert attention.how(2, 2 * 31) == "extrapolated"
