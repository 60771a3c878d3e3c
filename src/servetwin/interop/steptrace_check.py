"""What the header and the requests of a step trace may say."""

from __future__ import annotations

from typing import Any

from servetwin.errors import InputError, nearest

_LEAST = {
    "num_blocks": 2,  # one is the null block
    "budget": 1,
    "max_seqs": 1,
    "max_model_len": 2,
    "block_size": 1,
    "window": 1,
    "pp": 1,
    "num_spec": 0,
    "long_prefill_token_threshold": 0,
    "max_num_active_seqs": 1,
    "prefill_schedule_interval": 1,
}
"""options that are whole numbers, and the smallest value of each"""
_FLAGS = (
    "prefix",
    "chunked",
    "async",
    "long_prefill_token_threshold_adaptive",
    "adaptive_long_prefill_threshold",
    "scheduler_reserve_full_isl",
)
_CHOICES = {
    "attn": ("full", "swa", "hybrid"),
    "kv_role": ("kv_consumer", "kv_producer", "kv_both"),
    "scheduling_policy": ("fcfs", "priority"),
    "policy": ("fcfs", "priority"),
}
_KNOWN = (*_LEAST, *_FLAGS, *_CHOICES, "watermark")
_LAW = ("base", "per_prefill_token", "per_decode_seq", "per_context_token")


def _whole(value: object, least: int, field: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError("wrong value", field=field, found=value, allowed=f"a whole number, at least {least}")


def _mapping(header: dict[str, Any], key: str) -> dict[str, Any]:
    found = header.get(key, {})
    if not isinstance(found, dict):
        raise InputError("wrong value", field=f"header.{key}", found=found, allowed="a JSON object")
    return found


def check_header(header: dict[str, Any]) -> None:
    """Raises InputError when an option, the law or the version cannot be understood."""
    config = _mapping(header, "config")
    for key, value in config.items():
        field = f"header.config.{key}"
        if key in _LEAST:
            _whole(value, _LEAST[key], field)
        elif key in _FLAGS:
            if not isinstance(value, bool):
                raise InputError("wrong value", field=field, found=value, allowed="true or false")
        elif key in _CHOICES:
            if value not in _CHOICES[key]:
                raise InputError("wrong value", field=field, found=value, allowed=", ".join(_CHOICES[key]))
        elif key == "watermark":
            if not isinstance(value, int | float) or not 0 <= value < 1:
                raise InputError("wrong value", field=field, found=value, allowed="a number from 0, below 1")
        else:
            raise InputError("unknown engine option", field=field, hint=nearest(key, _KNOWN))
    for key in ("num_blocks", "budget", "max_seqs", *(("window",) if config.get("attn", "full") != "full" else ())):
        if key not in config:
            raise InputError(f"no {key!r}", field="header.config")
    law = _mapping(header, "latency_ns")
    for key in law:
        if key not in _LAW:
            raise InputError("unknown part of the law", field=f"header.latency_ns.{key}", hint=nearest(key, _LAW))
    for key in _LAW:
        # A step of no time would stop the clock.
        _whole(law.get(key, 0), 1 if key == "base" else 0, f"header.latency_ns.{key}")
    version = str(header.get("vllm", "0.33.0"))
    if not all(part.isdecimal() for part in version.split(".")[:2]):
        raise InputError("wrong value", field="header.vllm", found=version, allowed="a version such as 0.33.0")


def check_request(record: dict[str, Any]) -> None:
    """Raises InputError when a request lacks a field, or has one that cannot be."""
    for key in ("r", "at", "prompt", "max_tokens"):
        if key not in record:
            raise InputError(f"request without {key!r}")
    for key, least in (("r", 0), ("at", 0), ("max_tokens", 1), ("stop", 1), ("abort_at", 0)):
        if key in record:
            _whole(record[key], least, key)
    if not isinstance(record.get("prio", 0), int):
        raise InputError("wrong value", field="prio", found=record["prio"], allowed="a whole number")
    prompt = record["prompt"]
    if not isinstance(prompt, list) or not prompt:
        raise InputError("wrong value", field="prompt", found=prompt, allowed="segments [seed, length]")
    for segment in prompt:
        if not isinstance(segment, list | tuple) or len(segment) != 2:
            raise InputError("wrong value", field="prompt", found=segment, allowed="segments [seed, length]")
        _whole(segment[0], 0, "seed of a segment of the prompt")
        _whole(segment[1], 1, "length of a segment of the prompt")
