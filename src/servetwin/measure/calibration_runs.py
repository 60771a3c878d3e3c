"""The simulations that a calibration needs: observed runs under one overlay or another."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from servetwin.errors import InputError
from servetwin.measure.calibration_data import Ints, Observed
from servetwin.results.metrics import latencies
from servetwin.scenario import document
from servetwin.scenario.schema import Scenario
from servetwin.simulation import simulate
from servetwin.timing.overlay import Overlay

Floats = NDArray[np.float64]
Job = tuple[int, bool, Overlay]
"""which observed run, whether its short form, the overlay"""

FULL_KV = 0.98
"""share of KV blocks in use from which on a run counts as limited by them"""


@dataclass(frozen=True)
class Replay:
    """The figures of a simulated run, entry by entry those of the `Observed` run (ms)."""

    ttft_ms: Floats
    tpot_ms: Floats
    kv_limited: bool
    """requests were preempted, or nearly all KV blocks were in use"""


class Runs:
    """Simulates `observed` runs, `workers` at a time, none of them twice; a context manager.

    `tell(n)` is called with the number of simulations so far.
    """

    def __init__(self, observed: Sequence[Observed], workers: int, tell: Callable[[int], None] | None = None) -> None:
        self._observed, self._workers, self._tell = observed, workers, tell
        self._done: dict[Job, Replay] = {}
        self._pool: Executor | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Runs:
        if self._workers > 1:
            self._pool = self._stack.enter_context(ProcessPoolExecutor(self._workers))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None and kind is not None:
            self._pool.shutdown(cancel_futures=True)
        self._stack.close()

    def __call__(self, which: Iterable[int], overlays: Sequence[Overlay], short: bool = False) -> list[list[Replay]]:
        """The replays of the runs `which`, for each of `overlays`. Raises InputError naming the run that failed."""
        indices = list(which)
        jobs = [[self._job(i, short, overlay) for i in indices] for overlay in overlays]
        todo = list(dict.fromkeys(job for row in jobs for job in row if job not in self._done))
        work = [self._work(job) for job in todo]
        results = map(_replay, work) if self._pool is None else self._pool.map(_replay, work)
        for job, result in zip(todo, results, strict=True):
            self._done[job] = result
            if self._tell is not None:
                self._tell(len(self._done))
        return [[self._done[job] for job in row] for row in jobs]

    def _job(self, index: int, short: bool, overlay: Overlay) -> Job:
        one = self._observed[index]
        return index, short and one.short != one.scenario, overlay

    def _work(self, job: Job) -> tuple[str, Scenario, Path, Ints | None, Overlay]:
        one = self._observed[job[0]]
        return one.name, one.short if job[1] else one.scenario, one.base, one.request, job[2]


def _replay(work: tuple[str, Scenario, Path, Ints | None, Overlay]) -> Replay:
    name, scenario, base, request, overlay = work
    terms = {term: value for term, value in vars(overlay).items() if value is not None}
    with tempfile.TemporaryDirectory() as folder:
        if terms:
            file = Path(folder) / "overlay.yaml"
            file.write_text(document.write({"overlay": 1, "terms": terms}), encoding="utf-8")
            scenario = scenario.model_copy(update={"timing": scenario.timing.model_copy(update={"overlay": str(file)})})
        try:
            run = simulate(scenario, base)
        except InputError as error:
            raise error.at(where=name) from None
    if run.partial:
        raise KeyboardInterrupt
    finished = run.has_status("finished")
    wanted = np.arange(len(run)) if request is None else np.searchsorted(run.ints("request"), request)
    if not finished[wanted].all():
        reason = run.requests["reason"][int(wanted[np.argmin(finished[wanted])])]
        raise InputError(f"{int((~finished[wanted]).sum())} requests are not served: {reason}", where=name)
    columns = ("arrival_ns", "first_token_ns", "finish_ns", "output_tokens")
    times = latencies(*(run.ints(column)[wanted] for column in columns))
    ttft, tpot = times["ttft"] / 1e6, times["tpot"] / 1e6
    if request is None:
        known = tpot[~np.isnan(tpot)]
        ttft, tpot = ttft.mean(keepdims=True), np.array([known.mean() if len(known) else np.nan])
    total = np.asarray(run.kv_blocks_total, dtype=np.float64)[run.steps["engine"]]
    full = bool((run.steps["kv_blocks_used"] > FULL_KV * total).any())
    return Replay(ttft, tpot, full or bool(run.ints("preemptions").sum()))
