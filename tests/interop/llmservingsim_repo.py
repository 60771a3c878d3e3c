"""Writes a small checkout of LLMServingSim: dense models and two with experts, bundles, a workload, recorded runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from servetwin.interop.llmservingsim import import_cluster
from servetwin.scenario.schema import Scenario

DENSE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 512,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}
EXPERTS = {
    **DENSE,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
NORMED = {**DENSE, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
MIXTURE = {
    **NORMED,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 128,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
MODELS = {"dense": DENSE, "experts": EXPERTS, "normed": NORMED, "mixture": MIXTURE}
LAYERS = ["embedding", "layernorm", "qkv_proj", "rotary_emb", "o_proj", "final_layernorm"]
MLP = ["gate_up_proj", "act_fn", "down_proj"]
ROWS = [(10, 5, 1_000_000, list(range(10))), (20, 7, 3_000_000, list(range(20))), (30, 1, 2_000_000, None)]
"""prompt tokens, output tokens, arrival (ns), token ids"""
QUEUED = [500.25, 500.5, 500.125]


class Repo:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.cluster = root / "cluster.json"
        self.bench = root / "bench"
        self.out = root.parent / "out" / "twin.yaml"
        for name, config in MODELS.items():
            write_json(root / f"configs/model/org/{name}.json", config)
        write_json(self.cluster, cluster())
        self.bundle("dense", "llama")
        lines = []
        for prompt, output, arrival, ids in ROWS:
            row: dict[str, Any] = {"input_toks": prompt, "output_toks": output, "arrival_time_ns": arrival}
            lines.append(row | ({"input_tok_ids": ids} if ids else {}))
        write_lines(root / "workloads/three.jsonl", lines)

    def bundle(
        self,
        model: str,
        architecture: str,
        variant: str = "bf16",
        degrees: tuple[int, ...] = (1, 2),
        hardware: str = "RTX4090",
    ) -> Path:
        """Times at degree t are 1/t of those at 1; norms of queries and keys, and experts, where such models have them,
        with skewed shots as that project's profiler makes them."""
        place = self.root / "profiler/perf" / hardware / "org" / model / variant
        place.mkdir(parents=True)
        (place / "meta.yaml").write_text(
            f"profiler_version: 1.0.0\nvllm_version: 0.19.0\nhardware: {hardware}\narchitecture: {architecture}\n"
            f"model: org/{model}\nvariant: {variant}\n"
        )
        experts, normed = architecture in ("mixtral", "qwen3_moe"), architecture.startswith("qwen3")
        layers = LAYERS + ["qk_norm"] * normed + ([] if experts else MLP)
        for degree in degrees:
            part = place / f"tp{degree}"
            part.mkdir()
            dense = [f"{layer},{tokens},{2 + tokens / 8 / degree}" for layer in layers for tokens in (1, 16, 256, 2048)]
            (part / "dense.csv").write_text("\n".join(["layer,tokens,time_us", *dense]))
            heads = [f"{layer},{n},{(10 + n) / degree}" for layer in ("lm_head", "sampler") for n in (1, 16, 256)]
            (part / "per_sequence.csv").write_text("\n".join(["layer,sequences,time_us", *heads]))
            calls = [f"{chunk},0,0,0,{5 + chunk / degree}" for chunk in (16, 256)]
            calls += [f"0,0,{n},{kv},{5 + n * kv / 100 / degree}" for n in (1, 16) for kv in (16, 256)]
            calls += [f"{c},0,1,{kv},{6 + (c + kv / 100) / degree}" for c in (16, 256) for kv in (16, 256)]
            columns = "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us"
            (part / "attention.csv").write_text("\n".join([columns, *calls]))
            if normed:
                shots = [
                    f"{'mixed' if chunk else 'pure'},{n},1,,4.0,{chunk},0,{kv},{4 * kv},{kv + 3 * kv // n},{t},{2 * t},"
                    f"{1.3 * t},0.3"
                    for chunk in (0, 16, 256)
                    for n in (2, 8, 16)
                    for kv in (16, 64)
                    for t in (5 + chunk + n * kv / 50 / degree,)
                ]
                columns = "regime,n,nb,ratio,skew,pc,kp,kvs,kv_big,kv_mean,t_mean_us,t_max_us,t_skew_us,alpha"
                (part / "skew.csv").write_text("\n".join([columns, *shots]))
            if experts and degree == 1:  # whole experts alone are measured
                rows = [f"{n},{hit},{1 + hit + n / 16}" for n in (1, 16, 256) for hit in (2, 4, 8) if hit <= 2 * n]
                (part / "moe.csv").write_text("\n".join(["tokens,activated_experts,time_us", *rows]))
        return place

    def record(self, meta: dict[str, Any] | None = None, rows: list[dict[str, Any]] | None = None) -> Path:
        """A recorded run of the three requests; `meta` and `rows` replace parts of it."""
        kwargs = {"model": "org/dense", "tensor_parallel_size": 1, "max_num_seqs": 64, "max_model_len": None, "seed": 1}
        whole = {
            "model": (meta or {}).get("engine_kwargs", {}).get("model", "org/dense"),
            "vllm_version": "0.19.0",
            "engine_kwargs": kwargs | (meta or {}).get("engine_kwargs", {}),
            "dataset_path": "workloads/three.jsonl",
        }
        write_json(self.bench / "meta.json", whole | {k: v for k, v in (meta or {}).items() if k != "engine_kwargs"})
        write_lines(self.bench / "requests.jsonl", recorded() if rows is None else rows)
        return self.bench

    def load(
        self,
        flags: str = "--dataset workloads/three.jsonl",
        *,
        workload: Path | None = None,
        bench: Path | None = None,
        **fields: Any,
    ) -> Scenario:
        """Import the cluster file, whose only instance has `fields` too."""
        if fields:
            write_json(self.cluster, cluster(**fields))
        return import_cluster(self.cluster, self.root, workload, bench, flags, self.out)


def instance(**fields: Any) -> dict[str, Any]:
    """An instance of a cluster; None takes a field out."""
    whole = {
        "model_name": "org/dense",
        "hardware": "RTX4090",
        "npu_mem": {"mem_size": 24, "mem_bw": 1008, "mem_latency": 0},
        "pd_type": None,
        "tp_size": 1,
    } | fields
    return {name: value for name, value in whole.items() if value is not None}


def cluster(*nodes: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """A cluster of nodes with these instances; without any, of one instance with `fields`."""
    nodes = nodes or ([instance(**fields)],)
    host = {"mem_size": 64, "mem_bw": 50, "mem_latency": 0}
    return {
        "num_nodes": len(nodes),
        "link_bw": 16,
        "link_latency": 20000,
        "nodes": [{"num_instances": len(found), "cpu_mem": host, "instances": found} for found in nodes],
    }


def recorded() -> list[dict[str, Any]]:
    return [
        {"request_id": f"bench-{i}", "input_toks": row[0], "output_toks": row[1], "queued_ts": queued}
        for i, (row, queued) in enumerate(zip(ROWS, QUEUED, strict=True))
    ]


def write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def head(repo: Repo) -> str:
    return repo.out.read_text().split("\nname:")[0]
