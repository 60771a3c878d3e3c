"""A small bundle in LLMServingSim's layout, with times from simple formulas, for tests without the measurement data."""

from __future__ import annotations

import csv
from pathlib import Path

CHUNKS = (0, 16, 64, 256, 1024)
HISTORIES = (0, 256, 1024, 4096)
DECODES = (0, 1, 2, 4, 8, 16, 32)
CONTEXTS = (16, 64, 256, 1024, 4096)
TOKENS = (*range(1, 16), *range(16, 64, 4), *range(64, 1025, 16))
SEQUENCES = (*range(1, 16), *range(16, 33, 4))


def attention_us(chunk: int, history: float, decodes: int, context: float) -> float:
    """5 µs for the launch, 50 ns for 1000 query-key pairs of the prefill, 10 ns for each context token of a decode."""
    return 5 + 5e-5 * chunk * (history + (chunk + 1) / 2) + 0.01 * decodes * context


def dense_us(layer: str, tokens: int) -> float:
    weight = {"layernorm": 0.1, "final_layernorm": 0.1, "embedding": 0.2, "gate_up_proj": 4.0}.get(layer, 1.0)
    return 2 + weight * (10 + tokens / 8)


ATTENTION_HALF = ["embedding", "layernorm", "qkv_proj", "rotary_emb", "o_proj", "final_layernorm"]
LAYERS = {
    "llama": [*ATTENTION_HALF, "gate_up_proj", "act_fn", "down_proj"],
    "qwen3_moe": [*ATTENTION_HALF, "qk_norm"],
}


def write_bundle(folder: Path, architecture: str = "llama", degrees: tuple[int, ...] = (1,)) -> Path:
    """`folder/tiny/org/model/bf16`; at degree t the times are 1/t of those at 1. (chunk > 0, 32 decodes) is missing."""
    place = folder / "tiny" / "org" / "model" / "bf16"
    place.mkdir(parents=True)
    (place / "meta.yaml").write_text(
        f"profiler_version: 1.0.0\nvllm_version: 0.19.0\nhardware: tiny\narchitecture: {architecture}\n"
        "model: org/model\nvariant: bf16\ntp_degrees: [1, 2]\n",
        encoding="utf-8",
    )
    for tensor in degrees:
        part = place / f"tp{tensor}"
        part.mkdir()
        dense = [(layer, x, dense_us(layer, x) / tensor) for layer in LAYERS[architecture] for x in TOKENS]
        _write(part / "dense.csv", "layer,tokens,time_us", dense)
        heads = [(layer, x, (100 + x) / tensor) for layer in ("lm_head", "sampler") for x in SEQUENCES]
        _write(part / "per_sequence.csv", "layer,sequences,time_us", heads)
        columns = "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us"
        _write(part / "attention.csv", columns, [(*key, attention_us(*key) / tensor) for key in grid()])
        columns = "regime,n,nb,ratio,skew,pc,kp,kvs,kv_big,kv_mean,t_mean_us,t_max_us,t_skew_us,alpha"
        _write(part / "skew.csv", columns, skew_shots())
    if architecture == "qwen3_moe":
        moe = [
            (tokens, hit, 10 + hit + tokens / 4)
            for tokens in (1, 4, 16, 64, 256, 1024)
            for hit in (2, 4, 8, 16)
            if hit <= min(16, 2 * tokens)
        ]
        _write(place / "tp1" / "moe.csv", "tokens,activated_experts,time_us", moe)
    return place


def grid() -> list[tuple[int, int, int, int]]:
    return [
        (chunk, history, decodes, context)
        for chunk in CHUNKS
        for history in (HISTORIES if chunk else (0,))
        for decodes in DECODES
        for context in (CONTEXTS if decodes else (0,))
        if (chunk or decodes) and not (chunk and decodes == DECODES[-1])
    ]


def skew_shots() -> list[tuple[object, ...]]:
    """A third of the way from the mean to the longest context's time, on a scale three times that of the grid."""
    shots: list[tuple[object, ...]] = []
    for chunk in (0, 16, 256):
        for n in (2, 8, 16):
            for short in (64, 256, 1024):
                mean = short + 3 * short // n
                t_mean = 3 * attention_us(chunk, 0, n, mean)
                t_max = 3 * attention_us(chunk, 0, n, 4 * short)
                t_skew = t_mean + (t_max - t_mean) / 3
                kind = "mixed" if chunk else "pure"
                shots.append((kind, n, 1, "", 4.0, chunk, 0, short, 4 * short, mean, t_mean, t_max, t_skew, 0.33))
    return shots


def _write(path: Path, columns: str, rows: list[tuple[object, ...]] | list[tuple[int, int, float]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns.split(","))
        writer.writerows(rows)
