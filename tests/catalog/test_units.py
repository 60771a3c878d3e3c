from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servetwin.catalog import units
from servetwin.errors import InputError

READERS: list[Callable[..., float]] = [
    units.bytes_of,
    units.rate_of,
    units.duration_ns,
    units.flops_of,
    units.watts_of,
]


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (units.bytes_of, "80GiB", 80 * 2**30),
        (units.bytes_of, "80GB", 80 * 10**9),
        (units.bytes_of, " 1.5 MiB ", 3 * 2**19),
        (units.bytes_of, 4096, 4096),
        (units.bytes_of, "4096", 4096),
        (units.bytes_of, 8e10, 80 * 10**9),
        (units.rate_of, "900GB/s", 900e9),
        (units.rate_of, "3.35TB/s", 3.35e12),
        (units.rate_of, "100Gb/s", 12.5e9),
        (units.rate_of, "100Gbps", 12.5e9),
        (units.rate_of, "1GiB/s", 2.0**30),
        (units.duration_ns, "300ns", 300),
        (units.duration_ns, "2us", 2_000),
        (units.duration_ns, "2µs", 2_000),
        (units.duration_ns, "5ms", 5_000_000),
        (units.duration_ns, "1.5s", 1_500_000_000),
        (units.duration_ns, "2min", 120_000_000_000),
        (units.duration_ns, 0, 0),
        (units.flops_of, "989TFLOPS", 989e12),
        (units.flops_of, "1.98PFLOP/s", 1.98e15),
        (units.flops_of, "624TOPS", 624e12),
        (units.watts_of, "700W", 700.0),
        (units.watts_of, "10.2kW", 10_200.0),
    ],
)
def test_reads(read: Callable[[object], float], text: object, value: float) -> None:
    assert read(text) == value


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    "bad",
    ["", "GB", "-1GB", "nan", "inf", "1e999s", "1" * 100, "1,5s", "1 2s", math.nan, math.inf, -1, -0.5, True, None, []],
)
def test_refuses_what_is_no_quantity(read: Callable[[object], float], bad: object) -> None:
    with pytest.raises(InputError, match="a number with one of the units"):
        read(bad)


def test_wrong_unit_names_what_is_allowed_and_proposes_the_case() -> None:
    with pytest.raises(InputError) as caught:
        units.bytes_of("80GHz")
    assert str(caught.value) == (
        "'GHz' is not a unit of size; found '80GHz'; "
        "allowed: a number with one of the units B, kB, MB, GB, TB, KiB, MiB, GiB, TiB"
    )
    with pytest.raises(InputError, match="did you mean '80GiB'"):
        units.bytes_of("80gib")


def test_number_without_unit() -> None:
    with pytest.raises(InputError, match=r"a duration needs a unit; found 5; .* did you mean '5ms'"):
        units.duration_ns(5)
    assert units.duration_ns(5, plain=True) == 5
    with pytest.raises(InputError, match="did you mean '900GB/s'"):
        units.rate_of(900)
    with pytest.raises(InputError, match="must be a whole number"):
        units.bytes_of(0.5)


@given(st.integers(0, 2**60))
def test_bytes_round_trip(value: int) -> None:
    assert units.bytes_of(units.format_bytes(value)) == value


@given(st.integers(0, 2**63))
def test_duration_round_trip(value: int) -> None:
    assert units.duration_ns(units.format_duration(value)) == value


@given(st.floats(1e-3, 1e20))
def test_float_round_trips(value: float) -> None:
    assert units.rate_of(units.format_rate(value)) == value
    assert units.flops_of(units.format_flops(value)) == value
    assert units.watts_of(units.format_watts(value)) == value


def test_formats_as_people_write() -> None:
    assert units.format_bytes(80 * 2**30) == "80GiB"
    assert units.format_bytes(80 * 10**9) == "80GB"
    assert units.format_rate(3.35e12) == "3.35TB/s"
    assert units.format_duration(1_500_000) == "1.5ms"
    assert units.format_duration(0) == "0ns"
    assert units.format_flops(989.4e12) == "989.4TFLOPS"
    assert units.format_watts(700.0) == "700W"
