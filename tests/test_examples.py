"""Every example runs, and its pools and sessions are told apart in the summary."""

from __future__ import annotations

from pathlib import Path

import pytest

from servetwin.results.metrics import summarize
from servetwin.scenario.load import load
from servetwin.scenario.schema import SessionWorkload, TraceWorkload
from servetwin.simulation import simulate

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.yaml"))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda path: path.stem)
def test_example(file: Path) -> None:
    workload = load(file).workload
    if isinstance(workload, TraceWorkload):
        if not (file.parent / workload.trace).exists():
            pytest.skip(f"needs the trace {workload.trace}, which is not part of the project")
        few = "workload.limit=60"
    else:
        few = "workload.sessions=8" if isinstance(workload, SessionWorkload) else "workload.requests=60"
    scenario = load(file, [few])
    run = simulate(scenario, file.parent)
    summary = summarize(run)
    assert summary["completed"] > 0
    assert summary["completed"] + summary["failed"] + summary["aborted"] == len(run)
    assert ("sessions" in summary) == isinstance(workload, SessionWorkload)
    if len(scenario.pools) > 1:
        pools = summary["pools"]
        assert list(pools) == [pool.name for pool in scenario.pools]
        assert sum(pool["completed"] for pool in pools.values()) == summary["completed"]
        assert all(0 < pool["busy"] <= 1 for pool in pools.values())
