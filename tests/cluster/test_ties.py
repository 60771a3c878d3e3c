"""Equal engines with equal steps: much happens at the very same moment, and the order within it must be that of single
steps."""

from __future__ import annotations

from random import Random as PythonRandom

import pytest

from running import MS, Row, run, scenario_of, table_of

EQUAL_STEPS = {
    "source": "linear",
    "base_ns": 5 * MS,
    "per_prefill_token_ns": 0,
    "per_decode_seq_ns": 0,
    "per_context_token_ns": 0,
}
POLICIES = ("round_robin", "least_loaded", "join_shortest_queue", "least_kv_usage", "power_of_two")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_running_ahead_keeps_the_order_within_a_moment(policy: str, asynchronous: bool) -> None:
    for seed in range(12):
        random = PythonRandom(seed)
        arrivals = [0, 5 * MS * random.randrange(20)]
        count, prompt = random.choice([6, 12, 20]), random.choice([10, 20])
        rows = [Row(random.choice(arrivals), prompt=prompt, output=random.choice([20, 40, 60])) for _ in range(count)]
        engine = {
            "num_gpu_blocks_override": 500,
            "max_model_len": 320,
            "block_size": random.choice([1, 4]),
            "async_scheduling": asynchronous,
        }
        routing = {"policy": policy, "max_in_flight": random.choice([None, 3])}
        scenario = scenario_of(engine, replicas=random.choice([2, 3]), routing=routing, timing=EQUAL_STEPS)
        table = table_of(rows, concurrency=random.choice([None, 3, 5]))
        ahead, single = (run(scenario, table, coalesce=coalesce).everything() for coalesce in (True, False))
        assert ahead == single
