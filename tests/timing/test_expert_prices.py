"""What experts cost under routing laws, placements and layouts, from the scenario to the price."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servetwin import catalog
from servetwin.errors import InputError
from servetwin.fabric.collectives import exchange_ns
from servetwin.model import Dtypes, Sharding, load_architecture
from servetwin.model.expert_placement import RankLoads, in_order
from servetwin.model.expert_routing import Independent
from servetwin.model.kernels import Experts
from servetwin.model.operators import operators
from servetwin.scenario.load import dump, from_data, load
from servetwin.scenario.resolve import resolve
from servetwin.scenario.schema import Scenario
from servetwin.simulation import simulate
from servetwin.timing.choose import pricing_for, sharding_of
from servetwin.timing.kernels import KernelTables
from servetwin.timing.operators import OperatorTimer
from servetwin.timing.roofline import Roofline
from servetwin.timing.shape import StepShape
from servetwin.timing.silicon import Silicon

MODEL = "Qwen/Qwen3-30B-A3B"
DECODE = StepShape(0, 0, 0, 0, 64, 64, 64_000, 1000, 1000)
ROWS = (1, 8, 64, 513, 8192)


def scenario_of(
    experts: dict[str, Any] | None, model: str = MODEL, source: str = "roofline", **degrees: int
) -> Scenario:
    data = {
        "model": model,
        "workload": {"arrivals": {"process": "all_at_once"}, "requests": 1, "input_tokens": 10, "output_tokens": 5},
        "pools": [{"device": "h200_sxm", "parallelism": degrees, **({"experts": experts} if experts else {})}],
        "timing": {"source": source},
    }
    return resolve(from_data(data, None, Path()), Path())


def timer_of(
    experts: dict[str, Any] | None, model: str = MODEL, source: str = "roofline", **degrees: int
) -> OperatorTimer:
    scenario = scenario_of(experts, model, source, **degrees)
    timer = pricing_for(scenario, scenario.pools[0], Path()).new_timer()
    assert isinstance(timer, OperatorTimer)
    return timer


def experts_ns(timer: OperatorTimer, shape: StepShape = DECODE) -> int:
    return sum(ns for name, ns, _, _ in timer.explain(shape) if name == "experts")


def experts_of(sharding: Sharding) -> Experts:
    found = [op for op in operators(load_architecture(MODEL), Dtypes(), sharding) if isinstance(op, Experts)]
    return found[0]


@pytest.mark.parametrize("sharding", [Sharding(), Sharding(data=8, expert=8), Sharding(2, data=4, expert=4)], ids=str)
def test_a_law_without_preference_costs_as_much_as_even_routing(sharding: Sharding) -> None:
    even = experts_of(sharding)
    ranks = sharding.expert
    law = RankLoads(Independent(np.full(128, 1 / 16)), *in_order(128, ranks), ranks)
    tables = KernelTables.for_device("h200_sxm")
    for source in (Roofline(catalog.device("h200_sxm")), Silicon(tables, sharding)):
        by_law, evenly = source.pricer(replace(even, routing=law)), source.pricer(even)
        assert by_law is not None and evenly is not None
        for rows in ROWS:
            assert by_law(rows)[0] == pytest.approx(evenly(rows)[0], rel=1e-9)
    silicon = Silicon(tables, sharding).pricer(replace(even, routing=law))
    assert silicon is not None and silicon(64)[1] == "extrapolated"


@pytest.mark.parametrize("source", ["roofline", "auto"])
def test_the_last_rank_sets_the_time(source: str) -> None:
    degrees = {"data": 8, "expert": 8}
    prefill = StepShape(1, 2048, 0, 2048 * 2049 // 2, 0, 0, 0, 0, 0)
    even = experts_ns(timer_of(None, source=source, **degrees), prefill)
    spread = experts_ns(timer_of({"routing": "random"}, source=source, **degrees), prefill)
    mild = experts_ns(timer_of({"routing": "zipf", "exponent": 0.5}, source=source, **degrees), prefill)
    strong = experts_ns(timer_of({"routing": "zipf", "exponent": 1.2}, source=source, **degrees), prefill)
    assert even < spread < mild < strong
    assert spread < 1.05 * even, "16,384 tokens are nearly even"


def test_on_one_rank_popular_experts_read_fewer_weights() -> None:
    few = StepShape(0, 0, 0, 0, 16, 16, 16_000, 1000, 1000)
    assert experts_ns(timer_of({"routing": "zipf", "exponent": 1.0}), few) < experts_ns(timer_of(None), few)


def test_copies_of_popular_experts_relieve_the_last_rank() -> None:
    degrees = {"data": 8, "expert": 8}
    prefill = StepShape(1, 2048, 0, 2048 * 2049 // 2, 0, 0, 0, 0, 0)
    law = {"routing": "zipf", "exponent": 1.0}
    plain = experts_ns(timer_of(law, **degrees), prefill)
    copied = experts_ns(timer_of({**law, "redundant_experts": 32}, **degrees), prefill)
    even = experts_ns(timer_of(None, **degrees), prefill)
    assert even <= copied < 1.05 * even < plain


def test_rearranging_is_paid_in_equal_parts_by_every_step() -> None:
    plain = timer_of(None, data=8, expert=8)
    moving = timer_of({"rebalance_interval": 3000}, data=8, expert=8)
    link = catalog.device("h200_sxm").scale_up
    assert link is not None
    held = 48 * 16 * 3 * 2048 * 768 * 2
    cost = exchange_ns(8, held, link.bandwidth, link.link.latency_ns)
    assert moving.step_ns(DECODE) - plain.step_ns(DECODE) == int(cost / 3000)
    assert moving.lockstep_ns(DECODE, 64, 900) - plain.lockstep_ns(DECODE, 64, 900) == int(cost / 3000)
    assert sum(moving.run_ns(DECODE, 9)) - sum(plain.run_ns(DECODE, 9)) == 9 * int(cost / 3000)


def test_layers_with_popular_experts_of_their_own() -> None:
    shared = timer_of({"routing": "zipf", "exponent": 1.0}, data=8, expert=8)
    differ = timer_of({"routing": "zipf", "exponent": 1.0, "per_layer": True}, data=8, expert=8)
    assert sum(part.operator.name == "experts" for part in shared.parts) == 1
    assert sum(part.operator.name == "experts" for part in differ.parts) == 48
    again = timer_of({"routing": "zipf", "exponent": 1.0, "per_layer": True}, data=8, expert=8)
    assert differ.step_ns(DECODE) == again.step_ns(DECODE) != shared.step_ns(DECODE)


def test_measured_popularity(tmp_path: Path) -> None:
    even, first = tmp_path / "even.json", tmp_path / "first.json"
    even.write_text(str([1] * 128))
    first.write_text(str([[5] * 16 + [1] * 112] * 48))
    degrees = {"data": 8, "expert": 8}
    plain = timer_of(None, **degrees).step_ns(DECODE)
    assert timer_of({"routing": "measured", "popularity": str(even)}, **degrees).step_ns(DECODE) == plain
    assert timer_of({"routing": "measured", "popularity": str(first)}, **degrees).step_ns(DECODE) > plain
    first.write_text(str([[1] * 128] * 47))
    with pytest.raises(InputError, match=r"not as many layers .*found '47 layers'; allowed: 1 or 48"):
        timer_of({"routing": "measured", "popularity": str(first)}, **degrees)


@pytest.mark.parametrize(
    ("experts", "degrees", "message"),
    [
        ({"routing": "zipf"}, {}, r"exponent: missing: routing 'zipf' needs it"),
        ({"exponent": 1.0}, {}, r"exponent: does not go with routing 'balanced'"),
        ({"routing": "measured"}, {}, r"popularity: missing"),
        ({"routing": "random", "per_layer": True}, {}, r"per_layer: does not go with routing 'random'"),
        ({"routing": "zipff"}, {}, r"experts.routing: no such routing law; .*did you mean 'zipf'"),
        ({"rebalance_interval": 10}, {}, r"nothing to rearrange on a single rank"),
        ({"communication": "alltoall"}, {"tensor": 2}, r"only add up; found 'alltoall'; allowed: auto, allreduce"),
        ({"redundant_experts": 3}, {"data": 8, "expert": 8}, r"131 experts \(with 3 redundant ones\) on tensor"),
    ],
)
def test_choices_that_do_not_go_together(experts: dict[str, Any], degrees: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        timer_of(experts, **degrees)


def test_a_model_without_experts_has_no_choices() -> None:
    with pytest.raises(InputError, match="experts: the model has no experts"):
        timer_of({"routing": "random"}, "meta-llama/Llama-3.1-8B")


def test_the_sharding_of_a_pool_has_all_of_it() -> None:
    pool = scenario_of({"redundant_experts": 8}, tensor=8, data=2, expert=8, context=2).pools[0]
    assert sharding_of(pool) == Sharding(8, 1, 2, 8, redundant=8, context=2)


def test_ranks_that_share_kv_read_less_of_it_in_long_contexts() -> None:
    long = StepShape(0, 0, 0, 0, 64, 64, 64 * 100_000, 100_000, 100_000)
    short = StepShape(0, 0, 0, 0, 64, 64, 64 * 100, 100, 100)
    copied, dealt = (timer_of(None, tensor=8, context=c, source="auto") for c in (1, 2))
    assert dealt.step_ns(long) < copied.step_ns(long)
    assert dealt.step_ns(short) > copied.step_ns(short), "the exchanges cost more than they save"


@pytest.mark.parametrize(
    "experts",
    [
        {"routing": "random"},
        {"routing": "zipf", "exponent": 0.8, "per_layer": True, "redundant_experts": 8, "rebalance_interval": 500},
    ],
    ids=["random", "zipf"],
)
def test_a_run_is_the_same_in_one_go_step_by_step_and_again_from_its_resolved_form(
    experts: dict[str, Any], tmp_path: Path
) -> None:
    data = {
        "model": MODEL,
        "workload": {
            "arrivals": {"process": "poisson", "rate": 20}, "requests": 30, "input_tokens": 300, "output_tokens": 40,
        },
        "pools": [{"device": "h100_sxm", "parallelism": {"tensor": 4, "expert": 4}, "experts": experts}],
    }  # fmt: skip
    scenario = from_data(data, None, Path())
    file = tmp_path / "scenario.yaml"
    file.write_text(dump(resolve(scenario, Path())))
    first = simulate(scenario)
    for run in (simulate(scenario, coalesce=False), simulate(load(file))):
        for column, values in first.requests.items():
            assert np.array_equal(run.requests[column], values), column
        assert run.priced_ns == first.priced_ns
