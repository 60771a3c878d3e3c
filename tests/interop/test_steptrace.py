"""Our scheduler takes the steps that a real vLLM scheduler took; and what is said when a trace cannot be replayed."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from servetwin.errors import InputError
from servetwin.interop.steptrace import conformance, read_trace, splitmix64

FOLDER = Path(os.environ.get("SERVETWIN_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data/vllm_steps"
NAMES = [path.name for path in sorted(FOLDER.glob("*.jsonl.gz"))] or ["none found"]


def records_of(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        return [json.loads(line) for line in lines]


def of_kind(kind: str, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if record["kind"] == kind]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("name", NAMES)
def test_real_trace(shared: Path, tmp_path: Path, name: str) -> None:
    path = shared / "data/vllm_steps" / name
    [outcome] = conformance([path], tmp_path)
    assert outcome.exact, outcome.line
    real, ours = records_of(path), records_of(tmp_path / f"{outcome.trace.name}.jsonl")
    assert of_kind("out", ours) == of_kind("out", real)
    assert of_kind("req", ours) == of_kind("req", real)
    assert of_kind("header", ours) == of_kind("header", real)
    # All of a step: also the inputs of the latency law (pf, dc, ctx), which the comparison leaves out.
    assert of_kind("step", ours) == of_kind("step", real)


def test_all_21_traces_are_there(shared: Path) -> None:
    assert len(list((shared / "data/vllm_steps").glob("*.jsonl.gz"))) == 21


HEADER: dict[str, Any] = {
    "kind": "header",
    "scenario": "two",
    "config": {"num_blocks": 11, "budget": 64, "max_seqs": 4},
    "latency_ns": {"base": 1000, "per_prefill_token": 10, "per_decode_seq": 100, "per_context_token": 1},
}
REQUESTS: list[dict[str, Any]] = [
    {"kind": "req", "r": 0, "at": 0, "prompt": [[1, 20]], "max_tokens": 2},
    {"kind": "req", "r": 1, "at": 1500, "prompt": [[2, 50], [3, 20]], "max_tokens": 1},
]


class TestATraceWithoutSteps:
    """`header` and `req` lines alone: our steps are written, and there is nothing to compare with."""

    def test_steps_follow_the_law(self, tmp_path: Path) -> None:
        [outcome] = conformance([write(tmp_path / "in.jsonl", [HEADER, *REQUESTS])], tmp_path / "out")
        assert outcome.exact is None
        assert outcome.line == "two: 4 steps written, none recorded to compare with"
        records = records_of(tmp_path / "out/two.jsonl")
        # By hand: request 0 is alone until 1500; then request 1 follows in two chunks, 64 tokens and 6.
        assert of_kind("step", records) == [
            {"kind": "step", "i": 0, "t": 0, "e": 1220, "s": [[0, 20, 0]], "run": 1, "wait": 0, "free": 8}
            | {"pf": 20, "dc": 0, "ctx": 20},
            {"kind": "step", "i": 1, "t": 1220, "e": 2341, "s": [0], "run": 1, "wait": 0, "free": 8}
            | {"pf": 0, "dc": 1, "ctx": 21},
            {"kind": "step", "i": 2, "t": 2341, "e": 4045, "s": [[1, 64, 0]], "run": 1, "wait": 0, "free": 6}
            | {"pf": 64, "dc": 0, "ctx": 64},
            {"kind": "step", "i": 3, "t": 4045, "e": 5175, "s": [[1, 6, 64]], "run": 1, "wait": 0, "free": 5}
            | {"pf": 6, "dc": 0, "ctx": 70},
        ]
        assert of_kind("out", records)[0] == (
            {"kind": "out", "r": 0, "cached": 0, "sched": 0, "first": 1220, "last": 2341}
            | {"n": 2, "preempt": 0, "fin": "length"}
        )

    def test_what_was_written_is_exact_when_read_again(self, tmp_path: Path) -> None:
        conformance([write(tmp_path / "in.jsonl", [HEADER, *REQUESTS])], tmp_path / "out")
        [outcome] = conformance([tmp_path / "out/two.jsonl"])
        assert outcome.exact is True
        assert outcome.line.startswith("two: exact over ")

    def test_the_file_name_stands_in_for_a_missing_scenario_name(self, tmp_path: Path) -> None:
        header = {key: value for key, value in HEADER.items() if key != "scenario"}
        conformance([write(tmp_path / "mine.v2.jsonl", [header, *REQUESTS])], tmp_path / "out")
        assert (tmp_path / "out/mine.jsonl").is_file()

    def test_a_prompt_that_can_never_be_served(self, tmp_path: Path) -> None:
        huge = {"kind": "req", "r": 2, "at": 0, "prompt": [[9, 400]], "max_tokens": 5}
        conformance([write(tmp_path / "in.jsonl", [HEADER, *REQUESTS, huge])], tmp_path / "out")
        ends = {record["r"]: record["fin"] for record in of_kind("out", records_of(tmp_path / "out/two.jsonl"))}
        assert ends == {0: "length", 1: "length", 2: None}

    def test_a_prompt_longer_than_a_step_that_may_not_be_chunked(self, tmp_path: Path) -> None:
        header = HEADER | {"config": HEADER["config"] | {"chunked": False}}
        conformance([write(tmp_path / "in.jsonl", [header, *REQUESTS, REQUESTS[0] | {"r": 2, "at": 2000}])], tmp_path)
        ends = {record["r"]: record["fin"] for record in of_kind("out", records_of(tmp_path / "two.jsonl"))}
        assert ends == {0: "length", 1: None, 2: "length"}

    def test_aborted_before_it_came(self, tmp_path: Path) -> None:
        gone = {"kind": "req", "r": 2, "at": 5000, "prompt": [[9, 10]], "max_tokens": 5, "abort_at": 10}
        conformance([write(tmp_path / "in.jsonl", [HEADER, *REQUESTS, gone])], tmp_path / "out")
        ends = {record["r"]: record["fin"] for record in of_kind("out", records_of(tmp_path / "out/two.jsonl"))}
        assert ends == {0: "length", 1: "length", 2: None}


class TestTheFirstDifference:
    @pytest.fixture
    def records(self, tmp_path: Path) -> list[dict[str, Any]]:
        conformance([write(tmp_path / "in.jsonl", [HEADER, *REQUESTS])], tmp_path / "out")
        return records_of(tmp_path / "out/two.jsonl")

    @pytest.mark.parametrize(
        ("field", "value", "shown"),
        [("e", 2340, ("2340", "2341")), ("s", [[0, 2, 20]], ("[[0,2,20]]", "[0]")), ("p", [0], ("[0]", "-"))],
    )
    def test_is_shown_side_by_side(
        self, tmp_path: Path, records: list[dict[str, Any]], field: str, value: object, shown: tuple[str, str]
    ) -> None:
        of_kind("step", records)[1][field] = value
        of_kind("step", records)[2]["free"] = 99
        [outcome] = conformance([write(tmp_path / "tampered.jsonl", records)])
        assert outcome.exact is False
        first, titles, row = outcome.line.splitlines()
        assert first == f"two: differs at step 1 in {field}"
        assert titles.split() == ["real", "ours"]
        assert row.split() == [field, *shown]

    def test_a_step_too_few(self, tmp_path: Path, records: list[dict[str, Any]]) -> None:
        last = of_kind("step", records)[-1]
        [outcome] = conformance([write(tmp_path / "t.jsonl", [r for r in records if r is not last])])
        assert outcome.exact is False
        assert outcome.line.startswith(f"two: differs at step {last['i']} in ")

    def test_a_step_too_many(self, tmp_path: Path, records: list[dict[str, Any]]) -> None:
        last = of_kind("step", records)[-1]
        [outcome] = conformance([write(tmp_path / "t.jsonl", [*records, last | {"i": last["i"] + 1}])])
        assert outcome.exact is False
        assert outcome.line.startswith(f"two: differs at step {last['i'] + 1} in ")

    def test_files_are_reported_in_order(self, tmp_path: Path, records: list[dict[str, Any]]) -> None:
        good = write(tmp_path / "good.jsonl", records)
        of_kind("step", records)[0]["t"] = 1
        outcomes = conformance([write(tmp_path / "bad.jsonl", records), good])
        assert [outcome.exact for outcome in outcomes] == [False, True]


class TestBadInput:
    def refused(self, path: Path) -> InputError:
        with pytest.raises(InputError) as caught:
            conformance([path])
        assert str(path) in str(caught.value)
        return caught.value

    def test_missing_file(self, tmp_path: Path) -> None:
        assert "no such file" in str(self.refused(tmp_path / "none.jsonl"))

    def test_broken_json(self, tmp_path: Path) -> None:
        path = write(tmp_path / "t.jsonl", [HEADER])
        path.write_text(path.read_text() + '{"kind": "req", "r": 0,\n')
        error = self.refused(path)
        assert error.field == "line 2"
        assert "not JSON" in str(error)

    def test_a_line_that_is_no_object(self, tmp_path: Path) -> None:
        path = tmp_path / "t.jsonl"
        path.write_text("[1, 2]\n")
        assert "line 1: not a JSON object" in str(self.refused(path))

    def test_unknown_option(self, tmp_path: Path) -> None:
        header = HEADER | {"config": HEADER["config"] | {"watermrk": 0.1}}
        error = self.refused(write(tmp_path / "t.jsonl", [header, *REQUESTS]))
        assert error.field == "header.config.watermrk"
        assert error.hint == "watermark"

    @pytest.mark.parametrize("option", ["num_blocks", "budget", "max_seqs"])
    def test_missing_option(self, tmp_path: Path, option: str) -> None:
        config = {key: value for key, value in HEADER["config"].items() if key != option}
        assert f"no {option!r}" in str(self.refused(write(tmp_path / "t.jsonl", [HEADER | {"config": config}])))

    def test_no_header(self, tmp_path: Path) -> None:
        assert "no header record" in str(self.refused(write(tmp_path / "t.jsonl", REQUESTS)))

    def test_unknown_kind(self, tmp_path: Path) -> None:
        error = self.refused(write(tmp_path / "t.jsonl", [HEADER, {"kind": "stap"}]))
        assert (error.field, error.found) == ("line 2", "stap")

    @pytest.mark.parametrize("key", ["r", "at", "prompt", "max_tokens"])
    def test_incomplete_request(self, tmp_path: Path, key: str) -> None:
        request = {name: value for name, value in REQUESTS[0].items() if name != key}
        assert f"request without {key!r}" in str(self.refused(write(tmp_path / "t.jsonl", [HEADER, request])))

    def test_truncated_gzip(self, tmp_path: Path) -> None:
        whole = gzip.compress("".join(json.dumps(record) + "\n" for record in [HEADER, *REQUESTS * 50]).encode())
        path = tmp_path / "t.jsonl.gz"
        path.write_bytes(whole[: len(whole) // 2])
        assert "cannot be read" in str(self.refused(path))

    def test_text_named_gz(self, tmp_path: Path) -> None:
        assert "cannot be read" in str(self.refused(write(tmp_path / "t.jsonl.gz", [HEADER])))

    @pytest.mark.parametrize(
        "change",
        [
            {"config": [1]},
            {"config": HEADER["config"] | {"num_blocks": "many"}},
            {"config": HEADER["config"] | {"attn": "sparse"}},
            {"config": HEADER["config"] | {"max_seqs": None}},
            {"config": HEADER["config"] | {"budget": 0}},
            {"config": HEADER["config"] | {"num_blocks": 1}},
            {"vllm": "newest"},
            {"latency_ns": {"base": "slow"}},
            {"latency_ns": {}},
        ],
    )
    def test_wrong_header(self, tmp_path: Path, change: dict[str, Any]) -> None:
        self.refused(write(tmp_path / "t.jsonl", [HEADER | change, *REQUESTS]))

    @pytest.mark.parametrize(
        "change",
        [
            {"r": "first"},
            {"at": None},
            {"at": -5},
            {"prompt": 20},
            {"prompt": [[1]]},
            {"prompt": []},
            {"prompt": [[1, -4]]},
            {"max_tokens": 0},
            {"max_tokens": "all"},
            {"stop": "soon"},
        ],
    )
    def test_wrong_request(self, tmp_path: Path, change: dict[str, Any]) -> None:
        self.refused(write(tmp_path / "t.jsonl", [HEADER, REQUESTS[1], REQUESTS[0] | change]))

    def test_two_requests_of_one_number(self, tmp_path: Path) -> None:
        self.refused(write(tmp_path / "t.jsonl", [HEADER, REQUESTS[0], REQUESTS[0]]))


def test_splitmix64_golden_values() -> None:
    """The first outputs of the reference generator (Vigna, splitmix64.c) from seed 0."""
    gamma = 0x9E3779B97F4A7C15
    assert [splitmix64(i * gamma & (2**64 - 1)) for i in range(3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


def test_trace_without_requests(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [HEADER])
    assert read_trace(path).requests == []
    [outcome] = conformance([path])
    assert outcome.exact is None
