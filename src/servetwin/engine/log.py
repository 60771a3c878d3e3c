"""What an engine did, step by step: plain columns that results are made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from servetwin.engine.batch import Batch
from servetwin.timing.shape import StepShape

Ints = NDArray[np.int64]

PACKED = 1 << 16
"""Rows that are packed into arrays, or handed over, at a time."""

Keep = Callable[[str, int, Mapping[str, Any]], None]
"""Takes the next rows of a table away: its name, how many times rows of it were taken before, the rows as columns.

Should a KeyboardInterrupt come in between, the same rows (and perhaps more) are handed over under the same number.
"""

COLUMNS = (
    "engine",
    "step",
    "steps",
    "start_ns",
    "end_ns",
    "prefill_seqs",
    "prefill_tokens",
    "prefill_context",
    "decode_seqs",
    "decode_context",
    "running",
    "waiting",
    "kv_blocks_used",
    "preempted",
)
ENTRIES = ("engine", "step", "request", "tokens")


@dataclass
class StepLog:
    """One row a step, or one for consecutive decode steps of an unchanged batch and queue (`steps` > 1).

    Such a row has the shape of its first step (each later one has `decode_seqs` more tokens of context), starts with
    the first and ends with the last, and counts the blocks used after its last step. It is as long as it can be,
    however the steps were carried out. `expand`: one row a step always.
    """

    expand: bool = False
    rows: list[tuple[int, ...]] = field(default_factory=list)
    """the last rows; earlier ones are kept as arrays (see `table`)"""
    schedule: list[tuple[int, int, int, int]] | None = None
    """ENTRIES of every entry in the order scheduled, when asked for"""
    keep: Keep | None = None
    """where rows go instead, `PACKED` at a time; the last ones wait for `hand_over_...`"""

    _open: dict[int, list[int]] = field(default_factory=dict)
    """the last row of each engine, which its next steps may belong to"""
    _packed: list[list[Ints]] = field(default_factory=list)
    _kept_rows: int = 0
    _kept_entries: int = 0

    def table(self) -> dict[str, Ints]:
        """All rows so far, column by column, by engine and step; without those that `keep` took."""
        self._close()
        self._pack()
        engines = np.concatenate([columns[0] for columns in self._packed] or [np.empty(0, np.int64)])
        order = np.argsort(engines, kind="stable")  # an engine's steps come in order
        whole: list[Ints] = []
        for i in range(len(COLUMNS)):
            parts = [columns[i] for columns in self._packed] or [engines]
            whole.append(np.concatenate(parts).astype(np.int64)[order])
            for columns in self._packed:  # one column at a time is there twice
                columns[i] = whole[0][:0]
        self._packed = [whole]
        return dict(zip(COLUMNS, whole, strict=True))

    def _pack(self) -> None:
        if self.rows:
            table = np.array(self.rows, np.int64)
            packed = [narrowed(table[:, i]) for i in range(len(COLUMNS))]
            self._packed, self.rows = [*self._packed, packed], []

    def _close(self) -> None:
        """Let no row grow any more."""
        self.rows += [tuple(row) for row in self._open.values()]
        self._open.clear()

    def _settle(self) -> None:
        if self.keep is None:
            self._pack()
        else:
            self._hand_over()

    def hand_over_steps(self) -> None:
        """Give `keep` all steps that are left."""
        self._close()
        self._hand_over()

    def _hand_over(self) -> None:
        assert self.keep is not None
        if self.rows:
            self.keep("steps", self._kept_rows, by_column(COLUMNS, self.rows))
            self._kept_rows, self.rows = self._kept_rows + 1, []

    def hand_over_entries(self) -> None:
        """Give `keep` all entries of the schedule that are left."""
        assert self.keep is not None
        if self.schedule:
            self.keep("schedule", self._kept_entries, by_column(ENTRIES, self.schedule))
            self._kept_entries, self.schedule = self._kept_entries + 1, []

    @property
    def keeps_entries(self) -> bool:
        return self.schedule is not None

    def step(self, engine: int, batch: Batch, used: int) -> None:
        shape = batch.shape
        assert shape is not None
        self.add(
            [
                engine,
                batch.index,
                1,
                batch.begin_ns,
                batch.end_ns,
                shape.prefill_seqs,
                shape.prefill_tokens,
                shape.prefill_context,
                shape.decode_seqs,
                shape.decode_context,
                batch.running,
                batch.waiting,
                used,
                len(batch.preempted),
            ]
        )
        if self.schedule is not None:
            for request, tokens, _, _ in batch.entries():
                self.schedule.append((engine, batch.index, request.row, tokens))
            if self.keep is not None and len(self.schedule) >= PACKED:
                self.hand_over_entries()

    def add(self, row: list[int]) -> None:
        """Append a row of COLUMNS, or let the engine's last one grow by it."""
        last = self._open.get(row[0])
        if last is not None and not self.expand and continues(last, row):
            last[2] += row[2]
            last[4], last[12] = row[4], row[12]
            return
        self._open[row[0]] = row
        if last is not None:
            self.rows.append(tuple(last))
            if len(self.rows) >= PACKED:
                self._settle()

    def take(self, rows: Ints) -> None:
        """Append rows of COLUMNS, shape (rows, columns), none of which may grow."""
        if self.keep is None:
            self._pack()
            self._packed.append([narrowed(rows[:, i]) for i in range(len(COLUMNS))])
        else:
            self._hand_over()
            self.keep("steps", self._kept_rows, {name: rows[:, i] for i, name in enumerate(COLUMNS)})
            self._kept_rows += 1

    def run(
        self,
        engine: int,
        first: int,
        shape: StepShape,
        begins: list[int],
        ends: list[int],
        used: list[int],
        queue: tuple[int, int],
        requests: list[int],
    ) -> None:
        """`len(ends)` consecutive steps of the decodes `requests`; `queue` = (running, waiting) throughout."""
        steps = len(ends)
        seqs, context = shape.decode_seqs, shape.decode_context
        if not self.expand:
            self.add([engine, first, steps, begins[0], ends[-1], 0, 0, 0, seqs, context, *queue, used[-1], 0])
        else:
            for i in range(steps):
                later = context + i * seqs
                self.add([engine, first + i, 1, begins[i], ends[i], 0, 0, 0, seqs, later, *queue, used[i], 0])
        if self.schedule is not None:
            tokens = shape.decode_tokens // max(1, seqs)
            for i in range(steps):
                self.schedule += [(engine, first + i, row, tokens) for row in requests]
            if self.keep is not None and len(self.schedule) >= PACKED:
                self.hand_over_entries()


def continues(last: list[int], row: list[int]) -> bool:
    """Whether both are decode steps of the same batch, one behind the other."""
    _, _, steps, _, _, prefills, _, _, decodes, context, running, waiting, _, preempted = last
    return (
        context + steps * decodes == row[9]
        and decodes == row[8]
        and not (prefills or row[5] or preempted or row[13])
        and running == row[10]
        and waiting == row[11]
    )


def by_column(names: Sequence[str], rows: Sequence[tuple[int, ...]]) -> dict[str, Ints]:
    table = np.array(rows, np.int64).reshape(-1, len(names))
    return {name: table[:, i] for i, name in enumerate(names)}


def narrowed(column: Ints) -> Ints:
    """The same numbers in half the room, if they fit (of columns but the times, most do)."""
    small = column.astype(np.int32)
    return small if (small == column).all() else column.copy()  # type: ignore[return-value]
