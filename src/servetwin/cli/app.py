"""`servetwin`: its verbs, and the options that come before them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from servetwin import __version__
from servetwin.cli import calibrate, conformance, imports, list_, run, schema, show, validate
from servetwin.cli.faults import guarded

app = typer.Typer(
    name="servetwin",
    help="A digital twin of LLM serving: describe a system, get what would have happened.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run")(guarded(run.run))
app.command("list")(guarded(list_.list_))
app.command("show")(guarded(show.show))
app.command("schema")(guarded(schema.schema))
app.add_typer(imports.app, name="import")
app.command("conformance")(guarded(conformance.conformance))
app.command("validate")(guarded(validate.validate))
app.command("calibrate")(guarded(calibrate.calibrate))


@app.callback(invoke_without_command=True)
@guarded
def servetwin(
    context: typer.Context,
    catalog: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="A catalogue folder of one's own, searched first.")
    ] = None,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        typer.echo(f"servetwin {__version__}")
        raise typer.Exit
    for folder in catalog or ():
        _add_catalogue(folder)
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _add_catalogue(folder: Path) -> None:
    from servetwin.catalog import add_folder
    from servetwin.errors import InputError

    try:
        add_folder(folder)
    except InputError as error:
        error.where = "--catalog"
        raise error.at() from None


def main() -> None:
    """The console script."""
    # numpy's linear algebra starts a thread a core when it is imported, at up to 0.05 CPU seconds; a run needs none.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    app()
