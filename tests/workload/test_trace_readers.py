"""Trace readers: the real files, small ones of every format, and each way in which a file can be wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from servetwin.errors import InputError
from servetwin.scenario.schema import TraceWorkload
from servetwin.workload import RequestTable, build, write_workload
from servetwin.workload.readers import READERS, detect, read_trace

TOKENS = "allowed: a whole number from 1 to 2147483647"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n"

Write = Callable[[str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(content: str | bytes) -> Path:
        path = tmp_path / "trace"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def columns(table: RequestTable) -> list[list[int]]:
    return [table.arrival_ns.tolist(), table.input_tokens.tolist(), table.output_tokens.tolist()]


# rows, sum of prompts, sum of outputs and last arrival, computed with the csv, json and datetime modules alone
@pytest.mark.parametrize(
    ("name", "format", "rows", "prompt_sum", "output_sum", "last_ns"),
    [
        ("traces/azure_2023_conv.csv", "azure", 19366, 22361870, 4088665, 3501721937000),
        ("traces/azure_2023_code.csv", "azure", 8819, 18059974, 245896, 3435948056000),
        ("traces/mooncake_conversation.jsonl", "mooncake", 12031, 144793823, 4122048, 3536999000000),
        ("traces/mooncake_synthetic_1000.jsonl", "mooncake", 1000, 11851558, 196039, 272653000000),
        ("llmservingsim/workloads/example_trace.jsonl", "llmservingsim", 10, 120, 591, 1026970077),
        (
            "llmservingsim/workloads/sharegpt-llama-3.1-8b-300-sps10.jsonl",
            "llmservingsim",
            300,
            257239,
            195753,
            29183763203,
        ),
    ],
)
def test_real_file(
    shared: Path, name: str, format: str, rows: int, prompt_sum: int, output_sum: int, last_ns: int
) -> None:
    path = shared / "data" / name
    table = read_trace(path)
    assert detect(path) == format
    assert (len(table), table.source) == (rows, f"{format}:{path.name}")
    assert (table.input_tokens.sum(), table.output_tokens.sum(), table.arrival_ns[-1]) == (
        prompt_sum,
        output_sum,
        last_ns,
    )
    assert table.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    if format == "mooncake":
        assert table.segments is not None
        assert [sum(length for _, length in prompt) for prompt in table.segments] == table.input_tokens.tolist()
        assert all(length == 512 for prompt in table.segments for _, length in prompt[:-1])
    if format == "llmservingsim":
        assert table.token_ids is not None
        assert list(map(len, table.token_ids)) == table.input_tokens.tolist()
    if name.endswith("example_trace.jsonl"):
        assert table.token_ids is not None
        assert table.token_ids[0].tolist() == list(range(1, 11))


def test_azure_keeps_seven_decimals_and_reads_time_zones(write: Write) -> None:
    rows = "2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:46.6805901,1,2\r\n2023-11-16 18:15:46.6805800,3,4"
    assert columns(read_trace(write(AZURE + rows))) == [[10_000, 10_100, 0], [374, 1, 3], [44, 2, 4]]
    rows = "2024-05-10 00:00:00.009930+00:00,10,20\n2024-05-10 00:00:01+00:00,1,2\n"
    assert columns(read_trace(write(AZURE + rows)))[0] == [0, 990_070_000]


def test_column_names_may_differ_in_case_and_order(write: Write) -> None:
    path = write("Generated_Tokens,Extra,CONTEXTTOKENS,Timestamp\n7,x,5,2024-05-10 00:00:00\n")
    assert columns(read_trace(path)) == [[0], [5], [7]]
    assert detect(path) == "azure"


def test_vidur_and_burstgpt(write: Write) -> None:
    table = read_trace(write(VIDUR + "0.5,10,3\n0.25,20,4\n"))
    assert columns(table) == [[500_000_000, 250_000_000], [10, 20], [3, 4]]
    table = read_trace(
        write(BURST + "5,ChatGPT,472,18,490,Conversation log\n6,ChatGPT,0,0,0,API log\n9,GPT-4,1,2,3,API log\n")
    )
    assert columns(table) == [[5_000_000_000, 9_000_000_000], [472, 1], [18, 2]]
    assert table.notes == ("1 rows with 0 response tokens (failed requests) left out",)


def test_mooncake_blocks_become_segments(write: Write) -> None:
    path = write(
        '{"timestamp": 1.5, "input_length": 1100, "output_length": 2, "hash_ids": [4, 9, 2]}\n'
        '{"timestamp": 0, "input_length": 1024, "output_length": 2, "hash_ids": [4, 9]}\n'
    )
    table = read_trace(path)
    assert table.segments == [[(4, 512), (9, 512), (2, 76)], [(4, 512), (9, 512)]]
    assert table.arrival_ns.tolist() == [1_500_000, 0]


def test_llmservingsim_with_some_ids_or_none(write: Write) -> None:
    bare = '{"input_toks": 2, "output_toks": 5, "arrival_time_ns": 7}\n'
    assert read_trace(write(bare)).token_ids is None
    ids = '{"input_toks": 2, "output_toks": 5, "arrival_time_ns": 8, "input_tok_ids": [3, 4]}\n'
    table = read_trace(write(bare + "\n" + ids + bare))
    assert table.token_ids is not None
    assert [row.tolist() for row in table.token_ids] == [[-1, -2], [3, 4], [-3, -4]]
    assert columns(table) == [[7, 8, 7], [2, 2, 2], [5, 5, 5]]


def lss(**changes: Any) -> str:
    row = {"input_toks": 2, "output_toks": 5, "arrival_time_ns": 7} | changes
    return repr({name: value for name, value in row.items() if value is not ...}).replace("'", '"')


def mooncake(length: str, ids: str) -> str:
    return f'{{"timestamp": 0, "input_length": {length}, "output_length": 1, "hash_ids": {ids}}}'


BAD = [
    ("azure", "", "the file is empty"),
    ("azure", AZURE, "no rows below the header"),
    ("azure", "TIMESTAMP,ContextToken,GeneratedTokens\n", "no rows below the header"),
    (
        "azure",
        "TIMESTAMP,ContextTokens,GeneratedToken\n2023-11-16 18:15:46,1,2\n",
        "line 1: column GeneratedTokens is missing; found 'TIMESTAMP, ContextTokens, GeneratedToken'; "
        "did you mean 'GeneratedToken'?",
    ),
    (
        "azure",
        AZURE + "2023-11-16 18:15:46,5,5\n\n2023-11-16 18:15:46,0,5",
        f"line 4: ContextTokens is wrong; found '0'; {TOKENS}",
    ),
    ("azure", AZURE + "2023-11-16 18:15:46,5,-5", f"line 2: GeneratedTokens is wrong; found '-5'; {TOKENS}"),
    ("azure", AZURE + "2023-11-16 18:15:46,5,nan", f"line 2: GeneratedTokens is wrong; found 'nan'; {TOKENS}"),
    ("azure", AZURE + "2023-11-16 18:15:46,5,", f"line 2: GeneratedTokens is wrong; found ''; {TOKENS}"),
    ("azure", AZURE + "2023-11-16 18:15:46,1.5,5", f"line 2: ContextTokens is wrong; found '1.5'; {TOKENS}"),
    (
        "azure",
        AZURE + "2023-11-16 18:15:46,5,5\n2023-11-16 18:15:46,5,x",
        f"line 3: GeneratedTokens is wrong; found 'x'; {TOKENS}",
    ),
    (
        "azure",
        AZURE + "2023-11-16 18:15:46,5,5\n2023-11-16 18:15:46,5",
        "line 3: wrong number of columns; found 2; allowed: 3",
    ),
    (
        "azure",
        AZURE + "2023-11-16 18:15:46,5,5\nyesterday,5,5",
        "line 3: TIMESTAMP is wrong; found 'yesterday'; "
        "allowed: a time such as 2023-11-16 18:15:46.6805900, all with or all without a zone",
    ),
    ("azure", AZURE.encode() + b"2023-11-16 18:15:46,5,\xff\n", "line 2: not UTF-8 text"),
    (
        "vidur",
        "num_prefill_tokens,num_decode_tokens\n1,2\n",
        "line 1: column arrived_at is missing: this Vidur file has lengths without arrivals; "
        "found 'num_prefill_tokens, num_decode_tokens'; allowed: arrived_at, num_prefill_tokens, num_decode_tokens",
    ),
    (
        "vidur",
        VIDUR + "-1,5,5",
        "line 2: arrived_at is wrong; found '-1'; allowed: a number of seconds from 0 to 4611686018",
    ),
    (
        "vidur",
        VIDUR + "inf,5,5",
        "line 2: arrived_at is wrong; found 'inf'; allowed: a number of seconds from 0 to 4611686018",
    ),
    (
        "burstgpt",
        BURST + "5,ChatGPT,0,18,18,API log\n",
        "line 2: Request tokens is wrong; found '0'; allowed: at least 1 where there is a response",
    ),
    ("burstgpt", BURST + "5,ChatGPT,7,0,7,API log\n", "no row has response tokens: all requests of this trace failed"),
    (
        "llmservingsim",
        lss() + '\n{"input_toks": 2, "out',
        'line 2: not a JSON object; found \'{"input_toks": 2, "out\'; allowed: one JSON object a line',
    ),
    ("llmservingsim", lss() + "\n[1]", "line 2: not a JSON object; found '[1]'; allowed: one JSON object a line"),
    ("llmservingsim", lss(input_toks=0), f"line 1: input_toks is wrong; found 0; {TOKENS}"),
    ("llmservingsim", lss(output_toks=-3), f"line 1: output_toks is wrong; found -3; {TOKENS}"),
    ("llmservingsim", lss(output_toks="x"), f"line 1: output_toks is wrong; found 'x'; {TOKENS}"),
    ("llmservingsim", lss().replace("5", "NaN"), f"line 1: output_toks is wrong; found nan; {TOKENS}"),
    ("llmservingsim", lss().replace("5", "true"), f"line 1: output_toks is wrong; found True; {TOKENS}"),
    (
        "llmservingsim",
        lss(arrival_time_ns=-1),
        "line 1: arrival_time_ns is wrong; found -1; allowed: a number from 0 to 4611686018427387904",
    ),
    (
        "llmservingsim",
        lss().replace("7", "NaN"),
        "line 1: arrival_time_ns is wrong; found nan; allowed: a number from 0 to 4611686018427387904",
    ),
    (
        "llmservingsim",
        lss(output_toks=...),
        "line 1: output_toks is missing; found 'input_toks, arrival_time_ns'; did you mean 'input_toks'?",
    ),
    (
        "llmservingsim",
        lss(input_tok_ids=[1]),
        "line 1: input_tok_ids and input_toks differ; found '1 ids, input_toks 2'; allowed: one id a token",
    ),
    (
        "llmservingsim",
        lss(input_tok_ids=[1, -1]),
        "line 1: input_tok_ids is wrong; found '[1, -1]'; allowed: a list of whole numbers from 0 to 2147483647",
    ),
    (
        "llmservingsim",
        lss() + '\n{"session_id": "a", "arrival_time_ns": 0, "sub_requests": []}',
        "line 2: sub_requests is wrong; found '[]'; allowed: a list of objects, one at least",
    ),
    (
        "mooncake",
        mooncake("512", "[1]") + "\n" + mooncake("513", "[1]"),
        "line 2: hash_ids and input_length differ; found '1 hash ids, input_length 513'; "
        "allowed: 2 hash ids, one for each 512 tokens begun",
    ),
    (
        "mooncake",
        mooncake("512", '["a"]'),
        "line 1: hash_ids is wrong; found \"['a']\"; allowed: a list of whole numbers from 0 to 9223372036854775807",
    ),
    ("servetwin", b"PAR1 and no more", None),
    ("servetwin", "a,b\n1,2\n", None),
]


@pytest.mark.parametrize(("format", "content", "message"), BAD)
def test_bad_file(write: Write, format: str, content: str | bytes, message: str | None) -> None:
    path = write(content)
    with pytest.raises(InputError) as raised:
        read_trace(path, format)
    if message is None:
        assert str(raised.value).startswith(f"{path}: not a readable Parquet file: ")
    else:
        assert str(raised.value) == f"{path}: {message}"


def test_a_bad_row_far_down_is_found(write: Write) -> None:
    rows = ["2023-11-16 18:15:46,5,5"] * 5000
    rows[4321] = "2023-11-16 18:15:46,5,5x"
    with pytest.raises(InputError, match=r"line 4323: GeneratedTokens is wrong; found '5x'"):
        read_trace(write(AZURE + "\n".join(rows)))


def test_places_that_are_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        read_trace(tmp_path / "absent")
    assert str(raised.value) == f"{tmp_path / 'absent'}: no such file"
    with pytest.raises(InputError) as raised:
        read_trace(tmp_path)
    assert str(raised.value) == f"{tmp_path}: is a folder; allowed: a file"


@pytest.mark.parametrize("content", ["hello\n", '{"a": 1}\n', "1,2,3\n", b"\x00\x01\x02"])
def test_unknown_formats_are_named(write: Write, content: str | bytes) -> None:
    with pytest.raises(
        InputError, match=r"line 1: not a trace format that is known; found .*; allowed: llmservingsim: "
    ):
        detect(write(content))


FULL = RequestTable(
    arrival_ns=np.array([5, 0, 9]),
    input_tokens=np.array([4, 2, 3]),
    output_tokens=np.array([1, 2, 3]),
    segments=[[(0, 3), ((1 << 40) + 0, 1)], [(0, 2)], [(-1, 1), (7, 2)]],
    token_ids=[np.array([1, 2, 3, 4], np.int32), np.array([5, 6], np.int32), np.array([7, 8, 9], np.int32)],
    session=np.array([0, 0, 1]),
    priority=np.array([2, -1, 0]),
    abort_ns=np.array([-1, 100, 9]),
    concurrency=2,
)


def test_own_format_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "workload.parquet"
    write_workload(FULL, path)
    back = read_trace(path)
    assert back.source == "servetwin:workload.parquet"
    for name in ("arrival_ns", "input_tokens", "output_tokens", "session", "priority", "abort_ns"):
        values = getattr(back, name)
        assert values.dtype == np.int64
        assert np.array_equal(values, getattr(FULL, name))
    assert back.segments == FULL.segments
    assert back.token_ids is not None and FULL.token_ids is not None
    assert all(row.dtype == np.int32 for row in back.token_ids)
    assert [row.tolist() for row in back.token_ids] == [row.tolist() for row in FULL.token_ids]
    assert back.concurrency == 2
    first = path.read_bytes()
    write_workload(back, path)
    assert path.read_bytes() == first


def test_own_format_without_optional_columns(tmp_path: Path) -> None:
    path = tmp_path / "workload.parquet"
    write_workload(RequestTable(FULL.arrival_ns, FULL.input_tokens, FULL.output_tokens), path)
    back = read_trace(path)
    assert [
        getattr(back, name) for name in ("segments", "token_ids", "session", "priority", "abort_ns", "concurrency")
    ] == [None] * 6


def test_real_trace_survives_the_own_format(shared: Path, tmp_path: Path) -> None:
    table = read_trace(shared / "data/traces/mooncake_synthetic_1000.jsonl")
    write_workload(table, tmp_path / "w")
    back = read_trace(tmp_path / "w")
    assert columns(back) == columns(table)
    assert back.segments == table.segments


def parquet(**changes: Any) -> dict[str, Any]:
    good = {"arrival_ns": [0, 1], "input_tokens": [4, 5], "output_tokens": [1, 1]}
    return {name: value for name, value in (good | changes).items() if value is not ...}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            parquet(output_tokens=...),
            "column output_tokens is missing; found 'arrival_ns, input_tokens'; allowed: arrival_ns, input_tokens, "
            "output_tokens, session, priority, abort_ns, extends, model, token_ids, output_ids, seeds, lengths, "
            "parents, delay_ns",
        ),
        (parquet(input_tokens=[4, 0]), f"row 1: input_tokens is wrong; found 0; {TOKENS}"),
        (parquet(input_tokens=[4, None]), "row 1: input_tokens is missing"),
        (parquet(input_tokens=[4.0, 5.0]), "column input_tokens is wrong; found 'double'; allowed: int64"),
        (
            parquet(arrival_ns=[0, -1]),
            "row 1: arrival_ns is wrong; found -1; allowed: a whole number from 0 to 4611686018427387904",
        ),
        (
            parquet(abort_ns=[-1, 0]),
            "row 1: abort_ns is wrong; found 0; allowed: -1 (never), or a time from arrival_ns to 4611686018427387904",
        ),
        (parquet(seeds=[[1], [2]]), "columns seeds and lengths come together; found 'seeds'"),
        (
            parquet(seeds=[[1], [2]], lengths=[[4], [4]]),
            "row 1: sum of lengths is wrong; found 4; allowed: equal to input_tokens",
        ),
        (
            parquet(seeds=[[1], [2]], lengths=[[4], [6, -1]]),
            "row 1: number of seeds is wrong; found 1; allowed: as many as lengths",
        ),
        (parquet(seeds=[[1], [2, 3]], lengths=[[4], [6, -1]]), f"row 1: lengths is wrong; found -1; {TOKENS}"),
        (
            parquet(token_ids=[[1, 2, 3, 4], [1]]),
            "row 1: number of token_ids is wrong; found 1; allowed: as many as input_tokens",
        ),
        (parquet(token_ids=["a", "b"]), "column token_ids is wrong; found 'string'; allowed: list<int32>"),
        (
            parquet(
                arrival_ns=pa.array([], pa.int64()),
                input_tokens=pa.array([], pa.int64()),
                output_tokens=pa.array([], pa.int64()),
            ),
            "no rows",
        ),
    ],
)
def test_bad_own_format(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    path = tmp_path / "w.parquet"
    pq.write_table(pa.table(content), path)
    with pytest.raises(InputError) as raised:
        read_trace(path)
    assert str(raised.value) == f"{path}: {message}"


def test_truncated_own_format(tmp_path: Path) -> None:
    path = tmp_path / "w.parquet"
    write_workload(FULL, path)
    whole = path.read_bytes()
    for size in range(4, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match="not a readable Parquet file"):
            read_trace(path)


def replay(tmp_path: Path, **fields: Any) -> RequestTable:
    write_workload(FULL, tmp_path / "w.parquet")
    return build(TraceWorkload(trace="w.parquet", **fields), 0, tmp_path)


def test_replay_as_it_stands(tmp_path: Path) -> None:
    table = replay(tmp_path)
    assert columns(table) == columns(FULL)
    assert table.output_known
    assert not replay(tmp_path, output_ends="stop").output_known


def test_rate_scale_divides_arrivals_but_not_patience(tmp_path: Path) -> None:
    table = replay(tmp_path, rate_scale=0.5)
    assert table.arrival_ns.tolist() == [10, 0, 18]
    assert table.abort_ns is not None
    assert table.abort_ns.tolist() == [-1, 100, 18]
    assert replay(tmp_path, rate_scale=2.0).arrival_ns.tolist() == [2, 0, 4]  # halves round to even
    with pytest.raises(
        InputError, match=r"workload.rate_scale: stretches the trace over more than 146 years; found 1e-18"
    ):
        replay(tmp_path, rate_scale=1e-18)


def test_repetitions_follow_at_the_pace_of_the_trace(tmp_path: Path) -> None:
    """Arrivals 5, 0 and 9: a mean gap of 4.5, so that a repetition begins 13.5 ns (rounded to even) after the other."""
    once, table = replay(tmp_path), replay(tmp_path, repeat=3)
    assert table.arrival_ns.tolist() == [5, 0, 9, 19, 14, 23, 33, 28, 37]
    assert columns(table)[1:] == [column * 3 for column in columns(once)[1:]]
    assert table.abort_ns is not None and table.segments is not None and table.token_ids is not None
    assert once.abort_ns is not None
    patience = [a - b if a >= 0 else -1 for a, b in zip(once.abort_ns.tolist(), once.arrival_ns.tolist(), strict=True)]
    again = [a - b if a >= 0 else -1 for a, b in zip(table.abort_ns.tolist(), table.arrival_ns.tolist(), strict=True)]
    assert again == patience * 3
    assert table.segments[:3] == once.segments
    assert table.segments[5] == [(-4, 1), (7, 2)], "it quotes the answer of its own repetition's request 0"
    assert len(table.token_ids) == 9
    assert replay(tmp_path, repeat=2, rate_scale=0.5).arrival_ns.tolist() == [10, 0, 18, 38, 28, 46]
    with pytest.raises(
        InputError, match=r"workload.repeat: too many requests; found 50000000; allowed: up to 44739242"
    ):
        replay(tmp_path, repeat=50_000_000)
    years = 1 << 50
    write_workload(replace(FULL, arrival_ns=FULL.arrival_ns * years, abort_ns=None), tmp_path / "slow.parquet")
    with pytest.raises(InputError, match=r"workload.repeat: stretches the trace over more than 146 years; found 400"):
        build(TraceWorkload(trace="slow.parquet", repeat=400), 0, tmp_path)


def test_limit_and_skip_cut_every_column_and_restart_the_clock(tmp_path: Path) -> None:
    table = replay(tmp_path, limit=2)
    assert columns(table) == [[5, 0], [4, 2], [1, 2]]
    table = replay(tmp_path, skip=2)
    assert columns(table) == [[0], [3], [3]]
    assert table.abort_ns is not None and table.priority is not None and table.token_ids is not None
    # It quotes the output of a request that is left out: a seed that no output of this table has.
    assert (table.abort_ns.tolist(), table.priority.tolist(), table.segments) == ([0], [0], [[(-4, 1), (7, 2)]])
    assert table.token_ids[0].tolist() == [7, 8, 9]
    with pytest.raises(InputError, match=r"workload.skip: no request is left; found 3; allowed: less than 3"):
        replay(tmp_path, skip=3)


def test_formats_are_those_of_the_scenario() -> None:
    allowed = TraceWorkload.model_fields["format"].annotation
    assert set(getattr(allowed, "__args__", ())) == {"auto", *READERS}
