"""What a calibration is fitted to: measured runs, each beside the scenario that replays it, and their two parts."""

from __future__ import annotations

import csv
import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from servetwin.errors import InputError, nearest
from servetwin.measure.real_runs import read_real_run
from servetwin.scenario.schema import Arrivals, Lengths, RangeRatio, Scenario, SyntheticWorkload
from servetwin.workload import build as build_workload
from servetwin.workload.streams import stream

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

MEASURED = ("ttft_ms", "tpot_ms")
NEEDED = ("isl", "osl", "concurrency", *MEASURED)
OPTIONAL = ("ratio", "prompts", "tensor", "expert")
PROMPTS_A_CLIENT = 10
"""requests of a closed-loop point unless stated: 10 times its concurrency, as InferenceX runs them"""
SHORT = 3
SHORTEST = 24
"""slopes are taken from closed loops of 3 requests a client, at least 24 in all"""


@dataclass(frozen=True)
class Observed:
    """One measured run. Its figures are means over the run (`request` None, one entry each) or those of requests."""

    name: str
    scenario: Scenario
    base: Path
    """the folder that the scenario's relative paths start at"""
    ttft_ms: Floats
    tpot_ms: Floats
    """NaN where there is none"""
    request: Ints | None = None
    """position of each entry's request in the workload"""
    input_tokens: Ints | None = None
    """of each entry's request"""
    labels: Mapping[str, str] = field(default_factory=dict)
    """what the run can be held out by"""
    source: str = ""
    """the file it comes from; each file weighs the same in the fit"""

    def __len__(self) -> int:
        return len(self.ttft_ms)

    @cached_property
    def short(self) -> Scenario:
        """A shorter closed loop that reacts alike to the terms; the scenario itself where it is no closed loop."""
        workload = self.scenario.workload
        if not isinstance(workload, SyntheticWorkload) or workload.arrivals.concurrency is None:
            return self.scenario
        requests = min(workload.requests, max(SHORTEST, SHORT * workload.arrivals.concurrency))
        return self.scenario.model_copy(update={"workload": workload.model_copy(update={"requests": requests})})


def point(
    name: str,
    scenario: Scenario,
    ttft_ms: float,
    tpot_ms: float,
    *,
    base: Path = Path(),
    labels: Mapping[str, str] | None = None,
    source: str = "",
) -> Observed:
    """A run of which only the mean TTFT and TPOT (ms) are known."""
    return Observed(name, scenario, base, np.array([ttft_ms]), np.array([tpot_ms]), labels=labels or {}, source=source)


def read_observed(path: Path, template: Scenario, base: Path) -> list[Observed]:
    """The measured runs in `path`: a CSV of closed-loop points, a bench folder, or a `vllm bench serve` JSON.

    Points take model, devices and engine from `template` and bring their own workload; the other two are replayed by
    the template's workload, and only requests of the same lengths are kept. Raises InputError.
    """
    if path.suffix.lower() == ".csv":
        return read_points(path, template, base)
    return [_replayed(path, template, base)]


def hashes(path: Path) -> list[dict[str, str]]:
    """Name and SHA-256 of each file that `read_observed` reads."""
    files = [path / "meta.json", path / "requests.jsonl"] if path.is_dir() else [path]
    prefix = f"{path.resolve().name}/" if path.is_dir() else ""
    return [{"file": prefix + f.name, "sha256": hashlib.sha256(f.read_bytes()).hexdigest()} for f in files]


def _replayed(path: Path, template: Scenario, base: Path) -> Observed:
    real = read_real_run(path)
    table = build_workload(template.workload, template.seed, base)
    known = real.request < len(table)
    at = real.request[known]
    same = (table.input_tokens[at] == real.input_tokens[known]) & (table.output_tokens[at] == real.output_tokens[known])
    kept = np.flatnonzero(known)[same]
    if not len(kept):
        message = "no request has the lengths of the scenario's request of the same number"
        allowed = "a scenario whose workload replays this run (servetwin import llmservingsim --bench writes one)"
        raise InputError(message, where=str(path), allowed=allowed)
    return Observed(
        name=path.name,
        scenario=template,
        base=base,
        ttft_ms=real.ttft_ms[kept],
        tpot_ms=real.tpot_ms[kept],
        request=real.request[kept],
        input_tokens=real.input_tokens[kept],
        labels={"file": path.name},
        source=str(path),
    )


# ---- CSV of closed-loop points ----


def read_points(path: Path, template: Scenario, base: Path) -> list[Observed]:
    """The points of a CSV (columns NEEDED, perhaps OPTIONAL; others only name rows for holding them out).

    Rows that were measured under the same conditions are averaged into one, so that they never end up in both parts.
    """
    rows: dict[tuple[str, ...], list[Observed]] = defaultdict(list)
    for line, row in _rows(path):
        conditions = tuple(text for name, text in row.items() if name not in MEASURED)
        rows[conditions].append(_point(f"{path.name} line {line}", line, row, path, template, base))
    return [_average(repeats) for repeats in rows.values()]


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    where = str(path)
    try:
        lines = csv.reader(path.read_text(encoding="utf-8-sig").splitlines())
        header = [name.strip() for name in next(lines, [])]
        found = [(lines.line_num, [value.strip() for value in values]) for values in lines if values]
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=where) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"not a CSV file: {error}", where=where) from None
    for name in NEEDED:
        if name not in header:
            listed, hint = ", ".join(header), nearest(name, header)
            raise InputError(f"column {name} is missing", where=where, field="line 1", found=listed, hint=hint)
    if not found:
        raise InputError("no rows below the header", where=where)
    for line, values in found:
        if len(values) != len(header):
            allowed = str(len(header))
            raise InputError(
                "wrong number of columns", where=where, field=f"line {line}", found=len(values), allowed=allowed
            )
    return [(line, dict(zip(header, values, strict=True))) for line, values in found]


def _point(name: str, line: int, row: dict[str, str], path: Path, template: Scenario, base: Path) -> Observed:
    def number(column: str, least: float, most: float, default: float = math.nan, whole: bool = False) -> float:
        text = row.get(column, "")
        if not text and (column in OPTIONAL or column == "tpot_ms"):
            return default
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or (whole and value != int(value)):
            allowed = f"a {'whole ' if whole else ''}number from {least:g} to {most:g}"
            place = f"line {line}: {column}"
            raise InputError("is wrong", where=str(path), field=place, found=text, allowed=allowed)
        return value

    def count(column: str, default: int = 0) -> int:
        return int(number(column, 1, 2**31 - 1, default, whole=True))

    concurrency, ratio = count("concurrency"), number("ratio", 1e-3, 1, 1.0)
    workload = SyntheticWorkload(
        arrivals=Arrivals(process="closed_loop", concurrency=concurrency),
        requests=count("prompts", PROMPTS_A_CLIENT * concurrency),
        input_tokens=_lengths(count("isl"), ratio),
        output_tokens=_lengths(count("osl"), ratio),
    )
    degrees = {name: count(name) for name in ("tensor", "expert") if row.get(name)}
    pools = [
        pool.model_copy(update={"parallelism": pool.parallelism.model_copy(update=degrees)}) for pool in template.pools
    ]
    return point(
        name,
        template.model_copy(update={"workload": workload, "pools": pools}),
        number("ttft_ms", 1e-6, 1e9),
        number("tpot_ms", 1e-6, 1e9),
        base=base,
        labels={column: text for column, text in row.items() if column not in MEASURED},
        source=str(path),
    )


def _lengths(longest: int, ratio: float) -> Lengths:
    return longest if ratio == 1 else RangeRatio(max=longest, ratio=ratio)


def _average(repeats: Sequence[Observed]) -> Observed:
    means = {name: np.mean([getattr(one, name) for one in repeats], axis=0) for name in MEASURED}
    return replace(repeats[0], **means)


# ---- the two parts ----


def split_at_random(observed: Sequence[Observed], share: float, seed: int) -> list[Mask]:
    """For each run the mask of its entries that are fitted: a `share` of all, drawn at random."""
    if not 0 < share < 1:
        message = "the train part must leave something unseen"
        raise InputError(message, where="--train", found=share, allowed="more than 0, less than 1")
    total = sum(map(len, observed))
    chosen = np.zeros(total, dtype=bool)
    chosen[stream(seed, "calibration").permutation(total)[: max(1, round(share * total))]] = True
    return list(np.split(chosen, np.cumsum([len(one) for one in observed])[:-1]))


def hold_out(observed: Sequence[Observed], column: str, value: str) -> list[Mask]:
    """As `split_at_random`, but unseen are the runs whose `column` has this `value`."""
    names = sorted({name for one in observed for name in one.labels})
    if column not in names:
        allowed, hint = ", ".join(names), nearest(column, names)
        raise InputError("no such column", where="--hold-out", found=column, allowed=allowed, hint=hint)
    held = [_same(one.labels.get(column), value) for one in observed]
    if all(held) or not any(held):
        found = sorted({one.labels.get(column, "") for one in observed})
        message = "holds out every run" if all(held) else "holds out no run"
        allowed = f"a value that some have: {', '.join(found)}"
        raise InputError(message, where="--hold-out", found=f"{column}={value}", allowed=allowed)
    return [np.full(len(one), not out) for one, out in zip(observed, held, strict=True)]


def _same(text: str | None, value: str) -> bool:
    if text is None or text == value:
        return text is not None
    try:
        return float(text) == float(value)
    except ValueError:
        return False
