"""Profiles to test with: a tiny synthetic one, and the real one where the measurement data is at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from profile_bundle import write_bundle

from servetwin.interop.llmservingsim_profile import import_profile
from servetwin.timing.profile import ProfileTimer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny profile at tensor degrees 1 and 2."""
    root = tmp_path_factory.mktemp("tiny")
    return import_profile(write_bundle(root, degrees=(1, 2)), "tiny", root / "profiles", layers=4)


@pytest.fixture(scope="session")
def timer(tiny: Path) -> ProfileTimer:
    return ProfileTimer.load(tiny, 1)


@pytest.fixture(scope="session")
def measured_bundle(shared: Path) -> Path:
    return shared / "data/llmservingsim/profiler/perf/RTXPRO6000/meta-llama/Llama-3.1-8B/bf16"


@pytest.fixture(scope="session")
def measured(measured_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> ProfileTimer:
    """The real profile of Llama-3.1-8B on an RTX PRO 6000."""
    return ProfileTimer.load(
        import_profile(measured_bundle, "rtx_pro_6000", tmp_path_factory.mktemp("real"), layers=32), 1
    )
