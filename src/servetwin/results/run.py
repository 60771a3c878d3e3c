"""What a simulation produced, before anything is computed from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Columns = Mapping[str, Ints | NDArray[np.float64] | Sequence[str]]

STATUSES = ("finished", "failed", "aborted")

REQUEST_COLUMNS = (
    "request", "session", "pool", "engine", "decode_engine", "status", "reason", "arrival_ns", "scheduled_ns",
    "first_token_ns", "finish_ns", "input_tokens", "output_tokens", "cached_tokens", "preemptions",
)  # fmt: skip
TEXT_COLUMNS = frozenset({"pool", "status", "reason", "source", "target"})

STEP_COLUMNS = (
    "engine", "step", "steps", "start_ns", "end_ns", "prefill_seqs", "prefill_tokens", "prefill_context",
    "decode_seqs", "decode_context", "running", "waiting", "kv_blocks_used", "preempted",
)  # fmt: skip

SESSION_COLUMNS = (
    "session", "status", "turns", "arrival_ns", "finish_ns", "tool_ns", "input_tokens", "output_tokens",
    "cached_tokens", "first_ttft_ns", "last_ttft_ns",
)  # fmt: skip

LINK_COLUMNS = ("source", "target", "bandwidth", "bytes", "utilization")
"""B/s in this direction; bytes carried in the run, and their share of what the link could carry in that time"""

SCHEDULE_COLUMNS = ("engine", "step", "request", "tokens")

PRICED = ("measured", "interpolated", "extrapolated", "analytic")


@dataclass(frozen=True, kw_only=True)
class Run:
    """The tables and totals of one run. Times are ns from the start of the run; -1 stands for "never" or "none".

    `requests` has the columns REQUEST_COLUMNS, one row a request: text (`pool`, `status` one of STATUSES, `reason`
    empty when finished) as lists of str, everything else int64 arrays. `output_tokens` counts tokens really produced,
    `arrival_ns` is when the request was released to the system, `finish_ns` when it ended (also by failure or abort;
    -1 where that moment is not known).

    `steps` has the columns STEP_COLUMNS, one row an engine step or a coalesced run of `steps` steps, by engine and
    step. `running` and `waiting` count requests once the batch of the step is decided.

    Tables of a run that is written while it goes on may lie on disk: a column is then read each time that it is asked
    for (`results.tables.StoredColumns`).
    """

    scenario_yaml: str
    """the scenario as resolved, every default written out"""
    seed: int
    requests: Columns
    steps: Mapping[str, Ints]
    itl: tuple[Ints, Ints]
    """gaps between tokens (ns) and how often each occurs; a gap may be listed more than once"""
    kv_blocks_total: Sequence[int]
    """KV blocks of each engine, by engine number"""
    engine_pools: Sequence[str] = ()
    """name of each engine's pool, by engine number"""
    prefix_queries: int = 0
    """prompt tokens looked up in the prefix cache"""
    prefix_hits: int = 0
    """prompt tokens found there"""
    priced_ns: Mapping[str, int] = field(default_factory=dict)
    """simulated step time by where its price came from (keys PRICED, absent = 0)"""
    assumed_ns: int = 0
    """the part of `priced_ns['analytic']` that rests on assumed efficiencies"""
    step_error: Mapping[str, float] = field(default_factory=dict)
    """relative error (one standard deviation) of step times: `prefill` of steps with prefills, `overall` of all,
    weighted by their time; empty when nothing is known of it"""
    events: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    partial: bool = False
    """the run was interrupted: what had not finished is not part of the result"""
    concurrency: int | None = None
    """clients of a closed loop, None when arrivals do not wait for earlier requests"""
    token_ns: Sequence[Ints] | None = None
    """with `--record tokens`: time of every token, a request; None also where the table of requests lies on disk"""
    schedule: Mapping[str, Ints] | None = None
    """with `--record schedule`: columns SCHEDULE_COLUMNS, in the order scheduled"""
    links: Columns | None = None
    """with `--record links`: columns LINK_COLUMNS, one row a link of the network, the busiest first"""
    sessions: Columns | None = None
    """columns SESSION_COLUMNS, one row a session all of whose requests have ended; None when there are no sessions"""
    slo: Mapping[str, int | None] | None = None
    """limits `ttft_ns`, `tpot_ns`, `e2el_ns`; absent or None = no limit"""
    versions: Mapping[str, str] = field(default_factory=dict)
    """versions of the program and its catalogue, hashes of profiles and traces"""
    notes: Sequence[str] = ()

    def ints(self, column: str) -> Ints:
        """An integer column of `requests`."""
        return np.asarray(self.requests[column], dtype=np.int64)

    def has_status(self, status: str) -> NDArray[np.bool_]:
        """Mask of the requests that ended with `status`."""
        return np.fromiter((s == status for s in self.requests["status"]), dtype=bool, count=len(self))

    def __len__(self) -> int:
        return len(self.requests["request"])
