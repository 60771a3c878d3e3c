"""The command line: help, exit statuses, what goes to stdout and what to stderr."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from servetwin import catalog
from servetwin.cli.app import app
from servetwin.errors import InputError
from servetwin.results.run import REQUEST_COLUMNS, STEP_COLUMNS, TEXT_COLUMNS, Run

QUICK = ["run", "--model", "meta-llama/Llama-3.1-8B", "--device", "h100_sxm"]
VERBS = ("run", "list", "show", "schema", "import", "conformance", "validate")


def servetwin(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


def a_run(partial: bool = False) -> Run:
    """One request of 10 + 2 tokens, served in two steps of 1 ms."""
    one: dict[str, Any] = {name: np.array([0]) for name in REQUEST_COLUMNS}
    one |= {name: [""] for name in TEXT_COLUMNS} | {"status": ["finished"], "pool": ["pool0"]}
    one |= {"input_tokens": np.array([10]), "output_tokens": np.array([2])}
    one |= {"first_token_ns": np.array([1_000_000]), "finish_ns": np.array([2_000_000])}
    steps = {name: np.array([0, 0]) for name in STEP_COLUMNS}
    steps |= {"step": np.array([0, 1]), "steps": np.array([1, 1])}
    steps |= {"start_ns": np.array([0, 1_000_000]), "end_ns": np.array([1_000_000, 2_000_000])}
    gaps = (np.array([1_000_000]), np.array([1]))
    return Run(
        scenario_yaml="seed: 0\n", seed=0, requests=one, steps=steps, itl=gaps, kv_blocks_total=[100], partial=partial
    )


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces the simulation; holds what it was called with, and `does`: what it then does."""
    calls: dict[str, Any] = {"does": a_run}

    def simulate(scenario: Any, **options: Any) -> Run:
        calls.update(options, scenario=scenario)
        result: Run = calls["does"]()
        return result

    module = ModuleType("servetwin.simulation")
    module.simulate = simulate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "servetwin.simulation", module)
    return calls


class TestHelp:
    def test_names_every_verb(self) -> None:
        result = servetwin("--help")
        assert result.exit_code == 0
        for verb in VERBS:
            assert f"  {verb} " in result.stdout

    @pytest.mark.parametrize("verb", [*VERBS, ("import", "llmservingsim"), ("import", "llmservingsim-profile")])
    def test_of_a_verb(self, verb: str | tuple[str, ...]) -> None:
        result = servetwin(*([verb] if isinstance(verb, str) else verb), "--help")
        assert result.exit_code == 0
        assert "Usage: servetwin" in result.stdout or "Usage:" in result.stdout

    def test_without_a_verb(self) -> None:
        assert servetwin().exit_code == 0
        assert servetwin().stdout == servetwin("--help").stdout

    def test_version(self) -> None:
        assert servetwin("--version").stdout.startswith("servetwin ")

    def test_unknown_verb_and_option_are_wrong_input(self) -> None:
        assert servetwin("simulate").exit_code == 2
        assert servetwin("run", "--fast").exit_code == 2

    def test_is_quick_because_it_imports_nothing_heavy(self) -> None:
        heavy = "{'pydantic', 'numpy', 'yaml', 'pyarrow', 'plotly', 'rich.table'}"
        code = f"import sys, servetwin.cli; found = {heavy} & set(sys.modules); sys.exit(str(found) if found else 0)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


class TestRun:
    def test_prints_a_table_and_says_how_to_keep_it(self, simulated: dict[str, Any]) -> None:
        result = servetwin(*QUICK)
        assert result.exit_code == 0
        assert "Mean TTFT (ms)" in result.stdout
        assert "-o DIR" in result.stderr

    def test_hands_over_what_was_asked_for(self, simulated: dict[str, Any]) -> None:
        assert servetwin(*QUICK, "--seed", "9", "--record", "steps,tokens", "--no-coalesce", "--tp", "2").exit_code == 0
        assert simulated["scenario"].seed == 9
        assert simulated["scenario"].pools[0].parallelism.tensor == 2
        assert simulated["record"] == {"steps", "tokens"}
        assert simulated["coalesce"] is False

    def test_a_file_is_the_base_of_its_paths(self, simulated: dict[str, Any], tmp_path: Path) -> None:
        (tmp_path / "s.yaml").write_text(
            "model: meta-llama/Llama-3.1-8B\nworkload: {trace: t.csv}\npools: [{device: h100_sxm}]\n"
        )
        assert servetwin("run", str(tmp_path / "s.yaml"), "--set", "pools[0].replicas=2").exit_code == 0
        assert simulated["base"] == tmp_path
        assert simulated["scenario"].pools[0].replicas == 2

    def test_json_and_nothing_else(self, simulated: dict[str, Any], tmp_path: Path) -> None:
        result = servetwin(*QUICK, "--format", "json", "-o", str(tmp_path / "out"))
        assert json.loads(result.stdout)["completed"] == 1
        assert result.stdout == (tmp_path / "out" / "summary.json").read_text()

    def test_never_overwrites_unasked(self, simulated: dict[str, Any], tmp_path: Path) -> None:
        out = str(tmp_path / "out")
        assert servetwin(*QUICK, "-o", out).exit_code == 0
        simulated.clear()
        assert servetwin(*QUICK, "-o", out).exit_code == 2
        assert "scenario" not in simulated, "refused before it runs"

    def test_overwrites_when_asked(self, simulated: dict[str, Any], tmp_path: Path) -> None:
        for words in ([], ["--overwrite"]):
            assert servetwin(*QUICK, "-o", str(tmp_path / "out"), *words).exit_code == 0

    def test_an_interrupted_run_is_kept(self, simulated: dict[str, Any], tmp_path: Path) -> None:
        simulated["does"] = lambda: a_run(partial=True)
        result = servetwin(*QUICK, "-o", str(tmp_path / "out"))
        assert result.exit_code == 130
        assert json.loads((tmp_path / "out" / "summary.json").read_text())["partial"] is True

    def test_interrupted_before_anything_finished(self, simulated: dict[str, Any]) -> None:
        simulated["does"] = lambda: raises(KeyboardInterrupt())
        result = servetwin(*QUICK)
        assert (result.exit_code, result.stdout) == (130, "")

    def test_wrong_input_found_late_names_its_flag_or_file(self, simulated: dict[str, Any], tmp_path: Path) -> None:
        simulated["does"] = lambda: raises(InputError("too many", field="pools[0].parallelism.tensor", found=3))
        result = servetwin(*QUICK, "--tp", "3")
        assert (result.exit_code, result.stderr) == (2, "servetwin: --tp: too many; found 3\n")
        path = tmp_path / "s.yaml"
        path.write_text("model: meta-llama/Llama-3.1-8B\nworkload: {trace: t.csv}\npools: [{device: h100_sxm}]\n")
        result = servetwin("run", str(path))
        assert result.stderr == f"servetwin: {path}: pools[0].parallelism.tensor: too many; found 3\n"

    def test_a_fault_of_ours(self, simulated: dict[str, Any]) -> None:
        simulated["does"] = lambda: raises(ZeroDivisionError("oops"))
        result = servetwin(*QUICK)
        assert (result.exit_code, result.stdout) == (1, "")
        assert "ZeroDivisionError: oops" in result.stderr
        assert "a fault of ours" in result.stderr


def raises(error: BaseException) -> Run:
    raise error


class TestCatalogue:
    @pytest.mark.parametrize("kind", ["devices", "models", "links", "hosts"])
    def test_list_names_every_entry(self, kind: str) -> None:
        result = servetwin("list", kind)
        assert result.exit_code == 0
        rows = [line.split()[0] for line in result.stdout.splitlines()[1:]]
        assert rows == catalog.names(kind)

    def test_list_engines(self) -> None:
        assert servetwin("list", "engines").stdout.split() == ["ID", *catalog.names("engines")]

    def test_list_profiles_of_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SERVETWIN_PROFILES", str(tmp_path))
        assert servetwin("list", "profiles").exit_code == 0

    @pytest.mark.parametrize("kind", ["device", "model", "link", "engine", "host"])
    def test_show_every_entry(self, kind: str) -> None:
        for name in catalog.names(kind + "s"):
            result = servetwin("show", kind, name)
            assert result.exit_code == 0, name
            assert result.stdout.startswith(f"id: {name}\n")

    def test_show_has_units_and_sources(self) -> None:
        text = servetwin("show", "device", "h100_sxm").stdout
        assert "memory_bandwidth: 3.35TB/s" in text
        assert "tdp_w: 700W" in text
        assert "\nsources:\n" in text

    def test_unknown_profile(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SERVETWIN_PROFILES", str(tmp_path))
        result = servetwin("show", "profile", "a/b/c")
        assert (result.exit_code, result.stdout) == (2, "")

    def test_a_catalogue_of_ones_own(self, tmp_path: Path) -> None:
        (tmp_path / "devices").mkdir()
        (tmp_path / "devices" / "dream.yaml").write_text(
            "memory: {size: 1TiB, bandwidth: 50TB/s}\npeak: {bf16: 9PFLOPS}\n"
        )
        before = (f"import sys; sys.argv = ['servetwin', '--catalog', {str(tmp_path)!r}, 'show', 'device', 'dream'];"
                  "from servetwin.cli import main; main()")  # fmt: skip
        done = subprocess.run([sys.executable, "-c", before], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "memory_bandwidth: 50TB/s" in done.stdout

    def test_catalogue_that_is_none(self, tmp_path: Path) -> None:
        result = servetwin("--catalog", str(tmp_path / "none"), "list", "devices")
        assert result.exit_code == 2
        assert result.stderr == f"servetwin: --catalog: is not a folder; found '{tmp_path / 'none'}'\n"


class TestOtherVerbs:
    def test_schema_is_json(self) -> None:
        assert json.loads(servetwin("schema").stdout)["title"] == "ServeTwin scenario"

    @pytest.mark.parametrize(("exact", "status"), [([True, True], 0), ([True, None], 0), ([True, False], 1)])
    def test_conformance(self, monkeypatch: pytest.MonkeyPatch, exact: list[bool | None], status: int) -> None:
        outcomes = [SimpleNamespace(line=f"{number}: {value}", exact=value) for number, value in enumerate(exact)]
        module = ModuleType("servetwin.interop.steptrace")
        module.conformance = lambda files, out: outcomes  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "servetwin.interop.steptrace", module)
        result = servetwin("conformance", "a.jsonl", "b.jsonl")
        assert result.exit_code == status
        assert result.stdout.splitlines() == [outcome.line for outcome in outcomes]

    def test_validate_needs_a_real_run(self, tmp_path: Path) -> None:
        assert servetwin("validate", str(tmp_path)).exit_code == 2
        assert servetwin("validate", str(tmp_path / "a"), "--against", str(tmp_path / "b")).exit_code == 2

    def test_import_does_not_overwrite(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        module = ModuleType("servetwin.interop.llmservingsim")
        calls: list[Any] = []

        def import_cluster(*words: Any) -> None:
            *given, tell = words
            calls.append(tuple(given))
            tell("a guess")

        module.import_cluster = import_cluster  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "servetwin.interop.llmservingsim", module)
        words = ["import", "llmservingsim", "c.json", "--repo", "r", "--flags", "--max-num-seqs 8", "-o"]
        out = tmp_path / "s.yaml"
        result = servetwin(*words, str(out))
        assert (result.exit_code, result.stderr.splitlines()[0]) == (0, "note: a guess")
        assert calls == [(Path("c.json"), Path("r"), None, None, "--max-num-seqs 8", out)]
        out.write_text("")
        assert servetwin(*words, str(out)).exit_code == 2
        assert servetwin(*words, str(out), "--overwrite").exit_code == 0
