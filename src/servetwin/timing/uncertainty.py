"""How far a step's price may be off: one standard deviation of its relative error, from the measured spread of sources.

Each source was compared with measurements that it had not seen: tables by leaving points out, the roofline by leaving
devices out. Kernels of one kind err together (the error of a table is the same in every layer and step); different
kinds, and the host's time, err independently.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from servetwin.model.kernels import Operator
from servetwin.timing.efficiency import roofline_error
from servetwin.timing.host import HostOverhead
from servetwin.timing.kernels.tables import KernelTables
from servetwin.timing.layers.curve import Curve
from servetwin.timing.operators import OperatorTimer
from servetwin.timing.overlay import CalibratedTimer
from servetwin.timing.profile import ProfileTimer
from servetwin.timing.protocol import StepTimer
from servetwin.timing.shape import StepShape
from servetwin.timing.strict import StrictTimer

MEDIAN = 0.6745
"""Median absolute value of a normal variable, in standard deviations."""
SMALL_KERNELS = 0.25
"""Norms, rotary embedding and the like: the rule for their launch (3 us) and the one that was timed (2.0 to 2.4 us)
differ by about a quarter."""
LINK = 0.2
"""Collectives over a link of given latency and bandwidth: a round figure, nothing was compared. Assumed."""
SERVED = 0.06
"""Between the sum of kernels that were timed and the steps of an engine that served: other releases, clocks, fusions.
From Llama-3.1-70B fp8 with vLLM 0.10 on H100 and H200, priced by kernel tables of vLLM 0.24: 7 to 8 % of TTFT and 4 to
5 % of TPOT in the mean over 100 published points (benchmarks/silicon.py)."""
SERVED_EXPERTS = 0.3
"""The same for the time of experts, whose kernels differ more between releases and settings: with gpt-oss-120b,
MiniMax-M2.5 and Kimi-K2.5 on the same devices TTFT is off by 9 to 39 % and TPOT by 7 to 21 %, most of it there."""
TABLES = {
    "gemm": "gemm",
    "moe": "moe",
    "context_attention": "context_attention",
    "generation_attention": "generation_attention",
    "mla_context": "mla_context",
    "mla_generation": "mla_generation",
    "allreduce": "allreduce",
    "allgather": "nccl_all_gather",
    "reducescatter": "nccl_reduce_scatter",
    "alltoall": "nccl_alltoall",
}
"""Operator kind -> the name that its tables begin with."""


class Spread:
    """Relative error (one standard deviation) of an operator's price, by source and kind of knowledge."""

    def __init__(self, tables: KernelTables | None) -> None:
        self._tables = tables
        self._known: dict[str, tuple[float, float]] = {}

    def __call__(self, operator: Operator, how: str, source: str) -> float:
        match source:
            case "roofline":
                return roofline_error(operator.kind)[0] / MEDIAN
            case "link":
                return LINK
        if how == "analytic":
            return SMALL_KERNELS
        median, p90 = self._table_error(TABLES.get(operator.kind, "gemm"))
        # Leaving a point out doubles the distance to its neighbours, so half of the error remains between points;
        # at a point itself what remains is how well a time repeats, which is less. Beyond the points the tail is meant.
        return {"measured": median / 2, "interpolated": median}.get(how, p90) / MEDIAN

    def _table_error(self, prefix: str) -> tuple[float, float]:
        """Median and 90th percentile of the leave-one-out error of a kind of table, the worst axis counting."""
        if prefix not in self._known:
            assert self._tables is not None
            names = [name for name in self._tables.profile.tables if name.startswith(prefix)]
            axes = [errors for name in names for errors in (self._tables.errors(name) or {}).values()]
            self._known[prefix] = (
                float(np.median([median for median, _ in axes])) if axes else 0.1,
                float(np.median([p90 for _, p90 in axes])) if axes else 0.3,
            )
        return self._known[prefix]


def step_error(timer: StepTimer, spread: Spread | None, host: HostOverhead, shape: StepShape) -> float:
    """Relative error (one standard deviation) of a step of `shape`, the host's part included."""
    if isinstance(timer, CalibratedTimer | StrictTimer):
        return step_error(timer.timer, spread, host, shape)
    saved = timer.ledger.copy()
    device = timer.step_ns(shape)
    timer.ledger.restore(saved)
    whole = device + host.gap(shape.seqs)
    if isinstance(timer, OperatorTimer):
        assert spread is not None
        variance = _operators_variance(timer, spread, shape)
    else:
        ranks = getattr(timer, "ranks", timer)
        if not isinstance(ranks, ProfileTimer):
            return 0.0
        alone = ranks.step_ns(shape)
        ranks.ledger.restore(saved)
        variance = _profile_variance(ranks, shape) + (LINK * (device - alone)) ** 2
    return math.sqrt(variance + host.gap_error_ns**2) / whole


def _operators_variance(timer: OperatorTimer, spread: Spread, shape: StepShape) -> float:
    """ns squared; kernels of one kind and source err together."""
    together: dict[tuple[str, str], float] = defaultdict(float)
    by_name = {part.operator.name: part.operator for part in timer.parts}
    for name, ns, how, source in timer.explain(shape):
        operator = by_name[name]
        together[operator.kind, source] += ns * spread(operator, how, source)
        together["", "served"] += ns * SERVED
        if operator.kind == "moe":
            together["moe", "served"] += ns * SERVED_EXPERTS
    return sum(error**2 for error in together.values())


def _profile_variance(timer: ProfileTimer, shape: StepShape) -> float:
    """ns squared, from the leave-one-out error of the dense curves and of attention (its skew model's held-out
    error)."""
    skew = timer.profile.data.get("skew", {}).get(timer.tensor, {})
    attention = float(skew.get("fit", {}).get("holdout", {}).get("p50", 0.02))
    dense = _left_out(timer.dense_curves())
    together = {"dense": 0.0, "attention": 0.0}
    for name, ns, how in timer.explain(shape):
        kind = "attention" if name == "attention" else "dense"
        error = attention if kind == "attention" else dense
        together[kind] += ns * error / MEDIAN * (3.0 if how == "extrapolated" else 1.0)
    return sum(error**2 for error in together.values())


def _left_out(curves: Sequence[Curve]) -> float:
    """Median relative error of a point interpolated between its neighbours, over all points of all curves."""
    errors: list[float] = []
    for curve in curves:
        x, y = np.asarray(curve.xs, dtype=np.float64), np.asarray(curve.ts, dtype=np.float64)
        if len(x) > 2:
            share = (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])
            between = y[:-2] + share * (y[2:] - y[:-2])
            errors += (np.abs(between - y[1:-1]) / y[1:-1]).tolist()
    return float(np.median(errors)) if errors else 0.0
