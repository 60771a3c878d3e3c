"""`strict_measured`: a run ends at the first step that was not measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from servetwin.errors import InputError
from servetwin.scenario.load import from_data, strictly_measured
from servetwin.scenario.schema import Scenario
from servetwin.simulation import simulate


def scenario(device: str, tokens: int = 512, **timing: Any) -> Scenario:
    data = {
        "model": "mistralai/Mistral-7B-v0.3",
        "workload": {
            "arrivals": {"process": "all_at_once"},
            "requests": 4,
            "input_tokens": tokens,
            "output_tokens": 8,
        },
        "timing": timing,
        "pools": [{"device": device}],
    }
    return from_data(data, "test", Path())


def test_measured_and_interpolated_steps_pass() -> None:
    strict = simulate(scenario("h100_sxm", strict_measured=True))
    assert strict.priced_ns == simulate(scenario("h100_sxm")).priced_ns
    assert not strict.priced_ns["extrapolated"]


def test_a_step_beyond_the_measurements_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"lies beyond what was measured \(.*context_attention.*\)"):
        simulate(scenario("h100_sxm", tokens=30_000, strict_measured=True))


def test_a_device_without_measurements_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="no measurement on this device prices"):
        simulate(scenario("mi300x", strict_measured=True))


def test_a_law_cannot_be_strict() -> None:
    with pytest.raises(InputError, match="'linear', which measures nothing"):
        strictly_measured(scenario("h100_sxm", source="linear", base_ns=1000))
