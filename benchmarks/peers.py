"""How simulators of others are told to run a workload of `speed.py`, for the comparison of speeds.

A peer is installed in an environment of its own; `Peer.executable` says what of it is run. Both are given a dense 8B
model on one H100 and the same numbers of requests and tokens at the same rate. docs/performance.md says what is
comparable and what is not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

Command = Callable[[dict[str, Any], Path], list[str] | None]
"""From a scenario of ours and an empty folder: what to run there; None where the peer cannot express it."""


class Peer(NamedTuple):
    """`executable`: what of its environment is run. `package`: its name there."""

    executable: str
    package: str
    command: Command


def aisimulate(scenario: dict[str, Any], folder: Path) -> list[str] | None:
    """Options of NVIDIA AISimulate's `predict`; its schedulers know Poisson arrivals and a closed loop."""
    workload, pool = scenario["workload"], scenario["pools"][0]
    arrivals = workload.get("arrivals", {})
    if arrivals.get("process") == "poisson":
        load = {"type": "poisson", "requests_per_second": float(arrivals["rate"]), "seed": 0}
    elif arrivals.get("process") == "closed_loop":
        load = {"type": "concurrency", "concurrency": arrivals["concurrency"]}
    else:
        return None
    source = {
        "type": "synthetic",
        "input_tokens": workload["input_tokens"],
        "output_tokens": workload["output_tokens"],
    }
    config = {
        "traffic": {"source": source, "load": load, "stop": {"requests": workload["requests"]}},
        "engine": {
            "model": "meta-llama/Meta-Llama-3.1-8B",  # the id of the configuration that it brings
            "hardware": "h100_sxm",
            "backend": "vllm",
            "workers": {"aggregated": {"parallelism": {"replicas": pool["replicas"]}}},
        },
    }
    file = folder / "aisimulate.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return ["predict", "-c", str(file), "--output-dir", str(folder / "out"), "--format", "json"]


def vidur(scenario: dict[str, Any], folder: Path) -> list[str] | None:
    """Options of Vidur's simulator, with chunked prefill as its Sarathi scheduler does it, and times of our own making
    (see `vidur_stand_in.py`); no plots, which need a browser, and no trace for one."""
    workload, pool = scenario["workload"], scenario["pools"][0]
    arrivals = workload.get("arrivals", {})
    if arrivals.get("process") != "poisson":
        return None
    predictor = "random_forrest_execution_time_predictor_config"
    options = {
        "cluster_config_num_replicas": pool["replicas"],
        "replica_config_model_name": "meta-llama/Llama-3-8B",
        "replica_config_num_pipeline_stages": 1,
        "replica_config_tensor_parallel_size": 1,
        "global_scheduler_config_type": "lor",  # least outstanding requests
        "replica_scheduler_config_type": "sarathi",
        "sarathi_scheduler_config_chunk_size": 2048,
        "sarathi_scheduler_config_batch_size_cap": 256,
        "request_generator_config_type": "synthetic",
        "synthetic_request_generator_config_num_requests": workload["requests"],
        "length_generator_config_type": "fixed",
        "fixed_request_length_generator_config_prefill_tokens": workload["input_tokens"],
        "fixed_request_length_generator_config_decode_tokens": workload["output_tokens"],
        "interval_generator_config_type": "poisson",
        "poisson_request_interval_generator_config_qps": arrivals["rate"],
        "execution_time_predictor_config_type": "random_forrest",
        f"{predictor}_prediction_max_tokens_per_request": 4096,
        f"{predictor}_prediction_max_batch_size": 256,
        f"{predictor}_cache_dir": folder / "cache",
        "metrics_config_output_dir": folder / "out",
    }
    driver = str(Path(__file__).with_name("vidur_stand_in.py"))
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [driver, *given, "--no-metrics_config_store_plots", "--no-metrics_config_enable_chrome_trace"]


PEERS = {
    "aisimulate": Peer("the `aisimulate` command", "aisimulate", aisimulate),
    "vidur": Peer("a Python that has Vidur", "vidur", vidur),
}
