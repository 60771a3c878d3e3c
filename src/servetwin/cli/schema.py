"""`servetwin schema`: the JSON Schema of a scenario file."""

from __future__ import annotations

import typer


def schema() -> None:
    """Print the JSON Schema of a scenario file, for editors."""
    import json

    from servetwin.scenario.load import schema as of_scenario

    typer.echo(json.dumps(of_scenario(), indent=2, ensure_ascii=False))
