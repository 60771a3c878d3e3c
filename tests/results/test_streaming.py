"""Tables that go to disk during a run are, byte for byte, those that are held until its end."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from running import scenario_of
from servetwin.results.files import ResultFolder, read_run, write_run
from servetwin.results.run import REQUEST_COLUMNS, STEP_COLUMNS
from servetwin.simulation import simulate

CHAT: dict[str, Any] = {
    "arrivals": {"process": "poisson", "rate": 40},
    "requests": 120,
    "input_tokens": {"distribution": "uniform", "min": 5, "max": 300},
    "output_tokens": {"distribution": "uniform", "min": 1, "max": 60},
    "priorities": [1, 1],
}
SMALL = {"num_gpu_blocks_override": 150, "max_model_len": 600, "max_num_seqs": 12}
ALL = frozenset({"tokens", "schedule", "links"})


@contextmanager
def pieces(rows: int, row_group: int = 1 << 18) -> Iterator[None]:
    """Tables are taken so many rows at a time."""
    with (
        patch("servetwin.engine.log.PACKED", rows),
        patch("servetwin.cluster.ended.KEPT", max(1, rows // 4)),
        patch("servetwin.results.files.ROW_GROUP", row_group),
        patch("servetwin.results.tables.ROW_GROUP", row_group),
        patch("servetwin.results.parts.GROUP", 16),
    ):
        yield


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "summary.json"}


@settings(deadline=None, max_examples=6)
@given(
    rows=st.integers(100, 400),
    row_group=st.sampled_from([300, 1 << 18]),
    replicas=st.integers(1, 3),
    record=st.sampled_from([frozenset(), ALL, ALL | {"steps"}]),
)
def test_the_files_are_the_same(
    tmp_path_factory: pytest.TempPathFactory, rows: int, row_group: int, replicas: int, record: frozenset[str]
) -> None:
    scenario = scenario_of(SMALL, workload=CHAT, replicas=replicas, timing={"source": "roofline"})
    tmp_path = tmp_path_factory.mktemp("run")
    with pieces(1 << 16, row_group):
        write_run(simulate(scenario, record=record), tmp_path / "held")
    with pieces(rows, row_group), ResultFolder(tmp_path / "streamed") as folder:
        run = simulate(scenario, record=record, folder=folder)
        assert folder.keeps("requests"), "or this tests nothing"
        folder.write(run)
    one, other = files(tmp_path / "held"), files(tmp_path / "streamed")
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []
    held, streamed = read_run(tmp_path / "held"), read_run(tmp_path / "streamed")
    assert held.summary | {"simulation": 0} == streamed.summary | {"simulation": 0}
    assert len(run) == 120
    assert run.steps["end_ns"].tolist() == held.steps["end_ns"].tolist(), "the run can still be read"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held", "streamed"]


@pytest.mark.parametrize("table", ["requests", "steps", "schedule"])
@pytest.mark.parametrize("when", ["before", "while", "after"])
@pytest.mark.parametrize("number", [0, 2])
def test_an_interrupt_while_rows_are_taken_loses_and_doubles_none(
    table: str, when: str, number: int, tmp_path: Path
) -> None:
    scenario = scenario_of(SMALL, workload=CHAT, replicas=2)
    record = frozenset({"steps", "schedule"})
    whole = simulate(scenario, record=record)

    class Interrupted(ResultFolder):
        struck = False

        def keep(self, name: str, at: int, columns: Any) -> None:
            strikes = not self.struck and (name, at) == (table, number)
            self.struck = self.struck or strikes
            if strikes and when == "before":
                raise KeyboardInterrupt
            if strikes and when == "while":
                with patch("servetwin.results.parts.np.unique", side_effect=KeyboardInterrupt):
                    super().keep(name, at, columns)
            super().keep(name, at, columns)
            if strikes:
                raise KeyboardInterrupt

    with pieces(40), Interrupted(tmp_path / "run") as folder:
        summary = folder.write(simulate(scenario, record=record, coalesce=False, folder=folder))
        assert folder.struck
    saved = read_run(tmp_path / "run")
    assert summary["partial"]
    assert 0 < len(saved.requests["request"]) < 120 or table == "schedule"
    rows = np.asarray(saved.requests["request"])
    assert len(set(rows.tolist())) == len(rows)
    for name in REQUEST_COLUMNS:
        assert list(saved.requests[name]) == [whole.requests[name][row] for row in rows], name
    assert len(saved.steps["engine"])
    for engine in range(2):
        mine, all_of_it = saved.steps["engine"] == engine, whole.steps["engine"] == engine
        for name in STEP_COLUMNS:
            assert saved.steps[name][mine].tolist() == whole.steps[name][all_of_it][: mine.sum()].tolist(), name


KILLED = """
import os, signal, sys
from pathlib import Path
from unittest.mock import patch
sys.path[:0] = {path}
from test_streaming import CHAT, SMALL, pieces
from running import scenario_of
from servetwin.results.files import ResultFolder
from servetwin.simulation import simulate

def killed(ended, requests, now):
    if ended > 60:
        os.kill(os.getpid(), signal.SIGKILL)

with pieces(40), ResultFolder(Path(sys.argv[1])) as folder:
    simulate(scenario_of(SMALL, workload=CHAT | {{"requests": 600}}), coalesce=False, progress=killed, folder=folder)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_process_that_is_killed_leaves_pieces_that_can_be_read(tmp_path: Path) -> None:
    code = KILLED.format(path=sys.path)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".run.partial-")
    whole = simulate(scenario_of(SMALL, workload=CHAT | {"requests": 600}), coalesce=False)
    steps, requests = pq.read_table(left / "steps"), pq.read_table(left / "requests")
    assert len(requests) >= 60
    rows = requests["request"].to_numpy()
    assert requests["finish_ns"].to_pylist() == whole.ints("finish_ns")[rows].tolist()
    assert len(steps) >= 40
    assert steps["end_ns"].to_pylist() == whole.steps["end_ns"][: len(steps)].tolist()
