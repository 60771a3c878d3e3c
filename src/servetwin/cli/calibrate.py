"""`servetwin calibrate`: an overlay fitted to measured runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from servetwin.cli.progress import PATIENCE_S
from servetwin.errors import InputError

if TYPE_CHECKING:
    from servetwin.measure.calibration_result import Calibration, Errors

WORKERS = 2
INTERVAL_S = 10.0
"""between two lines of progress"""


def calibrate(
    scenario: Annotated[Path, typer.Argument(metavar="SCENARIO.yaml", help="Model, devices and engine; see --real.")],
    real: Annotated[
        list[Path],
        typer.Option(
            metavar="PATH",
            help="Measured: a bench folder or `vllm bench serve` JSON, which the scenario's workload replays, or a CSV"
            " of closed-loop points (isl, osl, concurrency, ttft_ms, tpot_ms).",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OVERLAY.yaml", help="The overlay to write.")],
    terms: Annotated[
        str | None, typer.Option(metavar="LIST", help="What to fit (with commas); default: what the data can hold.")
    ] = None,
    train: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Fit this share, at random; default 0.5.")
    ] = None,
    hold_out: Annotated[
        str | None, typer.Option(metavar="COLUMN=VALUE", help="Fit all but the rows of a CSV with this value.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of workloads and split, instead of the scenario's.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the overlay file.")] = False,
) -> None:
    """Fit a few physical terms to real measurements, and report the error on what the fit did not see."""
    from servetwin.measure.calibrate import calibrate as calibrated
    from servetwin.measure.calibration_data import hashes, read_observed, split_at_random
    from servetwin.measure.calibration_data import hold_out as held_out
    from servetwin.scenario.load import load

    if output.exists() and not overwrite:
        raise InputError("the file is there already", where=str(output), allowed="another file, or --overwrite")
    if not output.parent.is_dir():
        raise InputError("no such folder", where=str(output.parent))
    if hold_out is not None and train is not None:
        raise InputError("goes without --train", where="--hold-out", allowed="one of the two")
    template = load(scenario)
    if seed is not None:
        template = template.model_copy(update={"seed": seed})
    observed = [one for path in real for one in read_observed(path, template, scenario.parent)]
    if hold_out is None:
        masks = split_at_random(observed, 0.5 if train is None else train, template.seed)
    else:
        column, equals, value = hold_out.partition("=")
        if not equals:
            raise InputError("has no '='", where="--hold-out", found=hold_out, allowed="COLUMN=VALUE, such as osl=8192")
        masks = held_out(observed, column.strip(), value.strip())
    names = None if terms is None else [name.strip() for name in terms.split(",") if name.strip()]
    try:
        found = calibrated(observed, masks, names, workers=WORKERS, progress=_Telling())
    except InputError as error:
        raise error.at(where=str(scenario)) from None
    try:
        output.write_text(found.text([one for path in real for one in hashes(path)]), encoding="utf-8", newline="\n")
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", where=str(output)) from None
    _print(found)
    typer.echo(f"Written; a scenario names it so: timing: {{overlay: {output}}}", err=True)


class _Telling:
    """A line on stderr now and then, once a fit has lasted a while."""

    def __init__(self) -> None:
        self._next = time.monotonic() + PATIENCE_S

    def __call__(self, simulations: int, cost: float | None) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + INTERVAL_S
        so_far = f", train part {100 * cost:.1f} % off (rms)" if cost is not None and cost == cost else ""
        typer.echo(f"calibrating: {simulations} simulations{so_far}", err=True)


def _print(found: Calibration) -> None:
    from servetwin.cli.table import print_table

    def shown(value: float, factor: bool) -> str:
        return f"{value:.4f}" if factor else f"{value / 1e6:.4f} ms"

    rows = []
    for term in found.terms:
        factor = term.name.endswith("_factor")
        error = "at its bound" if term.error is None else shown(term.error, factor)
        rows.append([term.name, shown(term.start, factor), shown(term.value, factor), error])
    print_table(["term", "before", "fitted", "standard error"], rows)
    typer.echo()

    def cell(errors: Errors | None) -> str:
        return "–" if errors is None else f"{errors.mape_percent:.1f} ({errors.bias_percent:+.1f})"

    rows = []
    for name, part in (("train", found.train), ("unseen", found.unseen)):
        for metric in ("ttft", "tpot"):
            raw, after = part.raw.get(metric), part.calibrated.get(metric)
            if raw is not None:
                rows.append([name, metric.upper(), str(raw.figures), cell(raw), cell(after)])
    print_table(["part", "latency", "figures", "raw: MAPE (bias), %", "calibrated: MAPE (bias), %"], rows)
    for name, why in found.left_out.items():
        typer.echo(f"not fitted: {name}: {why}", err=True)
    for note in found.notes:
        typer.echo(f"note: {note}", err=True)
