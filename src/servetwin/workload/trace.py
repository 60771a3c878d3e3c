"""A workload replayed from a trace file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from servetwin.errors import InputError
from servetwin.workload.readers import read_trace
from servetwin.workload.readers.source import LATEST_NS
from servetwin.workload.table import Ints, RequestTable

if TYPE_CHECKING:
    from servetwin.scenario.schema import TraceWorkload


def replayed(workload: TraceWorkload, base: Path) -> RequestTable:
    """Read the trace, drop the first `skip` requests, keep at most `limit`, and play it `rate_scale` times as fast.

    Where turns wait for others, sessions are skipped, limited and scaled as wholes: `rate_scale` brings their starts
    closer, and what goes on inside one (tool times, roots that come later) keeps its pace. Requests are numbered from 0
    over the rows that are kept. With `skip`, time starts at the earliest arrival among them, so that a run does not
    begin with an idle stretch; without, arrivals are those of the reader. The patience of a client (abort minus
    arrival) keeps its length.

    Raises `InputError` for a bad file, or when `skip` leaves no request.
    """
    table = read_trace(base / workload.trace, workload.format)
    unit = table.units()
    units = int(unit.max()) + 1
    if workload.skip >= units:
        what = "rows" if table.waits_for is None else "sessions and single requests"
        raise InputError(
            "no request is left",
            field="workload.skip",
            found=workload.skip,
            allowed=f"less than {units} ({what} of the trace)",
        )
    if workload.skip or workload.limit is not None:
        end = units if workload.limit is None else workload.skip + workload.limit
        rows = np.flatnonzero((unit >= workload.skip) & (unit < end))
        table, unit = table.take(rows), unit[rows] - workload.skip
    start = _starts(table, unit)
    inside = np.where(table.roots, table.arrival_ns - start, 0)
    if workload.skip:
        start = start - start.min()
    if workload.rate_scale != 1:
        scaled = np.rint(start / workload.rate_scale)
        if scaled.max() > LATEST_NS:
            raise InputError(
                "stretches the trace over more than 146 years", field="workload.rate_scale", found=workload.rate_scale
            )
        start = scaled.astype(np.int64)
    arrival = start + inside
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


def _starts(table: RequestTable, unit: Ints) -> Ints:
    """The earliest arrival of a root in the unit of each row."""
    earliest = np.full(int(unit.max()) + 1, LATEST_NS)
    roots = table.roots
    np.minimum.at(earliest, unit[roots], table.arrival_ns[roots])
    return earliest[unit]
