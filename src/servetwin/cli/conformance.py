"""`servetwin conformance`: replay the step traces of a real scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def conformance(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Step traces (JSONL, also gzipped).")],
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="DIR", help="Write our steps here.")] = None,
) -> None:
    """Replay step traces of a real scheduler and compare every decision; status 1 if one differs."""
    from servetwin.interop.steptrace import conformance as replayed

    outcomes = replayed(files, output)
    for outcome in outcomes:
        typer.echo(outcome.line)
    if any(outcome.exact is False for outcome in outcomes):
        raise typer.Exit(1)
