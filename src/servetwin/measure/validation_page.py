"""The plots of a validation on one self-contained HTML page (needs plotly)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

if TYPE_CHECKING:
    from servetwin.measure.comparison import Floats, Metric, Report

REAL, SIMULATED = "#1b6ca8", "#d1495b"
NAMES = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "e2el_ms": "E2EL"}
MOST_POINTS = 5000


def _distribution(figure: go.Figure, column: int, values: Floats, name: str, color: str, dash: str) -> None:
    """The empirical distribution function: the share of requests at or below each value."""
    ordered = np.sort(values)
    rank = np.unique(np.linspace(1, len(ordered), min(len(ordered), MOST_POINTS)).astype(int))
    line = go.Scatter(
        x=ordered[rank - 1],
        y=rank / len(ordered),
        name=name,
        legendgroup=name,
        showlegend=column == 1,
        mode="lines",
        line={"color": color, "shape": "hv", "dash": dash, "width": 2},
        hovertemplate="%{y:.1%} within %{x:.4g} ms",
    )
    figure.add_trace(line, row=1, col=column)


def _scatter(figure: go.Figure, column: int, metric: Metric) -> None:
    """One point a matched request, and the line on which both runs agree."""
    every = -(-len(metric.pair_real) // MOST_POINTS) or 1
    real, simulated = metric.pair_real[::every], metric.pair_simulated[::every]
    points = go.Scatter(
        x=real,
        y=simulated,
        customdata=metric.pair_request[::every],
        name="request",
        legendgroup="request",
        showlegend=column == 1,
        mode="markers",
        marker={"color": SIMULATED, "size": 5, "opacity": 0.6},
        hovertemplate="request %{customdata}: real %{x:.4g} ms, simulated %{y:.4g} ms<extra></extra>",
    )
    figure.add_trace(points, row=2, col=column)
    if len(real):
        ends = [float(min(real.min(), simulated.min())), float(max(real.max(), simulated.max()))]
        equal = go.Scatter(
            x=ends,
            y=ends,
            name="equal",
            legendgroup="equal",
            showlegend=column == 1,
            mode="lines",
            line={"color": "#555", "width": 1, "dash": "dash"},
            hoverinfo="skip",
        )
        figure.add_trace(equal, row=2, col=column)


def _title(name: str, metric: Metric) -> str:
    matched = metric.matched
    if matched is None:
        return f"{NAMES[name]}: no matched request"
    return f"{NAMES[name]}: MAPE {matched.mape_percent:.2f} %, bias {matched.bias_percent:+z.2f} %"


def page_of(report: Report) -> str:
    """HTML with distributions (above) and matched requests (below), real against simulated. Same report, same bytes."""
    titles = [f"{NAMES[name]}: share of requests" for name in report.metrics]
    titles += [_title(name, metric) for name, metric in report.metrics.items()]
    figure = make_subplots(rows=2, cols=len(report.metrics), subplot_titles=titles, vertical_spacing=0.14)
    for column, (name, metric) in enumerate(report.metrics.items(), start=1):
        for values, label, color, dash in (
            (metric.real, "real", REAL, "solid"),
            (metric.simulated, "simulated", SIMULATED, "dot"),
        ):
            if len(values):
                _distribution(figure, column, values, label, color, dash)
        _scatter(figure, column, metric)
        scale: dict[str, Any] = {"type": "log" if name == "ttft_ms" else "linear"}  # TTFT spans decades in a queue
        figure.update_xaxes(title_text=f"{NAMES[name]} (ms)", row=1, col=column, **scale)
        figure.update_xaxes(title_text=f"real {NAMES[name]} (ms)", row=2, col=column, **scale)
        figure.update_yaxes(title_text=f"simulated {NAMES[name]} (ms)", row=2, col=column, **scale)
        figure.update_yaxes(tickformat=".0%", row=1, col=column)
    figure.update_layout(
        title=f"Simulated against real: {report.source}",
        template="plotly_white",
        height=900,
        margin={"t": 110},
        legend={"orientation": "h", "y": 1.06, "x": 1, "xanchor": "right", "yanchor": "bottom"},
    )
    # plotly's own page has a button that uploads the data of the plot: not here
    config = {"displaylogo": False, "modeBarButtonsToRemove": ["sendChartToCloud"]}
    page = figure.to_html(include_plotlyjs=True, div_id="validation", config=config)
    return str(page)
