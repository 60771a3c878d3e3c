"""Wrong scenarios, and the exact message that a user sees for each (the table is bad_input.yaml)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from servetwin import catalog
from servetwin.cli.app import app
from servetwin.errors import InputError
from servetwin.scenario.load import load, validated
from servetwin.scenario.resolve import resolve

TABLE: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("bad_input.yaml").read_text("utf-8"))
SMALLEST = """\
model: meta-llama/Llama-3.1-8B
workload: {arrivals: {process: poisson, rate: 10}, requests: 1000, input_tokens: 512, output_tokens: 128}
pools: [{device: h100_sxm}]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the smallest scenario and some things that are no scenarios."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SERVETWIN_PROFILES", str(tmp_path / "profiles"))
    Path("s.yaml").write_text(SMALLEST)
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    Path("full").mkdir()
    Path("full/file").write_text("something")
    return tmp_path


def needs_engines() -> None:
    if not catalog.names("engines"):
        pytest.skip("the catalogue holds no engine version")


@pytest.mark.parametrize("case", TABLE["files"])
def test_file(case: str) -> None:
    Path("t.yaml").write_text(TABLE["files"][case]["file"], encoding="utf-8")
    with pytest.raises(InputError) as raised:
        load("t.yaml")
    assert str(raised.value) == TABLE["files"][case]["says"]


@pytest.mark.parametrize("case", TABLE["overrides"])
def test_override(case: str) -> None:
    if case == "unknown engine":
        needs_engines()
    with pytest.raises(InputError) as raised:
        load("s.yaml", [TABLE["overrides"][case]["set"]])
    assert str(raised.value) == TABLE["overrides"][case]["says"]


@pytest.mark.parametrize("case", TABLE["contradictions"])
def test_contradiction(case: str) -> None:
    needs_engines()
    scenario = load("s.yaml", TABLE["contradictions"][case]["set"])
    with pytest.raises(InputError) as raised:
        resolve(scenario)
    assert str(raised.value) == TABLE["contradictions"][case]["says"]


@pytest.mark.parametrize("case", TABLE["commands"])
def test_command(case: str) -> None:
    result = CliRunner().invoke(app, TABLE["commands"][case]["type"])
    assert result.stderr.rstrip("\n") == TABLE["commands"][case]["says"]
    assert result.exit_code == 2
    assert result.stdout == ""


def test_smallest_scenario_is_right() -> None:
    assert load("s.yaml").pools[0].device == "h100_sxm"


def test_nested_too_deeply() -> None:
    Path("t.yaml").write_text("model: " + "[" * 3000)
    with pytest.raises(InputError, match=r"^t\.yaml: not valid YAML: nested too deeply$"):
        load("t.yaml")


def test_file_too_large() -> None:
    Path("t.yaml").write_text("#" * 10_000_001)
    with pytest.raises(InputError, match=r"^t\.yaml: the file is too large for a scenario; allowed: 10000000 bytes$"):
        load("t.yaml")


def test_model_configuration_that_is_none(folder: Path) -> None:
    Path("config.json").write_text("[1, 2]")
    with pytest.raises(InputError) as raised:
        load("s.yaml", ["model=./config.json"])
    assert str(raised.value) == "--set: model: the model configuration is not a JSON object; found 'config.json'"
    Path("config.json").write_text("{")
    with pytest.raises(InputError, match="model: the model configuration is not JSON"):
        load("s.yaml", ["model=./config.json"])
    Path("config.json").unlink()
    with pytest.raises(InputError, match="model: no such model configuration"):
        load("s.yaml", [f"model={folder}"])


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-this-name/model", "a\0b"])
def test_model_name_that_is_no_path_either(name: str) -> None:
    Path("t.yaml").write_text(SMALLEST)
    with pytest.raises(InputError, match=r"^--set"):
        load("t.yaml", [f'model="{name}"'.replace("\0", "\\0")])


KEYS = (
    "arrivals",
    "process",
    "rate",
    "requests",
    "input_tokens",
    "prefixes",
    "groups",
    "tokens",
    "popularity",
    "zipf",
    "distribution",
    "min",
    "max",
    "trace",
    "device",
    "engine",
    "link",
    "bandwidth",
    "source",
    "base_ns",
    "ttft",
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "uniform", "zipf", "10ms", "1GB/s"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@given(st.sampled_from(("model", "workload", "pools", "routing", "timing", "slo", "seed", "name")), ANYTHING)
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_anything_else_is_wrong_input_too(key: str, value: Any) -> None:
    """Nothing that a file can hold ends in another error than InputError."""
    data = {"model": "m", "workload": {"trace": "t"}, "pools": [{"device": "d"}], key: value}
    try:
        validated(data, "s.yaml")
    except InputError as error:
        assert str(error).startswith("s.yaml: ")
