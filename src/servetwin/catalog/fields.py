"""Reading a catalogue entry: a mapping whose every fault is reported with its file and field."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from servetwin.errors import InputError, nearest

T = TypeVar("T")
D = TypeVar("D")


class Fields:
    """A YAML mapping that is read field by field; `done` refuses what nobody asked for.

    `sources` are the source texts of the whole entry; a `source` beside a group of facts must name one of them.
    """

    def __init__(self, data: object, where: str, path: str = "", sources: dict[str, str] | None = None) -> None:
        self.where, self.path = where, path
        if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
            raise InputError(
                "must be a mapping of names to values", where=where, field=path or None, found=_short(data)
            )
        self._data: dict[str, Any] = data
        self._asked: set[str] = set()
        self.sources = {} if sources is None else sources

    def has(self, key: str) -> bool:
        self._asked.add(key)
        return self._data.get(key) is not None

    def get(self, key: str, read: Callable[[Any], T]) -> T:
        """The field `key` as `read` understands it. Raises InputError when it is missing or malformed."""
        if not self.has(key):
            raise InputError("is missing", where=self.where, field=self._at(key))
        try:
            return read(self._data[key])
        except InputError as error:
            raise error.at(self.where, self._at(key)) from None

    def maybe(self, key: str, read: Callable[[Any], T], default: D) -> T | D:
        """As `get`, with a default for a field that is absent."""
        return self.get(key, read) if self.has(key) else default

    def group(self, key: str) -> Fields:
        """The mapping under `key`, whose `source` is checked here."""
        inner = Fields(self.get(key, lambda data: data), self.where, self._at(key), self.sources)
        inner.maybe("source", lambda name: one_of(name, self.sources), "")
        return inner

    def maybe_group(self, key: str) -> Fields | None:
        return self.group(key) if self.has(key) else None

    def quantity(self, key: str, read: Callable[[Any], T]) -> T:
        """A field written as a value alone or as `{value: ..., source: ...}`."""
        if not isinstance(self._data.get(key), dict):
            return self.get(key, read)
        inner = self.group(key)
        value = inner.get("value", read)
        inner.done()
        return value

    def maybe_quantity(self, key: str, read: Callable[[Any], T], default: D) -> T | D:
        return self.quantity(key, read) if self.has(key) else default

    def rest(self) -> dict[str, Any]:
        """The fields that nobody asked for."""
        return {key: value for key, value in self._data.items() if key not in self._asked}

    def done(self) -> None:
        """Raise InputError when a field is left that nobody asked for."""
        for key in self.rest():
            allowed, hint = ", ".join(sorted(self._asked)), nearest(key, self._asked)
            raise InputError("unknown field", where=self.where, field=self._at(key), allowed=allowed, hint=hint)

    def _at(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key


def text(value: object) -> str:
    """A non-empty string."""
    if not isinstance(value, str) or not value.strip():
        raise InputError("must be a text", found=_short(value))
    return value


def texts(value: object) -> tuple[str, ...]:
    """A list of non-empty strings."""
    if not isinstance(value, list):
        raise InputError("must be a list of texts", found=_short(value))
    return tuple(text(item) for item in value)


def count(value: object) -> int:
    """A whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError("must be a whole number of at least 1", found=_short(value))
    return value


def one_of(value: object, allowed: Iterable[str]) -> str:
    """One of the texts in `allowed`."""
    names = list(allowed)
    if value not in names:
        hint = nearest(value, names) if isinstance(value, str) else None
        raise InputError("unknown value", found=_short(value), allowed=", ".join(names) or "nothing", hint=hint)
    return str(value)


def positive(read: Callable[[Any], T]) -> Callable[[Any], T]:
    """`read`, refusing zero."""

    def checked(value: Any) -> T:
        result = read(value)
        if not result:
            raise InputError("must be more than 0", found=value)
        return result

    return checked


def read_yaml(path: Path) -> Any:
    """The content of a YAML file, with plain types only. Raises InputError with the line of a syntax error."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}" if error.problem_mark else None
        raise InputError(f"not valid YAML: {error.problem}", where=str(path), field=line) from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"not valid YAML: {error}", where=str(path)) from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from None


def _short(value: object) -> object:
    """A value as an error shows it: long ones are cut."""
    return value if isinstance(value, (int, float)) else value[:80] if isinstance(value, str) else reprlib.repr(value)
