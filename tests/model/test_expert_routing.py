"""Routing laws against what tokens that pick by them really do, and placements against published rules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servetwin.errors import InputError
from servetwin.model import expert_routing
from servetwin.model.expert_placement import RankLoads, by_load, in_order, straggler
from servetwin.model.expert_routing import (
    Independent,
    Sampled,
    inclusion_of,
    measured,
    own_law,
    picked,
    read_popularity,
    zipf,
)

shapes = st.tuples(st.sampled_from([8, 32, 128, 256]), st.integers(1, 8))


@pytest.mark.parametrize("exponent", [0.3, 0.8, 1.2])
@pytest.mark.parametrize(("experts", "top_k"), [(32, 4), (128, 8), (256, 8)])
def test_inclusion_is_that_of_successive_sampling(experts: int, top_k: int, exponent: float) -> None:
    """Within 0.02 of the frequency among 40,000 tokens (whose own error is at most 0.0025)."""
    weights = np.arange(1, experts + 1, dtype=np.float64) ** -exponent
    picks = picked(np.random.default_rng(1), weights, top_k, 40_000)
    assert all(len(set(row)) == top_k for row in picks[:100].tolist())
    frequency = np.bincount(picks.ravel(), minlength=experts) / 40_000
    found = inclusion_of(weights, top_k)
    assert found.sum() == pytest.approx(top_k)
    assert np.abs(found - frequency).max() < 0.02


@pytest.mark.parametrize("exponent", [0.0, 1.0])
@pytest.mark.parametrize("tokens", [1, 8, 64, 512])
def test_pairs_and_distinct_experts_of_a_rank(exponent: float, tokens: int) -> None:
    """Against the mean of 400 batches: within 3 % for Zipf, and 1 % where the formula is exact."""
    law = zipf(64, 4, exponent, layer=0, seed=0)
    placed = RankLoads(law, *in_order(64, 4), 4)
    (expected,) = placed.of(tokens)
    order = np.argsort(-law.inclusion, kind="stable")
    weights = np.empty(64)
    weights[order] = np.arange(1, 65, dtype=np.float64) ** -exponent
    random, pairs, active = np.random.default_rng(2), np.zeros(4), np.zeros(4)
    for _ in range(400):
        counts = np.bincount(picked(random, weights, 4, tokens).ravel(), minlength=64)
        pairs += counts.reshape(4, 16).sum(axis=1)
        active += (counts > 0).reshape(4, 16).sum(axis=1)
    within = 0.03 if exponent else 0.01
    noise = 4 * np.sqrt(pairs) / 400  # four standard deviations of a count
    for rank, (its_pairs, its_active) in enumerate(expected):
        assert its_pairs == pytest.approx(pairs[rank] / 400, rel=within, abs=noise[rank])
        assert its_active == pytest.approx(active[rank] / 400, rel=within, abs=noise[rank])


@given(shapes, st.floats(0, 3), st.integers(1, 5000), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_pairs_sum_to_all_and_experts_stay_within_bounds(
    shape: tuple[int, int], exponent: float, tokens: int, ranks: int
) -> None:
    experts, top_k = shape
    for law in (zipf(experts, top_k, exponent, 0, 0), Sampled(experts, top_k, 0, 0)):
        for outcome in RankLoads(law, *in_order(experts, ranks), ranks).of(tokens):
            assert sum(pairs for pairs, _ in outcome) == pytest.approx(tokens * top_k)
            assert all(0 <= active <= -(-experts // ranks) + 1e-9 for _, active in outcome)
            assert sum(active for _, active in outcome) <= min(experts, tokens * top_k) + 1e-6


def test_a_law_without_preference_is_the_even_one() -> None:
    assert zipf(128, 8, 0.0, 3, 4).inclusion.tolist() == [1 / 16] * 128
    assert measured([5.0] * 128, 8).inclusion == pytest.approx(1 / 16)


def test_measured_popularity_is_the_chance_and_at_most_one() -> None:
    found = measured([90, 4, 3, 2, 1], 2).inclusion
    assert found == pytest.approx([1.0, 0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize("tokens", [8, 64, 4096, 100_000])
def test_sampled_counts_have_the_spread_of_even_picks(tokens: int) -> None:
    """Variance of one expert's count: T p (1 - p), sampled one by one or as normal numbers."""
    law = Sampled(64, 4, 0, 0)
    random = np.random.default_rng(3)
    counts = np.array([law._outcome(random, tokens).pairs for _ in range(300)])
    assert counts.sum(axis=1) == pytest.approx(tokens * 4)
    assert counts.var(axis=0).mean() == pytest.approx(tokens / 16 * 15 / 16, rel=0.05)


def test_the_straggler_has_more_than_its_share_when_tokens_are_few() -> None:
    """And less and less so as they are many: the excess goes with the root of the tokens."""
    placed = RankLoads(Sampled(128, 8, 0, 0), *in_order(128, 8), 8)
    excess = [straggler(placed.of(t), lambda pairs, _: pairs) / t - 1 for t in (16, 256, 4096, 65_536)]
    assert excess == sorted(excess, reverse=True)
    assert excess[0] > 0.1 and 0 < excess[-1] < 0.01


def test_outcomes_depend_on_the_seed_the_layer_and_the_tokens_alone() -> None:
    one, other = Sampled(64, 4, 5, 7), Sampled(64, 4, 5, 7)
    other.outcomes(99)
    assert [load.pairs.tolist() for load in one.outcomes(40)] == [load.pairs.tolist() for load in other.outcomes(40)]
    assert one.outcomes(40)[0].pairs.tolist() != Sampled(64, 4, 6, 7).outcomes(40)[0].pairs.tolist()
    assert zipf(64, 4, 1.0, 0, 1).inclusion.tolist() != zipf(64, 4, 1.0, 1, 1).inclusion.tolist()
    assert sorted(zipf(64, 4, 1.0, 0, 1).inclusion) == sorted(zipf(64, 4, 1.0, 1, 1).inclusion)


def test_experts_are_dealt_out_in_order() -> None:
    assert in_order(8, 4) == (list(range(8)), [0, 0, 1, 1, 2, 2, 3, 3])
    assert in_order(10, 4)[1] == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3]


# Two expert layers of the README of DeepSeek's EPLB: 12 experts, 4 of them twice, on 8 devices of 2 nodes.
EPLB_LOADS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
EPLB_SLOTS = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


@pytest.mark.parametrize(("load", "slots"), list(zip(EPLB_LOADS, EPLB_SLOTS, strict=True)))
def test_the_published_example_of_eplb(load: list[int], slots: list[int]) -> None:
    """Devices hold the same pairs of experts as published, up to the order of nodes, devices and slots."""
    experts, rank = by_load(np.array(load, dtype=np.float64), 4, 8, nodes=2, groups=4)

    def nodes(of: dict[int, list[int]]) -> set[tuple[tuple[int, ...], ...]]:
        devices = [tuple(sorted(of[device])) for device in range(8)]
        return {tuple(sorted(devices[:4])), tuple(sorted(devices[4:]))}

    ours: dict[int, list[int]] = {device: [] for device in range(8)}
    for expert, device in zip(experts, rank, strict=True):
        ours[device].append(expert)
    assert nodes(ours) == nodes({device: slots[2 * device : 2 * device + 2] for device in range(8)})


@given(st.integers(0, 10_000), st.sampled_from([(32, 8, 8), (64, 16, 16), (120, 8, 16)]), st.sampled_from([1, 2]))
@settings(max_examples=40, deadline=None)
def test_placements_hold_every_expert_and_equally_many_a_rank(
    seed: int, sizes: tuple[int, int, int], nodes: int
) -> None:
    count, redundant, ranks = sizes
    load = np.random.default_rng(seed).exponential(size=count)
    experts, rank = by_load(load, redundant, ranks, nodes, groups=4)
    assert sorted(set(experts)) == list(range(count)) and len(experts) == count + redundant
    assert np.bincount(rank).tolist() == [(count + redundant) // ranks] * ranks


def test_copies_and_placement_by_load_even_out_the_ranks() -> None:
    law = zipf(128, 8, 1.0, 0, 0)

    def worst(experts: list[int], rank: list[int]) -> float:
        return straggler(RankLoads(law, experts, rank, 8).of(4096), lambda pairs, _: pairs) / 4096

    plain = worst(*in_order(128, 8))
    placed = worst(*by_load(law.inclusion, 0, 8))
    copied = worst(*by_load(law.inclusion, 32, 8))
    assert plain > 1.2 > placed > copied >= 1
    assert copied < 1.01


def test_copies_share_pairs_and_are_active_as_independent_picks_are() -> None:
    """One expert of popularity 0.5 with two copies: each is picked with 0.25."""
    law = Independent(np.array([0.5, 0.5]))
    ((first, second, third),) = RankLoads(law, [0, 0, 1], [0, 1, 2], 3).of(4)
    assert first == second
    assert first[0] == 1.0 and third == (2.0, 1 - 0.5**4)
    assert first[1] == pytest.approx(1 - 0.75**4, abs=0.07), "1 - sqrt(0.5^4), the limit of rare picks"


def test_popularity_files(tmp_path: Path) -> None:
    one, two, bad = tmp_path / "one.json", tmp_path / "two.yaml", tmp_path / "bad.yaml"
    one.write_text("[1, 2, 3, 4]")
    two.write_text("- [1, 2, 3, 4]\n- [4, 3, 2, 1.5]\n")
    assert read_popularity(one, 4, 2) == [[1, 2, 3, 4]]
    assert read_popularity(two, 4, 2) == [[1, 2, 3, 4], [4, 3, 2, 1.5]]
    for text, message in [
        ("[1, 2, 3]", "not a number for each expert"),
        ("a: 1", "not a number for each expert"),
        ("[1, 2, -3, 4]", "not a count"),
        ("[1, 0, 0, 0]", "a token picks 2 experts"),
        ("[1, {", "neither JSON nor YAML"),
    ]:
        bad.write_text(text)
        with pytest.raises(InputError, match=message):
            read_popularity(bad, 4, 2)
    with pytest.raises(InputError, match="cannot be read"):
        read_popularity(tmp_path / "none.json", 4, 2)


class _AllToTheFirst:
    """A law of a user: every token picks the first experts."""

    def __init__(self, experts: int, top_k: int, layer: int, seed: int) -> None:
        self.chances = np.array([1.0] * top_k + [0.0] * (experts - top_k))

    def outcomes(self, tokens: int) -> list[tuple[object, object]]:
        return [(self.chances * tokens, self.chances)]


class _TooMuch(_AllToTheFirst):
    def outcomes(self, tokens: int) -> list[tuple[object, object]]:
        return [(self.chances * tokens * 2, self.chances)]


class _Point:
    def __init__(self, name: str, law: type) -> None:
        self.name, self._law = name, law

    def load(self) -> type:
        return self._law


def test_a_law_of_an_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [_Point("all_to_the_first", _AllToTheFirst), _Point("too_much", _TooMuch)]
    monkeypatch.setattr(expert_routing, "entry_points", lambda group: points if group == expert_routing.GROUP else [])
    law = own_law("all_to_the_first")(experts=8, top_k=2, layer=0, seed=0)
    assert RankLoads(law, *in_order(8, 4), 4).of(10) == [[(20.0, 2.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)]]
    with pytest.raises(InputError, match="gives no load of 8 experts for 10 tokens"):
        own_law("too_much")(experts=8, top_k=2, layer=0, seed=0).outcomes(10)
    with pytest.raises(InputError) as error:
        own_law("all_to_first")
    assert error.value.hint == "all_to_the_first"
