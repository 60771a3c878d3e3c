"""`--set pools[0].engine.max_num_seqs=64`: one value of a scenario, changed on the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servetwin.errors import InputError, nearest
from servetwin.scenario import document
from servetwin.scenario.problems import join, short

WHERE = "--set"
PATHS = ("workload.trace", "timing.overlay")
"""Files named on the command line are relative to where it is typed, not to the scenario."""
_PART = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)((?:\[[0-9]{1,9}\])*)")


@dataclass(frozen=True)
class Override:
    """`text` as typed, split into the way to the value and the value."""

    text: str
    steps: tuple[str | int, ...]
    value: Any

    @property
    def path(self) -> str:
        path = ""
        for step in self.steps:
            path = join(path, step)
        return path


def read(text: str) -> Override:
    """Split `path=value`; the value is YAML. Raises InputError."""
    path, equals, value = text.partition("=")
    where = f"--set {text}"
    if not equals:
        raise InputError("has no '='", where=where, allowed="--set path=value, such as --set pools[0].replicas=2")
    steps: list[str | int] = []
    for part in path.strip().split("."):
        match = _PART.fullmatch(part)
        if match is None:
            allowed = "names and indices, such as pools[0].device"
            raise InputError("not a path", where=where, found=path, allowed=allowed)
        steps += [match[1], *(int(index) for index in re.findall(r"[0-9]+", match[2]))]
    change = Override(text, tuple(steps), document.parse(value, where))
    if change.path in PATHS and isinstance(change.value, str):
        return Override(text, change.steps, str(Path.cwd() / change.value))
    return change


def apply(data: dict[str, Any], change: Override) -> str:
    """Set the value in `data`. Mappings on the way are made when absent; list entries must be there.

    Returns the path from which on everything stems from the change: its own, or that of the first mapping made.
    Raises InputError when the way leads through something that is neither.
    """
    place: Any = data
    path, made = "", None
    for position, step in enumerate(change.steps):
        _check(place, step, path, change)
        if position == len(change.steps) - 1:
            place[step] = change.value
            break
        if isinstance(step, str) and place.get(step) is None and isinstance(change.steps[position + 1], str):
            place[step] = {}
            made = made or join(path, step)
        path = join(path, step)
        place = place[step] if isinstance(step, int) else place.get(step)
    return made or change.path


def _check(place: Any, step: str | int, path: str, change: Override) -> None:
    """That `step` can be taken from `place`, which lies at `path`."""
    if isinstance(step, str):
        if not isinstance(place, dict):
            raise InputError(f"is no mapping, so it has no {step!r}", where=WHERE, field=path, found=short(place))
        return
    if place is None:
        from servetwin.scenario.schema import Scenario

        names = list(Scenario.model_fields)
        hint = nearest(path, names) if path not in names else None
        raise InputError("there is no such list in the scenario", where=WHERE, field=path, hint=hint)
    if not isinstance(place, list):
        raise InputError("is not a list", where=WHERE, field=path, found=short(place))
    if step >= len(place):
        allowed = f"0 to {len(place) - 1}" if len(place) > 1 else "0" if place else None
        raise InputError("there is no such entry", where=WHERE, field=join(path, step), allowed=allowed)
