"""A step priced by a linear law: for teaching, queueing studies and conformance tests."""

from __future__ import annotations

from dataclasses import dataclass, field

from servetwin.timing.ledger import Ledger
from servetwin.timing.shape import StepShape


@dataclass
class LinearTimer:
    """step = base + prefill tokens * p + decode sequences * d + context tokens * c, all in integer ns.

    Draft tokens count as prefill tokens, a decode with drafts as one sequence; context is, for every scheduled request,
    its computed tokens before the step plus its scheduled tokens.
    """

    base_ns: int
    per_prefill_token_ns: int = 0
    per_decode_seq_ns: int = 0
    per_context_token_ns: int = 0
    pipeline: int = 1
    ledger: Ledger = field(default_factory=Ledger)
    booked = None

    def step_ns(self, shape: StepShape) -> int:
        drafts = shape.decode_tokens - shape.decode_seqs
        ns = (
            self.base_ns
            + self.per_prefill_token_ns * (shape.prefill_tokens + drafts)
            + self.per_decode_seq_ns * shape.decode_seqs
            + self.per_context_token_ns * shape.context
        )
        self.ledger.analytic += ns
        return ns

    def run_ns(self, shape: StepShape, steps: int) -> list[int]:
        first = self.step_ns(shape)
        growth = self.per_context_token_ns * shape.decode_seqs
        durations = [first + growth * i for i in range(steps)]
        self.ledger.analytic += sum(durations) - first
        return durations

    def lockstep_ns(self, shape: StepShape, tokens: int, gathered: int) -> int:
        """Each token of padding counts as a decode sequence without context."""
        padding = self.per_decode_seq_ns * (tokens - shape.tokens)
        self.ledger.analytic += padding
        return self.step_ns(shape) + padding

    def lockstep_run_ns(self, shape: StepShape, steps: int, tokens: int, gathered: int) -> list[int]:
        padding = self.per_decode_seq_ns * (tokens - shape.tokens)
        self.ledger.analytic += padding * steps
        return [ns + padding for ns in self.run_ns(shape, steps)]

    def stage_ns(self, shape: StepShape) -> list[int]:
        """Every stage takes an equal part, the last one the remainder."""
        before = self.ledger.copy()
        whole = self.step_ns(shape)
        self.ledger.restore(before)
        part = whole // self.pipeline
        return [part] * (self.pipeline - 1) + [whole - part * (self.pipeline - 1)]

    def run_stage_ns(self, shape: StepShape, steps: int) -> list[list[int]]:
        return [self.stage_ns(shape.later(i)) for i in range(steps)]
