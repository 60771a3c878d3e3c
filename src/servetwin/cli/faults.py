"""What a user sees when something goes wrong, and the exit status of it."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from typing import ParamSpec

import typer

from servetwin.errors import InputError

FAULT, WRONG_INPUT, INTERRUPTED = 1, 2, 130
FRAMES = 4
"""Innermost lines of a traceback that are shown."""

P = ParamSpec("P")


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """`command`, ending with status 2 and one message for wrong input, and with 1 for a fault of ours."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise
        except InputError as error:
            typer.echo(f"servetwin: {error}", err=True)
            raise typer.Exit(WRONG_INPUT) from None
        except KeyboardInterrupt:
            typer.echo("servetwin: interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            typer.echo("".join(traceback.format_exception(error, limit=-FRAMES)).rstrip(), err=True)
            typer.echo("servetwin: a fault of ours, not of your input; please report it with the lines above", err=True)
            raise typer.Exit(FAULT) from None

    return run
