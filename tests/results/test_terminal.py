"""The block on the terminal: every line of `vllm bench serve` that people grep for, and no escape codes in a pipe."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from servetwin.report.terminal import SECTIONS, SHOWN, print_summary
from servetwin.results.run import PRICED


@pytest.fixture
def summary() -> dict[str, Any]:
    latencies = {f"{statistic}_{name}_ms": 12.345 for statistic, _ in SHOWN for name, _, _ in SECTIONS}
    return {
        "completed": 300, "failed": 0, "aborted": 0, "partial": False, "duration_s": 65.934,
        "total_input_tokens": 258_000, "total_output_tokens": 196_500, "request_throughput": 4.55,
        "output_throughput": 2980.25, "total_token_throughput": 6893.278, **latencies, "preemptions": 3,
        "prefix_cache_hit_rate": 0.125, "peak_kv_usage": 0.875, "provenance": dict.fromkeys((*PRICED, "assumed"), 0.25),
        "saturation": {"saturated": False, "verdict": "keeps up: fine"},
        "simulation": {"wall_s": 1.5, "cpu_s": 1.25, "steps": 2100, "events": 900}, "notes": [],
    }  # fmt: skip


def text(summary: dict[str, Any], **console: Any) -> str:
    stream = io.StringIO()
    print_summary(summary, Console(file=stream, **console))
    return stream.getvalue()


def test_the_lines_of_vllm_bench_serve_are_there(summary: dict[str, Any]) -> None:
    lines = {line.split(":")[0]: line.split(":")[-1].strip() for line in text(summary).splitlines()}
    assert lines["Successful requests"] == "300"
    assert lines["Benchmark duration (s)"] == "65.93"
    assert lines["Total input tokens"] == "258000"
    assert lines["Total generated tokens"] == "196500"
    assert lines["Request throughput (req/s)"] == "4.55"
    assert lines["Output token throughput (tok/s)"] == "2980.25"
    assert lines["Total Token throughput (tok/s)"] == "6893.28"
    for short in ("TTFT", "TPOT", "ITL", "E2EL"):
        for label in ("Mean", "Median", "P90", "P99"):
            assert lines[f"{label} {short} (ms)"] in ("12.35", "12.34")
    assert lines["Peak KV cache usage"] == "87.5 %"


def test_a_pipe_gets_plain_text_of_one_width(summary: dict[str, Any]) -> None:
    plain = text(summary, width=20)
    assert "\x1b" not in plain
    assert {len(line) for line in plain.splitlines()} == {50}
    assert "\x1b[1m" in text(summary, force_terminal=True)


def test_what_cannot_be_computed_is_a_dash(summary: dict[str, Any]) -> None:
    assert "Mean TTFT (ms):                                  -" in text({**summary, "mean_ttft_ms": None})


def test_failures_goodput_and_warnings_show_only_when_there_are_any(summary: dict[str, Any]) -> None:
    plain = text(summary)
    for word in ("Failed", "Aborted", "goodput", "Saturated", "Partial", "Note", "keeps up"):
        assert word not in plain
    told = text({
        **summary, "failed": 2, "aborted": 1, "request_goodput": 3.5, "slo": {"attainment": 0.75}, "partial": True,
        "saturation": {"saturated": True, "verdict": "saturated: the queue grows [a]"}, "notes": ["look [here]"],
    })  # fmt: skip
    for line in (
        "Failed requests:                                 2",
        "Aborted requests:                                1",
        "Request goodput (req/s):                      3.50",
        "Requests that met the SLO:                  75.0 %",
        "Saturated: the queue grows [a].",
        "Partial: the run was interrupted; only what had finished is counted.",
        "Note: look [here]",
    ):
        assert line in told.splitlines()


def test_sessions_have_a_block_of_their_own(summary: dict[str, Any]) -> None:
    assert "Sessions" not in text(summary)
    names = ("duration_ms", "turns", "tool_ms", "first_ttft_ms", "last_ttft_ms")
    figures = {f"{statistic}_{name}": 1234.5 for statistic, _ in SHOWN for name in names}
    figures |= {"completed": 30, "failed": 2, "session_throughput": 0.41449}
    lines = {
        line.split(":")[0]: line.split(":")[-1].strip() for line in text(summary | {"sessions": figures}).splitlines()
    }
    assert (lines["Completed sessions"], lines["Failed sessions"]) == ("30", "2")
    assert lines["Session throughput (sessions/s)"] == "0.414"
    assert lines["P99 duration (s)"] == lines["Mean time in tools (s)"] == "1.23"
    assert lines["Mean TTFT of the last turn (ms)"] == "1234.50"
    assert {len(line) for line in text(summary | {"sessions": figures}, width=20).splitlines()} == {50}
