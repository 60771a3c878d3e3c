"""The result folder: same bytes, whole or absent, and read back as written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from servetwin.errors import InputError
from servetwin.results.files import RESULT_FILES, ResultFolder, read_run, write_run
from servetwin.results.run import REQUEST_COLUMNS, SESSION_COLUMNS, STEP_COLUMNS, Run

MakeRun = Callable[..., Run]


@pytest.fixture
def run(make_run: MakeRun) -> Run:
    schedule = {name: np.arange(3) for name in ("engine", "step", "request", "tokens")}
    tokens = [np.array([1, 2, 3]), np.array([], np.int64)]
    sessions = {name: np.array([7]) for name in SESSION_COLUMNS} | {"status": ["finished"]}
    links = {"source": ["a"], "target": ["b"], "bandwidth": np.array([9]), "bytes": np.array([3])}
    links["utilization"] = np.array([0.5])
    extra = {"schedule": schedule, "token_ns": tokens, "sessions": sessions, "links": links}
    return make_run([0, 5], 10, versions={"servetwin": "0.1", "catalog": "ab"}, **extra)


def test_what_is_written_is_read_back(run: Run, tmp_path: Path) -> None:
    write_run(run, tmp_path / "new" / "out")
    saved = read_run(tmp_path / "new" / "out")
    for name in REQUEST_COLUMNS:
        assert list(saved.requests[name]) == list(run.requests[name]), name
    for name in STEP_COLUMNS:
        assert saved.steps[name].tolist() == run.steps[name].tolist(), name
    assert saved.schedule is not None and saved.schedule["tokens"].tolist() == [0, 1, 2]
    assert saved.token_ns is not None and [tokens.tolist() for tokens in saved.token_ns] == [[1, 2, 3], []]
    assert saved.sessions is not None and run.sessions is not None
    for name in SESSION_COLUMNS:
        assert list(saved.sessions[name]) == list(run.sessions[name]), name
    assert saved.summary["completed"] == 2
    assert saved.scenario_yaml == "# seed: 0\n# catalog: ab\n# servetwin: 0.1\nmodel: tiny\n"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["out"]


def test_same_run_same_bytes_whatever_the_simulation_cost(run: Run, tmp_path: Path) -> None:
    write_run(run, tmp_path / "a")
    write_run(replace(run, wall_s=1.5, cpu_s=2.5), tmp_path / "b")
    for name in RESULT_FILES:
        same = (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert same is (name != "summary.json"), name


def test_schedule_tokens_sessions_and_links_only_when_there_are_some(make_run: MakeRun, tmp_path: Path) -> None:
    write_run(make_run([0], 10), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        set(RESULT_FILES) - {"schedule.parquet", "sessions.parquet", "links.parquet"}
    )
    saved = read_run(tmp_path / "out")
    assert saved.schedule is None and saved.token_ns is None and saved.sessions is None


def test_a_run_without_requests_can_be_written(make_run: MakeRun, tmp_path: Path) -> None:
    write_run(make_run([], 10, token_ns=[]), tmp_path / "out")
    assert len(read_run(tmp_path / "out").requests["request"]) == 0


def test_an_existing_folder_is_kept_unless_told_otherwise(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_run(run, out)  # empty: fine
    with pytest.raises(InputError) as caught:
        write_run(run, out)
    assert str(caught.value) == f"{out}: the output folder is not empty; allowed: another folder, or --overwrite"


def test_what_came_into_the_folder_meanwhile_is_kept(run: Run, tmp_path: Path) -> None:
    with ResultFolder(tmp_path / "out") as folder:
        folder.keep("steps", 0, run.steps)
        write_run(run, tmp_path / "other")
        (tmp_path / "other").rename(tmp_path / "out")
        with pytest.raises(InputError, match="the output folder is not empty"):
            folder.write(run)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert read_run(tmp_path / "out").summary["completed"] == 2


def test_what_a_killed_process_of_the_same_number_left_is_kept(run: Run, tmp_path: Path) -> None:
    left = tmp_path / f".out.partial-{os.getpid()}" / "steps"
    left.mkdir(parents=True)
    with pytest.raises(InputError, match="cannot write the results: File exists"):
        write_run(run, tmp_path / "out")
    assert left.is_dir()


def test_overwrite_replaces_results_and_leaves_the_rest(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_run(run, out)
    (out / "notes.txt").write_text("mine")
    write_run(replace(run, schedule=None, seed=7), out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "schedule.parquet").exists()
    assert read_run(out).summary["seed"] == 7
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_write_leaves_nothing(run: Run, tmp_path: Path) -> None:
    broken = replace(run, steps={"engine": np.zeros(2, np.int64), "kv_blocks_used": np.zeros(2), "steps": np.ones(2)})
    with pytest.raises(KeyError):
        write_run(broken, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="out: the output must be a folder, but a file stands there"):
        write_run(run, tmp_path / "out", overwrite=True)
    with pytest.raises(InputError, match="cannot write the results: Not a directory"):
        write_run(run, tmp_path / "out" / "deeper")


def test_reading_says_what_is_wrong(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError) as caught:
        read_run(out)
    assert str(caught.value) == f"{out}: no such result folder"

    write_run(run, out)
    whole = (out / "requests.parquet").read_bytes()
    (out / "requests.parquet").write_bytes(whole[:-20])
    with pytest.raises(InputError) as caught:
        read_run(out)
    assert str(caught.value) == f"{out}/requests.parquet: cannot be read as Parquet: truncated or damaged"

    (out / "requests.parquet").write_bytes((out / "steps.parquet").read_bytes())
    with pytest.raises(InputError, match=r"requests.parquet: request: a column is missing; allowed: request, session"):
        read_run(out)

    (out / "requests.parquet").unlink()
    with pytest.raises(InputError) as caught:
        read_run(out)
    assert str(caught.value) == (f"{out}/requests.parquet: no such file; the folder is not a complete result folder")

    (out / "summary.json").write_text('{"completed": 2,\n')
    with pytest.raises(InputError, match=r"summary.json: line 2: is not JSON: "):
        read_run(out)


def test_summary_is_plain_json(run: Run, tmp_path: Path) -> None:
    write_run(run, tmp_path / "out")
    text = (tmp_path / "out" / "summary.json").read_text()
    assert json.loads(text)["mean_ttft_ms"] is not None and "NaN" not in text


def test_metrics_need_no_pyarrow() -> None:
    import subprocess
    import sys

    code = "import sys, servetwin.results.files, servetwin.results.metrics; print('pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
