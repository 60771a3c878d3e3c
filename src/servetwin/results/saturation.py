"""Did the queue still grow when the arrivals ended?

A run of finite length always ends, so its averages look finite even when the load is above what the system can serve;
they then only say how long the run was. The rule looks at the second half of the arrival window, in which A requests
arrive and the queue (requests that wait to be run) grows by G, so that A - G of them were taken up. The system is
*saturated* when both hold:

1. G exceeds twice the standard deviation of the difference of two Poisson counts, 2 * sqrt(A + (A - G)): a queue at
   exactly full load wanders about by so much without a trend.
2. The queue also grows over the last quarter: it is not a burst that is being worked off.

The only constant is the usual "two standard deviations". More regular traffic than Poisson makes the test careful, not
wrong. To be told from chance, an overload of factor r needs about 8 r (r + 1) / (r - 1)^2 requests (530 at 1.2, 48 at
2). A queue that is never empty in the last quarter and grows by less is reported as undecided.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from servetwin.results.run import Ints, Run


def _queue(run: Run) -> tuple[Ints, Ints]:
    """The queue over time: sorted times (ns) and the number of waiting requests from each of them on.

    A request waits from its arrival to the start of its first step, or to its end when it never ran. In front of a
    decode engine that it is handed over to it waits again; that part is known from the step table.
    """
    arrival, scheduled, finish = (run.ints(column) for column in ("arrival_ns", "scheduled_ns", "finish_ns"))
    left = np.where(scheduled >= 0, scheduled, finish)
    refused = (left < 0) & run.has_status("failed")  # at the door: it never waited
    left = left[left >= 0]
    times, changes = [arrival, left], [(~refused).astype(np.int64), np.full(len(left), -1)]
    decode_engine = run.ints("decode_engine")
    # An engine that decodes what it has prefilled itself has the queue that the request table already tells.
    handed_over = (decode_engine >= 0) & (decode_engine != run.ints("engine"))
    for engine in np.unique(decode_engine[handed_over]):
        rows = run.steps["engine"] == engine
        times.append(run.steps["start_ns"][rows])
        changes.append(np.diff(run.steps["waiting"][rows], prepend=0))
    moments, place = np.unique(np.concatenate(times), return_inverse=True)
    net = np.zeros(len(moments), dtype=np.int64)
    np.add.at(net, place, np.concatenate(changes))
    return moments, np.cumsum(net)


def _no(verdict: str, **figures: float) -> dict[str, Any]:
    return {"saturated": False, "verdict": verdict, **figures}


def saturation(run: Run) -> dict[str, Any]:
    """`{saturated, verdict}` and, for an open loop, the figures behind the verdict.

    `arrived` requests over the last `window_s` seconds of arrivals, `queue_start` and `queue_end` waiting requests at
    both ends of it, `arrival_rate` and `taken_up_rate` in requests/s.
    """
    arrival = run.ints("arrival_ns")
    if run.concurrency is not None:
        return _no("closed loop: clients wait for their answers, so the queue cannot grow without bound")
    if len(arrival) < 2 or arrival.min() == arrival.max():
        return _no("all requests arrive at once: the queue can only shrink")

    begin, end = int(arrival.min()), int(arrival.max())
    half, quarter = begin + (end - begin) // 2, begin + (end - begin) * 3 // 4
    times, level = _queue(run)
    at_half, at_quarter, at_end = np.searchsorted(times, (half, quarter, end), side="right") - 1
    before, after = int(level[at_half]), int(level[at_end])
    arrived, growth = int((arrival > half).sum()), after - before
    # Those under way between prefill and decode at the start of the window may queue up on top of the arrivals.
    taken_up, window_s = max(arrived - growth, 0), (end - half) / 1e9
    figures = {
        "window_s": window_s,
        "arrived": arrived,
        "queue_start": before,
        "queue_end": after,
        "arrival_rate": arrived / window_s,
        "taken_up_rate": taken_up / window_s,
    }
    by = (
        f"from {before} to {after} waiting requests over the last {window_s:.4g} s of arrivals "
        f"({figures['arrival_rate']:.4g} req/s arrive, {figures['taken_up_rate']:.4g} req/s are taken up)"
    )
    grows_still = after > level[at_quarter]
    if grows_still and growth > 2 * math.sqrt(arrived + taken_up):
        verdict = f"saturated: the queue grows {by}; latencies depend on the length of the run"
        return {"saturated": True, "verdict": verdict, **figures}
    if grows_still and growth > 0 and level[at_quarter : at_end + 1].min() > 0:
        verdict = f"undecided: the queue grows {by}, no more than chance may do; simulate more requests"
        return _no(verdict, **figures)
    return _no("keeps up: the queue shows no growth at the end of the arrivals", **figures)
