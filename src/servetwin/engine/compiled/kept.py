"""What numba keeps of compiled code, and for how long.

numba tells whether a function is still the same by the time and size of its own file. What it calls, and the columns
that are constants in it, stand in other files, and installing may give all of them one time. So the text of all of them
is noted beside the compiled code, which is thrown away when it was made from another one.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

from servetwin.engine.compiled.kernel import advance

SOURCES = ("columns", "pricing", "steps", "coast", "kernel")
NOTE = "servetwin-compiled.sha256"


def compiled_before() -> bool:
    """Whether compiled code of this very text is there at once."""
    folder = _folder()
    return folder is not None and _noted(folder) == _digest() and any(folder.glob("kernel.advance-*.nbi"))


def throw_away_older() -> None:
    """To be called before anything compiled is."""
    folder = _folder()
    if folder is None or _noted(folder) == _digest():
        return
    with suppress(OSError):  # where nothing can be written, nothing is kept either
        folder.mkdir(parents=True, exist_ok=True)
        for source in SOURCES:
            for kept in folder.glob(f"{source}.*.nb[ic]"):
                kept.unlink(missing_ok=True)
        (folder / NOTE).write_text(_digest())


def _folder() -> Path | None:
    folder = advance.stats.cache_path
    return None if folder is None else Path(folder)


def _noted(folder: Path) -> str:
    with suppress(OSError):
        return (folder / NOTE).read_text()
    return ""


def _digest() -> str:
    here = Path(__file__).parent
    return hashlib.sha256(b"\0".join((here / f"{source}.py").read_bytes() for source in SOURCES)).hexdigest()
