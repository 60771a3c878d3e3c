"""When requests are released: at their arrival, or, in a session, when the turns before them have ended."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np

from servetwin.engine.request import Request, Status
from servetwin.workload.table import RequestTable

_ENDED = {Status.FAILED: "failed", Status.ABORTED: "was aborted"}


class Sessions:
    """Which rows wait for which, as the run goes on. Without `waits_for` in the table every row is on its own.

    Invariant: each row is released once, or fails once with a turn before it, and never before all its parents have
    finished and its tool has run.
    """

    def __init__(self, table: RequestTable) -> None:
        self._table = table
        self.waiting = 0
        """rows that have neither been released nor failed"""
        self.shortest_ns = 0
        """shortest tool time: a turn is released no sooner than so long after the end of another request"""
        self._left: memoryview | None = None
        """unfinished parents of each row; -1: it has failed with one of them"""
        self._unit: memoryview | None = None
        waits = table.waits_for
        if waits is None:
            return
        units = table.units()
        offsets, children = waits.children()
        # Memoryviews are read item by item faster than arrays, and take no more room.
        self._unit, self._open = units.data, np.bincount(units).data
        self._delay, self._left = waits.delay_ns.data, waits.counts.data
        self._offsets, self._children = offsets.data, children.data
        self._latest: dict[int, int] = {}
        """the latest end of a parent so far, of rows that wait for others too"""
        turns = ~waits.roots
        self.waiting = int(turns.sum())
        self.shortest_ns = int(waits.delay_ns[turns].min()) if self.waiting else 0

    def roots(self) -> Iterator[tuple[int, int]]:
        """(arrival, row) of the rows that wait for nobody, in order of arrival, ties by row."""
        rows = np.flatnonzero(self._table.roots)
        arrivals = self._table.arrival_ns[rows]
        order = np.argsort(arrivals, kind="stable")
        for start in range(0, len(order), 1 << 12):  # Python's numbers take five times the room of the table's
            some = order[start : start + (1 << 12)]
            yield from zip(arrivals[some].tolist(), rows[some].tolist(), strict=True)

    def queue(self) -> list[list[int]]:
        """What waits for the places of a closed loop, in order of arrival: the roots of each session, or one row."""
        if self._unit is None:
            return [[row] for _, row in self.roots()]
        places: dict[int, list[int]] = {}
        for _, row in self.roots():
            places.setdefault(self._unit[row], []).append(row)
        return list(places.values())

    def ended(self, row: int) -> bool:
        """`row` has ended: whether it was the last of its session, so that a place of a closed loop is free."""
        if self._unit is None:
            return True
        unit = self._unit[row]
        self._open[unit] -= 1
        return not self._open[unit]

    def after(self, request: Request, now: int) -> tuple[list[tuple[int, int]], list[Request]]:
        """What the end of `request` brings about: (time, row) of turns to release, and the turns that fail with it.

        When a request has failed or was aborted, all that descend from it fail at once, each with its reason.
        """
        released: list[tuple[int, int]] = []
        failed: list[Request] = []
        if self._left is None:
            return released, failed
        left = self._left
        ended = [request]
        while ended:
            parent = ended.pop()
            for child in self._children[self._offsets[parent.row] : self._offsets[parent.row + 1]]:
                if left[child] < 0:
                    continue
                if parent.status != Status.FINISHED:
                    left[child] = -1
                    self.waiting -= 1
                    failed.append(self._failed(child, parent, now))
                    ended.append(failed[-1])
                    continue
                left[child] -= 1
                # Engines may run ahead of each other, so that the last end told is not always the latest.
                latest = max(now, self._latest.pop(child, 0))
                if left[child]:
                    self._latest[child] = latest
                else:
                    self.waiting -= 1
                    released.append((latest + self._delay[child], child))
        return released, failed

    def _failed(self, row: int, parent: Request, now: int) -> Request:
        table = self._table
        session = -1 if table.session is None else int(table.session[row])
        request = Request(row, now, int(table.input_tokens[row]), int(table.output_tokens[row]), session=session)
        request.status, request.finish_ns = Status.FAILED, now
        request.reason = f"the turn before it, request {parent.row}, {_ENDED[parent.status]}"
        return request


class Releases:
    """The rows of an open loop in the order of their release, ties by row: roots, and turns as they are told."""

    def __init__(self, roots: Iterator[tuple[int, int]]) -> None:
        self._roots = roots
        self._root = next(roots, None)
        self._turns: list[tuple[int, int]] = []
        self.next = self._root
        """(time, row) of the next release, None while there is none"""

    def add(self, time: int, row: int) -> None:
        """`row` is to be released at `time`, which has not passed."""
        heapq.heappush(self._turns, (time, row))
        self._look()

    def pop(self) -> tuple[int, int]:
        """Take the next release off."""
        taken = self.next
        assert taken is not None
        if taken is self._root:
            self._root = next(self._roots, None)
        else:
            heapq.heappop(self._turns)
        self._look()
        return taken

    def _look(self) -> None:
        root, turn = self._root, self._turns[0] if self._turns else None
        self.next = root if turn is None or (root is not None and root < turn) else turn
