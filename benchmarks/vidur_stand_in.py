"""Vidur with a plain law of time in place of its profiles, which it would fetch from the network.

    /path/to/vidur/environment/bin/python benchmarks/vidur_stand_in.py OPTIONS OF VIDUR

Its speed is then what can be measured without a network; its latencies mean nothing. The law gives steps of about the
length that an 8B model takes on an H100, so that there are about as many of them: 6.2 ms, 0.0134 ms more for each token
and what it takes to read the KV cache, split evenly over 32 layers (Vidur asks for the time of one).
"""

from __future__ import annotations

from itertools import product
from typing import Any

from vidur.execution_time_predictor.sklearn_execution_time_predictor import SklearnExecutionTimePredictor
from vidur.main import main

LAYERS = 32
STEP_MS, TOKEN_MS, CONTEXT_MS = 6.2 / LAYERS, 0.0134 / LAYERS, 4.9e-5 / LAYERS
OPERATIONS = (
    "attn_pre_proj",
    "attn_post_proj",
    "mlp_up_proj",
    "mlp_down_proj",
    "mlp_act",
    "attn_rope",
    "attn_kv_cache_save",
    "input_layernorm",
    "post_attention_layernorm",
    "add",
)


def law(self: Any) -> dict[str, dict[tuple[int, ...], float]]:
    """Milliseconds of each operation of a layer, by the sizes that Vidur looks up."""
    config = self._config
    tokens = range(1, config.prediction_max_tokens_per_request + 1)
    contexts = range(0, config.prediction_max_tokens_per_request + 1, config.kv_cache_prediction_granularity)
    prefill = product(contexts, range(32, config.prediction_max_prefill_chunk_size + 1, 32))
    decode = product(range(1, config.prediction_max_batch_size + 1), contexts)
    times = {name: {(n,): 0.0 for n in tokens} for name in OPERATIONS}
    times["mlp_up_proj"] = {(n,): STEP_MS + TOKEN_MS * n for n in tokens}
    return times | {
        "attn_prefill": {(context, new): CONTEXT_MS * context for context, new in prefill},
        "attn_decode": {(seqs, context): CONTEXT_MS * seqs * context for seqs, context in decode},
    }


if __name__ == "__main__":
    SklearnExecutionTimePredictor._load_predictions_from_hf = law
    main()
