"""Field types of a scenario: counts, fractions, and quantities with a unit such as `80GiB`, `900GB/s`, `2us`.

Inside the program a quantity is a plain number in base units (bytes, bytes per second, nanoseconds). In a file a
number without a unit is refused, because nobody can tell whether `ttft: 200` means milliseconds or seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Annotated

from pydantic import BeforeValidator, Field, PlainSerializer, ValidationInfo, WithJsonSchema
from pydantic_core import PydanticCustomError

from servetwin.catalog.units import bytes_of, duration_ns, format_bytes, format_duration, format_rate, rate_of
from servetwin.errors import InputError

FROM_FILE = {"from_file": True}
"""Validation context under which quantities must be written with their unit."""

_A_SIZE = "a size with its unit, more than 0, such as 80GiB"
_A_RATE = "a rate with its unit, more than 0, such as 900GB/s"
_A_TIME = "a time with its unit, such as 200ms"


def _bytes(value: object) -> int:
    """`bytes_of`, which also takes a bare number; here that would be a forgotten unit far more often than bytes."""
    if isinstance(value, int) and not isinstance(value, bool):
        raise InputError("a size needs a unit", allowed=_A_SIZE, hint=f"{value}GiB")
    return bytes_of(value)


def _reader(parse: Callable[[object], float], allowed: str, at_least: int) -> BeforeValidator:
    def read(value: object, info: ValidationInfo) -> object:
        if isinstance(value, str) or (info.context or {}).get("from_file"):
            try:
                value = parse(value)
            except InputError as error:
                context = {"message": error.message, "allowed": error.allowed, "hint": error.hint}
                raise PydanticCustomError("quantity", "{message}", context) from None
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or value < at_least:
            raise PydanticCustomError("quantity", "{message}", {"message": "must be " + allowed, "allowed": None})
        return value

    return BeforeValidator(read)


def _text(allowed: str, example: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "description": allowed, "examples": [example]})


Bytes = Annotated[
    int,
    _reader(_bytes, _A_SIZE, 1),
    PlainSerializer(format_bytes, return_type=str, when_used="json"),
    _text(_A_SIZE, "80GiB"),
]
Rate = Annotated[
    float,
    _reader(rate_of, _A_RATE, 1),
    PlainSerializer(format_rate, return_type=str, when_used="json"),
    _text(_A_RATE, "900GB/s"),
]
Duration = Annotated[
    int,
    _reader(duration_ns, _A_TIME, 0),
    PlainSerializer(format_duration, return_type=str, when_used="json"),
    _text(_A_TIME, "200ms"),
]

LARGEST = 2**31 - 1
"""Largest count or length: sums over a run then stay far inside an int64."""

Count = Annotated[int, Field(ge=1, le=LARGEST)]
Whole = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
