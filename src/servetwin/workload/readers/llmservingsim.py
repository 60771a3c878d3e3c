"""LLMServingSim's workload: JSONL, one request a line, arrivals in ns, with or without token ids.

https://github.com/casys-kaist/LLMServingSim: `{"input_toks", "output_toks", "arrival_time_ns", "input_tok_ids"?,
"output_tok_ids"?}`. The ids of outputs are not used.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from servetwin.workload.readers.jsonl import JsonRow, json_rows
from servetwin.workload.readers.source import TraceFile
from servetwin.workload.table import RequestTable

SIGNS = ("input_toks", "sub_requests")
MOST_ID = (1 << 31) - 1


def read(file: TraceFile) -> RequestTable:
    """Arrivals as they stand in the file. In a file where some rows have ids, a row without gets ids of its own."""
    arrival, prompts, outputs = [], [], []
    ids: list[NDArray[np.int32] | None] = []
    for row in json_rows(file):
        if "sub_requests" in row.values:
            raise file.error(f"agentic sessions are not supported yet (line {row.line})")
        arrival.append(row.time_ns("arrival_time_ns", 1))
        prompts.append(row.tokens("input_toks"))
        outputs.append(row.tokens("output_toks"))
        ids.append(_prompt_ids(row, prompts[-1]) if row.values.get("input_tok_ids") is not None else None)
    return RequestTable(
        arrival_ns=np.array(arrival, np.int64),
        input_tokens=np.array(prompts, np.int64),
        output_tokens=np.array(outputs, np.int64),
        token_ids=_filled(ids, prompts) if any(row is not None for row in ids) else None,
    )


def _prompt_ids(row: JsonRow, tokens: int) -> NDArray[np.int32]:
    ids = row.whole_numbers("input_tok_ids", MOST_ID)
    if len(ids) != tokens:
        raise row.file.error(
            "input_tok_ids and input_toks differ",
            row.line,
            found=f"{len(ids)} ids, input_toks {tokens}",
            allowed="one id a token",
        )
    return np.array(ids, np.int32)


def _filled(ids: list[NDArray[np.int32] | None], prompts: list[int]) -> list[NDArray[np.int32]]:
    """Rows without ids get negative ones, which occur nowhere else: their prompts are like no other."""
    filled, below = [], 0
    for row, tokens in zip(ids, prompts, strict=True):
        if row is None:
            row = np.arange(below - 1, below - 1 - tokens, -1, dtype=np.int32)
            below -= tokens
        filled.append(row)
    return filled
