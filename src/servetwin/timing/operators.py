"""A step priced operator by operator, each by the best source that knows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from servetwin.model.kernels import Operator
from servetwin.timing.ledger import KINDS, Ledger
from servetwin.timing.shape import StepShape

Price = tuple[float, str]
"""Time of one call in ns, and the kind of knowledge behind it (a field of `Ledger`)."""

Pricer = Callable[[StepShape], Price]


class Source(Protocol):
    """A source of operator prices on one device."""

    def pricer(self, operator: Operator) -> Pricer | None:
        """What prices `operator`, prepared once; None when this source does not know it."""


class OperatorTimer:
    """Sums operators over a model's layers, all pipeline stages together.

    Operators that depend only on the number of tokens, or of logits, are priced once for each number; attention is
    priced in each step. `padded(tokens)` is the number of tokens that the device computes for so many (CUDA graphs).
    """

    def __init__(
        self,
        operators: Sequence[Operator],
        sources: Sequence[Source],
        padded: Callable[[StepShape], int] | None = None,
    ) -> None:
        self.ledger = Ledger()
        self._padded = padded
        self._parts: list[tuple[str, int, Operator, Pricer]] = []
        for operator in operators:
            pricer = next((p for p in (source.pricer(operator) for source in sources) if p is not None), None)
            assert pricer is not None, f"no source prices {operator.name}"
            self._parts.append((_depends_on(operator), sum(operator.stages), operator, pricer))
        self._by_tokens: dict[int, tuple[int, ...]] = {}
        self._by_logits: dict[int, tuple[int, ...]] = {}
        self._context = [(n, p) for kind, n, _, p in self._parts if kind == "context"]
        self._generation = [(n, p) for kind, n, _, p in self._parts if kind == "generation"]
        self._both = [(n, p) for kind, n, _, p in self._parts if kind == "both"]

    def step_ns(self, shape: StepShape) -> int:
        shares = self._shares(shape)
        self.ledger.add(shares)
        return sum(shares)

    def run_ns(self, shape: StepShape, steps: int) -> list[int]:
        return [self.step_ns(shape.later(i)) for i in range(steps)]

    def explain(self, shape: StepShape) -> list[tuple[str, int, str]]:
        """(operator, ns over all layers, kind of knowledge) of every operator of the step, in order."""
        rows = []
        for kind, count, operator, pricer in self._parts:
            wide = self._wide(shape) if kind == "tokens" else shape
            if (kind == "context" and not shape.prefill_seqs) or (kind == "generation" and not shape.decode_seqs):
                continue
            ns, how = pricer(wide)
            rows.append((operator.name, round(ns * count), how))
        return rows

    def _wide(self, shape: StepShape) -> StepShape:
        """The shape with the tokens that padding adds, as decodes without context."""
        if self._padded is None:
            return shape
        more = self._padded(shape) - shape.tokens
        return shape._replace(decode_tokens=shape.decode_tokens + more) if more else shape

    def _shares(self, shape: StepShape) -> tuple[int, ...]:
        """ns by kind of knowledge."""
        wide = self._wide(shape)
        tokens, logits = wide.tokens, shape.logits
        dense = self._by_tokens.get(tokens)
        if dense is None:
            dense = self._by_tokens[tokens] = self._sum("tokens", wide)
        head = self._by_logits.get(logits)
        if head is None:
            head = self._by_logits[logits] = self._sum("logits", shape)
        shares = [a + b for a, b in zip(dense, head, strict=True)]
        running = list(self._both)
        if shape.prefill_seqs:
            running += self._context
        if shape.decode_seqs:
            running += self._generation
        for count, pricer in running:
            ns, how = pricer(shape)
            shares[_INDEX[how]] += round(ns * count)
        if not any(shares):
            shares[-1] = 1
        return tuple(shares)

    def _sum(self, kind: str, shape: StepShape) -> tuple[int, ...]:
        shares = [0] * len(KINDS)
        for depends, count, _, pricer in self._parts:
            if depends == kind:
                ns, how = pricer(shape)
                shares[_INDEX[how]] += round(ns * count)
        return tuple(shares)


_INDEX = {kind: i for i, kind in enumerate(KINDS)}


def _depends_on(operator: Operator) -> str:
    """What the operator's time is a function of."""
    match operator.kind:
        case "context_attention" | "mla_context":
            return "context"
        case "generation_attention" | "mla_generation":
            return "generation"
        case "linear_attention" | "indexer":
            return "both"
        case _:
            return "logits" if operator.rows == "logits" else "tokens"


