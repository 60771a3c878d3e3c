"""The command line: one module a verb, each a thin shell around a room of the package."""

from __future__ import annotations

from servetwin.cli.app import main

__all__ = ["main"]
