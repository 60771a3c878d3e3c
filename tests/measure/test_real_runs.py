"""Logs of real runs are read as their tools define them, and damaged ones are refused with the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servetwin.errors import InputError
from servetwin.measure.real_runs import read_real_run

ROW: dict[str, Any] = {
    "request_id": "bench-0", "input_toks": 10, "output_toks": 5, "arrival_time": 1.7e9,
    "queued_ts": 100.0, "scheduled_ts": 100.25, "first_token_ts": 100.5, "last_token_ts": 102.5,
}  # fmt: skip
DETAILED: dict[str, Any] = {
    "model_id": "tiny", "duration": 4.0, "input_lens": [10, 20, 30], "output_lens": [3, 1, 0],
    "ttfts": [0.5, 0.25, 0.0], "itls": [[0.25, 0.75], [], []], "errors": ["", "", "Traceback: ..."],
}  # fmt: skip


def bench(folder: Path, *rows: dict[str, Any], meta: dict[str, Any] | None = None) -> Path:
    (folder / "meta.json").write_text(json.dumps({"num_requests": len(rows)} if meta is None else meta))
    (folder / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def detailed(folder: Path, **changes: Any) -> Path:
    path = folder / "bench.json"
    path.write_text(json.dumps({key: value for key, value in (DETAILED | changes).items() if value is not None}))
    return path


def message(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_real_run(path)
    return str(caught.value)


def test_bench_latencies_count_from_the_queue(tmp_path: Path) -> None:
    other = ROW | {"request_id": "bench-1", "output_toks": 1, "queued_ts": 99.5, "last_token_ts": 100.5}
    run = read_real_run(bench(tmp_path, other, ROW))
    assert run.request.tolist() == [0, 1]  # ordered by number, not by line
    assert run.ttft_ms.tolist() == [500, 1000]
    assert run.e2el_ms.tolist() == [2500, 1000]
    assert run.tpot_ms[0] == 500 and np.isnan(run.tpot_ms[1])
    assert run.duration_s == 3.0 and run.notes == ()


def test_bench_requests_without_an_end_are_counted_apart(tmp_path: Path) -> None:
    run = read_real_run(bench(tmp_path, ROW, ROW | {"request_id": "bench-1", "last_token_ts": None}))
    assert run.request.tolist() == [0] and run.unfinished == 1


def test_bench_with_fewer_rows_than_it_should_have_says_so(tmp_path: Path) -> None:
    run = read_real_run(bench(tmp_path, ROW, meta={"num_requests": 3, "model": "tiny", "vllm_version": "0.19.0"}))
    assert run.notes == ("meta.json says 3 requests, requests.jsonl has 1",)
    assert run.source == "tiny, vLLM 0.19.0"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"request_id": "warmup-3"}, "line 2: wrong request_id; found 'warmup-3'; allowed: bench-0, bench-1, ..."),
        ({"request_id": "bench-0"}, "line 2: occurs twice; found 'bench-0'"),
        ({"input_toks": -1}, "line 2: input_toks: must be a count; found -1; allowed: an integer >= 0"),
        ({"output_toks": 0}, "line 2: output_toks: must be a count; found 0; allowed: an integer >= 1"),
        ({"queued_ts": "x"}, "line 2: queued_ts: must be a time in seconds; found 'x'; allowed: a number >= 0"),
        (
            {"first_token_ts": 99.0},
            "line 2: times must not go back (queued_ts, first_token_ts, last_token_ts); found (100.0, 99.0, 102.5)",
        ),
    ],
)
def test_bad_bench_rows(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    folder = bench(tmp_path, ROW, ROW | {"request_id": "bench-1"} | change)
    assert message(folder) == f"{folder}/requests.jsonl: {expected}"


def test_a_misspelt_bench_field(tmp_path: Path) -> None:
    row = {("queue_ts" if key == "queued_ts" else key): value for key, value in ROW.items()}
    assert message(bench(tmp_path, row)).endswith("line 1: 'queued_ts' is missing; did you mean 'queue_ts'?")


def test_a_truncated_bench(tmp_path: Path) -> None:
    folder = bench(tmp_path, ROW, ROW | {"request_id": "bench-1"})
    text = (folder / "requests.jsonl").read_text()
    (folder / "requests.jsonl").write_text(text[:-30])
    assert message(folder).startswith(f"{folder}/requests.jsonl: line 2: is not JSON (")
    (folder / "requests.jsonl").write_text("")
    assert message(folder) == f"{folder}/requests.jsonl: holds no finished request"


def test_what_is_no_real_run(tmp_path: Path) -> None:
    assert message(tmp_path / "none") == f"{tmp_path}/none: no such file or folder"
    assert message(tmp_path) == (
        f"{tmp_path}/meta.json: no such file; allowed: a bench folder with meta.json and requests.jsonl, "
        "or a `vllm bench serve` JSON file"
    )
    (tmp_path / "list.json").write_text("[]")
    assert message(tmp_path / "list.json") == f"{tmp_path}/list.json: must be a JSON object; found 'list'"


def test_vllm_bench_serve_end_to_end_is_ttft_plus_gaps(tmp_path: Path) -> None:
    run = read_real_run(detailed(tmp_path))
    assert run.request.tolist() == [0, 1] and run.unfinished == 1
    assert run.ttft_ms.tolist() == [500, 250]
    assert run.e2el_ms.tolist() == [1500, 250]
    assert run.tpot_ms[0] == 500 and np.isnan(run.tpot_ms[1])
    assert run.duration_s == 4.0
    assert read_real_run(detailed(tmp_path, start_times=[1.0, 7.0, 8.0])).duration_s == 6.25


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"ttfts": None},
            "ttfts: must be a list with one entry a request; "
            "did you mean 'vllm bench serve --save-result --save-detailed'?",
        ),
        ({"itls": [[], []]}, "itls: has the wrong length; found 2; allowed: 3 entries, as in ttfts"),
        (
            {"itls": [[0.1, "x"], [], []]},
            "itls[0][1]: must be a time in seconds; found 'x'; allowed: a number >= 0",
        ),
        ({"input_lens": [1, 2, 2.5]}, "input_lens[2]: must be a count; found 2.5; allowed: an integer >= 0"),
        ({"output_lens": [0, 0, 0]}, "holds no finished request"),
    ],
)
def test_bad_vllm_bench_serve_files(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    path = detailed(tmp_path, **change)
    assert message(path) == f"{path}: {expected}"
