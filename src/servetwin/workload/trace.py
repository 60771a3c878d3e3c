"""A workload replayed from a trace file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from servetwin.errors import InputError
from servetwin.workload.readers import read_trace
from servetwin.workload.readers.source import LATEST_NS
from servetwin.workload.table import Ints, RequestTable, Segment

if TYPE_CHECKING:
    from servetwin.scenario.schema import TraceWorkload

MOST_REQUESTS = 1 << 27


def replayed(workload: TraceWorkload, base: Path) -> RequestTable:
    """Read the trace, drop the first `skip` rows, keep at most `limit`, and play them `repeat` times over, so many
    times as fast as `rate_scale` says.

    Requests are numbered from 0 over the rows that are kept. With `skip`, time starts at the earliest arrival among
    them, so that a run does not begin with an idle stretch; without, arrivals are those of the reader. `rate_scale`
    divides arrivals; the patience of a client (abort minus arrival) keeps its length.

    Each repetition begins one mean gap between arrivals after the one before has ended. It sends the same prompts in
    sessions of its own, and quotes answers of its own.

    Raises `InputError` for a bad file, when `skip` leaves no request, or when time runs out of its 146 years.
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
    if workload.skip:
        table = _later(table, -int(table.arrival_ns.min()))
    if workload.repeat > 1:
        table = _repeated(table, workload.repeat)
    arrival = table.arrival_ns
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


def _later(table: RequestTable, ns: int) -> RequestTable:
    abort = table.abort_ns
    if abort is not None:
        abort = np.where(abort < 0, -1, abort + ns)
    return replace(table, arrival_ns=table.arrival_ns + ns, abort_ns=abort)


def _repeated(table: RequestTable, times: int) -> RequestTable:
    rows, first, last = len(table), int(table.arrival_ns.min()), int(table.arrival_ns.max())
    if rows * times > MOST_REQUESTS:
        allowed = f"up to {MOST_REQUESTS // rows} (times {rows} rows)"
        raise InputError("too many requests", field="workload.repeat", found=times, allowed=allowed)
    period = round((last - first) * rows / (rows - 1)) if rows > 1 else 0
    if last + period * (times - 1) > LATEST_NS:
        raise InputError("stretches the trace over more than 146 years", field="workload.repeat", found=times)
    again = np.repeat(np.arange(times, dtype=np.int64), rows)

    def tiled(column: Ints | None) -> Ints | None:
        return None if column is None else np.tile(column, times)

    session, abort, segments = tiled(table.session), tiled(table.abort_ns), table.segments
    if table.session is not None and session is not None:
        session = np.where(session < 0, session, session + again * (int(table.session.max()) + 1))
    if abort is not None:
        abort = np.where(abort < 0, -1, abort + again * period)
    if segments is not None:
        segments = [prompt for i in range(times) for prompt in _quoting_later(segments, i * rows)]
    return replace(
        table,
        arrival_ns=np.tile(table.arrival_ns, times) + again * period,
        input_tokens=np.tile(table.input_tokens, times),
        output_tokens=np.tile(table.output_tokens, times),
        segments=segments,
        token_ids=None if table.token_ids is None else list(table.token_ids) * times,
        session=session,
        priority=tiled(table.priority),
        abort_ns=abort,
    )


def _quoting_later(segments: Sequence[Sequence[Segment]], rows: int) -> Iterator[Sequence[Segment]]:
    """The same prompts, quoting the answers of requests that stand `rows` further down."""
    for prompt in segments:
        if rows and any(seed < 0 for seed, _ in prompt):
            yield [(seed - rows if seed < 0 else seed, length) for seed, length in prompt]
        else:
            yield prompt


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
