"""Finding entries by name: the project's own folder, then what the user adds, the latest first.

An entry is one YAML file whose stem is its id (in a model's id `__` stands for `/`). A look-up reads that one file;
aliases are only searched when no file has the name.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from servetwin.catalog.entries import Device, EngineVersion, Host, Link, ModelEntry
from servetwin.catalog.fields import Fields, read_yaml
from servetwin.catalog.reading import (
    FindLink,
    open_entry,
    read_device,
    read_engine,
    read_host,
    read_link,
    read_model,
)
from servetwin.errors import InputError, nearest

T = TypeVar("T")
KINDS = ("devices", "links", "hosts", "models", "engines")
VARIABLE = "SERVETWIN_CATALOG"

_OWN = Path(__file__).parent
_added: list[Path] = []
_ALIASES = re.compile(r"^aliases:.*(?:\n(?:[ \t#-].*)?)*", re.MULTILINE)


def add_folder(path: str | os.PathLike[str]) -> None:
    """Search `path` (with sub-folders `devices`, `links`, ...) before everything searched so far.

    Raises InputError when it is not a folder.
    """
    _added.insert(0, _folder(Path(path).expanduser().resolve(), "add_folder"))


def device(name: str) -> Device:
    """The accelerator of this id or alias. Raises InputError with the nearest name, or for a malformed entry."""
    return _find("devices", name, read_device)


def link(name: str) -> Link:
    """The link of this id or alias. Raises InputError with the nearest name, or for a malformed entry."""
    return _find("links", name, read_link)


def host(name: str) -> Host:
    """The host of this id or alias. Raises InputError with the nearest name, or for a malformed entry."""
    return _find("hosts", name, read_host)


def model(name: str) -> ModelEntry:
    """The model of this id or alias. Raises InputError with the nearest name, or for a malformed entry."""
    return _find("models", name, read_model)


def engine(name: str) -> EngineVersion:
    """The engine version of this id or alias. Raises InputError with the nearest name, or for a malformed entry."""
    return _find("engines", name, read_engine)


def names(kind: str) -> list[str]:
    """The ids of one of `KINDS`, sorted. Raises InputError for another kind."""
    if kind not in KINDS:
        raise InputError("unknown kind of entry", found=kind, allowed=", ".join(KINDS), hint=nearest(kind, KINDS))
    return sorted({_id(kind, path) for path in _files(kind)}, key=str.casefold)


def _find(kind: str, name: str, read: Callable[[str, Fields, FindLink], T]) -> T:
    what = kind.removesuffix("s")
    if not isinstance(name, str):
        raise InputError(f"the name of a {what} must be a text", found=name)
    wanted = _folded(name)
    path = next((path for path in _files(kind) if _folded(_id(kind, path)) == wanted), None)
    if path is None:
        aliases = {_folded(alias): (alias, path) for path in reversed(list(_files(kind))) for alias in _aliases(path)}
        if wanted not in aliases:
            known = [*names(kind), *(alias for alias, _ in aliases.values())]
            listing = f"what `servetwin list {kind}` prints"
            raise InputError(f"unknown {what}", found=name, allowed=listing, hint=nearest(name, known))
        path = aliases[wanted][1]
    return read(path.stem, open_entry(_content(path, path.stat().st_mtime_ns), str(path)), link)


def _files(kind: str) -> Iterator[Path]:
    """The entry files of a kind, those that take precedence first."""
    for folder in (*_added, *_from_environment(), _OWN):
        place = folder / kind
        if place.is_dir():
            yield from sorted(path for path in place.iterdir() if path.suffix in (".yaml", ".yml"))


def _from_environment() -> list[Path]:
    given = os.environ.get(VARIABLE, "")
    return [_folder(Path(part).expanduser(), VARIABLE) for part in given.split(os.pathsep) if part]


def _folder(path: Path, where: str) -> Path:
    if not path.is_dir():
        raise InputError("is not a folder", where=where, found=str(path))
    return path


def _id(kind: str, path: Path) -> str:
    return path.stem.replace("__", "/", 1) if kind == "models" else path.stem


def _folded(name: str) -> str:
    """Names are the same when they differ only in case or in the sign between words."""
    return name.casefold().replace("-", "_").replace(" ", "_")


def _aliases(path: Path) -> tuple[str, ...]:
    """The aliases of an entry, from that part of the file alone: the scan must not parse every entry."""
    found = _ALIASES.search(path.read_text(encoding="utf-8", errors="replace"))
    if not found:
        return ()
    import yaml

    try:
        listed = yaml.safe_load(found[0])["aliases"]
    except yaml.YAMLError:
        return ()  # reported when this entry itself is looked up
    return tuple(alias for alias in listed if isinstance(alias, str)) if isinstance(listed, list) else ()


@functools.lru_cache(maxsize=256)
def _content(path: Path, _modified_ns: int) -> Any:
    """The parsed file; it is read again when it has changed."""
    return read_yaml(path)
