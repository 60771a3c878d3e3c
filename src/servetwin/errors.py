"""Errors that a person can act on.

Everything that a user can get wrong is raised as `InputError`; the command line prints it as one line and exits with
status 2. Any other exception that reaches the command line is a fault of ours (status 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The entry of `names` that `name` was most likely meant to be, or None when nothing is close."""
    by_folded = {candidate.casefold(): candidate for candidate in names}
    close = difflib.get_close_matches(name.casefold(), by_folded, n=1, cutoff=0.5)
    return by_folded[close[0]] if close else None


class InputError(Exception):
    """The user's input is wrong.

    `where` names the file (or flag), `field` the place inside it (`pools[0].device`, `line 17`), `found` what stands
    there, `allowed` what may stand there, `hint` the nearest valid name or what to type instead.
    """

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        field: str | None = None,
        found: object = None,
        allowed: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.message, self.where, self.field = message, where, field
        self.found, self.allowed, self.hint = found, allowed, hint
        super().__init__(str(self))

    def __str__(self) -> str:
        place = ": ".join(part for part in (self.where, self.field) if part)
        text = f"{place}: {self.message}" if place else self.message
        if self.found is not None:
            text += f"; found {self.found!r}"
        if self.allowed:
            text += f"; allowed: {self.allowed}"
        if self.hint:
            text += f"; did you mean {self.hint!r}?"
        return text

    def at(self, where: str | None = None, field: str | None = None) -> InputError:
        """The same error, with the place filled in where it was not known yet."""
        return InputError(
            self.message,
            where=self.where or where,
            field=self.field or field,
            found=self.found,
            allowed=self.allowed,
            hint=self.hint,
        )
