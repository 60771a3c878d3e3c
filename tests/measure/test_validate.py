"""A run made from the real log itself must validate at 0 %, one that is 10 % slower at +10 %."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from servetwin.errors import InputError
from servetwin.measure.comparison import METRICS, STATISTICS
from servetwin.measure.validate import validate

SaveRun = Callable[..., Path]
SECOND = 1_000_000_000


@pytest.fixture
def real(shared: Path) -> Path:
    return shared / "data/llmservingsim/bench/examples/RTXPRO6000/Llama-3.1-8B/vllm"


def columns_of(folder: Path, slower: float = 1.0) -> list[Any]:
    """The real log as columns of a simulated run, every latency multiplied by `slower`."""
    rows = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    queued, first, last = (
        np.array([row[key] - rows[0]["queued_ts"] for row in rows]) * SECOND
        for key in ("queued_ts", "first_token_ts", "last_token_ts")
    )
    times = [queued, queued + slower * (first - queued), queued + slower * (last - queued)]
    lengths = [np.array([row[key] for row in rows]) for key in ("input_toks", "output_toks")]
    return [np.round(time).astype(np.int64) for time in times] + lengths


@pytest.mark.parametrize("slower", [1.0, 1.1, 0.5])
def test_every_figure_moves_with_the_run(real: Path, save_run: SaveRun, tmp_path: Path, slower: float) -> None:
    result = validate(save_run(*columns_of(real, slower)), real, tmp_path / "out").as_dict()
    percent = pytest.approx(100 * (slower - 1), abs=1e-5)  # clocks are rounded to whole ns
    for name in METRICS:
        for statistic in STATISTICS:
            assert result["metrics"][name][statistic]["difference_percent"] == percent
        matched = result["metrics"][name]["matched"]
        assert matched["requests"] == 300 and matched["bias_percent"] == percent
        for figure in ("mape_percent", "median_ape_percent", "p90_ape_percent"):
            assert matched[figure] == pytest.approx(abs(100 * (slower - 1)), abs=1e-5)
    assert result["requests"] == {
        "real": 300, "simulated": 300, "common": 300, "length_mismatches": 0, "mismatched": [],
    }  # fmt: skip


def test_the_published_means_of_the_real_run(real: Path, save_run: SaveRun) -> None:
    """Means and P99 (ms) that LLMServingSim's own `bench validate` gives for this log."""
    metrics = validate(save_run(*columns_of(real)), real).as_dict()["metrics"]
    assert metrics["ttft_ms"]["mean"]["real"] == pytest.approx(7097.2, abs=0.05)
    assert metrics["ttft_ms"]["median"]["real"] == pytest.approx(9442.7, abs=0.05)
    assert metrics["tpot_ms"]["p99"]["real"] == pytest.approx(37.3, abs=0.05)
    assert metrics["e2el_ms"]["mean"]["real"] == pytest.approx(28201, abs=0.5)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Three real requests: TTFT 100, 200, 400 ms; E2EL 1000, 200, 2400 ms."""
    path = tmp_path / "real.json"
    content = {
        "input_lens": [10, 20, 30], "output_lens": [10, 1, 11],
        "ttfts": [0.1, 0.2, 0.4], "itls": [[0.1] * 9, [], [0.2] * 10], "duration": 4,
    }  # fmt: skip
    path.write_text(json.dumps(content))
    return path


def ms(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64) * 1_000_000


def test_errors_of_single_requests(tiny: Path, save_run: SaveRun) -> None:
    run = save_run(ms(0, 0, 0), ms(110, 180, 400), ms(1100, 180, 2400), [10, 20, 30], [10, 1, 11])
    report = validate(run, tiny)
    ttft = report.metrics["ttft_ms"].matched
    assert ttft is not None
    assert ttft.mape_percent == pytest.approx(20 / 3)
    assert ttft.median_ape_percent == pytest.approx(10)
    assert ttft.bias_percent == pytest.approx(0, abs=1e-9)
    tpot = report.metrics["tpot_ms"].matched
    assert tpot is not None and tpot.requests == 2  # none for the request of one token
    assert tpot.bias_percent == pytest.approx(5)
    assert report.totals["duration_s"].difference_percent == pytest.approx(-40)
    assert report.totals["request_throughput"].real == pytest.approx(0.75)


def test_requests_of_other_lengths_are_named_and_not_matched(tiny: Path, save_run: SaveRun) -> None:
    run = save_run(ms(0, 0, 0), ms(110, 180, 400), ms(1100, 180, 2400), [10, 20, 31], [10, 1, 12])
    report = validate(run, tiny)
    assert report.mismatches == [
        {
            "request": 2, "real_input_tokens": 30, "simulated_input_tokens": 31,
            "real_output_tokens": 11, "simulated_output_tokens": 12,
        }
    ]  # fmt: skip
    assert report.notes == [
        "1 of 3 requests have other lengths in the simulated run and are not matched: 2 "
        "(request 2: 31 input and 12 output tokens, really 30 and 11); was the same workload simulated?"
    ]
    assert report.metrics["ttft_ms"].matched is not None and report.metrics["ttft_ms"].matched.requests == 2
    assert len(report.metrics["ttft_ms"].simulated) == 3  # the distributions are of all


def test_only_requests_that_finished_are_compared(tiny: Path, save_run: SaveRun) -> None:
    times = (ms(0, 0, 0), ms(110, 180, 400), ms(1100, 180, 2400), [10, 20, 30], [10, 1, 11])
    report = validate(save_run(*times, status=["finished", "failed", "aborted"]), tiny)
    assert report.as_dict()["requests"]["simulated"] == report.as_dict()["requests"]["common"] == 1
    run = save_run(*times, status=["failed"] * 3)
    with pytest.raises(InputError) as caught:
        validate(run, tiny)
    assert str(caught.value) == f"{run}: holds no finished request"


def test_nothing_in_common_is_said(tiny: Path, save_run: SaveRun) -> None:
    run = save_run(ms(0), ms(5), ms(9), [10], [2], request=np.array([77]))
    report = validate(run, tiny)
    assert report.metrics["ttft_ms"].matched is None
    assert report.notes == ["no request number occurs in both runs: nothing could be matched"]
    report.print(Console(file=io.StringIO()))


def test_files_land_in_the_run_folder_and_are_the_same_each_time(tiny: Path, save_run: SaveRun) -> None:
    pytest.importorskip("plotly", reason="the page needs plotly")
    run = save_run(ms(0, 0, 0), ms(110, 180, 400), ms(1100, 180, 2400), [10, 20, 30], [10, 1, 11])
    files = validate(run, tiny).files
    assert files == [run / "validation.json", run / "validation.html"]
    before = [path.read_bytes() for path in files]
    validate(run, tiny)
    assert [path.read_bytes() for path in files] == before
    assert b"<script src=" not in before[1]  # nothing is fetched ...
    assert b'"modeBarButtonsToRemove": ["sendChartToCloud"]' in before[1]  # ... and nothing uploaded


def test_without_plotly_the_figures_are_still_written(
    tiny: Path, save_run: SaveRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    monkeypatch.delitem(sys.modules, "servetwin.measure.validation_page", raising=False)
    run = save_run(ms(0, 0, 0), ms(110, 180, 400), ms(1100, 180, 2400), [10, 20, 30], [10, 1, 11])
    report = validate(run, tiny)
    assert report.files == [run / "validation.json"]
    assert report.notes == ["no plots: they need plotly (pip install 'servetwin[plot]')"]


def test_the_printed_tables_are_plain_in_a_pipe(tiny: Path, save_run: SaveRun) -> None:
    stream = io.StringIO()
    run = save_run(ms(0, 0, 0), ms(110, 180, 400), ms(1100, 180, 2400), [10, 20, 30], [10, 1, 11])
    validate(run, tiny).print(Console(file=stream, width=80))
    lines = [line.split() for line in stream.getvalue().splitlines()]
    assert "\x1b" not in stream.getvalue()
    assert ["Mean", "TTFT", "(ms)", "233.33", "230.00", "-1.43", "%"] in lines
    assert ["TTFT", "3", "6.67", "%", "10.00", "%", "10.00", "%", "+0.00", "%"] in lines
