"""What a pool's engines are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from running import LINEAR, WORKLOAD, Row, run, table_of
from servetwin.cluster.engines import scheduler_options
from servetwin.scenario.load import from_data
from servetwin.scenario.resolve import resolve
from servetwin.scenario.schema import Scenario


def scenario(model: str, *engines: dict[str, Any], **more: Any) -> Scenario:
    """A resolved scenario with a pool of one H200 an engine."""
    pools = [{"device": "h200_sxm", "engine": engine} for engine in engines]
    return resolve(from_data({"model": model, "workload": WORKLOAD, "pools": pools, **more}, None, Path()), Path())


@pytest.mark.parametrize("model", ["openai/gpt-oss-120b", "meta-llama/Llama-3.1-8B"])
def test_a_given_number_of_blocks_keeps_the_groups_of_the_model(model: str) -> None:
    estimated, given = (
        scheduler_options(scenario(model, engine).pools[0], Path())
        for engine in ({}, {"num_gpu_blocks_override": 5000})
    )
    assert given.usable_blocks == 4999
    assert (given.windows, given.block_size) == (estimated.windows, estimated.block_size)
    assert (128 in given.windows) == ("gpt-oss" in model)


def test_every_pool_accepts_drafts_at_its_own_rate() -> None:
    drafts = [{"num_speculative_tokens": 3, "spec_acceptance_rate": rate} for rate in (0.0, 1.0)]
    two = scenario("meta-llama/Llama-3.1-8B", *drafts, routing={"policy": "round_robin"}, timing=LINEAR)
    none, all_of_them = run(two, table_of([Row(output=401)] * 2)).requests
    assert (none.engine, all_of_them.engine) == (0, 1)
    decoding = [request.finish_ns - request.first_token_ns for request in (none, all_of_them)]
    assert decoding[0] > 3 * decoding[1]
