"""A small repository in LLMServingSim's layout, with made-up measurements, and a folder of profiles of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from llmservingsim_repo import Repo


@pytest.fixture(autouse=True)
def own_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SERVETWIN_PROFILES", str(tmp_path / "profiles"))
    return tmp_path / "profiles"


@pytest.fixture
def repo(tmp_path: Path) -> Repo:
    return Repo(tmp_path / "repo")
