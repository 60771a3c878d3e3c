"""When requests arrive."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from servetwin.errors import InputError
from servetwin.workload.readers.source import LATEST_NS
from servetwin.workload.table import Ints

if TYPE_CHECKING:
    from servetwin.scenario.schema import Arrivals


def arrival_times(arrivals: Arrivals, requests: int, random: np.random.Generator) -> Ints:
    """Arrival of each request in ns, shape (requests,), ascending.

    In the open processes request i arrives after i + 1 gaps, so the first one arrives after the first gap. The gaps
    have mean 1/rate seconds: exponential (`poisson`), all equal (`constant`), or Gamma with shape `burstiness` and
    scale 1/(rate·burstiness) (`gamma`, as in `vllm bench serve`: 1 = Poisson, below 1 burstier, above more regular).
    `all_at_once` and `closed_loop` are all zeros; a closed loop is paced by the table's `concurrency`.

    Raises `InputError` when the last request would come after 146 years (2^62 ns), the end of the clock.
    """
    if arrivals.process in ("all_at_once", "closed_loop"):
        return np.zeros(requests, np.int64)
    assert arrivals.rate is not None  # the schema sees to it
    mean_ns = 1e9 / arrivals.rate
    times: NDArray[np.floating]
    if arrivals.process == "constant":
        times = np.arange(1, requests + 1) * mean_ns
    elif arrivals.process == "poisson":
        times = np.cumsum(random.exponential(mean_ns, requests))
    else:
        assert arrivals.burstiness is not None
        times = np.cumsum(random.gamma(arrivals.burstiness, mean_ns / arrivals.burstiness, requests))
    if not times[-1] <= LATEST_NS:
        raise InputError(
            f"so slow a rate spreads {requests} requests over more than 146 years",
            field="workload.arrivals.rate",
            found=arrivals.rate,
            allowed="more requests per second",
        )
    return np.asarray(np.rint(times), np.int64)
