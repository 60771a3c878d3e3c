"""What cannot be imported is refused by its name, and what is wrong is named with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from llmservingsim_repo import Repo, cluster, instance, recorded, write_json

from servetwin.errors import InputError


def refusal(repo: Repo, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(InputError) as caught:
        repo.load(*args, **kwargs)
    assert not repo.out.exists()
    return str(caught.value)


@pytest.mark.parametrize(
    "flag",
    [
        "--enable-prefix-sharing",
        "--prefix-storage CPU",
        "--prefix-storage CXL",
        "--enable-local-offloading",
        "--enable-attn-offloading",
        "--enable-sub-batch-interleaving",
        "--skip-prefill",
        "--network-backend ns3",
        "--request-routing-policy CUSTOM",
        "--expert-routing-policy CUSTOM",
    ],
)
def test_features_that_flags_turn_on(repo: Repo, flag: str) -> None:
    assert refusal(repo, flag) == f"--flags: cannot be imported: {flag}"


def test_flags_that_change_nothing_here_are_taken(repo: Repo) -> None:
    repo.load(
        "--prefix-storage None --network-backend analytical --no-enable-block-copy --run-id x --inputs-root y "
        "--no-cleanup-inputs --log-interval 0.5 --log-level DEBUG --output z.csv --expert-routing-policy RAND"
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"pd_type": "prefill"}, "nodes[0].instances[0].pd_type 'prefill'"),
        ({"pd_type": "decode"}, "nodes[0].instances[0].pd_type 'decode'"),
        ({"enable_local_offloading": True}, "enable_local_offloading"),
        ({"enable_attn_offloading": True}, "enable_attn_offloading"),
        ({"enable_sub_batch_interleaving": True}, "enable_sub_batch_interleaving"),
        ({"placement": {"default": {"weights": "cpu"}}}, "placement at cpu"),
        ({"placement": {"layers": {"lm_head": {"kv_loc": "cxl:1"}}}}, "placement at cxl:1"),
        ({"npu_mem": {"mem_size": 24, "mem_bw": 1008, "mem_latency": 5}}, "npu_mem.mem_latency 5"),
    ],
)
def test_features_of_an_instance(repo: Repo, fields: dict[str, Any], words: str) -> None:
    assert f"{repo.cluster}: cannot be imported: nodes[0].instances[0]" in (message := refusal(repo, **fields))
    assert words in message


def test_features_of_nodes_and_the_cluster_are_named_together(repo: Repo) -> None:
    whole = cluster(pd_type="prefill") | {"cxl_mem": {"mem_size": 1}}
    whole["nodes"][0] |= {"power": {}, "cpu_mem": {"mem_size": 64, "pim_config": "DDR4_8GB_3200_pim"}}
    write_json(repo.cluster, whole)
    assert refusal(repo) == (
        f"{repo.cluster}: cannot be imported: nodes[0].cpu_mem.pim_config, nodes[0].power, "
        "nodes[0].instances[0].pd_type 'prefill', cxl_mem"
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_name": "org/dense", "ep_size": 2}, "ep_size: org/dense has no experts; found 2; allowed: 1"),
        (
            {"tp_size": 2, "ep_size": 4},
            "8 experts do not fit tp_size 2 on 1 data-parallel ranks; found 4; allowed: 1, 2",
        ),
        ({"tp_size": 4, "ep_size": 3}, "found 3; allowed: 1, 2, 4"),
    ],
)
def test_expert_parallelism_that_does_not_fit(repo: Repo, fields: dict[str, Any], words: str) -> None:
    assert words in refusal(repo, **({"model_name": "org/mixture"} | fields))


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (
            {"tp_size": 2},
            {},
            "instances[1].tp_size: differs in the data-parallel group 'A'; found 1; allowed: 2, as in",
        ),
        ({}, {"model_name": "org/normed"}, "instances[1].model_name: differs"),
        ({"max_num_seqs": 8}, {}, "instances[1].max_num_seqs: differs in the data-parallel group 'A'; found 'nothing'"),
        ({"model_name": "org/mixture"}, {"model_name": "org/mixture"}, "ep_size: 8 experts do not fit tp_size 1 on 2"),
    ],
)
def test_data_parallel_groups_that_do_not_fit(
    repo: Repo, first: dict[str, Any], second: dict[str, Any], words: str
) -> None:
    write_json(repo.cluster, cluster([instance(dp_group="A", **first), instance(dp_group="A", **second)]))
    assert words in refusal(repo)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--max-num-seq 3", "--flags: unknown flag; found '--max-num-seq'"),
        ("--max-num-seq 3", "did you mean '--max-num-seqs'?"),
        ("--max-num-seqs three", "--max-num-seqs: invalid int value: 'three'"),
        ("--max-num-seqs 0", "--max-num-seqs: must be a whole number of at least 1; found 0"),
        ("--max-num-seqs", "--max-num-seqs: expected one argument"),
        ("--npu-memory-utilization 1.5", "at most 1"),
        ("--npu-memory-utilization nan", "--npu-memory-utilization: must be a number"),
        ("--dtype fp16", "--dtype: unknown value; found 'fp16'; allowed: float16"),
        ("--log-level LOUD", "invalid choice: 'LOUD'"),
        ("--num-reqs -1", "--num-reqs: must be a whole number of at least 0; found -1"),
        ("serving", "belongs to no flag; found 'serving'"),
        ("--output 'a", "cannot be split into words"),
        ("--dataset nowhere.jsonl", "--dataset: no such workload"),
        ("--cluster-config other.json", "--cluster-config: is another file"),
        ("--no-enable-chunked-prefill", "does not fit in one step"),
    ],
)
def test_wrong_flags(repo: Repo, flags: str, words: str) -> None:
    assert words in refusal(repo, flags)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tp_size": 0}, "instances[0].tp_size: must be a whole number of at least 1; found 0"),
        ({"tp_size": True}, "instances[0].tp_size: must be a whole number"),
        ({"tp_size": "2"}, "instances[0].tp_size: must be a whole number"),
        ({"tp_size": 2, "num_npus": 3}, "instances[0].num_npus: does not fit; found 3"),
        ({"model_name": None}, "instances[0].model_name: is missing"),
        ({"model_name": "org/dens"}, "did you mean 'org/dense'?"),
        ({"model_name": "../model/org/dense"}, "no such model configuration"),
        ({"hardware": "RTX4091"}, "instances[0].hardware: unknown device; found 'RTX4091'"),
        ({"npu_mem": None}, "instances[0].npu_mem: is missing"),
        ({"npu_mem": {"mem_size": "24", "mem_bw": 1, "mem_latency": 0}}, "npu_mem.mem_size: must be a number"),
        ({"npu_mem": {"mem_size": 0, "mem_bw": 1, "mem_latency": 0}}, "npu_mem.mem_size: must be more than 0"),
        ({"npu_mem": {"mem_size": 1, "mem_bw": 1}}, "npu_mem.mem_latency: is missing"),
        ({"npu_mem": {"mem_size": 1, "mem_bw": 1, "mem_latency": 0, "mem_util": 1.1}}, "npu_mem.mem_util"),
        ({"enable_prefix_caching": "no"}, "enable_prefix_caching: must be true or false; found 'no'"),
        ({"max_num_sequences": 5}, "max_num_sequences: unknown field"),
        ({"max_num_seqs": 4096}, "max_num_batched_tokens (2048) is less than max_num_seqs (4096)"),
    ],
)
def test_wrong_instances(repo: Repo, fields: dict[str, Any], words: str) -> None:
    assert words in refusal(repo, **fields)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_nodes": 2}, "num_nodes: is wrong; found 2; allowed: 1, the length of nodes"),
        ({"num_nodes": None}, "num_nodes: is missing"),
        ({"nodes": []}, "nodes: must be a list with at least one entry"),
        ({"nodes": [5]}, "nodes[0]: must be a mapping"),
        ({"link_bw": 0}, "link_bw: must be more than 0"),
        ({"link_bw": "16"}, "link_bw: must be a number"),
        ({"link_bw": [16, 16]}, "link_bw: has the wrong length"),
        ({"link_latency": -1}, "link_latency: must be a number of at least 0"),
        ({"cxl_mem": {"mem_size": 1}}, "cannot be imported: cxl_mem"),
        ({"link_speed": 1}, "link_speed: unknown field"),
    ],
)
def test_wrong_cluster_files(repo: Repo, change: dict[str, Any], words: str) -> None:
    write_json(repo.cluster, cluster() | change)
    assert words in refusal(repo)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": ' * 5000, "\0", '{"num_nodes": NaN}'])
def test_files_that_are_no_cluster_files(repo: Repo, text: str) -> None:
    repo.cluster.write_text(text)
    assert str(repo.cluster) in refusal(repo)


def test_links_that_differ_inside_a_node(repo: Repo) -> None:
    two = cluster(tp_size=2, pp_size=2)
    write_json(repo.cluster, two | {"link_bw": [16, 8]})
    words = "link_bw: cannot be imported: links that differ between the dimensions inside a node; found [16"
    assert words in refusal(repo)
    write_json(repo.cluster, two | {"link_latency": [5, 6]})
    assert "link_latency: cannot be imported" in refusal(repo)
    group = cluster([instance(dp_group="A", tp_size=2)] * 2)
    write_json(repo.cluster, group | {"link_bw": [16, 8]})
    assert "link_bw: cannot be imported" in refusal(repo)


# ---- recorded runs ----


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ({"engine_kwargs": {"tensor_parallel_size": 2}}, "tp_size: is not what the run in"),
        ({"engine_kwargs": {"data_parallel_size": 2}}, "dp_group: is not what the run in"),
        ({"engine_kwargs": {"data_parallel_size": 2}}, "(members of the data-parallel group); found 1; allowed: 2"),
        ({"engine_kwargs": {"speculative_config": {}}}, "engine_kwargs.speculative_config"),
        ({"engine_kwargs": {"max_num_seqs": "many"}}, "engine_kwargs.max_num_seqs: must be a whole number"),
        ({"model": "org/other"}, "model_name: is not what the run in"),
        ({"vllm_version": "0.1"}, "vllm_version: is older than"),
        ({"vllm_version": "new"}, "vllm_version: not a version"),
        ({"kv_cache": {"num_gpu_blocks": 1.5}}, "kv_cache.num_gpu_blocks: must be a whole number"),
        ({"dataset_path": None}, "dataset_path: names no workload"),
        ({"dataset_path": "gone.jsonl"}, "dataset_path: no such workload"),
        ({"num_requests": 4}, "bench-3: lacks the moment"),
        ({"num_requests": 2}, "bench-2: more requests than meta.json says (2)"),
    ],
)
def test_runs_that_do_not_fit(repo: Repo, meta: dict[str, Any], words: str) -> None:
    assert words in refusal(repo, "", bench=repo.record(meta))


def test_a_run_is_of_one_engine(repo: Repo) -> None:
    write_json(repo.cluster, cluster([instance(), instance()]))
    words = "describes 2 engines, but the run in"
    assert words in refusal(repo, "", bench=repo.record())


def test_expert_parallelism_other_than_the_runs(repo: Repo) -> None:
    bench = repo.record({"engine_kwargs": {"model": "org/mixture", "tensor_parallel_size": 2}})
    words = "ep_size: is not what the run in"
    assert words in refusal(repo, "", bench=bench, model_name="org/mixture", tp_size=2, ep_size=2)


def test_flags_and_fields_that_contradict_the_run(repo: Repo) -> None:
    bench = repo.record()
    assert "--max-num-seqs: is not what the run" in refusal(repo, "--max-num-seqs 32", bench=bench)
    assert "instances[0].max_num_seqs: is not what the run" in refusal(repo, "", bench=bench, max_num_seqs=32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"output_toks": 6}, "bench-1: lengths differ from row 1"),
        ({"queued_ts": None}, "bench-1: lacks the moment"),
        ({"queued_ts": "soon"}, "line 2.queued_ts: must be a number"),
        ({"request_id": "bench-0"}, "line 2: occurs twice; found 'bench-0'"),
        ({"request_id": "1"}, "line 2: wrong request_id; found '1'"),
        ({"request_id": "bench-3"}, "bench-1: lacks the moment"),
    ],
)
def test_requests_that_are_not_those_of_the_workload(repo: Repo, change: dict[str, Any], words: str) -> None:
    rows = recorded()
    rows[1] |= change
    assert words in refusal(repo, "", bench=repo.record(rows=rows))


def test_a_workload_shorter_than_the_run(repo: Repo) -> None:
    rows = [*recorded(), {"request_id": "bench-3", "input_toks": 1, "output_toks": 1, "queued_ts": 600}]
    assert "bench-3: " in refusal(repo, "", bench=repo.record(rows=rows))


def test_folders_that_hold_no_run(repo: Repo, tmp_path: Path) -> None:
    assert "meta.json: no such file" in refusal(repo, "", bench=tmp_path)
    bench = repo.record()
    (bench / "requests.jsonl").write_text("{")
    assert "line 1: not JSON" in refusal(repo, "", bench=bench)
    (bench / "requests.jsonl").unlink()
    assert "requests.jsonl: no such file" in refusal(repo, "", bench=bench)
