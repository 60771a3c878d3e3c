"""What is kept of a run in little memory is what was put in: gaps between tokens, steps, requests that have ended."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from running import MS, Row, run, scenario_of, table_of
from servetwin.cluster.build import build
from servetwin.cluster.ended import EndedRequests
from servetwin.engine.gaps import Gaps, merged
from servetwin.engine.log import StepLog, narrowed

times = st.lists(st.integers(0, 30), min_size=1, max_size=6).map(lambda gaps: np.cumsum(gaps).tolist())


@settings(deadline=None)
@given(st.lists(st.tuples(times, st.integers(1, 9)), max_size=20), st.lists(st.tuples(st.integers(0, 40), st.just(2))))
def test_gaps_are_an_exact_multiset(runs: list[tuple[list[int], int]], single: list[tuple[int, int]]) -> None:
    gaps, expected = Gaps(), Counter[int]()
    with patch("servetwin.engine.gaps.PENDING", 7):
        for outputs, count in runs:
            gaps.add_all(0, outputs, count)
            for before, after in zip([0, *outputs], outputs, strict=False):
                expected[after - before] += count
        for ns, count in single:
            gaps.add(ns, count)
            expected[ns] += count
    for ns, counts in (gaps.counts(), merged([gaps.counts(), Gaps().counts()])):
        assert ns.tolist() == sorted(expected)
        assert dict(zip(ns.tolist(), counts.tolist(), strict=True)) == expected


@pytest.mark.parametrize("replicas", [1, 3])
def test_steps_are_the_same_packed_or_not(replicas: int) -> None:
    rows = [Row(i * 7 * MS, prompt=40 + i, output=30) for i in range(20)]
    whole = run(scenario_of(replicas=replicas), table_of(rows))
    with patch("servetwin.engine.log.PACKED", 5):
        packed = run(scenario_of(replicas=replicas), table_of(rows))
    assert packed.steps() == whole.steps()
    assert packed.steps() == packed.steps(), "the table can be asked for again"
    assert [(step["engine"], step["step"]) for step in whole.steps()] == sorted(
        (step["engine"], step["step"]) for step in whole.steps()
    )


@pytest.mark.parametrize("largest", [0, 2**31 - 1, 2**31, 2**62])
def test_narrowed_columns_keep_their_numbers(largest: int) -> None:
    column = np.array([-1, largest, 0], np.int64)
    assert narrowed(column).tolist() == column.tolist()
    assert (narrowed(column).itemsize == 4) == (largest < 2**31)


def test_ended_requests_are_the_columns_of_the_objects() -> None:
    rows = [Row(i * MS, prompt=10 + i, output=5 + i, abort_ns=3 * MS if i == 2 else -1) for i in range(6)]
    rows.append(Row(0, prompt=9_000))
    scenario, table = scenario_of({"max_model_len": 512}), table_of(rows)
    objects = run(scenario, table).requests
    ended = EndedRequests(["pool"])
    built = build(scenario, table, base=Path(), log=StepLog(), record_tokens=True)
    built.cluster.on_ended = ended.add
    built.cluster.run()
    columns = ended.columns()
    assert len(ended) == len(rows)
    assert list(columns["request"]) == list(range(len(rows)))
    assert list(columns["status"]) == [request.status.name.lower() for request in objects]
    assert list(columns["reason"]) == ["" if r.status.name == "FINISHED" else r.reason for r in objects]
    assert list(columns["finish_ns"]) == [request.finish_ns for request in objects]
    assert list(columns["output_tokens"]) == [request.outputs for request in objects]
    assert [ns.tolist() for ns in ended.token_ns() or []] == [request.token_ns for request in objects]
