"""A workload replayed from a trace file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from servetwin.errors import InputError
from servetwin.workload.readers import read_trace
from servetwin.workload.readers.source import LATEST_NS
from servetwin.workload.table import RequestTable

if TYPE_CHECKING:
    from servetwin.scenario.schema import TraceWorkload


def replayed(workload: TraceWorkload, base: Path) -> RequestTable:
    """Read the trace, drop the first `skip` rows, keep at most `limit`, and play it `rate_scale` times as fast.

    Requests are numbered from 0 over the rows that are kept. With `skip`, time starts at the earliest arrival among
    them, so that a run does not begin with an idle stretch; without, arrivals are those of the reader. `rate_scale`
    divides arrivals; the patience of a client (abort minus arrival) keeps its length.

    Raises `InputError` for a bad file, or when `skip` leaves no request.
    """
    table = read_trace(base / workload.trace, workload.format)
    if workload.skip >= len(table):
        raise InputError(
            "no request is left",
            field="workload.skip",
            found=workload.skip,
            allowed=f"less than {len(table)} (rows of the trace)",
        )
    table = _rows(table, workload.skip, workload.limit)
    arrival = table.arrival_ns
    if workload.skip:
        arrival = arrival - arrival.min()
    if workload.rate_scale != 1:
        scaled = np.rint(arrival / workload.rate_scale)
        if scaled.max() > LATEST_NS:
            raise InputError(
                "stretches the trace over more than 146 years", field="workload.rate_scale", found=workload.rate_scale
            )
        arrival = scaled.astype(np.int64)
    abort = table.abort_ns
    if abort is not None:
        abort = np.where(abort < 0, -1, arrival + (abort - table.arrival_ns))
    return replace(
        table,
        arrival_ns=arrival,
        abort_ns=abort,
        output_known=workload.output_ends == "length",
        at_engine=workload.arrivals_at == "engine",
    )


def _rows(table: RequestTable, skip: int, limit: int | None) -> RequestTable:
    """`limit` rows from row `skip` on."""
    kept = slice(skip, None if limit is None else skip + limit)
    columns = (
        "arrival_ns",
        "input_tokens",
        "output_tokens",
        "segments",
        "token_ids",
        "session",
        "priority",
        "abort_ns",
    )
    return replace(table, **{name: getattr(table, name)[kept] for name in columns if getattr(table, name) is not None})
