"""The command-line flags of LLMServingSim 2.0 and the options among them that an instance may override.

Names, defaults and choices are facts read from `serving/__main__.py` of https://github.com/casys-kaist/LLMServingSim.
"""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from servetwin.catalog.fields import count, one_of
from servetwin.errors import InputError, nearest

WHERE = "--flags"


def whole(value: object) -> int:
    """A whole number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InputError("must be a whole number of at least 0", found=value)
    return value


def number(value: object) -> float:
    """A finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise InputError("must be a number of at least 0", found=value)
    return float(value)


def share(value: object) -> float:
    """A number above 0, at most 1."""
    if not 0 < (result := number(value)) <= 1:
        raise InputError("must be a number above 0 and at most 1", found=value)
    return result


def switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise InputError("must be true or false", found=value)
    return value


def dtype(value: object) -> str:
    return one_of(value, ("float16", "bfloat16", "float32", "fp8", "int8"))


def kv_dtype(value: object) -> str:
    return one_of(value, ("auto", "fp8"))


ENGINE: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "max_num_seqs": (count, 128),
    "max_num_batched_tokens": (whole, 2048),
    "long_prefill_token_threshold": (whole, 0),
    "block_size": (count, 16),
    "dtype": (dtype, None),
    "kv_cache_dtype": (kv_dtype, "auto"),
    "enable_chunked_prefill": (switch, True),
    "enable_prefix_caching": (switch, True),
    "reserve_full_isl": (switch, True),
}
"""Options of an engine, as flags and as fields of an instance: how each is read, and its default. A dtype of None is
the model's; max_num_batched_tokens 0 is the model's longest sequence."""
MEMORY_SHARE = "npu_memory_utilization"
"""The one option with two names: in an instance it is `npu_mem.mem_util`. Default 0.9."""
REFUSED_SWITCHES = ("enable_local_offloading", "enable_attn_offloading", "enable_sub_batch_interleaving")
"""Features that a flag or a field of an instance turns on and that cannot be imported."""

_TYPES = {"max_num_seqs": int, "max_num_batched_tokens": int, "long_prefill_token_threshold": int, "block_size": int}
_OUTPUT_ONLY = ("output", "run_id", "inputs_root", "cleanup_inputs", "log_interval", "log_level", "enable_block_copy")
_REFUSED_VALUES = {
    "enable_prefix_sharing": (True,),
    "prefix_storage": ("CPU", "CXL"),
    "request_routing_policy": ("CUSTOM",),
    "expert_routing_policy": ("CUSTOM",),
    "skip_prefill": (True,),
    "network_backend": ("ns3",),
    **dict.fromkeys(REFUSED_SWITCHES, (True,)),
}


@dataclass(frozen=True)
class Flags:
    """The flags that were given."""

    engine: dict[str, Any] = field(default_factory=dict)
    """options of `ENGINE` and `MEMORY_SHARE`"""
    dataset: str | None = None
    requests: int = 0
    """rows of the data set to replay; 0 = all"""
    routing: str = "LOAD"
    expert_routing: str = "BALANCED"
    cluster_config: str | None = None
    unused: tuple[str, ...] = ()
    """flags that only concern that program's own output"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, exit_on_error=False, argument_default=argparse.SUPPRESS
    )

    def add(name: str, **how: Any) -> None:
        parser.add_argument("--" + name.replace("_", "-"), **how)

    for name in ("cluster_config", "dataset", "output", "run_id", "inputs_root", "dtype", "kv_cache_dtype"):
        add(name)
    for name in (*_TYPES, "num_reqs"):
        add(name, type=int)
    for name in (MEMORY_SHARE, "log_interval"):
        add(name, type=float)
    for name in ("enable_chunked_prefill", "enable_prefix_caching", "reserve_full_isl"):
        add(name, action=argparse.BooleanOptionalAction)
    for name in ("enable_block_copy", "cleanup_inputs"):
        add(name, action=argparse.BooleanOptionalAction)
    for name in ("enable_prefix_sharing", *REFUSED_SWITCHES, "skip_prefill"):
        add(name, action="store_true")
    add("request_routing_policy", choices=("LOAD", "RR", "RAND", "CUSTOM"))
    add("expert_routing_policy", choices=("BALANCED", "RR", "RAND", "CUSTOM"))
    add("prefix_storage", choices=("None", "CPU", "CXL"))
    add("log_level", choices=("WARNING", "INFO", "DEBUG"))
    add("network_backend", choices=("analytical", "ns3"))
    return parser


def read_flags(text: str) -> Flags:
    """The flags in `text`, written as on a command line.

    Raises InputError for an unknown flag, a wrong value, and a feature that cannot be imported, by its name.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise InputError(f"cannot be split into words: {error}", where=WHERE, found=text) from None
    parser = _parser()
    names = [option for action in parser._actions for option in action.option_strings]
    for word in words:
        if word.startswith("--") and word.partition("=")[0] not in names:
            name = word.partition("=")[0]
            message, listed = "unknown flag", ", ".join(names)
            raise InputError(message, where=WHERE, found=name, allowed=listed, hint=nearest(name, names))
    try:
        parsed, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        flag = (error.argument_name or "").partition("/")[0]
        raise InputError(error.message, where=WHERE, field=flag or None) from None
    if rest:
        raise InputError("belongs to no flag", where=WHERE, found=rest[0])
    given = vars(parsed)
    refused = [_shown(name, given[name]) for name, values in _REFUSED_VALUES.items() if given.get(name) in values]
    if refused:
        raise InputError("cannot be imported: " + ", ".join(refused), where=WHERE)
    engine = {}
    for name, (read, _) in {**ENGINE, MEMORY_SHARE: (share, None)}.items():
        if name in given:
            engine[name] = _checked(name, read, given[name])
    return Flags(
        engine=engine,
        dataset=given.get("dataset"),
        requests=_checked("num_reqs", whole, given.get("num_reqs", 0)),
        routing=given.get("request_routing_policy", "LOAD"),
        expert_routing=given.get("expert_routing_policy", "BALANCED"),
        cluster_config=given.get("cluster_config"),
        unused=tuple(_shown(name, given[name]) for name in _OUTPUT_ONLY if name in given),
    )


def _checked(name: str, read: Callable[[Any], Any], value: Any) -> Any:
    try:
        return read(value)
    except InputError as error:
        raise error.at(WHERE, "--" + name.replace("_", "-")) from None


def _shown(name: str, value: object) -> str:
    flag = name.replace("_", "-")
    return f"--no-{flag}" if value is False else f"--{flag}" if value is True else f"--{flag} {value}"
