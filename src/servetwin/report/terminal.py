"""The summary of a run as a block of text, laid out like that of `vllm bench serve`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from servetwin.results.run import PRICED

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 50
SHOWN = (("mean", "Mean"), ("median", "Median"), ("p90", "P90"), ("p99", "P99"))
SECTIONS = (
    ("ttft", "TTFT", "Time to First Token"),
    ("tpot", "TPOT", "Time per Output Token (excl. 1st token)"),
    ("itl", "ITL", "Inter-token Latency"),
    ("e2el", "E2EL", "End-to-end Latency"),
)


def _number(value: float | None, digits: int = 2) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.{digits}f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _interval(summary: Mapping[str, Any], key: str) -> str:
    """The interval of a metric, where the summary holds one."""
    found = (summary.get("interval") or {}).get(key)
    return f"[{found[0]:.2f}, {found[1]:.2f}]" if found else ""


def _rows(summary: Mapping[str, Any]) -> Iterator[tuple[str, ...] | str]:
    """The lines of the block: `(label, value)`, perhaps with an interval, or the title of a section."""
    yield "Successful requests", _number(summary["completed"])
    for status in ("failed", "aborted"):
        if summary[status]:
            yield f"{status.capitalize()} requests", _number(summary[status])
    yield "Benchmark duration (s)", _number(summary["duration_s"])
    yield "Total input tokens", _number(summary["total_input_tokens"])
    yield "Total generated tokens", _number(summary["total_output_tokens"])
    yield "Request throughput (req/s)", _number(summary["request_throughput"])
    if "request_goodput" in summary:
        yield "Request goodput (req/s)", _number(summary["request_goodput"])
        yield "Requests that met the SLO", _percent(summary["slo"]["attainment"])
    yield "Output token throughput (tok/s)", _number(summary["output_throughput"])
    yield "Total Token throughput (tok/s)", _number(summary["total_token_throughput"])
    for name, short, title in SECTIONS:
        yield title
        for statistic, label in SHOWN:
            key = f"{statistic}_{name}_ms"
            yield f"{label} {short} (ms)", _number(summary[key]), _interval(summary, key)
    if "sessions" in summary:
        yield from _sessions(summary["sessions"])
    for name, figures in summary.get("pools", {}).items():
        yield from _pool(name, figures)
    yield "Memory"
    yield "Preemptions", _number(summary["preemptions"])
    yield "Prefix cache hit rate", _percent(summary["prefix_cache_hit_rate"])
    yield "Peak KV cache usage", _percent(summary["peak_kv_usage"])
    yield "Where the step times come from"
    provenance = summary["provenance"]
    for source in PRICED:
        yield source.capitalize(), _percent(provenance[source])
    if provenance["assumed"]:
        yield "  of which on assumed efficiencies", _percent(provenance["assumed"])
    yield "Simulation"
    simulation = summary["simulation"]
    yield "Wall time (s)", _number(simulation["wall_s"], 3)
    yield "CPU time (s)", _number(simulation["cpu_s"], 3)
    yield "Engine steps", _number(simulation["steps"])
    yield "Events", _number(simulation["events"])


def _sessions(figures: Mapping[str, Any]) -> Iterator[tuple[str, ...] | str]:
    yield "Sessions"
    yield "Completed sessions", _number(figures["completed"])
    if figures["failed"]:
        yield "Failed sessions", _number(figures["failed"])
    yield "Session throughput (sessions/s)", _number(figures["session_throughput"], 3)
    yield "Mean turns", _number(figures["mean_turns"])
    for statistic, label in SHOWN:
        yield f"{label} duration (s)", _number(_seconds(figures[f"{statistic}_duration_ms"]))
    yield "Mean time in tools (s)", _number(_seconds(figures["mean_tool_ms"]))
    for which in ("first", "last"):
        yield f"Mean TTFT of the {which} turn (ms)", _number(figures[f"mean_{which}_ttft_ms"])


def _pool(name: str, figures: Mapping[str, Any]) -> Iterator[tuple[str, ...] | str]:
    yield f"Pool {name}"
    yield "Engines", _number(figures["engines"])
    for status in ("completed", "failed", "aborted"):
        if figures[status] or status == "completed":
            yield f"{status.capitalize()} requests", _number(figures[status])
    for metric, short, _ in SECTIONS:
        if metric != "itl":
            for statistic in ("mean", "p99"):
                label = dict(SHOWN)[statistic]
                yield f"{label} {short} (ms)", _number(figures[f"{statistic}_{metric}_ms"])
    yield "Output token throughput (tok/s)", _number(figures["output_throughput"])
    yield "Time in which a step was under way", _percent(figures["busy"])
    yield "Peak KV cache usage", _percent(figures["peak_kv_usage"])


def _seconds(ms: float | None) -> float | None:
    return None if ms is None else ms / 1e3


def print_summary(summary: Mapping[str, Any], console: Console) -> None:
    """Print the content of `summary.json`; plain text when `console` is no terminal."""
    from rich.text import Text

    def line(text: str, style: str = "") -> None:
        console.print(Text(text, style=style), soft_wrap=True)

    line(" Simulated Serving Result ".center(WIDTH, "="), "bold")
    for row in _rows(summary):
        if isinstance(row, str):
            line(f" {row} ".center(WIDTH, "-"), "bold")
        else:
            label, value, *interval = row
            line(f"{label + ':':<{WIDTH - 12}}{value:>12}  {''.join(interval)}".rstrip())
    line("=" * WIDTH, "bold")
    if summary["partial"]:
        line("Partial: the run was interrupted; only what had finished is counted.", "yellow")
    if summary.get("interval"):
        level = 100 * summary["interval"]["level"]
        line(f"[low, high]: {level:.0f} % interval, from the spread of what step times were priced with.")
    verdict = summary["saturation"]["verdict"]
    if summary["saturation"]["saturated"] or verdict.startswith("undecided"):
        line(verdict[0].upper() + verdict[1:] + ".", "yellow")
    for note in summary["notes"]:
        line(f"Note: {note}")
