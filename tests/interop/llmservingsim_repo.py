"""Writes a small checkout of LLMServingSim: one dense model, one with experts, bundles, a workload, a recorded run."""

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
        write_json(root / "configs/model/org/dense.json", DENSE)
        write_json(root / "configs/model/org/experts.json", EXPERTS)
        write_json(self.cluster, cluster())
        self.bundle("dense", "llama")
        lines = []
        for prompt, output, arrival, ids in ROWS:
            row: dict[str, Any] = {"input_toks": prompt, "output_toks": output, "arrival_time_ns": arrival}
            lines.append(row | ({"input_tok_ids": ids} if ids else {}))
        write_lines(root / "workloads/three.jsonl", lines)

    def bundle(self, model: str, architecture: str, variant: str = "bf16", degrees: tuple[int, ...] = (1, 2)) -> Path:
        place = self.root / "profiler/perf/RTX4090/org" / model / variant
        place.mkdir(parents=True)
        (place / "meta.yaml").write_text(
            f"profiler_version: 1.0.0\nvllm_version: 0.19.0\nhardware: RTX4090\narchitecture: {architecture}\n"
            f"model: org/{model}\nvariant: {variant}\n"
        )
        for degree in degrees:
            part = place / f"tp{degree}"
            part.mkdir()
            layers = LAYERS if architecture == "mixtral" else LAYERS + MLP
            dense = [f"{layer},{tokens},{2 + tokens / 8}" for layer in layers for tokens in (1, 16, 256, 2048)]
            (part / "dense.csv").write_text("\n".join(["layer,tokens,time_us", *dense]))
            heads = [f"{layer},{n},{10 + n}" for layer in ("lm_head", "sampler") for n in (1, 16, 256)]
            (part / "per_sequence.csv").write_text("\n".join(["layer,sequences,time_us", *heads]))
            calls = [f"{chunk},0,0,0,{5 + chunk}" for chunk in (16, 256)]
            calls += [f"0,0,{n},{kv},{5 + n * kv / 100}" for n in (1, 16) for kv in (16, 256)]
            calls += [f"{chunk},0,1,{kv},{6 + chunk + kv / 100}" for chunk in (16, 256) for kv in (16, 256)]
            columns = "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us"
            (part / "attention.csv").write_text("\n".join([columns, *calls]))
            if architecture == "mixtral":
                (part / "moe.csv").write_text("tokens,activated_experts,time_us\n1,2,3\n16,4,9\n256,4,20\n")
        return place

    def record(self, meta: dict[str, Any] | None = None, rows: list[dict[str, Any]] | None = None) -> Path:
        """A recorded run of the three requests; `meta` and `rows` replace parts of it."""
        kwargs = {"model": "org/dense", "tensor_parallel_size": 1, "max_num_seqs": 64, "max_model_len": None, "seed": 1}
        whole = {
            "model": "org/dense",
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


def cluster(**fields: Any) -> dict[str, Any]:
    """A cluster of one instance; `fields` are of the instance. None takes a field out."""
    instance = {
        "model_name": "org/dense",
        "hardware": "RTX4090",
        "npu_mem": {"mem_size": 24, "mem_bw": 1008, "mem_latency": 0},
        "pd_type": None,
        "tp_size": 1,
    } | fields
    return {
        "num_nodes": 1,
        "link_bw": 16,
        "link_latency": 20000,
        "nodes": [
            {
                "num_instances": 1,
                "cpu_mem": {"mem_size": 64, "mem_bw": 50, "mem_latency": 0},
                "instances": [{name: value for name, value in instance.items() if value is not None}],
            }
        ],
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
