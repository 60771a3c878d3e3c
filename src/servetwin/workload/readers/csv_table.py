"""CSV files, read column by column and checked as a whole; lines are looked at one by one only to place an error."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from servetwin.errors import InputError, nearest
from servetwin.workload.readers.source import LATEST_NS, MOST_TOKENS, TraceFile
from servetwin.workload.table import Ints


def folded(name: str) -> str:
    """A column name without case, spaces and underscores: `Context_Tokens` and `ContextTokens` are one column."""
    return name.casefold().replace("_", "").replace(" ", "")


def header_of(file: TraceFile) -> tuple[int, list[str]]:
    """Line number and column names of a CSV file's first line."""
    line, text = file.first_line()
    return line, [name.strip() for name in next(csv.reader([text]), [])]


class CsvTable:
    """The columns of a CSV file as text; the methods convert one and raise `InputError` with the line of a bad value.

    Columns are found by `folded` name. A file without a header line is given one as `header`.
    """

    def __init__(self, file: TraceFile, header: Sequence[str] | None = None) -> None:
        import pyarrow as pa
        import pyarrow.csv

        self.file = file
        self.header_line, self.header = (0, list(header)) if header else header_of(file)
        names = [str(position) for position in range(len(self.header))]  # positions: header names may be repeated
        try:
            self._columns: Any = pyarrow.csv.read_csv(
                io.BytesIO(file.text),
                read_options=pyarrow.csv.ReadOptions(column_names=names, skip_rows=self.header_line, use_threads=False),
                convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
            )
        except pa.ArrowInvalid as error:
            raise self._bad_line(str(error)) from None
        if not len(self._columns):
            raise file.error("no rows below the header")

    def __len__(self) -> int:
        return len(self._columns)

    def _bad_line(self, reason: str) -> InputError:
        """What made the parser stop (only now are lines looked at one by one)."""
        for line, content in self._data_lines():
            try:
                values = next(csv.reader([content.decode()]))
            except UnicodeDecodeError:
                return self.file.error("not UTF-8 text", line)
            except csv.Error as error:
                return self.file.error(f"not CSV: {error}", line)
            if len(values) != len(self.header):
                return self.file.error(
                    "wrong number of columns", line, found=len(values), allowed=str(len(self.header))
                )
        return self.file.error("no rows below the header" if "Empty CSV" in reason else f"not CSV: {reason}")

    def _data_lines(self) -> Iterator[tuple[int, bytes]]:
        return ((line, content) for line, content in self.file.lines() if line > self.header_line)

    def line_of(self, row: int) -> int:
        """Line number of a data row (rows count from 0)."""
        return next(islice(self._data_lines(), row, None))[0]

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {folded(name): at for at, name in reversed(list(enumerate(self.header)))}

    def text(self, name: str) -> Any:
        """A column as a pyarrow array of text without surrounding blanks."""
        import pyarrow.compute as pc

        position = self._positions.get(folded(name))
        if position is None:
            raise self.file.error(
                f"column {name} is missing",
                self.header_line,
                found=", ".join(self.header),
                hint=nearest(name, self.header),
            )
        return pc.utf8_trim_whitespace(self._columns.column(position))

    def tokens(self, name: str, least: int = 1) -> Ints:
        """Counts of tokens from `least` to 2147483647, shape (rows,)."""
        allowed = f"a whole number from {least} to {MOST_TOKENS}"
        values = self._numbers(name, allowed)
        self.check(name, (values >= least) & (values <= MOST_TOKENS) & (values == np.floor(values)), allowed)
        return values.astype(np.int64)

    def seconds_as_ns(self, name: str) -> Ints:
        """Times in seconds, from 0 on, as ns, shape (rows,)."""
        allowed = f"a number of seconds from 0 to {LATEST_NS // 10**9}"
        values = self._numbers(name, allowed) * 1e9
        self.check(name, (values >= 0) & (values <= LATEST_NS), allowed)
        return np.rint(values).astype(np.int64)

    def timestamps_ns(self, name: str) -> Ints:
        """Dates with a time of day (up to 9 decimals, with or without a time zone) as ns since 1970, shape (rows,)."""
        import pyarrow as pa

        text = self.text(name)
        zoned = str(text[0].as_py())[10:].strip("0123456789:. T") != ""
        kind = pa.timestamp("ns", "UTC" if zoned else None)
        times = self._cast(
            name, text, kind, "a time such as 2023-11-16 18:15:46.6805900, all with or all without a zone"
        )
        return np.asarray(times.cast(pa.int64()).to_numpy(), np.int64)

    def _numbers(self, name: str, allowed: str) -> NDArray[np.float64]:
        import pyarrow as pa

        values: NDArray[np.float64] = self._cast(name, self.text(name), pa.float64(), allowed).to_numpy()
        self.check(name, np.isfinite(values), allowed)
        return values

    def _cast(self, name: str, text: Any, kind: Any, allowed: str) -> Any:
        import pyarrow as pa

        def castable(rows: int) -> bool:
            try:
                text.slice(0, rows).cast(kind)
            except pa.ArrowInvalid:
                return False
            return True

        try:
            return text.cast(kind)
        except pa.ArrowInvalid:
            bad = _first(lambda rows: not castable(rows), len(text)) - 1
            raise self._wrong(name, bad, allowed) from None

    def check(self, name: str, fine: NDArray[np.bool_], allowed: str) -> None:
        if not fine.all():
            raise self._wrong(name, int(np.argmin(fine)), allowed)

    def _wrong(self, name: str, row: int, allowed: str) -> InputError:
        found = self.text(name)[row].as_py()
        return self.file.error(f"{name} is wrong", self.line_of(row), found=found, allowed=allowed)


def _first(holds: Callable[[int], bool], known: int) -> int:
    """The smallest n >= 1 that `holds`, given that all from it to `known` do (binary search)."""
    low, high = 0, known
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
