"""Readers of what real serving runs left behind: one set of latencies a request."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from servetwin.errors import InputError, nearest

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RealRun:
    """The requests of a real run that finished, one entry a request, in the order of `request`.

    `request` is the position in the workload (from 0), the same as in a simulated run of that workload. Latencies are
    in ms and count from when the engine or the client had the request; TPOT is NaN for requests of one token.
    """

    source: str
    request: Ints
    input_tokens: Ints
    output_tokens: Ints
    ttft_ms: Floats
    tpot_ms: Floats
    e2el_ms: Floats
    unfinished: int
    """requests that were sent and did not finish"""
    duration_s: float | None = None
    """first arrival to last finish"""
    notes: tuple[str, ...] = ()


def read_real_run(path: Path) -> RealRun:
    """Read a LLMServingSim bench folder (`meta.json`, `requests.jsonl`) or a `vllm bench serve --save-detailed` JSON.

    Raises InputError, naming file and row, for anything else or anything damaged.
    """
    if path.is_dir():
        return _read_bench_folder(path)
    if not path.is_file():
        raise InputError("no such file or folder", where=str(path))
    return _read_vllm_bench(path)


def _load_object(text: str, where: str, field: str | None = None) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        place = field or f"line {error.lineno}"
        raise InputError(f"is not JSON ({error.msg}): truncated or damaged", where=where, field=place) from error
    if not isinstance(content, dict):
        raise InputError("must be a JSON object", where=where, field=field, found=type(content).__name__)
    return content


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError("is not UTF-8 text", where=str(path)) from error


def _count(value: object, least: int, where: str, field: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError("must be a count", where=where, field=field, found=value, allowed=f"an integer >= {least}")
    return value


def _seconds(value: object, where: str, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise InputError("must be a time in seconds", where=where, field=field, found=value, allowed="a number >= 0")
    return float(value)


def _tpot_ms(ttft_ms: Floats, e2el_ms: Floats, output_tokens: Ints) -> Floats:
    tpot = np.full(len(output_tokens), np.nan)
    np.divide(e2el_ms - ttft_ms, output_tokens - 1, out=tpot, where=output_tokens > 1)
    return tpot


# ---- LLMServingSim bench folder ----

_CLOCKS = ("queued_ts", "first_token_ts", "last_token_ts")


def _read_bench_folder(folder: Path) -> RealRun:
    for name in ("meta.json", "requests.jsonl"):
        if not (folder / name).is_file():
            raise InputError(
                "no such file",
                where=str(folder / name),
                allowed="a bench folder with meta.json and requests.jsonl, or a `vllm bench serve` JSON file",
            )
    meta = _load_object(_read_text(folder / "meta.json"), str(folder / "meta.json"))
    where = str(folder / "requests.jsonl")
    rows: dict[int, tuple[int, int, float, float, float]] = {}
    unfinished = 0
    for number, line in enumerate(_read_text(folder / "requests.jsonl").splitlines(), start=1):
        if not line.strip():
            continue
        field = f"line {number}"
        row = _load_object(line, where, field)
        for key in ("request_id", "input_toks", "output_toks", *_CLOCKS):
            if key not in row:
                raise InputError(f"{key!r} is missing", where=where, field=field, hint=nearest(key, row))
        position = re.fullmatch(r"bench-(\d+)", str(row["request_id"]))
        if not position:
            found, allowed = row["request_id"], "bench-0, bench-1, ..."
            raise InputError("wrong request_id", where=where, field=field, found=found, allowed=allowed)
        request = int(position[1])
        if request in rows:
            raise InputError("occurs twice", where=where, field=field, found=row["request_id"])
        if any(row[key] is None for key in _CLOCKS):
            unfinished += 1
            continue
        queued, first, last = (_seconds(row[key], where, f"{field}: {key}") for key in _CLOCKS)
        if not queued <= first <= last:
            message = "times must not go back (queued_ts, first_token_ts, last_token_ts)"
            raise InputError(message, where=where, field=field, found=(queued, first, last))
        inputs = _count(row["input_toks"], 0, where, f"{field}: input_toks")
        rows[request] = (inputs, _count(row["output_toks"], 1, where, f"{field}: output_toks"), queued, first, last)
    if not rows:
        raise InputError("holds no finished request", where=where)

    expected, sent = meta.get("num_requests"), len(rows) + unfinished
    notes = [f"meta.json says {expected} requests, requests.jsonl has {sent}"] if expected not in (None, sent) else []
    request_ids = np.array(sorted(rows), dtype=np.int64)
    columns = zip(*(rows[request] for request in request_ids.tolist()), strict=True)
    inputs_, outputs, queued_, first_, last_ = (np.array(column) for column in columns)
    ttft, e2el = (first_ - queued_) * 1e3, (last_ - queued_) * 1e3
    return RealRun(
        source=f"{meta.get('model', 'unknown model')}, vLLM {meta.get('vllm_version', 'of unknown version')}",
        request=request_ids,
        input_tokens=inputs_,
        output_tokens=outputs,
        ttft_ms=ttft,
        tpot_ms=_tpot_ms(ttft, e2el, outputs),
        e2el_ms=e2el,
        unfinished=unfinished,
        duration_s=float(last_.max() - queued_.min()),
        notes=tuple(notes),
    )


# ---- vllm bench serve --save-detailed ----


def _per_request(
    content: dict[str, Any], key: str, length: int | None, where: str, parse: Callable[[object, str, str], Any]
) -> list[Any]:
    values = content.get(key)
    if not isinstance(values, list):
        hint = "vllm bench serve --save-result --save-detailed" if values is None else None
        raise InputError("must be a list with one entry a request", where=where, field=key, found=values, hint=hint)
    if length is not None and len(values) != length:
        allowed = f"{length} entries, as in ttfts"
        raise InputError("has the wrong length", where=where, field=key, found=len(values), allowed=allowed)
    return [parse(value, where, f"{key}[{index}]") for index, value in enumerate(values)]


def _gaps(value: object, where: str, field: str) -> float:
    """The sum of a request's gaps between tokens (s)."""
    if not isinstance(value, list):
        raise InputError("must be a list of times in seconds", where=where, field=field, found=value)
    return math.fsum(_seconds(gap, where, f"{field}[{index}]") for index, gap in enumerate(value))


def _read_vllm_bench(path: Path) -> RealRun:
    """E2EL = TTFT + sum of the gaps, as in vLLM's own client. Requests with an error or no output are left out."""
    where = str(path)
    content = _load_object(_read_text(path), where)
    ttft = np.array(_per_request(content, "ttfts", None, where, _seconds), dtype=np.float64)
    n = len(ttft)

    def counts(value: object, where: str, field: str) -> int:
        return _count(value, 0, where, field)

    rest = np.array(_per_request(content, "itls", n, where, _gaps), dtype=np.float64)
    inputs = np.array(_per_request(content, "input_lens", n, where, counts), dtype=np.int64)
    outputs = np.array(_per_request(content, "output_lens", n, where, counts), dtype=np.int64)
    good = outputs > 0
    if "errors" in content:
        good &= ~np.array(_per_request(content, "errors", n, where, lambda value, *_: bool(value)), dtype=bool)
    if not good.any():
        raise InputError("holds no finished request", where=where)

    ttft_ms, e2el_ms = ttft[good] * 1e3, (ttft + rest)[good] * 1e3
    duration = None
    if content.get("start_times"):
        start = np.array(_per_request(content, "start_times", n, where, _seconds), dtype=np.float64)
        duration = float((start[good] + e2el_ms / 1e3).max() - start.min())
    elif content.get("duration") is not None:
        duration = _seconds(content["duration"], where, "duration")
    return RealRun(
        source=f"{content.get('model_id', 'unknown model')}, vllm bench serve",
        request=np.flatnonzero(good).astype(np.int64),
        input_tokens=inputs[good],
        output_tokens=outputs[good],
        ttft_ms=ttft_ms,
        tpot_ms=_tpot_ms(ttft_ms, e2el_ms, outputs[good]),
        e2el_ms=e2el_ms,
        unfinished=int((~good).sum()),
        duration_s=duration,
    )
