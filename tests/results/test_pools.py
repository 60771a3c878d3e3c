"""Pools told apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from servetwin.results.metrics import summarize
from servetwin.scenario.load import from_data
from servetwin.simulation import simulate


@pytest.mark.parametrize("pipeline", [1, 4])
def test_engines_are_busy_at_most_all_the_time(pipeline: int) -> None:
    """Steps of pipeline stages overlap; the time in which any is under way counts once."""
    pool = {"device": "h100_sxm", "engine": {"max_num_batched_tokens": 512}}
    data = {
        "model": "meta-llama/Llama-3.1-8B",
        "workload": {"arrivals": {"process": "all_at_once"}, "requests": 24, "input_tokens": 2000, "output_tokens": 5},
        "pools": [pool | {"parallelism": {"pipeline": pipeline}}, pool],
        "routing": {"policy": "round_robin"},
    }
    run = simulate(from_data(data, None, Path()))
    pools = summarize(run)["pools"]
    assert [pool["completed"] for pool in pools.values()] == [12, 12]
    mine = run.steps["engine"] == 0
    spans = np.unique(np.concatenate([np.arange(s // 1000, e // 1000) for s, e in zip(
        run.steps["start_ns"][mine], run.steps["end_ns"][mine], strict=True)]))  # fmt: skip
    duration_us = int(run.ints("finish_ns").max()) / 1000
    assert 0 < pools["pool0"]["busy"] <= 1
    assert pools["pool0"]["busy"] == pytest.approx(len(spans) / duration_us, abs=0.01)
