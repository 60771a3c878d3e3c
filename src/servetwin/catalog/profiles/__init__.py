"""Where measured profiles are found: the user's profile folder, then the package.

A profile is a folder with a header `profile.yaml` and the tables that it names (docs/profiles.md): per-layer times in
`<device>/<org>__<model>/<variant>/`, kernel times in `kernels/<device>/`. Its id is that path. A profile of the user
hides one of the package with the same id. The profiles of the package lie beside this file.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servetwin.catalog.fields import Fields, count, one_of, read_yaml, text
from servetwin.errors import InputError, nearest

SCHEMA = 1
KINDS = ("layers", "kernels")
HEADER = "profile.yaml"


@dataclass(frozen=True, slots=True)
class Profile:
    """The header of a profile: what every kind has in common, and the rest of the file in `data`."""

    folder: Path
    kind: str
    device: str
    model: str
    """"any" for kernels, whose dtypes and degrees are those of the tables"""
    dtype: str
    kv_dtype: str
    tensor: tuple[int, ...]
    """tensor-parallel degrees that were measured"""
    limits: Mapping[str, int]
    """how far the measurements reach: max_tokens, max_seqs, max_context"""
    tables: Mapping[str, tuple[str, str]]
    """name -> (file, sha256)"""
    data: Mapping[str, Any]

    @property
    def id(self) -> str:
        return "/".join(self.folder.parts[-3 if self.kind == "layers" else -2 :])

    def table(self, name: str) -> Path:
        """The file of a table, checked against its hash. Raises InputError when it is missing or was changed."""
        file, expected = self.tables[name]
        path = self.folder / file
        try:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from None
        if found != expected:
            message = f"is not the file that {HEADER} describes: its sha256 differs"
            raise InputError(message, where=str(path), found=found)
        return path


def user_folder() -> Path:
    """`$SERVETWIN_PROFILES`, or `servetwin/profiles` in the platform's folder for user data."""
    if chosen := os.environ.get("SERVETWIN_PROFILES"):
        return Path(chosen).expanduser()
    home = Path.home()
    if sys.platform == "win32":
        data = Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local"))
    elif sys.platform == "darwin":
        data = home / "Library" / "Application Support"
    else:
        data = Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share")
    return data / "servetwin" / "profiles"


def packaged_folder() -> Path:
    return Path(__file__).parent


def read_profile(folder: Path) -> Profile:
    """The header of the profile in `folder`. Raises InputError when it is missing or malformed."""
    path = folder / HEADER
    data = read_yaml(path)
    fields = Fields(data, str(path))
    if (schema := fields.get("schema", count)) != SCHEMA:
        raise InputError("unknown schema", where=str(path), field="schema", found=schema, allowed=str(SCHEMA))
    kind = fields.get("kind", lambda value: one_of(value, KINDS))
    of_layers = kind == "layers"
    return Profile(
        folder=folder,
        kind=kind,
        device=fields.get("device", text),
        model=fields.get("model", text) if of_layers else "any",
        dtype=fields.get("dtype", text) if of_layers else "any",
        kv_dtype=fields.get("kv_dtype", text) if of_layers else "any",
        tensor=fields.get("tensor", _degrees) if of_layers else (),
        limits=fields.get("limits", _limits) if of_layers else {},
        tables=fields.get("tables", lambda value: {text(k): _table(v) for k, v in _mapping(value).items()}),
        data=data,
    )


def all_profiles() -> list[Profile]:
    """Every profile that can be found, by id; a malformed one raises InputError."""
    found: dict[str, Profile] = {}
    for root in (user_folder(), packaged_folder()):
        for folder in _folders(root, "*/*/*", "kernels/*"):
            profile = read_profile(folder)
            found.setdefault(profile.id, profile)
    return [found[name] for name in sorted(found)]


def find(device: str, model: str, dtype: str, kv_dtype: str, kind: str = "layers") -> Path | None:
    """The folder of the profile for exactly these, or None. A `kv_dtype` of "auto" means `dtype`."""
    wanted = (kind, model.casefold(), dtype, dtype if kv_dtype == "auto" else kv_dtype)
    for root in (user_folder(), packaged_folder()):
        for folder in _folders(root / device, "*/*"):
            profile = read_profile(folder)
            if (profile.kind, profile.model.casefold(), profile.dtype, profile.kv_dtype) == wanted:
                return folder
    return None


def by_id(name: str) -> Profile:
    """The profile with that id. Raises InputError naming the nearest one there is."""
    for root in (user_folder(), packaged_folder()):
        folder = root / name
        if ".." not in Path(name).parts and (folder / HEADER).is_file() and folder != root:
            return read_profile(folder)
    names = [profile.id for profile in all_profiles()]
    allowed = ", ".join(names) or f"none; {user_folder()} holds no profile"
    raise InputError("no such profile", found=name, allowed=allowed, hint=nearest(name, names))


def profile_hash(folder: Path) -> str:
    """sha256 of the header; as that holds the hash of every table, it stands for the whole profile."""
    return hashlib.sha256((folder / HEADER).read_bytes()).hexdigest()


def _folders(root: Path, *patterns: str) -> Iterator[Path]:
    for pattern in patterns:
        yield from (path.parent for path in sorted(root.glob(f"{pattern}/{HEADER}")))


def _degrees(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise InputError("must be a list with at least one entry", found=value)
    return tuple(count(item) for item in value)


def _limits(value: object) -> dict[str, int]:
    return {text(name): count(limit) for name, limit in _mapping(value).items()}


def _mapping(value: object) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise InputError("must be a mapping", found=value)
    return value


def _table(value: object) -> tuple[str, str]:
    entry = _mapping(value)
    file = text(entry.get("file"))
    if Path(file).is_absolute() or ".." in Path(file).parts:
        raise InputError("must be a file inside the profile's folder", found=file)
    return file, text(entry.get("sha256"))
