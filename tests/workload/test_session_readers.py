"""Sessions in files: LLMServingSim's sub_requests, and ServeTwin's own columns; whole sessions are cut and scaled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings

from servetwin.errors import InputError
from servetwin.scenario.schema import TraceWorkload
from servetwin.workload import RequestTable, build, write_workload
from servetwin.workload.dependence import Dependence
from servetwin.workload.identity import keys_of, prompt_of
from servetwin.workload.readers import read_trace
from session_tables import session_tables


def turn(prompt: int, output: int, tool_ns: int | None = None, **fields: Any) -> dict[str, Any]:
    tool = {} if tool_ns is None else {"tool_duration_ns": tool_ns}
    return {"input_toks": prompt, "output_toks": output, **tool, **fields}


def line(name: str, arrival_ns: int, *turns: dict[str, Any]) -> dict[str, Any]:
    return {"session_id": name, "arrival_time_ns": arrival_ns, "sub_requests": list(turns)}


def read(tmp_path: Path, *lines: dict[str, Any]) -> RequestTable:
    (tmp_path / "w.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return read_trace(tmp_path / "w.jsonl")


class TestLLMServingSim:
    def test_sessions_and_requests_mixed_and_unsorted(self, tmp_path: Path) -> None:
        table = read(
            tmp_path,
            line("a", 900, turn(10, 5, 70), turn(20, 6, 80), turn(15, 7, 90)),
            {**turn(30, 8), "arrival_time_ns": 100},
            line("b", 500, turn(40, 9)),
        )
        assert table.source == "llmservingsim:w.jsonl"
        assert table.arrival_ns.tolist() == [900, 900, 900, 100, 500]
        assert table.input_tokens.tolist() == [10, 20, 15, 30, 40]
        assert table.output_tokens.tolist() == [5, 6, 7, 8, 9]
        assert table.session is not None and table.session.tolist() == [0, 0, 0, -1, 1]
        assert table.waits_for is not None
        assert [table.waits_for[row].tolist() for row in range(5)] == [[], [0], [1], [], []]
        assert table.waits_for.delay_ns.tolist() == [0, 70, 80, 0, 0]
        # 20 >= 10 + 5, so turn 1 goes on from turn 0; 15 < 20 + 6, so turn 2 is new text.
        assert table.extends is not None and table.extends.tolist() == [-1, 0, -1, -1, -1]
        assert [length for _, length in prompt_of(table, 1)] == [10, 5, 5]
        assert table.notes == ("1 turns have prompts shorter than the conversation before them: new text, without ids",)

    def test_a_session_id_that_stands_twice(self, tmp_path: Path) -> None:
        """Two sessions, which do not touch each other."""
        table = read(tmp_path, line("a", 5, turn(10, 5), turn(20, 5)), line("a", 0, turn(10, 5), turn(20, 5)))
        assert table.session is not None and table.session.tolist() == [0, 0, 1, 1]
        assert table.waits_for is not None
        assert [table.waits_for[row].tolist() for row in range(4)] == [[], [0], [], [2]]
        assert table.notes == ("1 lines repeat a session_id of an earlier one; each line is a session of its own",)

    def test_ids_say_what_is_shared(self, tmp_path: Path) -> None:
        table = read(
            tmp_path,
            line(
                "a",
                0,
                turn(4, 2, input_tok_ids=[1, 2, 3, 4], output_tok_ids=[5, 6]),
                turn(8, 1, input_tok_ids=[1, 2, 3, 4, 5, 6, 7, 8]),
                turn(10, 1, input_tok_ids=[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
            ),
            {**turn(4, 2, input_tok_ids=[1, 2, 3, 4], output_tok_ids=[5, 6]), "arrival_time_ns": 0},
        )
        assert table.extends is None and table.output_ids is not None
        # Of turn 1 the output is told by turn 2; that of the single request is not used.
        assert [ids.tolist() for ids in table.output_ids] == [[5, 6], [9], [], []]
        keys = [keys_of(table, row, 2) for row in range(4)]
        assert [keys[0].key(i) for i in range(3)] == [keys[1].key(i) for i in range(3)]
        assert keys[0].key(2) != keys[3].key(2)
        # Of turn 1, ids 9 comes out; turn 2 finds it where it stands, and what comes after is its own.
        assert keys[1].key(4) != keys[2].key(4)

    def test_turns_without_ids_beside_others_with_ids(self, tmp_path: Path) -> None:
        table = read(
            tmp_path,
            line("a", 0, turn(3, 2, input_tok_ids=[1, 2, 3]), turn(6, 1), turn(7, 1), turn(3, 1)),
            {**turn(6, 2), "arrival_time_ns": 0},
        )
        assert table.token_ids is not None and table.output_ids is not None
        first, second, third, fourth, alone = (ids.tolist() for ids in table.token_ids)
        assert second[:5] == [*first, *table.output_ids[0].tolist()]
        assert third == [*second, *table.output_ids[1].tolist()]
        made_up = [*second[3:], *table.output_ids[1].tolist(), *fourth, *alone]
        assert len(set(made_up)) == len(made_up) and max(made_up) < 0
        for row in range(5):
            keys_of(table, row, 2)

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            (line("a", 0), "line 1: sub_requests is wrong; found '[]'; allowed: a list of objects, one at least"),
            (
                {"session_id": "a", "arrival_time_ns": 0, "sub_requests": {"input_toks": 1}},
                "line 1: sub_requests is wrong; found \"{'input_toks': 1}\"; allowed: a list of objects, one at least",
            ),
            (
                {"session_id": "a", "arrival_time_ns": 0, "sub_requests": [3]},
                "line 1: sub_requests is wrong; found '[3]'; allowed: a list of objects, one at least",
            ),
            (
                line("a", 0, turn(1, 1), turn(0, 1)),
                "line 1: sub_requests[1]: input_toks is wrong; found 0; allowed: a whole number from 1 to 2147483647",
            ),
            (
                line("a", 0, turn(1, 1), {"input_toks": 1, "output_tok": 2}),
                "line 1: sub_requests[1]: output_toks is missing; found 'input_toks, output_tok'; "
                "did you mean 'output_tok'?",
            ),
            (
                line("a", 0, turn(1, 1, -5)),
                "line 1: sub_requests[0]: tool_duration_ns is wrong; found -5; "
                "allowed: a number from 0 to 4611686018427387904",
            ),
            (
                line("a", 0, turn(1, 2, output_tok_ids=[1])),
                "line 1: sub_requests[0]: output_tok_ids and output_toks differ; found '1 ids, output_toks 2'; "
                "allowed: one id a token",
            ),
            (
                {"session_id": "a", "sub_requests": [turn(1, 1)]},
                "line 1: arrival_time_ns is missing; found 'session_id, sub_requests'",
            ),
        ],
    )
    def test_bad_sessions(self, tmp_path: Path, row: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError) as raised:
            read(tmp_path, row)
        assert str(raised.value) == f"{tmp_path / 'w.jsonl'}: {message}"


def same(one: RequestTable, other: RequestTable) -> None:
    for name in ("arrival_ns", "input_tokens", "output_tokens", "session", "extends", "priority", "abort_ns", "model"):
        ours, theirs = getattr(one, name), getattr(other, name)
        assert (ours is None and theirs is None) or np.array_equal(ours, theirs), name
    assert one.concurrency == other.concurrency and one.models == other.models
    assert one.segments == other.segments
    assert one.waits_for is not None and other.waits_for is not None
    for name in ("offsets", "parents", "delay_ns"):
        assert np.array_equal(getattr(one.waits_for, name), getattr(other.waits_for, name)), name
    for name in ("token_ids", "output_ids"):
        ours, theirs = getattr(one, name), getattr(other, name)
        assert (ours is None) == (theirs is None)
        assert ours is None or all(map(np.array_equal, ours, theirs))


class TestOwnFormat:
    @settings(max_examples=50, deadline=None)
    @given(session_tables())
    def test_any_graph_round_trip(self, tmp_path_factory: pytest.TempPathFactory, table: RequestTable) -> None:
        path = tmp_path_factory.mktemp("w") / "w.parquet"
        write_workload(table, path)
        same(read_trace(path), table)
        first = path.read_bytes()
        write_workload(read_trace(path), path)
        assert path.read_bytes() == first

    def test_ids_and_models_round_trip(self, tmp_path: Path) -> None:
        table = read(
            tmp_path,
            line("a", 0, turn(2, 2, 5, input_tok_ids=[1, 2], output_tok_ids=[3, 4]), turn(5, 1)),
            line("b", 9, turn(1, 1)),
        )
        table = RequestTable(**{**vars(table), "model": np.array([0, 0, 1]), "models": ("x/big", "y/small")})
        write_workload(table, tmp_path / "w.parquet")
        assert pq.read_table(tmp_path / "w.parquet")["model"].to_pylist() == ["x/big", "x/big", "y/small"]
        same(read_trace(tmp_path / "w.parquet"), table)

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"parents": [[], [0], [1]]}, "columns parents and delay_ns come together; found 'parents'"),
            (
                {"parents": [[], [0], [1]], "delay_ns": [0, 1, -1]},
                "row 2: delay_ns is wrong; found -1; allowed: a whole number from 0 to 4611686018427387904",
            ),
            (
                {"parents": [[], [0], [3]], "delay_ns": [0, 0, 0]},
                "row 2: a parent is no row; found 3; allowed: a row from 0 to 2",
            ),
            (
                {"parents": [[], [2], [1]], "delay_ns": [0, 0, 0]},
                "row 1: requests wait for each other in a circle: 1 -> 2 -> 1",
            ),
            (
                {"parents": [[], [0], [1]], "delay_ns": [0, 0, 0], "session": [0, 0, 1]},
                "row 2: a parent is of another session; found 1; allowed: a row of the same session (column session, "
                "from 0 on)",
            ),
            ({"extends": [-1, 0, -1]}, "row 1: extends is wrong; found 0; allowed: -1 (none) where nobody waits"),
            (
                {"parents": [[], [0], [0]], "delay_ns": [0, 0, 0], "extends": [-1, 0, 1]},
                "row 2: extends is wrong; found 1; allowed: a row that this one waits for, at once or by way of others",
            ),
            (
                {"parents": [[], [0], [1]], "delay_ns": [0, 0, 0], "extends": [-1, -2, 1]},
                "row 1: extends is wrong; found -2; allowed: -1 (none), or a row from 0 to 2",
            ),
            (
                {"parents": [[], [0], [1]], "delay_ns": [0, 0, 0], "extends": [-1, -1, 1]},
                "row 2: input_tokens is wrong; found 20; allowed: at least the input_tokens + output_tokens of row "
                "extends",
            ),
            (
                {
                    "parents": [[], [0], [1]],
                    "delay_ns": [0, 0, 0],
                    "extends": [-1, -1, 0],
                    "seeds": [[1], [2], [3]],
                    "lengths": [[10], [20], [8]],
                },
                "row 2: sum of lengths is wrong; found 8; allowed: equal to what is new in it",
            ),
            (
                {"output_ids": pa.array([[]] * 3, pa.list_(pa.int32()))},
                "output_ids need token_ids beside them; found 'output_ids'",
            ),
            ({"model": [1, 2, 3]}, "column model is wrong; found 'int64'; allowed: string"),
            ({"model": ["a", None, "b"]}, "row 1: model is missing"),
        ],
    )
    def test_bad_columns(self, tmp_path: Path, columns: dict[str, Any], message: str) -> None:
        good = {"arrival_ns": [0, 0, 0], "input_tokens": [10, 20, 20], "output_tokens": [5] * 3, "session": [0] * 3}
        path = tmp_path / "w.parquet"
        pq.write_table(pa.table(good | columns), path)
        with pytest.raises(InputError) as raised:
            read_trace(path)
        assert str(raised.value) == f"{path}: {message}"


class TestReplay:
    """Two sessions around a single request; the second session has a root of its own that comes later."""

    TABLE = RequestTable(
        arrival_ns=np.array([100, 0, 400, 600, 0, 700]),
        input_tokens=np.array([10, 20, 30, 40, 50, 60]),
        output_tokens=np.full(6, 5),
        session=np.array([0, 0, -1, 1, 1, 1]),
        waits_for=Dependence.of([[], [0], [], [], [3], []], [0, 7, 0, 0, 8, 0]),
        extends=np.array([-1, 0, -1, -1, 3, -1]),
        abort_ns=np.array([-1, -1, -1, 900, -1, -1]),
    )

    def replay(self, tmp_path: Path, **fields: Any) -> RequestTable:
        write_workload(self.TABLE, tmp_path / "w.parquet")
        return build(TraceWorkload(trace="w.parquet", **fields), 0, tmp_path)

    def test_limit_counts_sessions(self, tmp_path: Path) -> None:
        table = self.replay(tmp_path, limit=1)
        assert table.input_tokens.tolist() == [10, 20]
        assert self.replay(tmp_path, limit=2).input_tokens.tolist() == [10, 20, 30]

    def test_skip_leaves_out_sessions(self, tmp_path: Path) -> None:
        table = self.replay(tmp_path, skip=2)
        assert table.input_tokens.tolist() == [40, 50, 60]
        assert table.waits_for is not None and table.waits_for[1].tolist() == [0]
        assert table.extends is not None and table.extends.tolist() == [-1, 0, -1]
        assert table.arrival_ns.tolist() == [0, 0, 100]
        assert table.abort_ns is not None and table.abort_ns.tolist() == [300, -1, -1]
        with pytest.raises(InputError) as raised:
            self.replay(tmp_path, skip=3)
        assert str(raised.value) == (
            "workload.skip: no request is left; found 3; "
            "allowed: less than 3 (sessions and single requests of the trace)"
        )

    def test_rate_scale_moves_sessions_and_keeps_their_pace(self, tmp_path: Path) -> None:
        table = self.replay(tmp_path, rate_scale=2.0)
        assert table.arrival_ns.tolist() == [50, 50, 200, 300, 300, 400]
        assert table.waits_for is not None and table.waits_for.delay_ns.tolist() == [0, 7, 0, 0, 8, 0]
        assert table.abort_ns is not None and table.abort_ns[3] == 600
