"""Clusters of several nodes and instances of LLMServingSim, data and expert parallelism, as scenarios."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from llmservingsim_repo import Repo, cluster, head, instance, write_json

from servetwin.errors import InputError
from servetwin.interop.llmservingsim import import_cluster
from servetwin.scenario.load import load
from servetwin.scenario.resolve import resolve
from servetwin.scenario.schema import Scenario
from servetwin.simulation import simulate
from servetwin.workload import build

LLAMA, QWEN, PRO, ADA = "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-30B-A3B-Instruct-2507", "rtx_pro_6000", "rtx_4090"
SHIPPED: dict[str, Any] = {
    "dual_node_moe_dp_ep_intra_inter_instance": (2, [(QWEN, PRO, (2, 1, 2, 4), 1)], False),
    "dual_node_multi_instance": (2, [(LLAMA, PRO, (1, 1, 1, 1), 4)], True),
    "rtx4090_multi_instance": (1, [(LLAMA, ADA, (1, 1, 1, 1), 2)], False),
    "rtx4090_single_instance": (1, [(LLAMA, ADA, (1, 1, 1, 1), 1)], False),
    "rtx4090_tp2_instance": (1, [(LLAMA, ADA, (2, 1, 1, 1), 1)], False),
    "single_node_4_instance_2TP": (1, [(LLAMA, PRO, (2, 1, 1, 1), 4)], False),
    "single_node_cxl_instance": "nodes[0].instances[0].placement at cxl:0, cxl:1, cxl:2, cxl:3, cxl_mem",
    "single_node_dp_instance": (1, [(LLAMA, PRO, (2, 1, 2, 1), 1)], False),
    "single_node_heterogeneous": "nodes[0].instances[0].pd_type 'prefill', nodes[0].instances[1].pd_type 'decode'",
    "single_node_memory_instance": (1, [(LLAMA, PRO, (1, 1, 1, 1), 1)], True),
    "single_node_moe_dp_ep_instance": (1, [(QWEN, PRO, (1, 1, 2, 2), 1)], False),
    "single_node_moe_dp_pp_instance": (1, [(QWEN, PRO, (1, 2, 2, 2), 1)], False),
    "single_node_moe_dp_tp_instance": (1, [(QWEN, PRO, (2, 1, 2, 2), 1)], False),
    "single_node_moe_dp_tp_pp_instance": (1, [(QWEN, PRO, (2, 2, 2, 4), 1)], False),
    "single_node_moe_multi_instance": (1, [(QWEN, PRO, (1, 1, 1, 1), 2)], False),
    "single_node_moe_pd_instance": "nodes[0].instances[0].pd_type 'prefill', nodes[0].instances[1].pd_type 'decode'",
    "single_node_moe_pp_instance": (1, [(QWEN, PRO, (2, 2, 1, 2), 1)], False),
    "single_node_moe_single_instance": (1, [(QWEN, PRO, (2, 1, 1, 2), 1)], False),
    "single_node_multi_instance": (1, [(LLAMA, PRO, (1, 1, 1, 1), 2)], True),
    "single_node_pd_instance": "nodes[0].instances[0].pd_type 'prefill', nodes[0].instances[1].pd_type 'decode'",
    "single_node_pd_per_instance_config": (
        "nodes[0].instances[0].pd_type 'prefill', nodes[0].instances[1].pd_type 'decode'"
    ),
    "single_node_pim_instance": "nodes[0].cpu_mem.pim_config, nodes[0].power",
    "single_node_power_instance": "nodes[0].power",
    "single_node_pp_instance": (1, [(LLAMA, PRO, (1, 4, 1, 1), 1)], True),
    "single_node_single_instance": (1, [(LLAMA, PRO, (1, 1, 1, 1), 1)], True),
    "single_node_single_instance_H100": (1, [("meta-llama/Llama-3.1-70B", "h100_sxm", (4, 1, 1, 1), 1)], False),
    "single_node_tp_pp_instance": (1, [(LLAMA, PRO, (2, 2, 1, 1), 1)], False),
}
"""Every cluster file of that project: what it is refused for, or nodes, pools as (model, device, degrees of tensor,
pipeline, data and expert, replicas), and whether the data has its measurements (one bundle, of degree 1)."""


def several(repo: Repo, *nodes: list[dict[str, Any]], flags: str = "", **top: Any) -> Scenario:
    write_json(repo.cluster, cluster(*nodes) | top)
    return repo.load(flags or "--dataset workloads/three.jsonl")


# ---- the files of that project ----


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_cluster_files(shared: Path, tmp_path: Path, name: str) -> None:
    repo, out, told = shared / "data/llmservingsim", tmp_path / "out.yaml", []
    file = repo / f"configs/cluster/{name}.json"

    def load_it() -> Scenario:
        return import_cluster(file, repo, None, None, "--dataset workloads/example_trace.jsonl", out, told.append)

    expected = SHIPPED[name]
    if isinstance(expected, str):
        with pytest.raises(InputError) as caught:
            load_it()
        assert str(caught.value) == f"{file}: cannot be imported: {expected}"
        assert not out.exists()
        return
    nodes, pools, measured = expected
    scenario = load_it()
    assert load(out) == scenario
    resolved = resolve(scenario, tmp_path)
    assert len(scenario.nodes or ()) == nodes
    degrees = [pool.parallelism for pool in resolved.pools]
    assert [
        (pool.model, pool.device, (p.tensor, p.pipeline, p.data, p.expert), pool.replicas)
        for pool, p in zip(resolved.pools, degrees, strict=True)
    ] == pools
    devices = sum(sum(node.devices.values()) for node in scenario.nodes or ())
    assert devices == sum(
        pool.replicas * p.tensor * p.pipeline * p.data for pool, p in zip(resolved.pools, degrees, strict=True)
    )
    assert scenario.timing.source == ("profile" if measured else "auto")
    assert any(text.startswith("NOT MEASURED: no measurements of ") for text in told) != measured
    for text in told:
        assert text in out.read_text()


def test_the_table_holds_all_cluster_files(shared: Path) -> None:
    assert set(SHIPPED) == {path.stem for path in (shared / "data/llmservingsim/configs/cluster").glob("*.json")}


@pytest.mark.parametrize("name", ["dual_node_multi_instance", "single_node_4_instance_2TP", "single_node_pp_instance"])
def test_shipped_cluster_files_run(shared: Path, tmp_path: Path, name: str) -> None:
    repo, out = shared / "data/llmservingsim", tmp_path / "out.yaml"
    flags = "--dataset workloads/example_trace.jsonl"
    scenario = import_cluster(repo / f"configs/cluster/{name}.json", repo, None, None, flags, out)
    assert list(simulate(scenario, tmp_path).requests["status"]) == ["finished"] * 10


# ---- instances, nodes, pools ----


def test_equal_instances_are_replicas_of_one_pool(repo: Repo) -> None:
    two = [instance(), instance(max_num_seqs=128)]  # the default, written out
    scenario = several(repo, two, [instance(max_num_seqs=64), instance()])
    many, few = scenario.pools
    assert (many.replicas, few.replicas) == (3, 1)
    assert (many.engine.max_num_seqs, few.engine.max_num_seqs) == (128, 64)
    assert (many.placement, few.placement) == (["node0:0", "node0:1", "node1:1"], ["node1:0"])
    assert many.name == "pool0"
    assert "pool0: nodes[0].instances[0], nodes[0].instances[1], nodes[1].instances[1]" in head(repo)
    assert "pool1: nodes[1].instances[0]" in head(repo)
    assert scenario.routing.policy == "llmservingsim_load"
    assert scenario.timing.profile == "rtx_4090/org__dense/bf16"


def test_nodes_hold_what_their_instances_use(repo: Repo) -> None:
    mixed = [instance(tp_size=2), instance(hardware="H100"), instance(tp_size=2, pp_size=2)]
    scenario = several(repo, mixed)
    assert scenario.nodes is not None
    (node,) = scenario.nodes
    assert node.devices == {"rtx_4090": 6, "h100_sxm": 1}  # a node lists its devices kind by kind
    assert (node.memory_size, node.memory_bandwidth) == (64 * 2**30, 50e9)
    assert [pool.placement for pool in scenario.pools] == [["node0:0-1"], ["node0:6"], ["node0:2-5"]]
    resolved = resolve(scenario, repo.out.parent)
    assert [pool.placement for pool in resolved.pools] == [["node0:0-1"], ["node0:6"], ["node0:2-5"]]
    assert "Tensor degrees: each pool has its own" in head(repo)


def test_pools_with_models_of_their_own(repo: Repo) -> None:
    scenario = several(repo, [instance(), instance(model_name="org/normed")])
    first, second = scenario.pools
    assert (scenario.model, first.model) == (str((repo.root / "configs/model/org/dense.json").resolve()), None)
    assert second.model == str((repo.root / "configs/model/org/normed.json").resolve())
    assert scenario.timing.source == "auto" and scenario.timing.profile is None
    # org/normed has no bundle; the catalogue knows neither, so that no profile is found by a name
    assert "NOT MEASURED: no measurements of org/normed (bf16) on RTX4090: there is no profile bundle" in head(repo)
    assert "for measured prices simulate its pool alone, with profile: rtx_4090/org__dense/bf16" in head(repo)


@pytest.mark.parametrize(
    ("flag", "policy"), [("LOAD", "llmservingsim_load"), ("RR", "round_robin"), ("RAND", "random")]
)
def test_routing_policies(repo: Repo, flag: str, policy: str) -> None:
    flags = f"--request-routing-policy {flag} --dataset workloads/three.jsonl"
    scenario = several(repo, [instance(), instance()], flags=flags)
    assert scenario.routing.policy == policy
    assert list(simulate(scenario, repo.out.parent).requests["status"]) == ["finished"] * 3


def test_without_a_workload_sixteen_requests_an_instance(repo: Repo) -> None:
    scenario = several(repo, [instance(), instance()], flags="--max-num-seqs 16")
    assert len(build(scenario.workload, 0, repo.out.parent)) == 32


# ---- data and expert parallelism ----


def test_a_data_parallel_group_is_one_replica(repo: Repo) -> None:
    member = instance(dp_group="A", tp_size=2)
    scenario = several(repo, [member, instance()], [instance(dp_group="B", tp_size=2), member])
    first, alone, second = scenario.pools
    assert (first.parallelism.tensor, first.parallelism.data, first.parallelism.expert) == (2, 2, 1)
    assert (first.replicas, first.placement) == (1, ["node0:0-1", "node1:2-3"])
    assert (alone.parallelism.data, second.parallelism.data) == (1, 1)
    assert second.placement == ["node1:0-1"]
    assert "pool0: nodes[0].instances[0] + nodes[1].instances[1]" in head(repo)
    assert "vLLM steps the data-parallel ranks of a dense model each for itself" in head(repo)
    assert "Data-parallel groups: each has its own network" in head(repo)


def test_equal_groups_are_replicas_of_one_pool(repo: Repo) -> None:
    groups = [instance(dp_group=name, model_name="org/mixture", ep_size=2) for name in "ABBA"]
    (pool,) = several(repo, groups).pools
    assert (pool.replicas, pool.parallelism.data, pool.parallelism.expert) == (2, 2, 2)
    assert pool.placement == ["node0:0", "node0:3", "node0:1", "node0:2"]


@pytest.mark.parametrize(
    ("fields", "expert"),
    [({}, 1), ({"tp_size": 2}, 2), ({"tp_size": 2, "ep_size": 1}, 1), ({"tp_size": 4, "ep_size": 2}, 2)],
)
def test_expert_parallelism_is_that_of_tensor_unless_given(repo: Repo, fields: dict[str, Any], expert: int) -> None:
    pool = repo.load(model_name="org/mixture", **fields).pools[0]
    assert (pool.parallelism.data, pool.parallelism.expert) == (1, expert)
    if fields:
        words = {(2, 2): "ends in an all-reduce", (2, 1): "ep_size 1: every expert is split over the tensor ranks"}
        assert words.get((pool.parallelism.tensor, expert), "every expert is split over the ranks that are") in head(
            repo
        )


def test_routing_of_tokens_to_experts(repo: Repo) -> None:
    repo.load("--expert-routing-policy BALANCED", model_name="org/mixture")
    assert "expert" not in repo.out.read_text().split("name:", 1)[1]
    repo.load("--expert-routing-policy RR", model_name="org/mixture")
    assert "--expert-routing-policy RR: an even share" in head(repo)
    assert "expert" not in repo.out.read_text().split("name:", 1)[1]
    repo.load("--expert-routing-policy RAND", model_name="org/dense")
    assert "RAND:" not in head(repo)


def test_random_routing_of_tokens_to_experts(repo: Repo) -> None:
    repo.load("--expert-routing-policy RAND", model_name="org/mixture")
    assert "experts:\n    routing: random\n" in repo.out.read_text()
    assert "that project draws the same every step" in head(repo)


# ---- links ----


def test_a_link_for_all_is_that_of_the_pool(repo: Repo) -> None:
    scenario = repo.load(tp_size=2)
    link = scenario.pools[0].link
    assert link is not None and scenario.network is None
    assert (link.bandwidth, link.latency) == (16 * 2**30, 20_000)
    assert "Links:" not in head(repo)


def test_links_of_dimensions_become_links_of_places(repo: Repo) -> None:
    member = instance(dp_group="A", tp_size=2)
    scenario = several(repo, [member], [member], link_bw=[128, 16], link_latency=[500, 20000])
    assert scenario.network is not None and scenario.pools[0].link is None
    inside, between = scenario.network.inside, scenario.network.between
    assert inside is not None and between is not None
    assert (inside.bandwidth, inside.latency) == (128 * 2**30, 500)
    assert (between.bandwidth, between.latency) == (16 * 2**30, 20_000)


def test_replicas_inside_nodes_keep_a_link_of_their_own(repo: Repo) -> None:
    scenario = several(repo, [instance(tp_size=2)], [instance(tp_size=2)], link_bw=[128, 16], link_latency=[500, 20000])
    (pool,) = scenario.pools
    assert pool.link is not None and (pool.link.bandwidth, pool.link.latency) == (128 * 2**30, 500)
    assert scenario.network is not None and scenario.network.inside is None
    assert scenario.network.between is not None
    assert (scenario.network.between.bandwidth, scenario.network.between.latency) == (16 * 2**30, 20_000)


def test_dimensions_that_nothing_crosses_do_not_matter(repo: Repo) -> None:
    member = instance(dp_group="A")  # one tensor rank: the first dimension has no links
    link = several(repo, [member, member], link_bw=[900, 16], link_latency=[0, 500]).pools[0].link
    assert link is not None and (link.bandwidth, link.latency) == (16 * 2**30, 500)
    link = several(repo, [instance(tp_size=2)] * 2, link_bw=[900, 16]).pools[0].link
    assert link is not None and (link.bandwidth, link.latency) == (900 * 2**30, 20_000)  # instances exchange nothing


@pytest.mark.parametrize(
    ("fields", "top", "expected"),
    [
        ({}, {}, (15.92e9, 6_600)),
        ({"hardware": "H100"}, {}, (16 * 2**30, 20_000)),
        ({}, {"link_latency": 10_000}, (16 * 2**30, 10_000)),
        ({}, {"link_bw": 32}, (32 * 2**30, 20_000)),
        ({"tp_size": 1}, {}, (15.92e9, 6_600)),
    ],
)
def test_a_guessed_link_gives_way_to_the_measured_one(
    repo: Repo, fields: dict[str, Any], top: dict[str, Any], expected: tuple[float, int]
) -> None:
    fields = {"hardware": "RTXPRO6000", "tp_size": 2} | fields
    write_json(repo.cluster, cluster(**fields) | top)
    link = repo.load().pools[0].link
    assert link is not None and (link.bandwidth, link.latency) == expected
    said = "the file's 16 GB/s and 20 us are a guess" in head(repo)
    assert said == (expected[1] == 6_600 and fields["tp_size"] > 1)  # where it matters


# ---- without measurements ----


@pytest.mark.parametrize("fields", [{"hardware": "H100"}, {"tp_size": 4}, {"dtype": "float16"}])
def test_without_a_bundle_the_scenario_says_so_and_runs(repo: Repo, fields: dict[str, Any]) -> None:
    told: list[str] = []
    write_json(repo.cluster, cluster(**fields))
    flags = "--dataset workloads/three.jsonl"
    scenario = import_cluster(repo.cluster, repo.root, None, None, flags, repo.out, told.append)
    assert (scenario.timing.source, scenario.timing.profile) == ("auto", None)
    (said,) = told
    assert said.startswith("NOT MEASURED: no measurements of org/dense")
    assert "python -m profiler profile org/dense --hardware" in said
    assert f"# {said}\n" in repo.out.read_text()
    run = simulate(scenario, repo.out.parent)
    assert list(run.requests["status"]) == ["finished"] * 3
    assert run.priced_ns["measured"] == run.priced_ns["interpolated"] == 0 or fields == {"hardware": "H100"}


def test_a_degree_that_no_profile_has_is_priced_without_it(repo: Repo) -> None:
    from servetwin import catalog

    name = "Qwen/Qwen3-0.6B"
    write_json(repo.root / f"configs/model/{name}.json", catalog.model(name).config)
    (repo.root / "profiler/perf/RTX4090/Qwen").mkdir()
    bundle = repo.bundle("../Qwen/Qwen3-0.6B", "qwen3", degrees=(1,))
    (bundle / "meta.yaml").write_text((bundle / "meta.yaml").read_text().replace("org/../", ""))
    assert repo.load(model_name=name).timing.profile == "rtx_4090/Qwen__Qwen3-0.6B/bf16"  # the user now has it
    scenario = repo.load(model_name=name, tp_size=2)
    assert "at tp_size 2: the bundle" in head(repo)
    run = simulate(scenario, repo.out.parent)
    assert list(run.requests["status"]) == ["finished"] * 3
    assert not any(name.startswith("profile") for name in run.versions)
