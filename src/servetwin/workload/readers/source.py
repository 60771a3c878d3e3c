"""The file behind a workload: its bytes, its hash, and errors that say where in it something is wrong."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from servetwin.errors import InputError

MOST_TOKENS = (1 << 31) - 1
LATEST_NS = 1 << 62
TOKENS_ALLOWED = f"a whole number from 1 to {MOST_TOKENS}"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class TraceFile:
    """A file read whole."""

    path: Path
    data: bytes

    @classmethod
    def open(cls, path: Path) -> TraceFile:
        """Read `path`. Raises `InputError` when it is missing, a folder, unreadable or empty."""
        if path.is_dir():
            raise InputError("is a folder", where=str(path), allowed="a file")
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise InputError("no such file", where=str(path)) from None
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from None
        if not data.strip():
            raise InputError("the file is empty", where=str(path))
        return cls(path, data)

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def text(self) -> bytes:
        """The bytes without a byte order mark."""
        return self.data.removeprefix(BYTE_ORDER_MARK)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(line number from 1, line) of every line that is not blank."""
        for number, line in enumerate(io.BytesIO(self.text), 1):
            line = line.strip()
            if line:
                yield number, line

    def first_line(self) -> tuple[int, str]:
        """Number and text of the first line that is not blank."""
        number, line = next(self.lines())
        return number, line.decode(errors="replace")

    def error(
        self,
        message: str,
        place: str | int | None = None,
        *,
        found: object = None,
        allowed: str | None = None,
        hint: str | None = None,
    ) -> InputError:
        """An error in this file; `place` is a line number or says where in words."""
        field = f"line {place}" if isinstance(place, int) else place
        return InputError(message, where=str(self.path), field=field, found=found, allowed=allowed, hint=hint)
