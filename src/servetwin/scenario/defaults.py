"""The defaults of an engine, as vLLM resolves its own.

They follow vLLM's `get_batch_defaults` and its scheduler configuration (read in 0.32 and 0.33).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from servetwin import catalog
from servetwin.errors import InputError
from servetwin.scenario.schema import EngineOptions

GIB = 1 << 30
LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length")
"""Keys of a config.json that vLLM reads a model's longest sequence from; the least of them counts."""
LENGTH_OF = {"gemma3_text": 131072}
"""What the configuration classes of Hugging Face transformers assume where the file leaves the length out."""
UNKNOWN_LENGTH = 2048
"""What vLLM assumes of a model that states no longest sequence."""
_NO_SCALING = ("default", "su", "longrope", "llama3", "mrope")
"""Rotary scalings whose factor is already part of max_position_embeddings."""


def longest_sequence(config: Mapping[str, Any]) -> int:
    """The longest sequence of a model, tokens, as vLLM derives it from config.json."""
    lengths: list[int] = [config[key] for key in LENGTH_KEYS if isinstance(config.get(key), int)]
    if not lengths:
        return LENGTH_OF.get(str(config.get("model_type")), UNKNOWN_LENGTH)
    longest = min(lengths)
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind in _NO_SCALING or str(config.get("model_type", "")).startswith("gemma3"):
        return longest
    if kind == "yarn":
        longest = scaling.get("original_max_position_embeddings", longest)
    return int(longest * scaling.get("factor", 1))


def resolved_engine(given: EngineOptions, device: str, memory: int, stages: int, model_longest: int) -> EngineOptions:
    """`given` with vLLM's defaults for an API server on `device` with `memory` bytes, in `stages` pipeline stages.

    Raises InputError, its field starting at `engine`, for what vLLM refuses to start with.
    """
    version = catalog.engine(given.version).id if given.version else newest_engine()
    release = _release(version)
    longest = _max_model_len(given.max_model_len, model_longest)
    chunked = given.enable_chunked_prefill is not False
    tokens, seqs = _batch_limits(given, device, memory, longest, chunked)
    _check_batch(given, tokens, seqs, longest, chunked)
    speculative = given.num_speculative_tokens or 0
    if speculative and given.spec_acceptance_rate is None:
        message = "missing: num_speculative_tokens needs it"
        raise InputError(message, field="engine.spec_acceptance_rate", allowed="a number from 0 to 1")
    defaults = {
        "version": version,
        "max_model_len": longest,
        "max_num_seqs": seqs,
        "max_num_batched_tokens": tokens,
        "max_num_active_seqs": seqs,
        "block_size": 16,
        "gpu_memory_utilization": 0.92 if release >= (0, 32) else 0.9,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "long_prefill_token_threshold": 0,
        "long_prefill_token_threshold_adaptive": False,
        "scheduling_policy": "fcfs",
        "async_scheduling": stages == 1,
        "watermark": 0.0,
        "scheduler_reserve_full_isl": True,
        "prefill_schedule_interval": 1,
        "num_speculative_tokens": 0,
        "enforce_eager": False,
    }
    unset = {name: value for name, value in defaults.items() if getattr(given, name) is None}
    return given.model_copy(update={**unset, "version": version})


def newest_engine() -> str:
    """The newest engine version of the catalogue."""
    return max(catalog.names("engines"), key=_release)


def _release(version: str) -> tuple[int, ...]:
    """(0, 33) of `vllm-0.33`: versions compare as numbers, not as texts."""
    return tuple(int(part) for part in re.findall(r"[0-9]+", version.rpartition("-")[2]))


def _max_model_len(given: int | None, model_longest: int) -> int:
    if given is not None and given > model_longest:
        message = "is more than the model's longest sequence"
        raise InputError(message, field="engine.max_model_len", found=given, allowed=f"at most {model_longest}")
    return given or model_longest


def _batch_limits(given: EngineOptions, device: str, memory: int, longest: int, chunked: bool) -> tuple[int, int]:
    """max_num_batched_tokens and max_num_seqs: what is given, else vLLM's defaults by device memory."""
    tokens, seqs = 2048, 256
    if memory >= 70 * GIB and not device.startswith(("a100", "gb10")):
        tokens, seqs = (16384 if memory >= 160 * GIB else 8192), 1024
    if given.max_num_batched_tokens is not None:
        tokens = given.max_num_batched_tokens
    else:
        if not chunked:  # a prompt must then fit in one step
            tokens = max(tokens, longest)
        tokens = min(tokens, (given.max_num_seqs or seqs) * longest)
    return tokens, given.max_num_seqs or min(seqs, tokens)


def _check_batch(given: EngineOptions, tokens: int, seqs: int, longest: int, chunked: bool) -> None:
    """What vLLM refuses to start with."""
    field, found = "engine.max_num_batched_tokens", given.max_num_batched_tokens
    if found is None:
        field, found = "engine.max_num_seqs", given.max_num_seqs
    if tokens < seqs:
        message = f"max_num_batched_tokens ({tokens}) is less than max_num_seqs ({seqs})"
        raise InputError(message, field=field, found=found, allowed="a token at least for each request of a step")
    if not chunked and tokens < longest:
        message = f"without chunked prefill a prompt of max_model_len ({longest}) does not fit in one step"
        raise InputError(message, field=field, found=tokens, allowed=f"at least {longest}")
