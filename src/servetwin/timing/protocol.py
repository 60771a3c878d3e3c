"""What every timing source offers."""

from __future__ import annotations

from typing import Protocol

from servetwin.timing.ledger import Ledger, RunShares
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

    @property
    def booked(self) -> RunShares | None:
        """What the last `run_ns` accounted in the ledger, step by step; None: this timer did not keep it."""

    def lockstep_ns(self, shape: StepShape, tokens: int, gathered: int) -> int:
        """Device time of one step of one rank of a data-parallel group in lock step.

        The rank computes `tokens` tokens, at least those of `shape`, the rest padding; the experts of the group see
        `gathered`, the sum over all ranks (without meaning for a dense model). Attention, output projection and sampler
        do only what is in `shape`, which for a dummy batch is all zeros. Padding to the sizes of CUDA graphs that the
        timer knows of comes on top, alike on every rank. `step_ns(shape)` is the same as that of a group whose ranks
        all have this `shape`.
        """

    def lockstep_run_ns(self, shape: StepShape, steps: int, tokens: int, gathered: int) -> list[int]:
        """The same of `steps` consecutive steps without prefill, the first of shape `shape`; equal, and accounted in
        the ledger equally, to `lockstep_ns` on shape.later(0), shape.later(1), ..."""

    def stage_ns(self, shape: StepShape) -> list[int]:
        """`step_ns(shape)` by pipeline stage, the hand-over counted at its sender. Books nothing in the ledger."""

    def run_stage_ns(self, shape: StepShape, steps: int) -> list[list[int]]:
        """`stage_ns` of each of `steps` consecutive steps of one pure-decode batch, the first of shape `shape`."""
