"""Whole runs on recorded traces, and on the workload of a real run whose latencies are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from running import scenario_of
from servetwin.interop.llmservingsim import import_cluster
from servetwin.measure.validate import validate
from servetwin.results.files import write_run
from servetwin.simulation import simulate

LONGEST = 131_072
"""context of Llama-3.1-8B"""


def test_azure_conversations_complete(shared: Path) -> None:
    """19,366 requests of an hour of Azure conversations, in steps of 10 ms."""
    trace = shared / "data/traces/azure_2023_conv.csv"
    timing = {"source": "linear", "base_ns": 10_000_000}
    workload = {"trace": str(trace), "format": "azure"}
    engine = {"max_model_len": LONGEST, "enable_prefix_caching": False}
    run = simulate(scenario_of(engine, workload=workload, timing=timing))
    rows = trace.read_text().splitlines()[1:]
    lengths = np.array([[int(cell) for cell in row.split(",")[1:]] for row in rows])
    assert len(run) == len(lengths) == 19_366
    assert run.has_status("finished").all()
    assert (run.ints("input_tokens") == lengths[:, 0]).all()
    assert (run.ints("output_tokens") == lengths[:, 1]).all()
    assert run.itl[1].sum() == (lengths[:, 1] - 1).sum()


def hits_by_hand(rows: list[dict[str, Any]], block: int = 16) -> list[int]:
    """Cached tokens of each prompt when nothing is ever evicted and requests come one after the other.

    A hash id stands for (at most) 512 tokens and all before them; we note how many of them anybody had. Whole blocks of
    16 are found, and never the last token of a prompt.
    """
    seen: dict[int, int] = {}
    hits = []
    for row in rows:
        left, found, unbroken = row["input_length"], 0, True
        for name in row["hash_ids"]:
            length = min(left, 512)
            had = min(seen.get(name, 0), length) // block * block
            if unbroken:
                found += had
            unbroken = unbroken and had == 512
            seen[name] = max(seen.get(name, 0), length)
            left -= length
        hits.append(min(found, (row["input_length"] - 1) // block * block))
    return hits


@pytest.mark.parametrize("trace", ["mooncake_conversation", "mooncake_synthetic_1000"])
def test_prefix_hits_of_mooncake_are_those_counted_by_hand(shared: Path, trace: str) -> None:
    path, limit = shared / f"data/traces/{trace}.jsonl", 400
    with path.open() as lines:
        rows = [json.loads(next(lines)) for _ in range(limit)]
    blocks = sum((row["input_length"] + row["output_length"]) // 16 + 1 for row in rows)
    engine = {"max_model_len": LONGEST, "num_gpu_blocks_override": blocks + 1, "max_num_batched_tokens": LONGEST}
    # Steps of 1 ns: whoever comes at the same moment as others finds their prompts computed.
    timing = {"source": "linear", "base_ns": 1}
    run = simulate(scenario_of(engine, workload={"trace": str(path), "limit": limit}, timing=timing))
    served = [row["input_length"] < LONGEST for row in rows]
    assert run.has_status("finished").tolist() == served
    found = run.ints("cached_tokens")[served]
    assert found.tolist() == hits_by_hand([row for row in rows if row["input_length"] < LONGEST])
    assert run.prefix_hits == found.sum() > 100_000


def test_a_real_run_is_met(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """300 ShareGPT requests at 10/s on vLLM 0.19 and one RTX PRO 6000, replayed on the measured profile."""
    monkeypatch.setenv("SERVETWIN_PROFILES", str(tmp_path / "profiles"))
    repo = shared / "data/llmservingsim"
    example = repo / "bench/examples/RTXPRO6000/Llama-3.1-8B"
    scenario = import_cluster(example / "config.json", repo, None, example / "vllm", "", tmp_path / "scenario.yaml")
    run = simulate(scenario, tmp_path)
    assert len(run) == 300
    assert run.has_status("finished").all()
    write_run(run, tmp_path / "run", overwrite=False)
    report = validate(tmp_path / "run", example / "vllm", tmp_path / "validation")
    assert report.common_requests == 300
    assert report.mismatches == []

    bounds = {"ttft_ms": (3, 2, 6), "tpot_ms": (1, 2, 1.4), "e2el_ms": (1, 2, 1.2)}
    for name, (mean, p99, mape) in bounds.items():
        metric = report.metrics[name]
        for statistic, bound in (("mean", mean), ("p99", p99)):
            error = metric.statistics[statistic].difference_percent
            assert error is not None
            assert abs(error) <= bound, f"{statistic} of {name}: {error:+.2f} %"
        assert metric.matched is not None
        assert metric.matched.mape_percent <= mape, f"{name}: {metric.matched}"
