"""Trace formats: one module each, with `read(file) -> RequestTable` and `SIGNS`, the column names that give it away."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from servetwin.errors import InputError, nearest
from servetwin.workload.readers import azure, burstgpt, llmservingsim, mooncake, servetwin, vidur
from servetwin.workload.readers.csv_table import folded, header_of
from servetwin.workload.readers.source import TraceFile
from servetwin.workload.table import RequestTable

READERS: dict[str, Callable[[TraceFile], RequestTable]] = {
    "servetwin": servetwin.read,
    "llmservingsim": llmservingsim.read,
    "azure": azure.read,
    "mooncake": mooncake.read,
    "vidur": vidur.read,
    "burstgpt": burstgpt.read,
}
JSON_SIGNS: dict[str, tuple[str, ...]] = {"llmservingsim": llmservingsim.SIGNS, "mooncake": mooncake.SIGNS}
CSV_SIGNS: dict[str, tuple[str, ...]] = {"azure": azure.SIGNS, "vidur": vidur.SIGNS, "burstgpt": burstgpt.SIGNS}


def read_trace(path: Path, format: str = "auto") -> RequestTable:
    """All requests of a trace, with `source` ("azure:file name") and `sha256` of the file. Raises `InputError`."""
    file = TraceFile.open(path)
    name = _detect(file) if format == "auto" else format
    if name not in READERS:
        raise InputError(
            "unknown trace format",
            field="workload.format",
            found=name,
            allowed=", ".join(("auto", *READERS)),
            hint=nearest(name, READERS),
        )
    return replace(READERS[name](file), source=f"{name}:{path.name}", sha256=file.sha256)


def detect(path: Path) -> str:
    """The format of a trace file, from its content (never its name). Raises `InputError` when it is none of ours."""
    return _detect(TraceFile.open(path))


def _detect(file: TraceFile) -> str:
    if file.data.startswith(servetwin.MAGIC):
        return "servetwin"
    line, text = file.first_line()
    if text.startswith("{"):
        try:
            names = list(json.loads(text))
        except (ValueError, RecursionError):
            raise file.error("not a JSON object", line, found=text[:60], allowed="one JSON object a line") from None
        signs = JSON_SIGNS
    else:
        names, signs = header_of(file)[1], CSV_SIGNS
    given = set(map(folded, names))
    for format, columns in signs.items():
        if not given.isdisjoint(map(folded, columns)):
            return format
    raise file.error(
        "not a trace format that is known",
        line,
        found=", ".join(names)[:120],
        allowed="; ".join(f"{format}: {' or '.join(columns)}" for format, columns in (JSON_SIGNS | CSV_SIGNS).items()),
    )
