"""Who asks: requests drawn from distributions, one by one or in sessions, or replayed from a trace."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from servetwin.errors import InputError
from servetwin.workload.readers.servetwin import write_workload
from servetwin.workload.readers.source import LATEST_NS
from servetwin.workload.sessions import agentic
from servetwin.workload.synthetic import synthetic
from servetwin.workload.table import RequestTable
from servetwin.workload.trace import replayed

if TYPE_CHECKING:
    from servetwin.scenario.schema import SessionWorkload, SyntheticWorkload, TraceWorkload

__all__ = ["RequestTable", "build", "write_workload"]


def build(workload: SyntheticWorkload | SessionWorkload | TraceWorkload, seed: int, base: Path) -> RequestTable:
    """The requests of a scenario: a pure function of its workload section, the seed (>= 0) and the files it names.

    `base` is the folder that relative paths refer to (the one of the scenario file). Raises `InputError`.
    """
    from servetwin.scenario.schema import SessionWorkload, TraceWorkload

    if isinstance(workload, TraceWorkload):
        table = replayed(workload, base)
    elif isinstance(workload, SessionWorkload):
        table = agentic(workload, seed, base)
    else:
        return synthetic(workload, seed, base)
    _check_clock(table)
    return table


def _check_clock(table: RequestTable) -> None:
    """Refuse sessions whose tools alone may run beyond the end of the clock."""
    if table.waits_for is None:
        return
    ends = table.arrival_ns.max() + np.bincount(table.units(), weights=table.waits_for.delay_ns)
    if ends.max() > LATEST_NS:
        raise InputError(
            "the tool times of a session add up to more than 146 years",
            field="workload",
            found=f"{ends.max() / 1e9:.3g} s",
            allowed=f"at most {LATEST_NS // 10**9} s",
        )
