"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder that holds the measurements (`data/`), or skip: they are not part of the project."""
    place = Path(os.environ.get("SERVETWIN_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (place / "data").is_dir():
        pytest.skip(f"needs the measurement data, not found at {place} (set SERVETWIN_SHARED)")
    return place
