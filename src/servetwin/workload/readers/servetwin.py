"""ServeTwin's own workload file: Parquet, one row a request.

Columns (int64): `arrival_ns`, `input_tokens`, `output_tokens`; optional `session` (-1 = none), `priority`, `abort_ns`
(-1 = never), `model` (text), `token_ids` and `output_ids` (lists of int32; an empty list of output_ids = not known),
and `seeds` with `lengths` (lists of int64: the segments of the prompt; a negative seed -1-r quotes the output of
request r). Sessions: `parents` (list of int64: the rows that a row waits for) with `delay_ns` (from the end of the last
of them to its release), and `extends` (the row whose prompt and output open its prompt, -1 = none; segments are then
only what comes after). The concurrency of a closed loop stands in the file's metadata.
"""

from __future__ import annotations

from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from servetwin.errors import InputError
from servetwin.workload.dependence import Dependence
from servetwin.workload.readers.source import LATEST_NS, MOST_TOKENS, TOKENS_ALLOWED, TraceFile
from servetwin.workload.table import Ints, RequestTable, Segment

if TYPE_CHECKING:
    import pyarrow as pa

MAGIC = b"PAR1"
REQUIRED = ("arrival_ns", "input_tokens", "output_tokens")
OPTIONAL = ("session", "priority", "abort_ns", "extends")
OTHERS = ("model", "token_ids", "output_ids", "seeds", "lengths", "parents", "delay_ns")
CONCURRENCY = b"servetwin.concurrency"


def write_workload(table: RequestTable, path: Path) -> None:
    """Write `table`; `read` gives the same columns back. Not written: `source`, `sha256`, `notes`, `output_known`."""
    import pyarrow as pa
    import pyarrow.parquet

    columns: dict[str, Any] = {name: pa.array(getattr(table, name), pa.int64()) for name in REQUIRED}
    for name in OPTIONAL:
        values = getattr(table, name)
        if values is not None:
            columns[name] = pa.array(values, pa.int64())
    if table.model is not None:
        columns["model"] = pa.array(np.array(table.models, np.object_)[table.model], pa.string())
    for name in ("token_ids", "output_ids"):
        ids = getattr(table, name)
        if ids is not None:
            columns[name] = pa.array(list(ids), pa.list_(pa.int32()))
    if table.segments is not None:
        counts = np.fromiter((len(row) for row in table.segments), np.int32, len(table))
        offsets = pa.array(np.concatenate(([0], counts.cumsum())), pa.int32())
        flat = np.array(list(chain.from_iterable(table.segments)), np.int64).reshape(-1, 2)
        columns["seeds"] = pa.ListArray.from_arrays(offsets, pa.array(flat[:, 0].copy()))
        columns["lengths"] = pa.ListArray.from_arrays(offsets, pa.array(flat[:, 1].copy()))
    if table.waits_for is not None:
        waits = table.waits_for
        offsets = pa.array(waits.offsets.astype(np.int32), pa.int32())
        columns["parents"] = pa.ListArray.from_arrays(offsets, pa.array(waits.parents, pa.int64()))
        columns["delay_ns"] = pa.array(waits.delay_ns, pa.int64())
    metadata = {} if table.concurrency is None else {CONCURRENCY: str(table.concurrency).encode()}
    pyarrow.parquet.write_table(pa.table(columns).replace_schema_metadata(metadata), path, compression="zstd")


def read(file: TraceFile) -> RequestTable:
    """Read a file of `write_workload`. Rows in errors count from 0, as requests do."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        content = pyarrow.parquet.ParquetFile(pa.BufferReader(file.data)).read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise file.error(f"not a readable Parquet file: {str(error).splitlines()[0]}") from None
    for name in REQUIRED:
        if name not in content.column_names:
            raise file.error(
                f"column {name} is missing",
                found=", ".join(content.column_names),
                allowed=", ".join((*REQUIRED, *OPTIONAL, *OTHERS)),
            )
    if not len(content):
        raise file.error("no rows")
    numbers = {name: _integers(file, content, name) for name in (*REQUIRED, *OPTIONAL) if name in content.column_names}
    arrival, prompts = numbers["arrival_ns"], numbers["input_tokens"]
    _check(
        file, "arrival_ns", arrival, (arrival >= 0) & (arrival <= LATEST_NS), f"a whole number from 0 to {LATEST_NS}"
    )
    for name in ("input_tokens", "output_tokens"):
        _check(file, name, numbers[name], (numbers[name] >= 1) & (numbers[name] <= MOST_TOKENS), TOKENS_ALLOWED)
    if "abort_ns" in numbers:
        abort = numbers["abort_ns"]
        fine = (abort == -1) | ((abort >= arrival) & (abort <= LATEST_NS))
        _check(file, "abort_ns", abort, fine, f"-1 (never), or a time from arrival_ns to {LATEST_NS}")
    session, outputs = numbers.get("session"), numbers["output_tokens"]
    waits_for = _waits_for(file, content, session)
    extends = numbers.get("extends")
    new = prompts if extends is None else _new_tokens(file, extends, waits_for, prompts, outputs)
    model, models = _models(file, content)
    return RequestTable(
        arrival_ns=arrival,
        input_tokens=prompts,
        output_tokens=outputs,
        session=session,
        priority=numbers.get("priority"),
        abort_ns=numbers.get("abort_ns"),
        waits_for=waits_for,
        extends=extends,
        model=model,
        models=models,
        segments=_segments(file, content, new, "input_tokens" if extends is None else "what is new in it"),
        token_ids=_ids(file, content, "token_ids", prompts, "as many as input_tokens"),
        output_ids=_ids(file, content, "output_ids", outputs, "none, or as many as output_tokens"),
        concurrency=_concurrency(file, content),
    )


def _integers(file: TraceFile, content: pa.Table, name: str) -> Ints:
    import pyarrow as pa

    column = content[name]
    if not pa.types.is_integer(column.type):
        raise file.error(f"column {name} is wrong", found=str(column.type), allowed="int64")
    _no_nulls(file, name, column)
    try:
        return column.cast(pa.int64()).to_numpy()
    except pa.ArrowInvalid:
        raise file.error(f"column {name} holds numbers beyond int64", found=str(column.type), allowed="int64") from None


def _no_nulls(file: TraceFile, name: str, column: Any) -> None:
    if column.null_count:
        row = column.is_null().to_numpy().argmax()
        raise file.error(f"{name} is missing", f"row {row}")


def _check(file: TraceFile, name: str, values: Ints, fine: NDArray[np.bool_], allowed: str) -> None:
    if not fine.all():
        row = int(np.argmin(fine))
        raise file.error(f"{name} is wrong", f"row {row}", found=int(values[row]), allowed=allowed)


def _lists(file: TraceFile, content: pa.Table, name: str, kind: pa.DataType) -> tuple[NDArray[Any], Ints]:
    """All values of a list column behind one another, and where each row begins (rows + 1 offsets)."""
    import pyarrow as pa

    column = content[name]
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)) or not pa.types.is_integer(
        column.type.value_type
    ):
        raise file.error(f"column {name} is wrong", found=str(column.type), allowed=f"list<{kind}>")
    _no_nulls(file, name, column)
    array: Any = column.combine_chunks().cast(pa.large_list(column.type.value_type))
    flat = array.flatten()
    if flat.null_count:
        raise file.error(f"column {name} has empty places in its lists", allowed=f"list<{kind}>")
    try:
        values = flat.cast(kind).to_numpy()
    except pa.ArrowInvalid:
        raise file.error(f"column {name} holds numbers beyond {kind}", found=str(column.type)) from None
    offsets = array.offsets.to_numpy()
    return values, offsets - offsets[0]


def _ids(file: TraceFile, content: pa.Table, name: str, tokens: Ints, allowed: str) -> list[NDArray[np.int32]] | None:
    import pyarrow as pa

    if name not in content.column_names:
        return None
    values, offsets = _lists(file, content, name, pa.int32())
    counts = np.diff(offsets)
    fine = counts == tokens
    if name == "output_ids":
        if "token_ids" not in content.column_names:
            raise file.error("output_ids need token_ids beside them", found="output_ids")
        fine |= counts == 0
    _check(file, f"number of {name}", counts, fine, allowed)
    return np.split(values, offsets[1:-1])


def _waits_for(file: TraceFile, content: pa.Table, session: Ints | None) -> Dependence | None:
    import pyarrow as pa

    present = [name for name in ("parents", "delay_ns") if name in content.column_names]
    if not present:
        return None
    if len(present) == 1:
        raise file.error("columns parents and delay_ns come together", found=present[0])
    parents, offsets = _lists(file, content, "parents", pa.int64())
    delay = _integers(file, content, "delay_ns")
    _check(file, "delay_ns", delay, (delay >= 0) & (delay <= LATEST_NS), f"a whole number from 0 to {LATEST_NS}")
    waits_for = Dependence(offsets, parents, delay)
    try:
        waits_for.check(session)
    except InputError as error:
        raise error.at(where=str(file.path)) from None
    return waits_for


def _new_tokens(file: TraceFile, extends: Ints, waits_for: Dependence | None, prompts: Ints, outputs: Ints) -> Ints:
    """Tokens of each prompt beyond those that it extends. What a row extends must have ended when it is released."""
    rows = np.flatnonzero(extends != -1)
    fine = (extends >= -1) & (extends < len(prompts))
    _check(file, "extends", extends, fine, f"-1 (none), or a row from 0 to {len(prompts) - 1}")
    _check(file, "extends", extends, extends == -1 if waits_for is None else fine, "-1 (none) where nobody waits")
    if waits_for is not None:
        direct = np.zeros(len(prompts), np.bool_)
        waiting = np.repeat(np.arange(len(prompts)), waits_for.counts)
        direct[waiting[waits_for.parents == extends[waiting]]] = True
        for row in rows[~direct[rows]].tolist():
            fine[row] = waits_for.descends(row, int(extends[row]))
        _check(file, "extends", extends, fine, "a row that this one waits for, at once or by way of others")
    quoted = np.where(extends < 0, 0, prompts[extends] + outputs[extends])
    _check(file, "input_tokens", prompts, prompts >= quoted, "at least the input_tokens + output_tokens of row extends")
    return prompts - quoted


def _models(file: TraceFile, content: pa.Table) -> tuple[Ints | None, tuple[str, ...]]:
    """Index and names of the models, in the order in which they appear."""
    import pyarrow as pa

    if "model" not in content.column_names:
        return None, ()
    column = content["model"]
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise file.error("column model is wrong", found=str(column.type), allowed="string")
    _no_nulls(file, "model", column)
    encoded = column.combine_chunks().dictionary_encode()
    return encoded.indices.to_numpy().astype(np.int64), tuple(map(str, encoded.dictionary.to_pylist()))


def _segments(file: TraceFile, content: pa.Table, tokens: Ints, meaning: str) -> list[list[Segment]] | None:
    import pyarrow as pa

    present = [name for name in ("seeds", "lengths") if name in content.column_names]
    if not present:
        return None
    if len(present) == 1:
        raise file.error("columns seeds and lengths come together", found=present[0])
    seeds, offsets = _lists(file, content, "seeds", pa.int64())
    lengths, lengths_offsets = _lists(file, content, "lengths", pa.int64())
    counts = np.diff(offsets)
    _check(file, "number of seeds", counts, counts == np.diff(lengths_offsets), "as many as lengths")
    row_of = np.repeat(np.arange(len(tokens)), counts)
    bad = (lengths < 1) | (lengths > MOST_TOKENS)
    if bad.any():
        at = int(np.argmax(bad))
        raise file.error("lengths is wrong", f"row {row_of[at]}", found=int(lengths[at]), allowed=TOKENS_ALLOWED)
    ends = np.concatenate(([0], lengths.cumsum()))
    total = ends[offsets[1:]] - ends[offsets[:-1]]
    _check(file, "sum of lengths", total, total == tokens, f"equal to {meaning}")
    pairs = list(zip(seeds.tolist(), lengths.tolist(), strict=True))
    bounds = offsets.tolist()
    return [pairs[begin:end] for begin, end in pairwise(bounds)]


def _concurrency(file: TraceFile, content: pa.Table) -> int | None:
    text = (content.schema.metadata or {}).get(CONCURRENCY)
    if text is None:
        return None
    if not text.isdigit() or int(text) < 1:
        raise file.error("concurrency is wrong", "metadata", found=text.decode(errors="replace"), allowed="from 1 on")
    return int(text)
