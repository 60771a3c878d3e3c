"""Who asks: requests drawn from distributions or replayed from a trace."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from servetwin.workload.readers.servetwin import write_workload
from servetwin.workload.synthetic import synthetic
from servetwin.workload.table import RequestTable
from servetwin.workload.trace import replayed

if TYPE_CHECKING:
    from servetwin.scenario.schema import SyntheticWorkload, TraceWorkload

__all__ = ["RequestTable", "build", "write_workload"]


def build(workload: SyntheticWorkload | TraceWorkload, seed: int, base: Path) -> RequestTable:
    """The requests of a scenario: a pure function of its workload section, the seed (>= 0) and the files it names.

    `base` is the folder that relative paths refer to (the one of the scenario file). Raises `InputError`.
    """
    from servetwin.scenario.schema import TraceWorkload

    if isinstance(workload, TraceWorkload):
        return replayed(workload, base)
    return synthetic(workload, seed, base)
