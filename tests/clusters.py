"""Random scenarios of whole clusters, for properties and for the fuzz."""

from __future__ import annotations

from random import Random
from typing import Any

DENSE = ("meta-llama/Llama-3.1-8B", "Qwen/Qwen3-32B", "google/gemma-3-27b-it")
SPARSE = ("Qwen/Qwen3-30B-A3B", "mistralai/Mixtral-8x7B-v0.1", "openai/gpt-oss-120b")
DEVICES = ("h100_sxm", "h200_sxm", "l40s", "mi300x", "rtx_pro_6000")
POLICIES = (
    "round_robin",
    "random",
    "least_loaded",
    "llmservingsim_load",
    "vllm_dp",
    "join_shortest_queue",
    "least_kv_usage",
    "power_of_two",
    "session_affinity",
    "prefix_aware",
    "consistent_hash",
    "weighted",
)
MAX_MODEL_LEN = 640


def random_scenario(random: Random) -> dict[str, Any]:
    """A scenario as a file would have it. Small enough to end in a moment; KV caches are often much too small, prompts
    now and then too long, clients impatient."""
    models = random.sample(DENSE + SPARSE, random.choice([1, 1, 1, 2]))
    pools = [_pool(random, models[i % len(models)]) for i in range(max(len(models), random.choice([1, 1, 2, 3])))]
    scenario: dict[str, Any] = {
        "model": models[0],
        "workload": _workload(random, models),
        "pools": pools,
        "routing": _routing(random),
        "timing": _timing(random),
        "seed": random.randrange(2**31),
    }
    if random.random() < 0.4:
        kinds = sorted({pool["device"] for pool in pools})
        scenario["nodes"] = [{"count": 16, "devices": dict.fromkeys(kinds, 8)}]
        if random.random() < 0.5:
            scenario["network"] = _network(random)
    return scenario


def _pool(random: Random, model: str) -> dict[str, Any]:
    parallelism: dict[str, int] = {
        "tensor": random.choice([1, 1, 2, 4]),
        "pipeline": random.choice([1, 1, 1, 2, 3]),
        "data": random.choice([1, 1, 2, 3]),
    }
    if model in SPARSE and random.random() < 0.6:
        devices = parallelism["tensor"] * parallelism["data"]
        parallelism["expert"] = devices if devices in (1, 2, 4, 8) else 1
    pool: dict[str, Any] = {
        "model": model,
        "device": random.choice(DEVICES),
        "replicas": random.choice([1, 1, 2, 4]),
        "parallelism": parallelism,
        "engine": _engine(random),
    }
    if model in SPARSE and random.random() < 0.4:
        routing = random.choice([{"routing": "random"}, {"routing": "zipf", "exponent": 1.2}])
        pool["experts"] = routing | random.choice([{}, {"redundant_experts": 8, "rebalance_interval": 50}])
        if parallelism.get("expert", 1) == 1:
            pool["experts"] = routing
    return pool


def _engine(random: Random) -> dict[str, Any]:
    seqs = random.choice([1, 2, 4, 16])
    engine: dict[str, Any] = {
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": seqs,
        "max_num_batched_tokens": max(seqs, random.choice([16, 64, 256, 2048])),
        "num_gpu_blocks_override": random.choice([3, 12, 45, 90, 400, 4000]),
        "async_scheduling": random.random() < 0.6,
        "enable_prefix_caching": random.random() < 0.6,
        "scheduling_policy": random.choice(["fcfs", "fcfs", "priority"]),
        "watermark": random.choice([0.0, 0.0, 0.05]),
        "scheduler_reserve_full_isl": random.random() < 0.7,
        "prefill_schedule_interval": random.choice([1, 1, 1, 4]),
        "long_prefill_token_threshold": random.choice([0, 0, 32]),
        "enforce_eager": random.random() < 0.2,
    }
    if random.random() < 0.2:
        engine |= {"num_speculative_tokens": random.choice([1, 3]), "spec_acceptance_rate": random.random()}
    return engine


def _lengths(random: Random, most: int) -> Any:
    high = random.randint(2, most)
    return random.choice(
        [
            random.randint(1, most),
            {"distribution": "uniform", "min": 1, "max": high},
            {"distribution": "lognormal", "median": high / 2, "sigma": 0.8, "min": 1, "max": most},
        ]
    )


def _workload(random: Random, models: list[str]) -> dict[str, Any]:
    workload = _arrivals(random)
    if random.random() < 0.25:
        workload |= {"sessions": random.choice([1, 6]), "turns": random.choice([1, 4])}
        workload |= {"first_input_tokens": random.choice([1, 150]), "tool_time": random.choice(["0s", "30ms"])}
        workload |= {"input_tokens": random.choice([1, 30]), "output_tokens": random.choice([1, 25])}
        if random.random() < 0.4:
            branch = {"width": 2, "input_tokens": 5, "output_tokens": 9, "join": random.random() < 0.7}
            workload["fan_out"] = branch
    else:
        workload |= {
            "requests": random.choice([1, 8, 40]),
            "input_tokens": _lengths(random, 700),
            "output_tokens": _lengths(random, 150),
        }
        if random.random() < 0.2:
            workload["patience"] = random.choice(["5ms", "300ms"])
        if random.random() < 0.4:
            workload["prefixes"] = {"groups": random.choice([1, 3]), "tokens": random.choice([16, 100])}
    if random.random() < 0.3:
        workload["priorities"] = [1, 2, 1]
    if len(models) > 1:
        workload["models"] = {model: random.choice([1, 2]) for model in models}
    return workload


def _arrivals(random: Random) -> dict[str, Any]:
    process = random.choice(["poisson", "gamma", "constant", "all_at_once", "closed_loop"])
    arrivals: dict[str, Any] = {"process": process}
    if process == "closed_loop":
        arrivals["concurrency"] = random.choice([1, 4, 32])
    elif process != "all_at_once":
        arrivals["rate"] = random.choice([2, 20, 200])
    return {"arrivals": arrivals, "output_ends": random.choice(["length", "stop"])}


def _routing(random: Random) -> dict[str, Any]:
    routing: dict[str, Any] = {"policy": random.choice(POLICIES)}
    if routing["policy"] == "weighted":
        routing["scorers"] = {"queue": 1, "kv_usage": 2, "prefix": random.choice([0, 3]), "session": 1}
    if random.random() < 0.3:
        routing["refresh"] = random.choice(["10ms", "1s"])
    if random.random() < 0.2:
        routing["max_waiting"] = random.choice([1, 5])
    if random.random() < 0.2:
        routing |= {"max_in_flight": random.choice([1, 6]), "when_full": random.choice(["queue", "reject"])}
    if random.random() < 0.2:
        routing["queue_timeout"] = random.choice(["50ms", "5s"])
    return routing


def _timing(random: Random) -> dict[str, Any]:
    if random.random() < 0.3:
        return {"source": random.choice(["auto", "roofline"])}
    return {
        "source": "linear",
        "base_ns": random.choice([1, 1_000_000, 20_000_000]),
        "per_prefill_token_ns": 20_000,
        "per_decode_seq_ns": 50_000,
        "per_context_token_ns": random.choice([0, 10]),
    }


def _network(random: Random) -> dict[str, Any]:
    inside = random.choice(["full_mesh", "switch", "pcie_tree", "ring"])
    between = random.choice(["switch", "fat_tree", "rail_fat_tree"])
    return {
        "inside": {"kind": inside, "link": "nvlink4"},
        "between": {"kind": between, "link": "infiniband_ndr"},
        "collectives": random.choice(["auto", "ring", "tree", "hierarchical", "one_shot", "llmservingsim"]),
    }
