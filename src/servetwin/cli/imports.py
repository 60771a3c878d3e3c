"""`servetwin import`: files of other tools, as scenarios and profiles."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from servetwin.cli.faults import guarded

app = typer.Typer(help="Read files of other tools.", no_args_is_help=True, rich_markup_mode=None)


@app.command("llmservingsim")
@guarded
def llmservingsim(
    cluster: Annotated[Path, typer.Argument(metavar="CLUSTER.json", help="A cluster file of LLMServingSim.")],
    repo: Annotated[Path, typer.Option(metavar="DIR", help="Its checkout, or a part of one in its layout.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="SCENARIO.yaml", help="The scenario to write.")],
    workload: Annotated[Path | None, typer.Option(metavar="FILE", help="The workload to replay.")] = None,
    bench: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A real run, whose KV capacity and arrivals are taken.")
    ] = None,
    flags: Annotated[str, typer.Option(metavar='"--max-num-seqs 128 …"', help="Its command-line flags.")] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the scenario file.")] = False,
) -> None:
    """Turn a cluster file of LLMServingSim into a scenario."""
    from servetwin.errors import InputError
    from servetwin.interop.llmservingsim import import_cluster

    if output.exists() and not overwrite:
        raise InputError("the file is there already", where=str(output), allowed="another file, or --overwrite")
    import_cluster(cluster, repo, workload, bench, flags, output, lambda text: typer.echo(f"note: {text}", err=True))
    typer.echo(f"Written; now type: servetwin run {output}", err=True)


@app.command("llmservingsim-profile")
@guarded
def llmservingsim_profile(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A profile bundle of LLMServingSim.")],
    device: Annotated[str, typer.Option(metavar="NAME", help="The device that it was measured on.")],
) -> None:
    """Convert a profile bundle of LLMServingSim into the user's profile folder."""
    from servetwin.interop.llmservingsim_profile import import_profile

    typer.echo(str(import_profile(folder, device)))
