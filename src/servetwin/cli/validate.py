"""`servetwin validate`: a simulated run beside a real one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def validate(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A folder that `servetwin run -o` wrote.")],
    against: Annotated[Path, typer.Option(metavar="REAL", help="The log of the real run.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Write table and plots here.")
    ] = None,
) -> None:
    """Compare a simulated run with the log of a real one."""
    from rich.console import Console

    from servetwin.measure.validate import validate as compared

    compared(run_dir, against, output).print(Console())
    if output is not None:
        typer.echo(f"Written to {output}", err=True)
