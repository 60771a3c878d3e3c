"""Workloads drawn from distributions: statistics, independence of the streams, prefixes, priorities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servetwin.errors import InputError
from servetwin.scenario.schema import Empirical, Prefixes, SyntheticWorkload, Zipf
from servetwin.workload import RequestTable, build
from servetwin.workload.streams import stream

HERE = Path()
COUNT = 20_000
FIRST_ARRIVAL_DRAWS = [328698596, 639251311, 441002816]


def workload(**fields: Any) -> SyntheticWorkload:
    given = {
        "arrivals": {"process": "all_at_once"},
        "requests": COUNT,
        "input_tokens": 100,
        "output_tokens": 10,
    } | fields
    return SyntheticWorkload.model_validate(given)


def table(**fields: Any) -> RequestTable:
    return build(workload(**fields), 0, HERE)


def gaps_s(**arrivals: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.diff(table(arrivals=arrivals).arrival_ns, prepend=0) / 1e9


def test_streams_are_the_same_on_every_machine() -> None:
    assert stream(0, "arrivals").integers(1 << 30, size=3).tolist() == FIRST_ARRIVAL_DRAWS
    assert stream(0, "output_tokens").integers(1 << 30) != FIRST_ARRIVAL_DRAWS[0]
    assert stream(1, "arrivals").integers(1 << 30) != FIRST_ARRIVAL_DRAWS[0]


def test_poisson_gaps_are_exponential_and_the_first_arrival_follows_one() -> None:
    gaps = gaps_s(process="poisson", rate=10.0)
    assert gaps[0] > 0
    assert abs(gaps.mean() - 0.1) < 4 * 0.1 / COUNT**0.5
    assert abs((gaps < 0.1).mean() - (1 - np.exp(-1))) < 4 * 0.5 / COUNT**0.5
    assert abs(gaps.std() / gaps.mean() - 1) < 0.03


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gamma_gaps_have_the_rate_and_the_burstiness(burstiness: float) -> None:
    gaps = gaps_s(process="gamma", rate=10.0, burstiness=burstiness)
    variation = burstiness**-0.5  # of a Gamma with this shape
    assert abs(gaps.mean() - 0.1) < 4 * 0.1 * variation / COUNT**0.5
    assert abs(gaps.std() / gaps.mean() - variation) < 0.05 * variation


def test_constant_arrivals_are_exact() -> None:
    times = table(arrivals={"process": "constant", "rate": 3.0}, requests=6).arrival_ns
    assert times.tolist() == [333333333, 666666667, 1000000000, 1333333333, 1666666667, 2000000000]


def test_all_at_once_and_closed_loop_start_at_zero() -> None:
    burst = table()
    assert not burst.arrival_ns.any()
    assert burst.concurrency is None
    loop = table(arrivals={"process": "closed_loop", "concurrency": 8})
    assert not loop.arrival_ns.any()
    assert loop.concurrency == 8


def test_a_rate_beyond_the_clock_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"workload.arrivals.rate: so slow a rate spreads 2 requests over more than 146"
    ):
        table(arrivals={"process": "constant", "rate": 1e-10}, requests=2)


def test_lengths() -> None:
    fixed = table(input_tokens={"distribution": "fixed", "value": 7}).input_tokens
    assert set(fixed.tolist()) == {7}
    uniform = table(input_tokens={"distribution": "uniform", "min": 3, "max": 12}).input_tokens
    assert (uniform.min(), uniform.max()) == (3, 12)
    assert abs(uniform.mean() - 7.5) < 4 * (99 / 12) ** 0.5 / COUNT**0.5
    ratio = table(input_tokens={"distribution": "range_ratio", "max": 1024, "ratio": 0.8}).input_tokens
    assert (ratio.min(), ratio.max()) == (819, 1024)
    assert ratio.dtype == np.int64


def test_lognormal_median_spread_and_bounds() -> None:
    drawn = table(input_tokens={"distribution": "lognormal", "median": 1000.0, "sigma": 0.7}).input_tokens
    logs = np.log(drawn)
    assert abs(logs.mean() - np.log(1000)) < 4 * 0.7 / COUNT**0.5
    assert abs(logs.std() - 0.7) < 4 * 0.7 / (2 * COUNT) ** 0.5
    law = {"distribution": "lognormal", "median": 1000.0, "sigma": 0.7, "min": 500, "max": 2000}
    clipped = table(input_tokens=law).input_tokens
    assert (clipped.min(), clipped.max()) == (500, 2000)
    assert table(input_tokens={"distribution": "lognormal", "median": 1.0, "sigma": 2.0}).input_tokens.min() == 1


def test_zipf_follows_the_power_law() -> None:
    drawn = table(input_tokens={"distribution": "zipf", "alpha": 1.5, "min": 10, "max": 100}).input_tokens
    weights = np.arange(10, 101) ** -1.5
    share = weights / weights.sum()
    error = 4 * (share * (1 - share) / COUNT) ** 0.5
    assert (np.abs(np.bincount(drawn, minlength=101)[10:] / COUNT - share) < error).all()
    with pytest.raises(
        InputError, match=r"workload.input_tokens: too wide a zipf; found 2000000000; allowed: at most 16777216"
    ):
        table(input_tokens=Zipf(alpha=1.5, min=1, max=2_000_000_000))


@pytest.mark.parametrize(
    "content", ["5\n50\n500\n", "tokens,other\n5,1\n50,1\n500,1\n", '{"tokens":5}\n{"tokens":50}\n\n{"tokens":500}']
)
def test_empirical_draws_from_a_file_beside_the_scenario(tmp_path: Path, content: str) -> None:
    (tmp_path / "lengths.txt").write_text(content)
    drawn = build(workload(input_tokens=Empirical(file="lengths.txt")), 0, tmp_path).input_tokens
    assert np.unique(drawn).tolist() == [5, 50, 500]
    assert (np.abs(np.bincount(drawn)[[5, 50, 500]] / COUNT - 1 / 3) < 4 * 0.5 / COUNT**0.5).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("5\n\n0\n", "line 3: tokens is wrong; found '0'; allowed: a whole number from 1 to 2147483647"),
        ("5\nsix\n", "line 2: tokens is wrong; found 'six'; allowed: a whole number from 1 to 2147483647"),
        ("5,5\n", "line 1: wrong number of columns; found 2; allowed: 1"),
        ("count\n5\n", "line 1: column tokens is missing; found 'count'"),
    ],
)
def test_bad_empirical_file(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "lengths.txt"
    file.write_text(content)
    with pytest.raises(InputError) as raised:
        build(workload(input_tokens=Empirical(file="lengths.txt")), 0, tmp_path)
    assert str(raised.value).startswith(f"{file}: {message}")


def test_changing_one_part_leaves_the_others_alone() -> None:
    poisson = {"process": "poisson", "rate": 5.0}
    lengths = {"distribution": "uniform", "min": 1, "max": 1000}
    prefixes = {"groups": 3, "tokens": 64}
    before = table(arrivals=poisson, input_tokens=lengths, output_tokens=lengths, prefixes=prefixes)
    after = table(
        arrivals=poisson,
        input_tokens=lengths,
        output_tokens=9,
        prefixes=prefixes | {"tokens": 32},
        priorities=[1.0, 1.0],
    )
    assert np.array_equal(before.arrival_ns, after.arrival_ns)
    assert np.array_equal(before.input_tokens, after.input_tokens)
    assert not np.array_equal(before.input_tokens, before.output_tokens)
    assert before.segments is not None and after.segments is not None
    assert [prompt[0][0] for prompt in before.segments] == [prompt[0][0] for prompt in after.segments]


def test_same_seed_same_table_other_seed_other_table() -> None:
    drawn = workload(arrivals={"process": "poisson", "rate": 5.0}, prefixes={"groups": 9, "tokens": 64})
    one, two, other = build(drawn, 3, HERE), build(drawn, 3, HERE), build(drawn, 4, HERE)
    assert np.array_equal(one.arrival_ns, two.arrival_ns)
    assert one.segments == two.segments
    assert not np.array_equal(one.arrival_ns, other.arrival_ns)
    assert one.segments != other.segments


def test_prefixes_are_part_of_the_prompt() -> None:
    drawn = table(
        requests=500,
        input_tokens={"distribution": "uniform", "min": 1, "max": 200},
        prefixes=Prefixes(groups=4, tokens=100),
    )
    assert drawn.segments is not None
    for request, prompt in enumerate(drawn.segments):
        tokens = int(drawn.input_tokens[request])
        group = prompt[0][0]
        assert 0 <= group < 4
        own = [((1 << 40) + request, tokens - 100)] if tokens > 100 else []
        assert prompt == [(group, min(tokens, 100)), *own]


def test_each_group_has_one_prefix_length_and_its_popularity() -> None:
    lengths = {"distribution": "uniform", "min": 1, "max": 99}
    drawn = table(prefixes={"groups": 5, "tokens": lengths, "popularity": {"zipf": 1.0}})
    assert drawn.segments is not None
    assert len({prompt[0] for prompt in drawn.segments}) == 5
    counts = np.bincount([prompt[0][0] for prompt in drawn.segments])
    share = 1 / np.arange(1, 6) / sum(1 / k for k in range(1, 6))
    assert (np.abs(counts / COUNT - share) < 4 * (share * (1 - share) / COUNT) ** 0.5).all()


def test_priorities_follow_their_weights() -> None:
    classes = table(priorities=[1.0, 0.0, 3.0]).priority
    assert classes is not None
    assert np.unique(classes).tolist() == [0, 2]
    assert abs((classes == 2).mean() - 0.75) < 4 * (0.75 * 0.25 / COUNT) ** 0.5
    assert table().priority is None


def test_output_ends_and_what_a_synthetic_table_says_of_itself() -> None:
    assert table().output_known
    assert not table(output_ends="stop").output_known
    assert (table().source, table().sha256, table().segments) == ("synthetic", None, None)
