"""Reading, overriding and writing scenarios."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from servetwin.errors import InputError
from servetwin.scenario import document
from servetwin.scenario.load import dump, from_flags, load, schema, validated
from servetwin.scenario.schema import (
    Arrivals,
    DeviceOverrides,
    Link,
    Pool,
    Scenario,
    Slo,
    SyntheticWorkload,
    TraceWorkload,
    Uniform,
)

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
SMALLEST = """\
model: meta-llama/Llama-3.1-8B
workload: {arrivals: {process: poisson, rate: 10}, requests: 1000, input_tokens: 512, output_tokens: 128}
pools: [{device: h100_sxm}]
"""
FULL = """\
name: everything
model: meta-llama/Llama-3.1-8B
workload:
  arrivals: {process: gamma, rate: 1e1, burstiness: 0.5}
  requests: 10
  input_tokens: {distribution: lognormal, median: 500, sigma: 1, min: 2, max: 4000}
  output_tokens: {distribution: zipf, alpha: 1.2, min: 1, max: 100}
  prefixes: {groups: 5, tokens: {distribution: uniform, min: 10, max: 20}, popularity: {zipf: 1.5}}
  priorities: [1, 2.5]
  output_ends: stop
pools:
  - name: first
    role: prefill
    replicas: 2
    device: h100_sxm
    device_overrides: {memory_size: 94GB, memory_bandwidth: 3.9TB/s}
    parallelism: {tensor: 2, pipeline: 1, data: 1, expert: 1}
    link: {bandwidth: 450GB/s, latency: 1.5us}
    engine: {dtype: bfloat16, quantization: fp8, kv_cache_dtype: fp8, max_num_seqs: 0x40, watermark: 0.01}
  - role: decode
    device: h100_sxm
routing: {policy: round_robin}
timing: {source: linear, base_ns: 5000000, per_prefill_token_ns: 20000, per_decode_seq_ns: 0}
slo: {ttft: 0.5s, e2el: 1min}
seed: 7
"""


@pytest.fixture
def scenario_file(tmp_path: Path) -> Path:
    path = tmp_path / "s.yaml"
    path.write_text(SMALLEST)
    return path


def test_smallest_file(scenario_file: Path) -> None:
    scenario = load(scenario_file)
    assert isinstance(scenario.workload, SyntheticWorkload)
    assert scenario.workload.arrivals == Arrivals(process="poisson", rate=10)
    assert scenario.workload.input_tokens == 512
    assert [pool.name for pool in scenario.pools] == ["pool0"]
    assert scenario.seed == 0


def test_quantities_are_in_base_units() -> None:
    scenario = validated(document.parse(FULL, "FULL"))
    assert scenario.pools[0].device_overrides == DeviceOverrides(memory_size=94 * 10**9, memory_bandwidth=3.9e12)
    assert scenario.pools[0].link == Link(bandwidth=450e9, latency=1500)
    assert scenario.slo == Slo(ttft=500_000_000, e2el=60_000_000_000)
    assert scenario.pools[0].engine.max_num_seqs == 64
    assert scenario.pools[1].name == "pool1"


@pytest.mark.parametrize("text", [SMALLEST, FULL], ids=["smallest", "full"])
def test_dump_reads_back(text: str) -> None:
    scenario = validated(document.parse(text, "text"))
    again = validated(document.parse(dump(scenario), "dump"))
    assert again == scenario
    assert dump(again) == dump(scenario)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_load_and_read_back(path: Path, tmp_path: Path) -> None:
    scenario = load(path)
    copy = tmp_path / path.name
    copy.write_text(dump(scenario), encoding="utf-8")
    assert load(copy) == scenario


def test_all_examples_are_there() -> None:
    names = {"quickstart", "azure-conversation", "mooncake", "shared-prefix", "saturated", "closed-loop"}
    assert names <= {path.stem for path in EXAMPLES}


@given(
    st.integers(1, 2**50),
    st.floats(1, 1e15, allow_nan=False),
    st.integers(0, 10**18),
)
def test_quantities_survive_a_dump(size: int, rate: float, duration: int) -> None:
    pool = Pool(
        device="a",
        device_overrides=DeviceOverrides(memory_size=size, memory_bandwidth=rate),
        link=Link(bandwidth=rate, latency=duration),
    )
    workload = TraceWorkload(trace="t.csv")
    scenario = Scenario(model="m", workload=workload, pools=[pool], slo=Slo(tpot=duration))
    assert validated(document.parse(dump(scenario), "dump")) == scenario


@given(st.text(st.characters(codec="utf-8")))
def test_names_survive_a_dump(name: str) -> None:
    """Also those that look like numbers, booleans or nothing in YAML."""
    assert document.parse(document.write({"a": name}), "dump") == {"a": name}


@pytest.mark.parametrize(
    "text",
    ["1e3", "yes", "1:30", "0x10", "null", "~", "-.inf", "2024-01-01", "<<", "=", "0o7", "\x85", "a\u2028b", "é\n"],
)
def test_texts_that_look_like_something_else_survive(text: str) -> None:
    assert document.parse(document.write({"a": text}), "dump") == {"a": text}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e3", 1000.0),
        ("1_000", "1_000"),
        ("yes", "yes"),
        ("1:30", "1:30"),
        ("017", 17),
        ("0o17", 15),
        ("0x1F", 31),
        (".5", 0.5),
        ("TRUE", True),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        ("80GiB", "80GiB"),
    ],
)
def test_types_of_yaml_1_2(text: str, value: object) -> None:
    found = document.parse(f"a: {text}", "test")["a"]
    assert found == value
    assert type(found) is type(value)


def test_a_bare_rate_is_a_number_of_bytes_inside_the_program_only() -> None:
    assert Link(bandwidth=1e9, latency=5).latency == 5
    with pytest.raises(InputError, match=r"pools\[0\]\.link\.bandwidth"):
        validated(document.parse(SMALLEST.replace("h100_sxm", "a, link: {bandwidth: 1e9, latency: 5ns}"), "s"))


@pytest.mark.parametrize("wrong", [True, float("nan"), float("inf"), -1, "80", None.__class__])
def test_python_values_are_checked_too(wrong: Any) -> None:
    with pytest.raises(ValidationError):
        Link(bandwidth=wrong, latency=1)
    with pytest.raises(ValidationError):
        Uniform(min=wrong, max=3)


def test_immutable() -> None:
    scenario = validated(document.parse(FULL, "FULL"))
    with pytest.raises(ValidationError):
        scenario.seed = 3  # type: ignore[misc]


class TestOverrides:
    @pytest.mark.parametrize(
        ("change", "read"),
        [
            ("seed=5", lambda s: s.seed == 5),
            ("pools[0].replicas=3", lambda s: s.pools[0].replicas == 3),
            ("pools[0].engine.max_num_seqs=64", lambda s: s.pools[0].engine.max_num_seqs == 64),
            ("pools[0].engine={block_size: 32}", lambda s: s.pools[0].engine.block_size == 32),
            (
                "workload.input_tokens={distribution: uniform, min: 1, max: 9}",
                lambda s: s.workload.input_tokens.max == 9,
            ),
            ("slo.ttft=200ms", lambda s: s.slo.ttft == 200_000_000),
            ("name=a=b", lambda s: s.name == "a=b"),
            ("name=", lambda s: s.name is None),
            ("pools=[{device: h100_sxm}, {device: a100_sxm}]", lambda s: len(s.pools) == 2),
        ],
    )
    def test_changes_one_value(self, scenario_file: Path, change: str, read: Any) -> None:
        assert read(load(scenario_file, [change]))

    def test_later_ones_win(self, scenario_file: Path) -> None:
        assert load(scenario_file, ["seed=1", "seed=2"]).seed == 2

    def test_may_build_on_earlier_ones(self, scenario_file: Path) -> None:
        changes = ["workload.arrivals={process: closed_loop}", "workload.arrivals.concurrency=8"]
        scenario = load(scenario_file, changes)
        assert isinstance(scenario.workload, SyntheticWorkload)
        assert scenario.workload.arrivals.concurrency == 8

    def test_blame_the_file_for_its_own_faults(self, tmp_path: Path) -> None:
        path = tmp_path / "s.yaml"
        path.write_text(SMALLEST + "sed: 3\n")
        with pytest.raises(InputError) as raised:
            load(path, ["pools[0].replicas=3"])
        assert raised.value.where == str(path)

    def test_files_are_relative_to_the_working_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        path = tmp_path / "s.yaml"
        path.write_text(SMALLEST)
        scenario = load(path, ["workload={trace: a.csv}", "workload.trace=b.csv"])
        assert isinstance(scenario.workload, TraceWorkload)
        assert scenario.workload.trace == str(tmp_path / "elsewhere" / "b.csv")


class TestFlags:
    def test_defaults_are_those_of_vllm_bench_serve(self) -> None:
        scenario = from_flags(model="meta-llama/Llama-3.1-8B", device="h100_sxm", base=Path())
        assert isinstance(scenario.workload, SyntheticWorkload)
        assert scenario.workload.arrivals.process == "all_at_once"
        assert (scenario.workload.requests, scenario.workload.input_tokens, scenario.workload.output_tokens) == (
            1000,
            1024,
            128,
        )

    def test_same_as_the_file(self, scenario_file: Path) -> None:
        flags = {"rate": 10.0, "requests": 1000, "input_len": 512, "output_len": 128}
        scenario = from_flags(model="meta-llama/Llama-3.1-8B", device="h100_sxm", base=Path(), **flags)  # type: ignore[arg-type]
        assert scenario == load(scenario_file)


class TestJsonSchema:
    def test_references_resolve_and_nothing_else_is_allowed(self) -> None:
        whole = schema()
        names = set(whole["$defs"])
        open_mappings = []

        def walk(node: Any, path: str) -> None:
            if isinstance(node, dict):
                if "$ref" in node:
                    assert node["$ref"].removeprefix("#/$defs/") in names, path
                # Either no other keys at all, or any name with a value of one kind (`devices: {h100_sxm: 8}`).
                if node.get("type") == "object" and node.get("additionalProperties", True) in (True, {}):
                    open_mappings.append(path)
                for key, value in node.items():
                    walk(value, f"{path}/{key}")
            elif isinstance(node, list):
                for index, value in enumerate(node):
                    walk(value, f"{path}/{index}")

        walk(whole, "")
        assert not open_mappings
        assert whole["$schema"] == "https://json-schema.org/draft/2020-12/schema"
        assert json.loads(json.dumps(whole)) == whole

    def test_says_what_the_classes_say(self) -> None:
        whole = schema()
        assert set(whole["required"]) == {"model", "workload", "pools"}
        options = whole["$defs"]["EngineOptions"]["properties"]
        assert options["gpu_memory_utilization"]["anyOf"][0] == {"exclusiveMinimum": 0, "maximum": 1, "type": "number"}
        assert options["scheduling_policy"]["anyOf"][0]["enum"] == ["fcfs", "priority"]
        assert whole["$defs"]["Link"]["properties"]["bandwidth"]["type"] == "string"
