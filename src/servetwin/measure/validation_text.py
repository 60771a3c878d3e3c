"""A validation on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console

    from servetwin.measure.comparison import Report

_TOTALS = {
    "duration_s": "Duration (s)",
    "request_throughput": "Request throughput (req/s)",
    "output_throughput": "Output throughput (tok/s)",
}


def _label(metric: str) -> str:
    return metric.removesuffix("_ms").upper()


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+z.2f} %"


def print_report(report: Report, console: Console) -> None:
    """Distributions of both runs, then the errors of single requests, then notes and files written."""

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for number, column in enumerate(columns):
            made.add_column(column, justify="right" if number else "left", no_wrap=True)
        return made

    console.print(Text(f"Real: {report.source}, {report.real_requests} finished requests"), soft_wrap=True)
    console.print(Text(f"Simulated: {report.run}, {report.simulated_requests} finished requests\n"), soft_wrap=True)
    sides = table("Distributions", "", "real", "simulated", "difference")
    for name, pair in report.totals.items():
        sides.add_row(_TOTALS[name], _show(pair.real), _show(pair.simulated), _percent(pair.difference_percent))
    for name, metric in report.metrics.items():
        sides.add_section()
        for statistic, pair in metric.statistics.items():
            label = f"{statistic.capitalize()} {_label(name)} (ms)"
            sides.add_row(label, _show(pair.real), _show(pair.simulated), _percent(pair.difference_percent))
    console.print(sides)
    errors = table("Request by request", "", "requests", "MAPE", "median APE", "P90 APE", "bias")
    for name, metric in report.metrics.items():
        if matched := metric.matched:
            sizes = (matched.mape_percent, matched.median_ape_percent, matched.p90_ape_percent)
            shown = [f"{size:.2f} %" for size in sizes]
            errors.add_row(_label(name), str(matched.requests), *shown, _percent(matched.bias_percent))
        else:
            errors.add_row(_label(name), "0", "-", "-", "-", "-")
    console.print(errors)
    for note in report.notes:
        console.print(Text(f"Note: {note}"), soft_wrap=True)
    for path in report.files:
        console.print(Text(f"Wrote {path}"), soft_wrap=True)
