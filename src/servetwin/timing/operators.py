"""A step priced operator by operator, each by the best source that knows it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import add
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from servetwin.errors import InputError
from servetwin.model.kernels import AttentionKernel, Operator
from servetwin.timing.ledger import KINDS, Ledger, RunShares
from servetwin.timing.shape import StepShape
from servetwin.timing.stages import apportion

Price = tuple[float, str]
"""Time of one call in ns, and the kind of knowledge behind it (a field of `Ledger`)."""

UNEVEN = 0.055
"""How much of the difference between contexts as long as the longest, and equal ones of the same sum, decode attention
takes: t = t_equal + 0.055 (t_longest - t_equal). The pooled coefficient of LLMServingSim's published skew measurements
(RTX PRO 6000, vLLM 0.19: 0.054 to 0.075 over three models), taken over for all devices."""

MANY = 80
"""Steps of a run from which on it is priced with arrays; below, Python's numbers are faster."""

Needs = Literal["rows", "prefills", "decodes", "step"]
"""What an operator's time depends on: the rows it runs over; the prefills or the decodes of a step; all of it."""


class RowPricer(Protocol):
    def __call__(self, rows: int, /) -> Price: ...


class PrefillPricer(Protocol):
    def __call__(self, seqs: int, tokens: int, context: int, pairs: int, /) -> Price: ...


class DecodePricer(Protocol):
    def __call__(self, seqs: int, tokens: int, context: int, /) -> Price: ...


@runtime_checkable
class RunPricer(Protocol):
    """A `DecodePricer` that can price consecutive steps of an unchanged batch at once, with the same results."""

    def __call__(self, seqs: int, tokens: int, context: int, /) -> Price: ...

    def scaled(self, factor: float, /) -> RunPricer:
        """One whose times are `factor` times as long."""

    def few(
        self, seqs: int, tokens: int, context: int, longest: int, steps: int, uneven: float, calls: float, /
    ) -> tuple[list[int], Sequence[tuple[int, str]]]:
        """`int(ns * calls)` of the `uneven` price of steps with contexts `context`, `context + seqs`, …, the longest of
        which is `longest`, `longest + 1`, …; and (first step, kind of knowledge) of each change of kind. For a few
        steps, arrays cost too much."""

    def many(self, seqs: int, tokens: int, context: int, steps: int, /) -> tuple[NDArray[np.float64], NDArray[np.int8]]:
        """The same as arrays: ns, and the kind of knowledge as its place in KINDS."""


@runtime_checkable
class Scalable(Protocol):
    """A pricer that can be made one of longer times."""

    def scaled(self, factor: float, /) -> Pricer:
        """One whose times are `factor` times as long."""


class StepPricer(Protocol):
    def __call__(self, shape: StepShape, /) -> Price: ...


Pricer = Callable[..., Price]
"""One of the above, by what `needs` says of the operator."""


class Source(Protocol):
    """A source of operator prices on one device."""

    name: str

    def pricer(self, operator: Operator) -> Pricer | None:
        """What prices `operator`, prepared once; None when this source does not know it."""


def needs(operator: Operator) -> Needs:
    """What the operator's time depends on, and so which kind of pricer it takes."""
    if operator.rows == "decodes":
        return "decodes"
    match operator.kind:
        case "context_attention" | "mla_context":
            return "prefills"
        case "generation_attention" | "mla_generation":
            return "decodes"
        case "linear_attention" | "indexer":
            return "step"
        case _:
            return "rows"


def uneven(pricer: DecodePricer, seqs: int, tokens: int, context: int, longest: int) -> Price:
    """The price of decode attention over sequences of different lengths, `longest` among them."""
    ns, how = pricer(seqs, tokens, context)
    if longest * seqs > context:
        ns += UNEVEN * (pricer(seqs, tokens, longest * seqs)[0] - ns)
    return ns, how


def as_shared(operator: Operator, pricer: Pricer) -> Pricer:
    """`pricer` told of this rank's share, where ranks share rows or the KV of a sequence."""
    parts = operator.context if isinstance(operator, AttentionKernel) else operator.parts
    if operator.rows == "step":
        return lambda rows: pricer(1)
    if operator.rows == "decodes":
        return lambda seqs, tokens, context: pricer(tokens)
    if parts == 1:
        return pricer
    if isinstance(operator, AttentionKernel):
        return lambda seqs, tokens, context: pricer(seqs, tokens, -(-context // parts))
    return lambda rows: pricer(-(-rows // parts))


class _Part(NamedTuple):
    operator: Operator
    calls: float
    """in a step, over all layers and pipeline stages; whole but for what does not run in every step"""
    pricer: Pricer
    source: str


class OperatorTimer:
    """Sums operators over a model's layers, all pipeline stages together.

    Operators that depend only on the number of tokens, or of logits, are priced once for each number; attention is
    priced in each step. `padded(tokens, prefills)` is the number of tokens that the device computes (CUDA graphs).
    """

    def __init__(
        self,
        operators: Sequence[Operator],
        sources: Sequence[Source],
        padded: Callable[[int, int], int] | None = None,
    ) -> None:
        self.ledger = Ledger()
        self.booked: RunShares | None = None
        self.padded = padded
        self.parts: list[_Part] = []
        for operator in operators:
            for source in sources:
                pricer = source.pricer(operator)
                if pricer is not None:
                    calls = sum(operator.stages)
                    often = calls if operator.every == 1 else calls / operator.every
                    self.parts.append(_Part(operator, often, as_shared(operator, pricer), source.name))
                    break
            else:
                names = ", ".join(source.name for source in sources)
                raise InputError(f"nothing prices the operator {operator.name}", field="timing.source", found=names)
        self._data = max((part.operator.data for part in self.parts), default=1)
        self._on_gathered = self._of("rows", "gathered")
        self._on_own = [*self._of("rows", "tokens"), *self._of("rows", "step")]
        # Where nothing else is said, every rank of the group brings as many tokens as this one.
        self._on_tokens = [*self._on_own, *((calls, _times(pricer, self._data)) for calls, pricer in self._on_gathered)]
        self._on_logits = self._of("rows", "logits")
        self.on_prefills = self._of("prefills")
        """(calls a step, pricer) of the operators that run over prefills alone"""
        self.on_decodes = self._of("decodes")
        self.on_step = self._of("step")
        self._on_runs = [(count, pricer) for count, pricer in self.on_decodes if isinstance(pricer, RunPricer)]
        self._token_shares: dict[int, tuple[int, ...]] = {}
        self._logit_shares: dict[int, tuple[int, ...]] = {}
        self._lockstep_shares: dict[tuple[int, int], tuple[int, ...]] = {}
        self._varying = [part for part in self.parts if needs(part.operator) != "rows"]
        self._staged_runs = [
            (part.calls, part.pricer, part.operator.stages)
            for part in self._varying
            if needs(part.operator) == "decodes" and isinstance(part.pricer, RunPricer)
        ]
        self._stage_shares: dict[tuple[int, int], list[int]] = {}
        self._fixed_shares: dict[tuple[int, int], tuple[int, list[int]]] = {}

    def _of(self, kind: Needs, rows: str | None = None) -> list[tuple[float, Pricer]]:
        return [
            (part.calls, part.pricer)
            for part in self.parts
            if needs(part.operator) == kind and rows in (None, part.operator.rows)
        ]

    def step_ns(self, shape: StepShape) -> int:
        return self._step(shape, *self._fixed(shape[1] + shape[5], shape[0], shape[5]))

    def run_ns(self, shape: StepShape, steps: int) -> list[int]:
        self.booked = None
        if shape.prefill_seqs or self.on_step:
            return [self.step_ns(shape.later(i)) for i in range(steps)]
        return self._run(shape, steps, *self._fixed(shape.decode_tokens, 0, shape.decode_tokens))

    def lockstep_ns(self, shape: StepShape, tokens: int, gathered: int) -> int:
        fixed = self._lockstep_fixed(shape, tokens, gathered)
        return self._step(shape, sum(fixed), fixed)

    def lockstep_run_ns(self, shape: StepShape, steps: int, tokens: int, gathered: int) -> list[int]:
        if shape.prefill_seqs or self.on_step:
            return [self.lockstep_ns(shape.later(i), tokens, gathered) for i in range(steps)]
        fixed = self._lockstep_fixed(shape, tokens, gathered)
        return self._run(shape, steps, sum(fixed), fixed)

    def _step(self, shape: StepShape, total: int, fixed: list[int]) -> int:
        """A step of which `fixed`, by kind, is known from numbers of rows; `total` is its sum."""
        prefills, new, old, pairs, decodes, decoded, context, longest, _ = shape
        shares = fixed.copy()
        if prefills:
            for count, pricer in self.on_prefills:
                ns, how = pricer(prefills, new, old, pairs)
                whole = int(ns * count)
                shares[_INDEX[how]] += whole
                total += whole
        if decodes:
            differ = longest * decodes > context
            for count, pricer in self.on_decodes:
                ns, how = pricer(decodes, decoded, context)
                if differ:
                    ns += UNEVEN * (pricer(decodes, decoded, longest * decodes)[0] - ns)
                whole = int(ns * count)
                shares[_INDEX[how]] += whole
                total += whole
        for count, pricer in self.on_step:
            ns, how = pricer(shape)
            whole = int(ns * count)
            shares[_INDEX[how]] += whole
            total += whole
        self.ledger.book(shares)
        return total

    def _run(self, shape: StepShape, steps: int, total: int, fixed: list[int]) -> list[int]:
        """The same for consecutive steps of an unchanged batch of decodes."""
        seqs, tokens, context, longest = shape[4:8]
        shares = [share * steps for share in fixed]
        if not seqs:
            durations = [total] * steps
        elif len(self._on_runs) < len(self.on_decodes):
            durations = self._step_by_step(shape, steps, total, shares)
        elif steps < MANY:
            durations, kept = [total] * steps, []
            for count, pricer in self._on_runs:
                part = pricer.few(seqs, tokens, context, longest, steps, UNEVEN, count)
                durations = list(map(add, durations, part[0]))
                kept.append(part)
            self.booked = RunShares(fixed, kept)
            shares = self.booked.between(0, steps)
        else:
            whole_steps = np.full(steps, total, np.int64)
            for count, pricer in self._on_runs:
                times, kinds = pricer.many(seqs, tokens, context, steps)
                if longest * seqs > context:
                    times += UNEVEN * (pricer.many(seqs, tokens, longest * seqs, steps)[0] - times)
                parts = (times * count).astype(np.int64)
                whole_steps += parts
                for kind in range(int(kinds.min()), int(kinds.max()) + 1):
                    shares[kind] += int(parts[kinds == kind].sum())
            durations = whole_steps.tolist()
        self.ledger.book(shares)
        return durations

    def _step_by_step(self, shape: StepShape, steps: int, total: int, shares: list[int]) -> list[int]:
        seqs, tokens, context, longest = shape[4:8]
        durations = []
        for _ in range(steps):
            duration = total
            for count, pricer in self.on_decodes:
                ns, how = uneven(pricer, seqs, tokens, context, longest)
                whole = int(ns * count)
                shares[_INDEX[how]] += whole
                duration += whole
            durations.append(duration)
            context += seqs
            longest += 1
        return durations

    def _lockstep_fixed(self, shape: StepShape, tokens: int, gathered: int) -> list[int]:
        """Shares of all that depends on numbers of rows alone."""
        if self.padded is not None:
            padded = self.padded(tokens, shape.prefill_seqs)
            tokens, gathered = padded, gathered + self._data * (padded - tokens)
        dense = self._lockstep_shares.get((tokens, gathered))
        if dense is None:
            shares = [0] * len(KINDS)
            _add(shares, self._on_own, tokens)
            _add(shares, self._on_gathered, gathered)
            dense = self._lockstep_shares[tokens, gathered] = _at_least(shares)
        logits = shape.logits
        if not logits:  # a dummy batch: nobody wants a token of it
            return list(dense)
        head = self.on_logits(logits)
        return [a + b for a, b in zip(dense, head, strict=True)]

    def stage_ns(self, shape: StepShape) -> list[int]:
        fixed = self._stages_fixed(shape)
        return [a + b for a, b in zip(fixed, self._by_stage(self._priced(shape, self._varying)), strict=True)]

    def run_stage_ns(self, shape: StepShape, steps: int) -> list[list[int]]:
        if self.on_step or len(self._on_runs) < len(self.on_decodes):
            return [self.stage_ns(shape.later(i)) for i in range(steps)]
        seqs, tokens, context, longest = shape[4:8]
        each = [self._stages_fixed(shape)] * steps
        for calls, pricer, weights in self._staged_runs:
            wholes, _ = pricer.few(seqs, tokens, context, longest, steps, UNEVEN, calls)
            parts = [apportion(ns, weights) for ns in wholes]
            each = [list(map(add, *pair)) for pair in zip(each, parts, strict=True)]
        return each

    def _stages_fixed(self, shape: StepShape) -> list[int]:
        """Time by stage of all operators that depend on numbers of rows alone."""
        tokens, logits = shape.tokens, shape.logits
        if self.padded is not None:
            tokens = self.padded(tokens, shape.prefill_seqs)
        fixed = self._stage_shares.get((tokens, logits))
        if fixed is None:
            fixed = self._by_stage(self._priced(shape, [part for part in self.parts if needs(part.operator) == "rows"]))
            dense, head = self.on_tokens(tokens), self.on_logits(logits)
            fixed[-1] += sum(dense) + sum(head) - sum(fixed)  # the 1 ns that a step takes at least
            self._stage_shares[tokens, logits] = fixed
        return fixed

    def _by_stage(self, priced: Iterable[tuple[_Part, int, str]]) -> list[int]:
        stages = [0] * len(self.parts[0].operator.stages)
        for part, ns, _ in priced:
            stages = [a + b for a, b in zip(stages, apportion(ns, part.operator.stages), strict=True)]
        return stages

    def _fixed(self, tokens: int, prefills: int, decoded: int) -> tuple[int, list[int]]:
        """Time of all operators that depend on numbers of rows alone: the sum, and by kind."""
        if self.padded is not None:
            tokens = self.padded(tokens, prefills)
        logits = prefills + decoded
        found = self._fixed_shares.get((tokens, logits))
        if found is None:
            dense, head = self.on_tokens(tokens), self.on_logits(logits)
            shares = [a + b for a, b in zip(dense, head, strict=True)]
            found = self._fixed_shares[tokens, logits] = sum(shares), shares
        return found

    def explain(self, shape: StepShape) -> list[tuple[str, int, str, str]]:
        """(operator, ns over all layers, kind of knowledge, source) of every operator of the step; the ns add up to
        `step_ns`."""
        return [(part.operator.name, ns, how, part.source) for part, ns, how in self._priced(shape, self.parts)]

    def _priced(self, shape: StepShape, parts: Iterable[_Part]) -> Iterator[tuple[_Part, int, str]]:
        """Those of `parts` that the step runs, with their ns over all layers and the kind of knowledge."""
        for part in parts:
            operator, count, pricer, _ = part
            match needs(operator):
                case "rows":
                    size = shape.logits if operator.rows == "logits" else shape.tokens
                    if operator.rows != "logits" and self.padded is not None:
                        size = self.padded(size, shape.prefill_seqs)
                    ns, how = pricer(size * operator.data)
                case "prefills":
                    if not shape.prefill_seqs:
                        continue
                    ns, how = pricer(*shape[:4])
                case "decodes":
                    if not shape.decode_seqs:
                        continue
                    ns, how = uneven(pricer, *shape[4:8])
                case "step":
                    ns, how = pricer(shape)
            yield part, int(ns * count), how

    def on_tokens(self, tokens: int) -> tuple[int, ...]:
        """Time, by kind of knowledge, of the operators that run over all tokens of a step; padding is counted in."""
        return self._token_shares.get(tokens) or self._rows(self._token_shares, self._on_tokens, tokens)

    def on_logits(self, logits: int) -> tuple[int, ...]:
        """The same of those that run over its logits."""
        return self._logit_shares.get(logits) or self._rows(self._logit_shares, self._on_logits, logits)

    def _rows(self, known: dict[int, tuple[int, ...]], parts: list[tuple[float, Pricer]], rows: int) -> tuple[int, ...]:
        shares = [0] * len(KINDS)
        _add(shares, parts, rows)
        found = known[rows] = _at_least(shares)
        return found


def _add(shares: list[int], parts: Sequence[tuple[float, Pricer]], rows: int) -> None:
    """Add the time of operators, (calls, pricer), over so many rows to `shares`, by kind of knowledge."""
    for count, pricer in parts:
        ns, how = pricer(rows)
        shares[_INDEX[how]] += int(ns * count)


def _at_least(shares: list[int]) -> tuple[int, ...]:
    """A step takes at least 1 ns."""
    if not any(shares):
        shares[-1] = 1
    return tuple(shares)


def _times(pricer: Pricer, data: int) -> Pricer:
    return lambda rows: pricer(rows * data)


_INDEX = {kind: i for i, kind in enumerate(KINDS)}
