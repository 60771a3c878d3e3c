"""Reading a scenario, from a file or from flags, and writing it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from servetwin.errors import InputError
from servetwin.scenario import document, override
from servetwin.scenario.names import check_names
from servetwin.scenario.problems import input_error
from servetwin.scenario.quantities import FROM_FILE
from servetwin.scenario.schema import Scenario

LONGEST = 10_000_000
"""Largest scenario file in bytes; real ones have a few thousand."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> Scenario:
    """The scenario in the YAML file `path`, with `overrides` (`pools[0].replicas=2`) applied in order.

    Devices, models and engine versions are looked up in the catalogue. Raises InputError for whatever is wrong.
    """
    path = Path(path)
    data = document.parse(_read(path), str(path))
    if data is None:
        raise InputError("the file is empty", where=str(path))
    if not isinstance(data, dict):
        allowed = "a mapping with model, workload, pools"
        raise InputError("not a scenario", where=str(path), found=str(data)[:60], allowed=allowed)
    return from_data(data, str(path), path.parent, overrides)


def from_data(data: dict[str, Any], where: str | None, base: Path, overrides: Iterable[str] = ()) -> Scenario:
    """The scenario in `data` (as `document.parse` returns it). Relative paths start at `base`. Raises InputError."""
    changes = [override.read(text) for text in overrides]
    changed = [override.apply(data, change) for change in changes]
    try:
        scenario = validated(data, where)
        check_names(scenario, base, where)
    except InputError as error:
        if error.field and any(_within(error.field, path) for path in changed):
            error.where = override.WHERE
        raise error.at() from None
    return scenario


def strictly_measured(scenario: Scenario) -> Scenario:
    """`scenario` with `timing.strict_measured` set. Raises InputError for a source that measures nothing."""
    timing = scenario.timing
    if timing.source == "linear":
        message = "does not go with source 'linear', which measures nothing"
        raise InputError(message, where="--strict-measured")
    return scenario.model_copy(update={"timing": timing.model_copy(update={"strict_measured": True})})


FLAG_OF = {
    "model": "--model",
    "device": "--device",
    "tensor": "--tp",
    "rate": "--rate",
    "requests": "--num-prompts",
    "input_len": "--input-len",
    "output_len": "--output-len",
}
"""The flag of each argument of `from_flags`."""
_FIELDS = {
    "model": "model",
    "pools[0].device": "device",
    "pools[0].parallelism.tensor": "tensor",
    "workload.arrivals.rate": "rate",
    "workload.requests": "requests",
    "workload.input_tokens": "input_len",
    "workload.output_tokens": "output_len",
}


def from_flags(
    *,
    model: str,
    device: str,
    tensor: int = 1,
    rate: float = inf,
    requests: int = 1000,
    input_len: int = 1024,
    output_len: int = 128,
    base: Path,
    overrides: Sequence[str] = (),
) -> Scenario:
    """The scenario of one pool and a synthetic workload, with the defaults of `vllm bench serve`.

    Arrivals are Poisson, at `rate` requests/s; infinity sends all requests at once. Raises InputError naming the flag.
    """
    arrivals = {"process": "all_at_once"} if rate == inf else {"process": "poisson", "rate": rate}
    workload = {"arrivals": arrivals, "requests": requests, "input_tokens": input_len, "output_tokens": output_len}
    pools = [{"device": device, "parallelism": {"tensor": tensor}}]
    try:
        return from_data({"model": model, "workload": workload, "pools": pools}, None, base, overrides)
    except InputError as error:
        raise naming_flag(error) from None


def naming_flag(error: InputError) -> InputError:
    """`error` about a field of a scenario made from flags, as one about the flag."""
    if error.where is None and error.field in _FIELDS:
        error.where, error.field = FLAG_OF[_FIELDS[error.field]], None
    return error.at()


def validated(data: dict[str, Any], where: str | None = None) -> Scenario:
    """The scenario in `data`, checked by the schema alone. Raises InputError."""
    try:
        return Scenario.model_validate(data, context=FROM_FILE)
    except ValidationError as error:
        raise input_error(error, where) from None


def _within(field: str, path: str) -> bool:
    return field == path or field.startswith((path + ".", path + "["))


def _read(path: Path) -> str:
    try:
        if path.is_file() and path.stat().st_size > LONGEST:
            raise InputError("the file is too large for a scenario", where=str(path), allowed=f"{LONGEST} bytes")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError("no such file", where=str(path)) from None
    except UnicodeDecodeError as error:
        raise InputError(f"not a text file (byte {error.start} is not UTF-8)", where=str(path)) from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from None


def dump(scenario: Scenario) -> str:
    """`scenario` as YAML that `load` reads back to an equal one; keys in the order of the schema, None left out."""
    return document.write(scenario.model_dump(mode="json", exclude_none=True))


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a scenario file, for editors."""
    draft = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": draft, **Scenario.model_json_schema(), "title": "ServeTwin scenario"}
