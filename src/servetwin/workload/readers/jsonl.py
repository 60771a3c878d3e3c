"""JSONL files, checked row by row as they are read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from servetwin.errors import InputError, nearest
from servetwin.workload.readers.source import LATEST_NS, MOST_TOKENS, TOKENS_ALLOWED, TraceFile


@dataclass(frozen=True, slots=True)
class JsonRow:
    """One line of a JSONL file, or an object inside it (`part`). The methods return a checked value or raise
    `InputError` with its place."""

    file: TraceFile
    line: int
    values: dict[str, Any]
    part: str = ""

    @property
    def place(self) -> str:
        return f"line {self.line}: {self.part}" if self.part else f"line {self.line}"

    def __getitem__(self, name: str) -> Any:
        if name not in self.values:
            raise self.file.error(
                f"{name} is missing",
                self.place,
                found=", ".join(map(str, self.values)),
                hint=nearest(name, map(str, self.values)),
            )
        return self.values[name]

    def tokens(self, name: str) -> int:
        """A count of tokens, 1 to 2147483647."""
        value = self[name]
        if type(value) is not int or not 1 <= value <= MOST_TOKENS:
            raise self.wrong(name, value, TOKENS_ALLOWED)
        return value

    def time_ns(self, name: str, unit_ns: int) -> int:
        """A time from 0 on, given in units of `unit_ns` nanoseconds."""
        value = self[name]
        if type(value) not in (int, float) or not 0 <= value * unit_ns <= LATEST_NS:  # NaN fails the comparison
            raise self.wrong(name, value, f"a number from 0 to {LATEST_NS // unit_ns}")
        time: int = round(value * unit_ns)
        return time

    def whole_numbers(self, name: str, most: int) -> list[int]:
        """A list of whole numbers from 0 to `most`."""
        value = self[name]
        if type(value) is not list or not all(type(item) is int and 0 <= item <= most for item in value):
            raise self.wrong(name, value, f"a list of whole numbers from 0 to {most}")
        return value

    def objects(self, name: str) -> list[JsonRow]:
        """A list of objects, of which there is one at least."""
        value = self[name]
        if type(value) is not list or not value or not all(type(item) is dict for item in value):
            raise self.wrong(name, value, "a list of objects, one at least")
        return [JsonRow(self.file, self.line, item, f"{name}[{at}]") for at, item in enumerate(value)]

    def wrong(self, name: str, found: object, allowed: str) -> InputError:
        return self.file.error(f"{name} is wrong", self.place, found=_short(found), allowed=allowed)


def _short(value: object) -> object:
    if not isinstance(value, list | dict):
        return value
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def json_rows(file: TraceFile) -> Iterator[JsonRow]:
    """The objects of a JSONL file; blank lines do not count. Raises `InputError` at the first line that is none."""
    for line, text in file.lines():
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            raise _not_an_object(file, line, text.decode(errors="replace")) from None
        if type(values) is not dict:
            raise _not_an_object(file, line, values)
        yield JsonRow(file, line, values)


def _not_an_object(file: TraceFile, line: int, found: object) -> InputError:
    return file.error("not a JSON object", line, found=_short(found), allowed="one JSON object a line")
