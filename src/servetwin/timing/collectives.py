"""A measured profile of one rank, and beside it the collectives between ranks, which it does not hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from servetwin.errors import InputError
from servetwin.model.kernels import Collective
from servetwin.timing.ledger import KINDS
from servetwin.timing.operators import Pricer, Source, as_shared
from servetwin.timing.profile import ProfileTimer
from servetwin.timing.shape import StepShape
from servetwin.timing.stages import apportion


class _Exchanged(NamedTuple):
    """Time of all collectives of a step in ns."""

    ns: int
    shares: tuple[int, ...]
    """by kind of knowledge, as in `Ledger`"""
    stages: list[int]
    """by pipeline stage"""


class WithCollectives:
    """Prices the steps of `ranks`, and every collective by the first of `sources` that knows it."""

    def __init__(self, ranks: ProfileTimer, collectives: Sequence[Collective], sources: Sequence[Source]) -> None:
        self.ranks, self.ledger, self.booked = ranks, ranks.ledger, None
        self._priced: dict[tuple[int, int, int], _Exchanged] = {}
        self._data = max((op.data for op in collectives), default=1)
        self._parts: list[tuple[Collective, Pricer]] = []
        for op in collectives:
            pricer = next((p for source in sources if (p := source.pricer(op)) is not None), None)
            if pricer is None:
                names = ", ".join(source.name for source in sources)
                raise InputError(f"nothing prices the operator {op.name}", field="timing.source", found=names)
            self._parts.append((op, as_shared(op, pricer)))

    def step_ns(self, shape: StepShape) -> int:
        exchanged = self._exchanged(shape, shape.tokens, shape.tokens * self._data)
        self.ledger.add(exchanged.shares)
        return self.ranks.step_ns(shape) + exchanged.ns

    def run_ns(self, shape: StepShape, steps: int) -> list[int]:
        exchanged = self._exchanged(shape, shape.tokens, shape.tokens * self._data)
        self.ledger.add(exchanged.shares, steps)
        return [ns + exchanged.ns for ns in self.ranks.run_ns(shape, steps)]

    def lockstep_ns(self, shape: StepShape, tokens: int, gathered: int) -> int:
        exchanged = self._exchanged(shape, tokens, gathered)
        self.ledger.add(exchanged.shares)
        return self.ranks.lockstep_ns(shape, tokens, gathered) + exchanged.ns

    def lockstep_run_ns(self, shape: StepShape, steps: int, tokens: int, gathered: int) -> list[int]:
        exchanged = self._exchanged(shape, tokens, gathered)
        self.ledger.add(exchanged.shares, steps)
        return [ns + exchanged.ns for ns in self.ranks.lockstep_run_ns(shape, steps, tokens, gathered)]

    def stage_ns(self, shape: StepShape) -> list[int]:
        exchanged = self._exchanged(shape, shape.tokens, shape.tokens * self._data)
        return [a + b for a, b in zip(self.ranks.stage_ns(shape), exchanged.stages, strict=True)]

    def run_stage_ns(self, shape: StepShape, steps: int) -> list[list[int]]:
        exchanged = self._exchanged(shape, shape.tokens, shape.tokens * self._data).stages
        each = self.ranks.run_stage_ns(shape, steps)
        return [[a + b for a, b in zip(stages, exchanged, strict=True)] for stages in each]

    def _exchanged(self, shape: StepShape, tokens: int, gathered: int) -> _Exchanged:
        key = tokens, gathered, shape.logits
        found = self._priced.get(key)
        if found is None:
            shares, stages = [0] * len(KINDS), [0] * len(self.ranks.stages)
            for op, pricer in self._parts:
                rows = {"logits": shape.logits, "gathered": gathered, "tokens": tokens}.get(op.rows, 1)
                if not rows:
                    continue
                once, how = pricer(rows)
                ns = round(once * sum(op.stages) / op.every)
                shares[KINDS.index(how)] += ns
                stages = [a + b for a, b in zip(stages, apportion(ns, op.stages), strict=True)]
            found = self._priced[key] = _Exchanged(sum(shares), tuple(shares), stages)
        return found
