"""What a mixture-of-experts layer computes and exchanges under every layout of ranks."""

from __future__ import annotations

from math import comb

import pytest

from servetwin import catalog
from servetwin.errors import InputError
from servetwin.model import Dtypes, Sharding, architecture_of, dtype, weight_bytes
from servetwin.model.experts import Communication, ExpertOptions
from servetwin.model.kernels import Collective, Experts, Operator
from servetwin.model.layers import Architecture
from servetwin.model.operators import operators
from servetwin.timing.shape import StepShape

DECODE = StepShape(0, 0, 0, 0, 64, 64, 64_000, 1000, 1000)


def arch_of(name: str) -> Architecture:
    return architecture_of(catalog.model(name).config, name)


QWEN = arch_of("Qwen/Qwen3-30B-A3B")
DEEPSEEK = arch_of("deepseek-ai/DeepSeek-V3")


def step(arch: Architecture, communication: Communication = "auto", **degrees: int) -> dict[str, Operator]:
    return {op.name: op for op in operators(arch, Dtypes(), Sharding(**degrees), ExpertOptions(communication))}


def exchanged(ops: dict[str, Operator]) -> dict[str, tuple[str, int, str]]:
    """(kind, ranks, rows) of the collectives of expert layers, in their order."""
    names = ("moe_dispatch", "moe_combine", "mlp_allreduce", "mlp_allgather")
    return {
        name: (op.kind, op.ranks, op.rows) for name, op in ops.items() if name in names and isinstance(op, Collective)
    }


def test_tensor_ranks_without_data_parallelism_only_add_up() -> None:
    for expert in (1, 4):
        assert exchanged(step(QWEN, tensor=4, expert=expert)) == {"mlp_allreduce": ("allreduce", 4, "tokens")}
    assert exchanged(step(QWEN)) == {}


def test_data_parallel_ranks_gather_hidden_states_and_choices_and_scatter_sums() -> None:
    ops = step(QWEN, data=8, expert=8)
    assert exchanged(ops) == {
        "moe_dispatch": ("allgather", 8, "gathered"),
        "moe_combine": ("reducescatter", 8, "gathered"),
    }
    assert ops["moe_dispatch"].message_bytes(DECODE) == 8 * 64 * (2048 * 2 + 8 * 8)
    assert ops["moe_combine"].message_bytes(DECODE) == 8 * 64 * 2048 * 2
    assert (ops["topk"].rows, ops["experts"].rows, ops["moe_sum"].rows) == ("tokens", "gathered", "gathered")


def test_hidden_states_travel_as_the_experts_take_them() -> None:
    sharding = Sharding(data=8, expert=8)
    sent = {}
    for name in ("bf16", "fp8", "int4", "nvfp4"):
        ops = {op.name: op for op in operators(QWEN, Dtypes(expert=dtype(name)), sharding)}
        sent[name] = ops["moe_dispatch"].message_bytes(DECODE) / (8 * 64) - 8 * 8
        assert ops["moe_combine"].message_bytes(DECODE) == 8 * 64 * 2048 * 2
    assert sent == {"bf16": 4096, "fp8": 2048, "int4": 4096, "nvfp4": 1152}


def test_with_tensor_parallelism_tokens_are_dealt_out_before_the_exchange() -> None:
    ops = step(DEEPSEEK, tensor=4, data=2, expert=8)
    assert exchanged(ops) == {
        "moe_dispatch": ("allgather", 8, "gathered"),
        "moe_combine": ("reducescatter", 8, "gathered"),
        "mlp_allreduce": ("allreduce", 4, "tokens"),  # of the three dense layers
        "mlp_allgather": ("allgather", 4, "tokens"),
    }
    assert (ops["mlp_allreduce"].stages, ops["mlp_allgather"].stages) == ((3,), (58,))
    assert [ops[name].count(DECODE) for name in ("router", "shared_down_proj")] == [16, 16]
    assert ops["shared_down_proj"].weight_bytes == 2 * 7168 * 2048, "whole on every rank"


def test_widths_alone_are_spread_without_dealing_out() -> None:
    ops = step(DEEPSEEK, tensor=4, data=2)
    assert exchanged(ops) == {
        "mlp_allreduce": ("allreduce", 4, "tokens"),
        "moe_dispatch": ("allgather", 2, "gathered"),
        "moe_combine": ("reducescatter", 2, "gathered"),
    }
    experts = ops["experts"]
    assert isinstance(experts, Experts) and (experts.local_experts, experts.inter) == (256, 256)


def test_an_all_to_all_sends_a_token_to_every_rank_with_one_of_its_experts() -> None:
    ops = step(QWEN, "alltoall", data=8, expert=8)
    homes = 8 * (1 - comb(112, 8) / comb(128, 8))
    sent = {name: op.message_bytes(DECODE) for name, op in ops.items() if op.kind == "alltoall"}
    assert sent == {"moe_dispatch": 64 * round(4096 * homes), "moe_combine": 64 * round(4096 * homes)}
    assert ops["experts"].rows == "gathered"
    dealt = step(QWEN, "alltoall", tensor=2, data=4, expert=8)
    assert dealt["moe_dispatch"].message_bytes(DECODE) == 32 * round(4096 * homes)


@pytest.mark.parametrize(
    ("communication", "degrees", "allowed"),
    [
        ("alltoall", {"tensor": 2, "expert": 2}, "auto, allreduce"),
        ("allreduce", {"data": 2, "expert": 2}, "auto, allgather_reducescatter, alltoall"),
        ("alltoall", {"data": 4, "expert": 2}, "with parallelism.expert: 4"),
    ],
)
def test_exchanges_that_do_not_go_with_a_layout(
    communication: Communication, degrees: dict[str, int], allowed: str
) -> None:
    with pytest.raises(InputError) as error:
        step(QWEN, communication, **degrees)
    assert (error.value.field, error.value.allowed) == ("experts.communication", allowed)


@pytest.mark.parametrize("degrees", [{}, {"data": 8, "expert": 8}, {"data": 8}, {"tensor": 2, "data": 4, "expert": 4}])
def test_the_ranks_of_a_group_do_all_pairs(degrees: dict[str, int]) -> None:
    sharding = Sharding(**degrees)
    experts = step(QWEN, **degrees)["experts"]
    assert isinstance(experts, Experts)
    tokens = 64 * sharding.data
    assert sharding.expert * experts.pairs(DECODE) == tokens * 8
    whole = step(QWEN)["experts"].flops(DECODE)
    assert sharding.tensor * sharding.data * experts.flops(DECODE) == sharding.data * whole


def test_expected_distinct_experts() -> None:
    """E (1 - (1 - k/E)^T), T to infinity: all of them."""
    experts = step(QWEN)["experts"]
    assert isinstance(experts, Experts)
    assert experts.touched_by(8) == pytest.approx(128 * (1 - (15 / 16) ** 8)) == pytest.approx(51.62, abs=0.005)
    assert experts.touched_by(1) == pytest.approx(8)
    assert experts.touched_by(10**6) == 128


def test_redundant_experts_take_memory_and_no_work() -> None:
    plain = Sharding(data=8, expert=8)
    more = Sharding(data=8, expert=8, redundant=16)
    expert = 3 * 2048 * 768 * 2
    assert weight_bytes(QWEN, Dtypes(), more) - weight_bytes(QWEN, Dtypes(), plain) == 48 * 2 * expert
    with_copies, without = (
        next(op for op in operators(QWEN, Dtypes(), s) if isinstance(op, Experts)) for s in (more, plain)
    )
    assert with_copies.pairs(DECODE) == without.pairs(DECODE)
    assert with_copies.local_experts == 18


@pytest.mark.parametrize(
    ("degrees", "field"),
    [
        ({"expert": 8, "data": 8, "redundant": 3}, "experts.redundant_experts"),
        ({"redundant": 8}, "experts.redundant_experts"),
        ({"tensor": 8, "context": 3}, "parallelism.context"),
        ({"tensor": 4, "context": 2}, "parallelism.context"),  # 4 KV heads: no rank has a copy of another's
    ],
)
def test_layouts_that_cannot_be(degrees: dict[str, int], field: str) -> None:
    with pytest.raises(InputError) as error:
        step(QWEN, **degrees)
    assert error.value.field == field


def test_rearranging_experts_moves_what_a_rank_had_not() -> None:
    (move,) = (
        op
        for op in operators(QWEN, Dtypes(), Sharding(data=8, expert=8), ExpertOptions(rebalance_interval=1000))
        if op.name == "expert_rebalancing"
    )
    assert isinstance(move, Collective)
    assert move.bytes_a_row == 48 * 16 * 3 * 2048 * 768 * 2
    assert (move.rows, move.every, move.count(DECODE), move.stages) == ("step", 1000, 1, (1,))
