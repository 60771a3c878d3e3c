"""Turns that wait for others: the directed acyclic graph over the requests of a workload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from servetwin.errors import InputError

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Dependence:
    """Which rows of a table wait for which others, in compressed rows (24 bytes a row of a chain).

    Row r waits for `parents[offsets[r]:offsets[r + 1]]`; it is released `delay_ns[r]` (the time that a tool takes)
    after the last of them has finished. A row without parents is a root: it comes at its own `arrival_ns`.
    """

    offsets: Ints
    """shape (rows + 1,)"""
    parents: Ints
    delay_ns: Ints
    """shape (rows,); 0 for roots"""

    @classmethod
    def of(cls, parents: Sequence[Sequence[int]], delay_ns: Sequence[int]) -> Dependence:
        """From the parents of each row and its delay."""
        counts = np.fromiter(map(len, parents), np.int64, len(parents))
        flat = np.fromiter((parent for row in parents for parent in row), np.int64, int(counts.sum()))
        return cls(np.concatenate(([0], counts.cumsum())), flat, np.asarray(delay_ns, np.int64))

    def __len__(self) -> int:
        return len(self.delay_ns)

    def __getitem__(self, row: int) -> Ints:
        """The parents of `row`."""
        return self.parents[self.offsets[row] : self.offsets[row + 1]]

    @property
    def counts(self) -> Ints:
        """Number of parents of each row."""
        return np.diff(self.offsets)

    @property
    def roots(self) -> NDArray[np.bool_]:
        """Mask of the rows that wait for nobody."""
        return np.equal(self.counts, 0)

    def children(self) -> tuple[Ints, Ints]:
        """The graph the other way round: offsets (rows + 1) and, row by row, those that wait for it, ascending."""
        waiting = np.repeat(np.arange(len(self)), self.counts)
        order = np.argsort(self.parents, kind="stable")
        ends = np.bincount(self.parents, minlength=len(self)).cumsum()
        return np.concatenate(([0], ends)), waiting[order]

    def take(self, rows: Ints, new_of: Ints) -> Dependence:
        """The graph over `rows` alone; `new_of[old row]` is a row's new number. They must hold their parents too."""
        counts = self.counts[rows]
        offsets = np.concatenate(([0], counts.cumsum()))
        at = np.repeat(self.offsets[rows] - offsets[:-1], counts) + np.arange(offsets[-1])
        return Dependence(offsets, new_of[self.parents[at]], self.delay_ns[rows])

    def check(self, session: Ints | None) -> None:
        """Raises `InputError` (without a file) for a parent that is no row or of another session, or a cycle."""
        rows = len(self)
        waiting = np.repeat(np.arange(rows), self.counts)

        def refuse(bad: NDArray[np.bool_], message: str, allowed: str) -> None:
            if bad.any():
                edge = int(np.argmax(bad))
                found = int(self.parents[edge])
                raise InputError(message, field=f"row {waiting[edge]}", found=found, allowed=allowed)

        refuse((self.parents < 0) | (self.parents >= rows), "a parent is no row", f"a row from 0 to {rows - 1}")
        theirs = np.full(rows, -1) if session is None else session
        own = theirs[waiting]
        refuse(
            (own < 0) | (own != theirs[self.parents]),
            "a parent is of another session",
            "a row of the same session (column session, from 0 on)",
        )
        if (self.parents >= waiting).any() and (cycle := self._cycle()):
            named = " -> ".join(map(str, cycle))
            raise InputError(f"requests wait for each other in a circle: {named}", field=f"row {cycle[0]}")

    def _cycle(self) -> list[int]:
        """The rows of a circle, the first one again at the end; empty when there is none (Kahn's algorithm)."""
        left = self.counts.tolist()
        offsets, children = (part.tolist() for part in self.children())
        free = [row for row, count in enumerate(left) if not count]
        while free:
            row = free.pop()
            for child in children[offsets[row] : offsets[row + 1]]:
                left[child] -= 1
                if not left[child]:
                    free.append(child)
        row = next((row for row, count in enumerate(left) if count), -1)
        if row < 0:
            return []
        seen: dict[int, int] = {}
        path: list[int] = []
        while row not in seen:
            seen[row] = len(path)
            path.append(row)
            # Of the rows that are left, each has a parent that is left too.
            row = next(parent for parent in self[row].tolist() if left[parent])
        circle = path[seen[row] :]
        least = circle.index(min(circle))
        circle = circle[least:] + circle[:least]
        return [*circle, circle[0]]

    def descends(self, row: int, ancestor: int) -> bool:
        """Whether `row` is released only after `ancestor` has finished."""
        todo, seen = [row], {row}
        while todo:
            for parent in self[todo.pop()].tolist():
                if parent == ancestor:
                    return True
                if parent not in seen:
                    seen.add(parent)
                    todo.append(parent)
        return False
