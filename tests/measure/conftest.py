"""Simulated runs with chosen latencies, written as result folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servetwin.results.files import write_run
from servetwin.results.run import STEP_COLUMNS, Run

SaveRun = Callable[..., Path]


@pytest.fixture
def save_run(tmp_path: Path) -> SaveRun:
    """Write a run of finished requests with the given columns (ns, tokens) and return its folder."""

    def save(arrival: Any, first: Any, finish: Any, inputs: Any, outputs: Any, **columns: Any) -> Path:
        n = len(arrival)
        zero, none = np.zeros(n, np.int64), np.full(n, -1)
        requests = {
            "request": np.arange(n), "session": none, "pool": ["default"] * n, "engine": zero, "decode_engine": none,
            "status": ["finished"] * n, "reason": [""] * n, "arrival_ns": arrival, "scheduled_ns": arrival,
            "first_token_ns": first, "finish_ns": finish, "input_tokens": inputs, "output_tokens": outputs,
            "cached_tokens": zero, "preemptions": zero,
        }  # fmt: skip
        run = Run(
            scenario_yaml="model: tiny\n",
            seed=0,
            requests=requests | columns,
            steps={name: np.zeros(0, np.int64) for name in STEP_COLUMNS},
            itl=(np.zeros(0, np.int64), np.zeros(0, np.int64)),
            kv_blocks_total=[],
        )
        folder = tmp_path / "run"
        write_run(run, folder, overwrite=True)
        return folder

    return save
