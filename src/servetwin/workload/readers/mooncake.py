"""Mooncake traces: JSONL with `timestamp` (ms), `input_length`, `output_length` and `hash_ids`.

https://github.com/kvcache-ai/Mooncake: each hash id stands for a block of 512 prompt tokens and all before it.
"""

from __future__ import annotations

import numpy as np

from servetwin.workload.readers.jsonl import json_rows
from servetwin.workload.readers.source import TraceFile
from servetwin.workload.table import RequestTable, Segment

SIGNS = ("hash_ids", "input_length")
BLOCK_TOKENS = 512
MOST_HASH_ID = (1 << 63) - 1


def read(file: TraceFile) -> RequestTable:
    """A prompt becomes the segments (hash id, 512) …, of which the last is shorter if need be."""
    arrival, prompts, outputs = [], [], []
    segments: list[list[Segment]] = []
    for row in json_rows(file):
        tokens = row.tokens("input_length")
        ids = row.whole_numbers("hash_ids", MOST_HASH_ID)
        blocks = -(-tokens // BLOCK_TOKENS)
        if len(ids) != blocks:
            raise file.error(
                "hash_ids and input_length differ",
                row.line,
                found=f"{len(ids)} hash ids, input_length {tokens}",
                allowed=f"{blocks} hash ids, one for each {BLOCK_TOKENS} tokens begun",
            )
        arrival.append(row.time_ns("timestamp", 1_000_000))
        prompts.append(tokens)
        outputs.append(row.tokens("output_length"))
        segments.append([(seed, BLOCK_TOKENS) for seed in ids])
        segments[-1][-1] = (ids[-1], tokens - BLOCK_TOKENS * (blocks - 1))
    return RequestTable(
        arrival_ns=np.array(arrival, np.int64),
        input_tokens=np.array(prompts, np.int64),
        output_tokens=np.array(outputs, np.int64),
        segments=segments,
    )
