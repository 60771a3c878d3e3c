"""What every timing source offers."""

from __future__ import annotations

from typing import Protocol

from servetwin.timing.ledger import Ledger
from servetwin.timing.shape import StepShape


class StepTimer(Protocol):
    """Prices engine steps in integer ns (at least 1: a step of no time would stall the clock)."""

    ledger: Ledger

    def step_ns(self, shape: StepShape) -> int:
        """Device time of one step."""

    def run_ns(self, shape: StepShape, steps: int) -> list[int]:
        """Device times of `steps` consecutive steps of one pure-decode batch, the first of shape `shape`.

        Equal, and accounted in the ledger equally, to calling `step_ns` on shape.later(0), shape.later(1), ...
        Where one of them is refused with an InputError, none is accounted.
        """
