"""How far a run has come, on stderr, once it has lasted a while."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

PATIENCE_S = 2.0
"""A run shorter than this shows nothing."""
REDRAW_S = 0.2


class Progress:
    """Called with (requests done, requests in all, simulated ns); silent where stderr is no terminal."""

    def __init__(self) -> None:
        self._next = time.monotonic() + PATIENCE_S if sys.stderr.isatty() else float("inf")
        self._bar: Bar | None = None

    def __call__(self, done: int, total: int, simulated_ns: int) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + REDRAW_S
        if self._bar is None:
            self._bar = _bar()
            self._bar.add_task("", total=total)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done, description=f"{simulated_ns / 1e9:.1f} s simulated")

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def _bar() -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    return Bar(*columns, console=Console(stderr=True), transient=True, refresh_per_second=4)
