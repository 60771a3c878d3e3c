"""The profile made from the bundle of measurements that LLMServingSim 2.0 has of a model on its hardware."""

from __future__ import annotations

import hashlib
from pathlib import Path

from servetwin.catalog import profiles
from servetwin.errors import InputError
from servetwin.interop.llmservingsim_cluster import Instance
from servetwin.interop.llmservingsim_profile import import_profile


def bundled_profile(repo: Path, instance: Instance, variant: str, device: str, layers: int) -> tuple[str | None, str]:
    """The id of the profile, converted where it is not there yet, and an empty text; or None, and what is missing."""
    folder = repo / "profiler" / "perf" / instance.hardware / instance.model / variant
    what = f"{instance.model} ({variant}) on {instance.hardware}"
    if not (folder / "meta.yaml").is_file():
        return None, f"no measurements of {what}: there is no profile bundle {folder}"
    degrees = sorted(int(path.name[2:]) for path in folder.glob("tp*") if path.name[2:].isdecimal())
    if instance.tensor not in degrees:
        there = ", ".join(map(str, degrees)) or "none"
        return None, f"no measurements of {what} at tp_size {instance.tensor}: the bundle {folder} has {there}"
    place = profiles.user_folder() / device / instance.model.replace("/", "__") / variant
    if not _made_from(place, folder, degrees, layers):
        place = import_profile(folder, device, layers=layers)
    return profiles.read_profile(place).id, ""


def _made_from(place: Path, bundle: Path, degrees: list[int], layers: int) -> bool:
    """Whether the profile in `place` was made from just these files."""
    if not (place / profiles.HEADER).is_file():
        return False
    try:
        profile = profiles.read_profile(place)
        sources = profile.data["provenance"]["sources"]
        for name in profile.tables:
            profile.table(name)
        same = all(hashlib.sha256((bundle / name).read_bytes()).hexdigest() == sources[name] for name in sources)
    except (InputError, KeyError, TypeError, ValueError, OSError, AttributeError):
        return False  # written by hand or damaged: it is replaced
    measured = {f"tp{degree}/skew.csv" for degree in degrees if (bundle / f"tp{degree}" / "skew.csv").is_file()}
    known = list(profile.tensor) == degrees and measured <= set(sources)
    return same and known and profile.data.get("layers") == layers
