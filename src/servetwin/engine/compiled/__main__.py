"""`python -m servetwin.engine.compiled`: compile now what long runs would else compile first; numba keeps it."""

from __future__ import annotations

import sys
import time
from importlib.util import find_spec

from servetwin.engine.engine import Engine
from servetwin.engine.log import StepLog
from servetwin.engine.options import SchedulerOptions
from servetwin.engine.request import Request
from servetwin.engine.scheduler import Scheduler
from servetwin.timing.linear import LinearTimer


def main() -> None:
    if find_spec("numba") is None:
        sys.exit('numba is not installed; with it, long runs are faster: pip install "servetwin[numba]"')
    from servetwin.engine.compiled.columns import NEVER
    from servetwin.engine.compiled.fleet import Fleet

    options = SchedulerOptions(usable_blocks=100, max_num_batched_tokens=512, max_num_seqs=8, max_model_len=512)
    scheduler, log = Scheduler(options, options.new_kv_cache(shared=False), rides=True), StepLog()
    engine = Engine(0, scheduler, LinearTimer(1_000_000), log, lambda request, now: None)
    began = time.process_time()
    fleet = Fleet([engine], log)
    request = Request(0, 0, 100, 10)
    request.engine = 0
    fleet.send(request, 0, 0)
    ended, _ = fleet.advance(NEVER, 0, False)
    assert [request.outputs for request in ended] == [10]
    print(f"compiled engines are ready ({time.process_time() - began:.1f} s of CPU time)")


if __name__ == "__main__":
    main()
