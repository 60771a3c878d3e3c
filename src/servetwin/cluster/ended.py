"""What stays of requests that have ended: a few numbers each, column by column."""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from servetwin.engine.log import Keep
from servetwin.engine.request import Request, Status
from servetwin.engine.tokens import TokenTimes

Ints = NDArray[np.int64]

NUMBERS = (
    "request", "session", "engine", "arrival_ns", "scheduled_ns", "first_token_ns", "finish_ns", "input_tokens",
    "output_tokens", "cached_tokens", "preemptions", "status",
)  # fmt: skip
KEPT = 1 << 16
"""Requests that are handed over at a time."""
STATUS: dict[int, str] = {Status.FINISHED: "finished", Status.ABORTED: "aborted", Status.FAILED: "failed"}
_NUMBERS = re.compile(r"\d+")


class EndedRequests:
    """Takes requests as they end and lets go of them. 12 numbers of 8 bytes each, and the reason of those that failed
    or were aborted; `token_ns` too, where it is recorded.

    With `keep`, they are handed over KEPT at a time and let go of altogether; the last ones wait for
    `hand_over`.
    """

    def __init__(self, pools: Sequence[str], keep: Keep | None = None) -> None:
        """`pools` names the pool of each engine."""
        self._pools, self._keep = pools, keep
        self._parts, self._before = 0, 0
        """how many times requests were handed over, and how many"""
        self._numbers = array("q")
        self._reasons: dict[int, str] = {}
        """by row"""
        self._failed: dict[str, tuple[int, str]] = {}
        """how many failed for reasons that differ in numbers alone, and the first reason"""
        self._token_ns: list[TokenTimes] = []

    def __len__(self) -> int:
        return self._before + self._held

    @property
    def _held(self) -> int:
        return len(self._numbers) // len(NUMBERS)

    def add(self, request: Request) -> None:
        if request.status != Status.FINISHED:
            self._reasons[request.row] = request.reason
            if request.status == Status.FAILED:
                kind = _NUMBERS.sub("", request.reason)
                count, first = self._failed.get(kind, (0, request.reason))
                self._failed[kind] = count + 1, first
        if request.token_ns is not None:
            self._token_ns.append(request.token_ns)
        # Last and at once, so that an interrupt leaves no half of a request.
        self._numbers.extend(
            (
                request.row,
                request.session,
                request.engine,
                request.arrival_ns,
                request.scheduled_ns,
                request.first_token_ns,
                request.finish_ns,
                request.prompt,
                request.outputs,
                request.cached_tokens,
                request.preemptions,
                request.status,
            )
        )
        if self._keep is not None and self._held >= KEPT:
            self.hand_over()

    def hand_over(self) -> None:
        """Give `keep` all that are left."""
        assert self._keep is not None
        if not self._held:
            return
        columns: dict[str, Any] = dict(self.columns())
        if self._token_ns:
            columns["token_ns"] = self.token_ns()
        self._keep("requests", self._parts, columns)
        parts, before, none = self._parts + 1, len(self), array("q")
        # At once, so that after an interrupt they have been handed over or have not.
        self._parts, self._before, self._numbers, self._token_ns, self._reasons = parts, before, none, [], {}

    def columns(self) -> dict[str, Ints | Sequence[str]]:
        """The columns of the table of requests, by row of the workload; without those handed over."""
        table = np.frombuffer(self._numbers, np.int64).reshape(-1, len(NUMBERS))
        order = self._order()
        numbers = {name: table[order, i] for i, name in enumerate(NUMBERS)}
        statuses = numbers.pop("status").tolist()
        named = ["", *self._pools]
        return {
            **numbers,
            "decode_engine": np.full(self._held, -1, np.int64),
            "pool": [named[engine + 1] for engine in numbers["engine"].tolist()],
            "status": [STATUS[status] for status in statuses],
            "reason": [self._reasons.get(row, "") for row in numbers["request"].tolist()],
        }

    def token_ns(self) -> list[Ints] | None:
        """The times of every token, a request, by row; None when they were not recorded."""
        return [self._token_ns[i].ns() for i in self._order().tolist()] if self._token_ns else None

    def failures(self) -> list[str]:
        """Why requests failed, a sentence for each kind of reason, the most frequent first."""
        found = sorted(self._failed.values(), key=lambda kind: -kind[0])
        return [f"{count} failed, the first of them: {reason}" for count, reason in found]

    def _order(self) -> NDArray[np.intp]:
        return np.argsort(np.frombuffer(self._numbers, np.int64)[:: len(NUMBERS)], kind="stable")
