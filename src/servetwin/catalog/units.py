"""Quantities with units, as people write them: `80GiB`, `3.35TB/s`, `400Gb/s`, `2us`, `989TFLOPS`, `700W`.

Units are case-sensitive, because `Gb/s` (bits) and `GB/s` (bytes) differ by eight. Arithmetic is decimal and exact, so
what a formatter writes is read back as the same number. Negative, infinite and undefined values are refused everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import NamedTuple

from servetwin.errors import InputError

_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE]([+-]?[0-9]{1,2}))?\s*(.*)", re.DOTALL)
_LONGEST = 64
"""Longest text taken for a quantity, in characters."""

_DECIMAL = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50}

_BYTES = {f"{p}B": Decimal(f) for p, f in (_DECIMAL | {"K": 10**3} | _BINARY).items()}
_BITS = {f"{p}{word}": Decimal(f) / 8 for p, f in _DECIMAL.items() for word in ("b/s", "bit/s", "bps")}
_OPS = {f"{p}{word}": Decimal(f) for p, f in (_DECIMAL | {"E": 10**18}).items() for word in ("FLOPS", "FLOP/s", "OPS")}
_NS = {"ns": 1, "us": 10**3, "µs": 10**3, "μs": 10**3, "ms": 10**6, "s": 10**9, "min": 60 * 10**9, "h": 3600 * 10**9}


class Quantity(NamedTuple):
    """One kind of quantity: its units in base units, those that messages name, and the one that hints propose."""

    name: str
    units: Mapping[str, Decimal]
    shown: str
    usual: str


SIZE = Quantity("size", _BYTES, "B, kB, MB, GB, TB, KiB, MiB, GiB, TiB", "GiB")
RATE = Quantity(
    "rate",
    {f"{u}/s": f for u, f in _BYTES.items()} | _BITS,
    "B/s, kB/s, MB/s, GB/s, TB/s, GiB/s; bits: Mb/s, Gb/s",
    "GB/s",
)
DURATION = Quantity("duration", {u: Decimal(f) for u, f in _NS.items()}, "ns, us, ms, s, min, h", "ms")
FLOPS = Quantity("arithmetic rate", _OPS, "GFLOPS, TFLOPS, PFLOPS, TOPS", "TFLOPS")
POWER = Quantity(
    "power", {"mW": Decimal("0.001"), "W": Decimal(1), "kW": Decimal(10**3), "MW": Decimal(10**6)}, "mW, W, kW, MW", "W"
)


def bytes_of(text: object) -> int:
    """Bytes of `80GiB`, `80GB` or a plain whole number; a fraction of a byte is rounded. Raises InputError."""
    return round(_parse(text, SIZE, plain=True))


def rate_of(text: object) -> float:
    """Bytes per second of `900GB/s`, `3.35TB/s` or `400Gb/s` (bits). Raises InputError."""
    return float(_parse(text, RATE))


def duration_ns(text: object, *, plain: bool = False) -> int:
    """Whole nanoseconds of `300ns`, `2us`, `5ms`, `1.5s`, `2min` or `1h`; a fraction of a nanosecond is rounded.

    A number without a unit is refused unless `plain` is true, when it counts nanoseconds (0 needs no unit).
    Raises InputError.
    """
    return round(_parse(text, DURATION, plain=plain))


def flops_of(text: object) -> float:
    """Operations per second of `989TFLOPS`, `1.98PFLOP/s` or, for integers, `624TOPS`. Raises InputError."""
    return float(_parse(text, FLOPS))


def watts_of(text: object) -> float:
    """Watts of `700W` or `10.2kW`. Raises InputError."""
    return float(_parse(text, POWER))


def format_bytes(value: int) -> str:
    """The shortest exact text: `80GiB`, `80GB`, or `85899345921B`."""
    scales = {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10} | {"TB": 10**12, "GB": 10**9, "MB": 10**6}
    exact = [f"{value // factor}{unit}" for unit, factor in scales.items() if value and value % factor == 0]
    return min([*exact, f"{value}B"], key=len)


def format_rate(value: float) -> str:
    """Bytes per second as `3.35TB/s`."""
    return _format(value, {"TB/s": 12, "GB/s": 9, "MB/s": 6, "kB/s": 3, "B/s": 0})


def format_duration(value: int) -> str:
    """Nanoseconds as `1.5ms`."""
    return _format(value, {"s": 9, "ms": 6, "us": 3, "ns": 0})


def format_flops(value: float) -> str:
    """Operations per second as `989.4TFLOPS`."""
    return _format(value, {"PFLOPS": 15, "TFLOPS": 12, "GFLOPS": 9, "FLOPS": 0})


def format_watts(value: float) -> str:
    """Watts as `700W`."""
    return _format(value, {"kW": 3, "W": 0})


def _format(value: float, powers: Mapping[str, int]) -> str:
    """`value` in the largest unit that leaves a number of at least 1; decimal shifts lose nothing."""
    exact = Decimal(str(value))
    unit, power = next(((u, p) for u, p in powers.items() if exact >= Decimal(10) ** p), list(powers.items())[-1])
    text = format(exact.scaleb(-power), "f")
    return (text.rstrip("0").rstrip(".") if "." in text else text) + unit


def _parse(text: object, kind: Quantity, *, plain: bool = False) -> Decimal:
    """The quantity in base units; `plain` lets a whole number without a unit stand for base units."""

    def wrong(message: str, hint: str | None = None) -> InputError:
        found = text[:_LONGEST] if isinstance(text, str) else text
        return InputError(message, found=found, allowed=f"a number with one of the units {kind.shown}", hint=hint)

    if isinstance(text, bool) or not isinstance(text, (int, float, str)):
        raise wrong(f"not a {kind.name}")
    written = text.strip() if isinstance(text, str) else str(text)
    match = _NUMBER.fullmatch(written) if len(written) <= _LONGEST else None
    if match is None:
        raise wrong(f"not a {kind.name} (finite, not negative)")
    number, unit = Decimal(f"{match[1]}e{match[2] or 0}"), match[3]
    if unit in kind.units:
        return number * kind.units[unit]
    if unit:
        near = next((u for u in kind.units if u.casefold() == unit.casefold()), None)
        raise wrong(f"{unit!r} is not a unit of {kind.name}", f"{number.normalize():f}{near}" if near else None)
    if number and not plain:
        raise wrong(f"a {kind.name} needs a unit", f"{number.normalize():f}{kind.usual}")
    if number != number.to_integral_value():
        raise wrong(f"a {kind.name} without a unit must be a whole number")
    return number
