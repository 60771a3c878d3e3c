"""A workload replayed from a trace file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from servetwin.errors import InputError
from servetwin.workload.dependence import Dependence
from servetwin.workload.readers import read_trace
from servetwin.workload.readers.source import LATEST_NS
from servetwin.workload.table import Ints, RequestTable, Segment

if TYPE_CHECKING:
    from servetwin.scenario.schema import TraceWorkload


MOST_REQUESTS = 1 << 27


def replayed(workload: TraceWorkload, base: Path) -> RequestTable:
    """Read the trace, drop the first `skip` requests, keep at most `limit`, and play them `repeat` times over, so many
    times as fast as `rate_scale` says.

    Where turns wait for others, sessions are skipped, limited and scaled as wholes: `rate_scale` brings their starts
    closer, and what goes on inside one (tool times, roots that come later) keeps its pace. Requests are numbered from 0
    over the rows that are kept. With `skip`, time starts at the earliest arrival among them, so that a run does not
    begin with an idle stretch; without, arrivals are those of the reader. The patience of a client (abort minus
    arrival) keeps its length.

    Each repetition begins one mean gap between arrivals after the one before has ended. It sends the same prompts in
    sessions of its own, and quotes answers of its own.

    Raises `InputError` for a bad file, when `skip` leaves no request, or when time runs out of its 146 years.
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
    if workload.repeat > 1:
        table = _repeated(table, workload.repeat)
        unit = table.units()
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


def _repeated(table: RequestTable, times: int) -> RequestTable:
    rows = len(table)
    if rows * times > MOST_REQUESTS:
        allowed = f"up to {MOST_REQUESTS // rows} (times {rows} rows)"
        raise InputError("too many requests", field="workload.repeat", found=times, allowed=allowed)
    arrivals = table.arrival_ns[table.roots]
    first, last = int(arrivals.min()), int(arrivals.max())
    period = round((last - first) * len(arrivals) / (len(arrivals) - 1)) if len(arrivals) > 1 else 0
    if last + period * (times - 1) > LATEST_NS:
        raise InputError("stretches the trace over more than 146 years", field="workload.repeat", found=times)
    again = np.repeat(np.arange(times, dtype=np.int64), rows)

    def tiled(column: Ints | None, step: int) -> Ints | None:
        """The column once for each repetition, each `step` further on; negative values, which stand for none, stay."""
        if column is None:
            return None
        whole = np.tile(column, times)
        return np.where(whole < 0, whole, whole + again * step) if step else whole

    waits, segments = table.waits_for, table.segments
    if waits is not None:
        each = np.tile(np.diff(waits.offsets), times)
        parents = np.concatenate([waits.parents + i * rows for i in range(times)])
        waits = Dependence(np.concatenate([[0], np.cumsum(each)]), parents, np.tile(waits.delay_ns, times))
    if segments is not None:
        segments = [prompt for i in range(times) for prompt in _quoting_later(segments, i * rows)]
    sessions = 0 if table.session is None else int(table.session.max()) + 1
    return replace(
        table,
        arrival_ns=np.tile(table.arrival_ns, times) + again * period,
        input_tokens=np.tile(table.input_tokens, times),
        output_tokens=np.tile(table.output_tokens, times),
        segments=segments,
        token_ids=None if table.token_ids is None else list(table.token_ids) * times,
        output_ids=None if table.output_ids is None else list(table.output_ids) * times,
        session=tiled(table.session, sessions),
        waits_for=waits,
        extends=tiled(table.extends, rows),
        model=tiled(table.model, 0),
        priority=tiled(table.priority, 0),
        abort_ns=tiled(table.abort_ns, period),
    )


def _quoting_later(segments: Sequence[Sequence[Segment]], rows: int) -> Iterator[Sequence[Segment]]:
    """The same prompts, quoting the answers of requests that stand `rows` further down."""
    for prompt in segments:
        if rows and any(seed < 0 for seed, _ in prompt):
            yield [(seed - rows if seed < 0 else seed, length) for seed, length in prompt]
        else:
            yield prompt
