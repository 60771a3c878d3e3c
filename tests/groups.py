"""Small simulations of lock-step groups for tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from running import LINEAR, Ran
from servetwin.cluster.build import Built, build
from servetwin.engine.engine import Engine
from servetwin.engine.lockstep import LockStep
from servetwin.engine.log import StepLog
from servetwin.engine.rank import Rank
from servetwin.scenario.schema import Scenario
from servetwin.timing.host import NO_OVERHEAD, HostOverhead
from servetwin.timing.linear import LinearTimer
from servetwin.timing.shape import StepShape
from servetwin.workload.table import RequestTable

GRAPHS = (1, 2, 4, 8, 16, 24, 32)


@dataclass
class GroupTimer(LinearTimer):
    """A linear law that counts tokens of padding in its own way, and tokens gathered from the whole group."""

    per_padding_ns: int = 0
    per_gathered_ns: int = 0

    def lockstep_ns(self, shape: StepShape, tokens: int, gathered: int) -> int:
        more = self.per_padding_ns * (tokens - shape.tokens) + self.per_gathered_ns * gathered
        self.ledger.analytic += more
        return self.step_ns(shape) + more

    def lockstep_run_ns(self, shape: StepShape, steps: int, tokens: int, gathered: int) -> list[int]:
        more = self.per_padding_ns * (tokens - shape.tokens) + self.per_gathered_ns * gathered
        self.ledger.analytic += more * steps
        return [ns + more for ns in self.run_ns(shape, steps)]


@dataclass
class GroupRan(Ran):
    """A finished simulation of groups."""

    groups: Sequence[LockStep] = ()

    def dummies(self) -> list[dict[str, int]]:
        return [row for row in self.steps() if row["prefill_seqs"] + row["decode_seqs"] == 0]

    def passes(self) -> list[list[tuple[int, int]]]:
        """(begin, end) of the passes of each engine."""
        return [
            [(row["start_ns"], row["end_ns"]) for row in self.steps() if row["engine"] == number]
            for number in range(len(self.engines))
        ]


def pipelined(scenario: Scenario, pipeline: int) -> Scenario:
    """`scenario` with so many pipeline stages."""
    pool = scenario.pools[0]
    parallelism = pool.parallelism.model_copy(update={"pipeline": pipeline})
    return scenario.model_copy(update={"pools": [pool.model_copy(update={"parallelism": parallelism})]})


def run_groups(
    scenario: Scenario,
    table: RequestTable,
    *,
    data: int,
    coalesce: bool = True,
    expand: bool = True,
    host: HostOverhead = NO_OVERHEAD,
    law: dict[str, int] | None = None,
    prepare: Callable[[Built], None] | None = None,
    **options: Any,
) -> GroupRan:
    """Run `table` with every `data` engines of `scenario` in one lock-step group; `options` are those of `LockStep`."""
    log = StepLog(expand=expand, schedule=[])
    built = build(scenario, table, base=Path(), log=log, record_tokens=True, coalesce=coalesce)
    cluster = built.cluster
    linear = {name: value for name, value in LINEAR.items() if isinstance(value, int)} | (law or {})
    groups: list[LockStep] = []
    # Equal engines share what has been priced once.
    timer = GroupTimer(**linear, pipeline=scenario.pools[0].parallelism.pipeline)
    for number, engine in enumerate(cluster.engines):
        if number % data == 0:
            groups.append(LockStep(**options))
        cluster.engines[number] = Rank(
            groups[-1],
            number,
            engine.scheduler,
            timer,
            log,
            cluster.ended,
            host=host,
            poll_ns=engine.poll_ns,
            horizon=engine._horizon,
        )
    if prepare is not None:
        prepare(built)
    assert cluster.requests is not None
    cluster.router.connect(cluster.engines, [scenario.model] * len(cluster.engines), built.cluster.requests.chain)
    clock: list[int] = []
    for engine in cluster.engines:
        engine.wake = _recording(engine, clock)  # type: ignore[method-assign]
    cluster.run()
    return GroupRan(built, log, clock, groups)


def _recording(engine: Engine, clock: list[int]) -> Callable[[int], int | None]:
    wake = engine.wake

    def recording(now: int) -> int | None:
        clock.append(now)
        assert len(clock) < 200_000, "the run does not end"
        return wake(now)

    return recording
