"""Bytes on links: what the operators send is what the links carry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servetwin.model import Dtypes, Sharding, dtypes_of, load_architecture
from servetwin.model.kernels import Collective
from servetwin.model.operators import operators
from servetwin.results.run import Run
from servetwin.scenario.load import from_data
from servetwin.simulation import simulate

DENSE, SPARSE = "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-30B-A3B"


def run(model: str, parallelism: dict[str, int], replicas: int = 1, eager: bool = True) -> Run:
    """Some requests on nodes whose devices are all joined to each other, where a message crosses one link."""
    data: dict[str, Any] = {
        "model": model,
        "workload": {
            "arrivals": {"process": "poisson", "rate": 40},
            "requests": 30,
            "input_tokens": {"distribution": "uniform", "min": 20, "max": 900},
            "output_tokens": {"distribution": "uniform", "min": 1, "max": 40},
        },
        "nodes": [{"devices": {"h100_sxm": 8}}],
        "network": {"inside": {"kind": "full_mesh", "link": "nvlink4"}, "collectives": "ring"},
        "pools": [
            {
                "device": "h100_sxm",
                "replicas": replicas,
                "parallelism": parallelism,
                "engine": {"enforce_eager": eager, "max_num_seqs": 32},
            }
        ],
    }
    return simulate(from_data(data, None, Path()), record=frozenset({"links"}))


def sent(operator: Collective, rows: float) -> float:
    """Bytes that all ranks of a group send: in a ring of N, each sends its N-th of the tensor N - 1 times, and in an
    all-reduce twice as often (Patarasuk and Yuan, 2009)."""
    size, others = operator.bytes_a_row * rows, operator.ranks - 1
    match operator.kind:
        case "allreduce":
            return 2 * others * size
        case "allgather" | "reducescatter":
            return others * size
        case "alltoall":
            return operator.ranks * size * others / operator.ranks
        case _:
            return size


def collectives(model: str, sharding: Sharding) -> list[Collective]:
    arch = load_architecture(model)
    dtypes: Dtypes = dtypes_of(arch, "auto", None, "auto")
    return [op for op in operators(arch, dtypes, sharding) if isinstance(op, Collective)]


@pytest.mark.parametrize(("tensor", "pipeline", "replicas"), [(2, 1, 1), (4, 1, 2), (2, 2, 1), (4, 2, 1)])
def test_link_bytes_are_operator_bytes(tensor: int, pipeline: int, replicas: int) -> None:
    ran = run(DENSE, {"tensor": tensor, "pipeline": pipeline}, replicas)
    steps = ran.steps
    tokens = int(((steps["prefill_tokens"] + steps["decode_seqs"]) * steps["steps"]).sum())
    logits = int(((steps["prefill_seqs"] + steps["decode_seqs"]) * steps["steps"]).sum())
    expected = 0.0
    for op in collectives(DENSE, Sharding(tensor, pipeline)):
        pairs = tensor if op.group == "pipeline" else 1  # each tensor rank hands its part over
        expected += sent(op, logits if op.rows == "logits" else tokens) * sum(op.stages) * pairs
    assert ran.links is not None
    assert float(np.sum(ran.links["bytes"])) == pytest.approx(expected, rel=1e-6)  # whole bytes a link


def test_ranks_in_step_exchange_their_tokens_once() -> None:
    ran = run(SPARSE, {"data": 2, "expert": 2})
    steps = ran.steps
    gathered = int(((steps["prefill_tokens"] + steps["decode_seqs"]) * steps["steps"]).sum())
    dummies = int(steps["steps"][(steps["prefill_tokens"] + steps["decode_seqs"]) == 0].sum())
    expected = 0.0
    for op in collectives(SPARSE, Sharding(1, 1, 2, 2)):
        assert op.rows == "gathered"
        expected += sent(op, gathered + dummies) * sum(op.stages)  # a dummy batch computes one token
    assert dummies > 0
    assert ran.links is not None
    assert float(np.sum(ran.links["bytes"])) == pytest.approx(expected, rel=1e-6)


def test_padding_to_graphs_is_sent_too() -> None:
    bare, padded = (run(DENSE, {"tensor": 4}, eager=eager).links for eager in (True, False))
    assert bare is not None and padded is not None
    assert np.sum(padded["bytes"]) > np.sum(bare["bytes"])


def test_one_device_has_no_links_to_count() -> None:
    found = run(DENSE, {}).links
    assert found is not None and len(found["bytes"]) == 0


def test_links_are_named_as_the_nodes_of_the_scenario() -> None:
    data: dict[str, Any] = {
        "model": DENSE,
        "workload": {"arrivals": {"process": "all_at_once"}, "requests": 2, "input_tokens": 20, "output_tokens": 3},
        "nodes": [
            {"name": "spare", "devices": {"l40s": 2}},
            {"name": "hopper", "count": 2, "devices": {"h100_sxm": 2}},
        ],
        "pools": [{"device": "h100_sxm", "parallelism": {"tensor": 4}}],
    }
    links = simulate(from_data(data, None, Path()), record=frozenset({"links"})).links
    assert links is not None
    busy = {end.split(".")[0] for end, size in zip(links["source"], links["bytes"], strict=True) if size and "." in end}
    assert busy == {"hopper-0", "hopper-1"}
    assert {end.split(".")[0] for end in links["source"] if "." in end} == {"spare", "hopper-0", "hopper-1"}
