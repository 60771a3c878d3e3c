"""`servetwin run`: simulate a scenario."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from servetwin.cli.faults import INTERRUPTED
from servetwin.errors import InputError, nearest

if TYPE_CHECKING:
    from servetwin.scenario.schema import Scenario

RECORDS = ("steps", "tokens", "schedule", "links")
FORMATS = ("table", "json")
NOTHING = """nothing to run; name a scenario file, or describe one with flags:
  servetwin run SCENARIO.yaml
  servetwin run --model meta-llama/Llama-3.1-8B --device h100_sxm --rate 10 --num-prompts 1000\
 --input-len 512 --output-len 128"""


def run(
    scenario: Annotated[Path | None, typer.Argument(metavar="[SCENARIO.yaml]", help="The scenario file.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="DIR", help="Keep the results here.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a value of the scenario.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The seed, instead of the scenario's.")] = None,
    record: Annotated[str, typer.Option(metavar="LIST", help=f"Also keep: {', '.join(RECORDS)} (with commas).")] = "",
    no_coalesce: Annotated[bool, typer.Option("--no-coalesce", help="Simulate every step by itself.")] = False,
    strict_measured: Annotated[
        bool, typer.Option("--strict-measured", help="Refuse to price a step beyond what was measured.")
    ] = False,
    format_: Annotated[str, typer.Option("--format", metavar="table|json", help="What to print.")] = "table",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output folder.")] = False,
    model: Annotated[str | None, typer.Option(metavar="ID", help="Without a file: the model.")] = None,
    device: Annotated[str | None, typer.Option(metavar="ID", help="Without a file: the device.")] = None,
    tp: Annotated[int | None, typer.Option(metavar="N", help="Tensor parallelism; default 1.")] = None,
    rate: Annotated[float | None, typer.Option(metavar="R", help="Requests/s; default: all at once.")] = None,
    num_prompts: Annotated[int | None, typer.Option(metavar="N", help="Requests; default 1000.")] = None,
    input_len: Annotated[int | None, typer.Option(metavar="L", help="Prompt tokens; default 1024.")] = None,
    output_len: Annotated[int | None, typer.Option(metavar="L", help="Output tokens; default 128.")] = None,
) -> None:
    """Simulate a scenario: a file, or a small one made from flags."""
    _one_of("--format", format_, FORMATS)
    recorded = frozenset(_one_of("--record", part.strip(), RECORDS) for part in record.split(",") if part.strip())
    flags = {
        "model": model,
        "device": device,
        "tensor": tp,
        "rate": rate,
        "requests": num_prompts,
        "input_len": input_len,
        "output_len": output_len,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    with _uncollected():
        loaded, base = _scenario(scenario, given, set_ or [])
        if seed is not None:
            loaded = loaded.model_copy(update={"seed": seed})
        if strict_measured:
            from servetwin.scenario.load import strictly_measured

            loaded = strictly_measured(loaded)
        if output is not None:
            from servetwin.results.files import check_output

            check_output(output, overwrite)
        _simulate(loaded, scenario, base, recorded, not no_coalesce, output, overwrite, format_)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Nobody looks for cycles of garbage: modules that are imported are none, and a run ends with its process."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _one_of(flag: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        hint = nearest(value, allowed)
        raise InputError("not valid", where=flag, found=value, allowed=", ".join(allowed), hint=hint)
    return value


def _scenario(path: Path | None, flags: dict[str, Any], overrides: list[str]) -> tuple[Scenario, Path]:
    """The scenario to run, and the folder at which its relative paths start."""
    from servetwin.scenario.load import FLAG_OF, from_flags, load

    if path is not None:
        for name in flags:
            message = "goes without a scenario file; change the file's values with --set"
            raise InputError(message, where=FLAG_OF[name])
        return load(path, overrides), path.parent
    if not flags:
        raise InputError(NOTHING)
    for name in ("model", "device"):
        if name not in flags:
            kind = f"what `servetwin list {name}s` prints"
            raise InputError("missing: a run without a scenario file needs it", where=FLAG_OF[name], allowed=kind)
    return from_flags(**flags, base=Path(), overrides=overrides), Path()


def _simulate(
    scenario: Scenario,
    path: Path | None,
    base: Path,
    record: frozenset[str],
    coalesce: bool,
    output: Path | None,
    overwrite: bool,
    format_: str,
) -> None:
    from servetwin.cli.progress import Progress
    from servetwin.results.files import ResultFolder
    from servetwin.results.metrics import summarize
    from servetwin.scenario.load import naming_flag
    from servetwin.simulation import simulate

    with ResultFolder(output, overwrite) if output is not None else nullcontext() as folder:
        try:
            with Progress() as progress:
                done = simulate(scenario, base=base, record=record, coalesce=coalesce, progress=progress, folder=folder)
        except InputError as error:
            raise (error.at(where=str(path)) if path else naming_flag(error)) from None
        summary = summarize(done) if folder is None else folder.write(done)
    _print(summary, format_)
    if output is not None:
        typer.echo(f"Results written to {output}", err=True)
    elif format_ == "table":
        typer.echo("Nothing was kept; -o DIR writes the results to a folder.", err=True)
    if done.partial:
        raise typer.Exit(INTERRUPTED)


def _print(summary: dict[str, Any], format_: str) -> None:
    if format_ == "json":
        import json

        typer.echo(json.dumps(summary, indent=2, allow_nan=False))
        return
    from rich.console import Console

    from servetwin.report.terminal import print_summary

    print_summary(summary, Console())
