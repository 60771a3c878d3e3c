"""Refusing to price what was not measured on this device."""

from __future__ import annotations

from servetwin.errors import InputError
from servetwin.timing.ledger import RunShares
from servetwin.timing.operators import OperatorTimer
from servetwin.timing.overlay import CalibratedTimer
from servetwin.timing.profile import ProfileTimer
from servetwin.timing.protocol import StepTimer
from servetwin.timing.shape import StepShape

FIELD = "timing.strict_measured"
ALLOWED = "steps within the measurements, or strict_measured: false"


class StrictTimer:
    """A timing source that ends the run at the first step which lies beyond the measurements behind it.

    Interpolation is allowed, and so are the small kernels and links that every source prices by a stated rule.

    Raises:
        InputError: at once, when an operator is priced by the roofline; at the first step of which a part is
            extrapolated or rests on assumed numbers.
    """

    def __init__(self, timer: StepTimer) -> None:
        self.timer, self.ledger = timer, timer.ledger
        if isinstance(timer, OperatorTimer):
            names = sorted({part.operator.name for part in timer.parts if part.source == "roofline"})
            if names:
                message = f"no measurement on this device prices {', '.join(names)}"
                raise InputError(message, field=FIELD, found=True, allowed=ALLOWED)

    def step_ns(self, shape: StepShape) -> int:
        before = self._beyond()
        ns = self.timer.step_ns(shape)
        self._check(before, shape)
        return ns

    def run_ns(self, shape: StepShape, steps: int) -> list[int]:
        saved, before = self.ledger.copy(), self._beyond()
        durations = self.timer.run_ns(shape, steps)
        try:
            self._check(before, shape.later(steps - 1))
        except InputError:  # whoever asked may not come to those steps
            self.ledger.restore(saved)
            raise
        return durations

    @property
    def booked(self) -> RunShares | None:
        return self.timer.booked

    def lockstep_ns(self, shape: StepShape, tokens: int, gathered: int) -> int:
        before = self._beyond()
        ns = self.timer.lockstep_ns(shape, tokens, gathered)
        self._check(before, shape)
        return ns

    def lockstep_run_ns(self, shape: StepShape, steps: int, tokens: int, gathered: int) -> list[int]:
        before = self._beyond()
        durations = self.timer.lockstep_run_ns(shape, steps, tokens, gathered)
        self._check(before, shape.later(steps - 1))
        return durations

    def stage_ns(self, shape: StepShape) -> list[int]:
        return self.timer.stage_ns(shape)

    def run_stage_ns(self, shape: StepShape, steps: int) -> list[list[int]]:
        return self.timer.run_stage_ns(shape, steps)

    def _beyond(self) -> int:
        return self.ledger.extrapolated + self.ledger.assumed

    def _check(self, before: int, shape: StepShape) -> None:
        if self._beyond() == before:
            return
        longest = max(shape.decode_max, shape.prefill_context)
        raise InputError(
            f"a step of {shape.tokens} new tokens in {shape.seqs} sequences, the longest with about {longest} tokens"
            f" before it, lies beyond what was measured{self._names(shape)}",
            field=FIELD,
            found=True,
            allowed=ALLOWED,
        )

    def _names(self, shape: StepShape) -> str:
        timer = self.timer.timer if isinstance(self.timer, CalibratedTimer) else self.timer
        timer = getattr(timer, "ranks", timer)
        if not isinstance(timer, OperatorTimer | ProfileTimer):
            return ""
        names = {row[0] for row in timer.explain(shape) if row[2] in ("extrapolated", "assumed")}
        return f" ({', '.join(sorted(names))})" if names else ""
