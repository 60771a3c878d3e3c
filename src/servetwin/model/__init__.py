"""What is computed: a decoder-only transformer as data, its weights, its KV cache and its operators.

arch = architecture_of(json.load(open("config.json")))
parameters(arch).total, kv_bytes_per_token(arch, dtypes_of(arch))
"""

from __future__ import annotations

from servetwin.model.architecture import architecture_of, load_architecture
from servetwin.model.dtypes import DTYPES, Dtype, Dtypes, dtype, dtypes_of
from servetwin.model.kv import KvGroup, kv_bytes_per_token, kv_groups, state_bytes_per_sequence
from servetwin.model.layers import Architecture
from servetwin.model.sharding import Sharding, check_sharding, stages
from servetwin.model.weights import Parameters, parameters, weight_bytes

__all__ = [
    "DTYPES",
    "Architecture",
    "Dtype",
    "Dtypes",
    "KvGroup",
    "Parameters",
    "Sharding",
    "architecture_of",
    "check_sharding",
    "dtype",
    "dtypes_of",
    "kv_bytes_per_token",
    "kv_groups",
    "load_architecture",
    "parameters",
    "stages",
    "state_bytes_per_sequence",
    "weight_bytes",
]
