"""Random workloads and engine options for properties."""

from __future__ import annotations

from random import Random
from typing import Any

from hypothesis import strategies as st

from running import MS, Row, table_of
from servetwin.workload.table import RequestTable

MAX_MODEL_LEN = 320


def _row(random: Random, spread_ms: int, distinct: bool) -> Row:
    arrival = random.choice([0, random.randrange(spread_ms + 1) * MS, random.randrange(spread_ms * MS + 1)])
    # Seeds 0 to 2 are shared, -1 and -2 quote what requests 0 and 1 answered.
    shared = [(random.choice([0, 0, 1, 2, -1, -2]), random.choice([3, 16, 32, 50])) for _ in range(random.randrange(4))]
    own = random.randrange(1, 360 if random.random() < 0.05 else 120)
    output = random.choice([1, random.randint(1, 5), random.randint(1, 150), random.randint(100, 200)])
    abort = random.choice([0, random.randrange(3 * MS), random.randrange(600 * MS)])
    return Row(
        arrival,
        prompt=own + sum(length for _, length in shared),
        output=output,
        segments=None if distinct else [*shared, (random.randrange(10_000, 10**9), own)],
        priority=random.randrange(3),
        abort_ns=arrival + abort if random.random() < 0.15 else -1,
    )


@st.composite
def tables(draw: st.DrawFn, most: int = 24) -> RequestTable:
    """Some prompts exceed MAX_MODEL_LEN; hypothesis chooses only the sizes, so that dense workloads are not rare."""
    random, spread_ms = Random(draw(st.integers(0, 2**32))), draw(st.sampled_from([0, 30, 300, 2000]))
    count, distinct = draw(st.sampled_from([most, most // 2, 5, 2, 1])), draw(st.booleans())
    return table_of(
        [_row(random, spread_ms, distinct) for _ in range(count)],
        concurrency=draw(st.sampled_from([None, None, 1, 2, 6, 16])),
        output_known=draw(st.booleans()),
    )


engines: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "async_scheduling": st.booleans(),
        "enable_prefix_caching": st.booleans(),
        # 24 blocks of 16 hold the longest request and little else.
        "num_gpu_blocks_override": st.sampled_from([25, 40, 400]),
        "max_num_seqs": st.sampled_from([1, 3, 16]),
        "max_num_batched_tokens": st.sampled_from([MAX_MODEL_LEN, 512]),
        "max_model_len": st.just(MAX_MODEL_LEN),
        "block_size": st.just(16),
        "scheduling_policy": st.sampled_from(["fcfs", "priority"]),
        "scheduler_reserve_full_isl": st.booleans(),
        "watermark": st.sampled_from([0.0, 0.05]),
        "version": st.sampled_from(["vllm-0.33", "vllm-0.19"]),
    }
)
