"""Whether the engines of a run are stepped by compiled code."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from servetwin.cluster.routing.policies import looks_at_engines
from servetwin.cluster.routing.router import Router
from servetwin.engine.engine import Engine
from servetwin.engine.log import StepLog
from servetwin.workload.table import RequestTable

if TYPE_CHECKING:
    from servetwin.engine.compiled.fleet import Fleet

WORTHWHILE = 25_000
"""Requests from which on compiled code saves more time than it takes to load it (some 0.5 s, and 100 MiB)."""
WORTH_COMPILING = 150_000
"""Requests from which on it saves more than compiling takes, too, which is done once (some 12 s)."""


def fleet_for(engines: list[Engine], log: StepLog, router: Router, table: RequestTable, tokens: bool) -> Fleet | None:
    """A fleet of `engines`, all of them; None where numba is not installed, the run is short, or an engine, the router,
    the clients or what is recorded (`tokens`: times of tokens) want more than it can do."""
    if len(table) < WORTHWHILE or tokens or log.keeps_entries or find_spec("numba") is None:
        return None
    if table.abort_ns is not None and (table.abort_ns >= 0).any():
        return None
    if router.refresh or router.limits.queue_timeout is not None or router.limits.max_waiting is not None:
        return None
    if any(map(looks_at_engines, router.policies)):
        return None
    try:
        from servetwin.engine.compiled.fleet import Fleet, fits
        from servetwin.engine.compiled.kept import compiled_before
    except ImportError:  # a numba that does not go with this Python or numpy
        return None
    if not all(map(fits, engines)) or (len(table) < WORTH_COMPILING and not compiled_before()):
        return None
    return Fleet(engines, log)
