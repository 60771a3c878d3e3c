"""Number formats of weights, activations and the KV cache, with the scales that go with them.

Effective bits an element, scales included:
- `fp8` one scale a tensor or channel (left out); `fp8_block` one float32 a 128 x 128 block (DeepSeek-V3 report, 3.3.2);
- `int4` one float16 a group of 128 (the usual AWQ and GPTQ group; other groups from the checkpoint);
- `mxfp4` one 8-bit scale a block of 32 (OCP Microscaling Formats v1.0): 4.25;
- `nvfp4` one 8-bit scale a block of 16 (NVIDIA NVFP4): 4.5.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from servetwin.errors import InputError, nearest
from servetwin.model.layers import Architecture


@dataclass(frozen=True, slots=True)
class Dtype:
    name: str
    bits: float
    """effective bits an element, scales included"""
    compute: str
    """the format in which a matrix product over such weights is done ("bf16" where only the weights are small)"""

    def bytes(self, elements: int) -> int:
        """Bytes of `elements` elements, rounded up."""
        return -int(-elements * self.bits // 8)


BF16 = Dtype("bf16", 16, "bf16")
DTYPES: dict[str, Dtype] = {
    d.name: d
    for d in (
        BF16,
        Dtype("fp16", 16, "fp16"),
        Dtype("fp32", 32, "fp32"),
        Dtype("fp8", 8, "fp8"),
        Dtype("fp8_block", 8 + 32 / (128 * 128), "fp8"),
        Dtype("int8", 8, "int8"),
        Dtype("int8_weight", 8, "bf16"),
        Dtype("int4", 4 + 16 / 128, "bf16"),
        Dtype("mxfp4", 4 + 8 / 32, "bf16"),
        Dtype("nvfp4", 4 + 8 / 16, "nvfp4"),
    )
}

_SAME = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float32": "fp32",
    "float": "fp32",
    "fp8_e4m3": "fp8",
    "fp8_e5m2": "fp8",
    "float8_e4m3fn": "fp8",
    "awq": "int4",
    "gptq": "int4",
    "awq_marlin": "int4",
    "gptq_marlin": "int4",
    "modelopt": "fp8",
    "modelopt_fp4": "nvfp4",
    "fp8_per_tensor": "fp8",
}


def dtype(name: str, field: str = "dtype") -> Dtype:
    """The format called `name`, in our spelling or an engine's (`bfloat16`, `fp8_e4m3`, `awq`); else InputError."""
    found = DTYPES.get(_SAME.get(name, name))
    if found is None:
        names = sorted({*DTYPES, *_SAME})
        raise InputError(
            "unknown number format", field=field, found=name, allowed=", ".join(names), hint=nearest(name, names)
        )
    return found


@dataclass(frozen=True, slots=True)
class Dtypes:
    """The format of every part of a model."""

    attention: Dtype = BF16
    """matrices of attention and of linear attention"""
    mlp: Dtype = BF16
    """dense MLPs and shared experts"""
    expert: Dtype = BF16
    """routed experts"""
    embedding: Dtype = BF16
    """embedding table and output projection"""
    kv: Dtype = BF16
    state: Dtype = BF16
    """recurrent states of linear attention"""
    activation: Dtype = BF16
    """activations between operators, norms, biases, routers"""

    def of(self, part: str) -> Dtype:
        """The format of weights of `part`: attention, mlp, expert, embedding, or anything else = unquantised."""
        if part == "attention":
            return self.attention
        if part == "mlp":
            return self.mlp
        if part == "expert":
            return self.expert
        return self.embedding if part == "embedding" else self.activation


def dtypes_of(
    arch: Architecture, model_dtype: str = "auto", quantization: str | None = None, kv_cache_dtype: str = "auto"
) -> Dtypes:
    """The formats an engine runs `arch` in.

    `model_dtype`, `quantization` and `kv_cache_dtype` are the engine's options (vLLM: --dtype, --quantization,
    --kv-cache-dtype); where they leave a choice open, the checkpoint's `quantization_config` decides. With
    `quantization` on a plain checkpoint, all matrices but embeddings, output projection and routers are quantised, as
    vLLM does it on the fly. InputError on an unknown name.
    """
    base = DTYPES[arch.dtype] if model_dtype == "auto" else dtype(model_dtype, "dtype")
    config = dict(arch.quantization)
    small = _small(config, quantization)
    parts = {"attention": base, "mlp": base, "expert": base}
    if small is not None:
        kept = _kept(config, len(arch.layers))
        parts = {part: base if part in kept else small for part in parts}
    cache = _cache(config) if kv_cache_dtype == "auto" else dtype(kv_cache_dtype, "kv_cache_dtype")
    state = DTYPES[arch.state_dtype] if arch.state_dtype else base
    return Dtypes(**parts, embedding=base, activation=base, kv=cache or base, state=state)


def _small(config: Mapping[str, object], quantization: str | None) -> Dtype | None:
    """The format of quantised matrices: the checkpoint's, unless the engine is told another; None = not quantised."""
    if quantization is None or quantization == config.get("quant_method"):
        return _weights(config) if config else None
    wanted = dtype(quantization, "quantization")
    try:
        stored = _weights(config)
    except InputError:  # nothing stored, or something that cannot be read, which is why the engine is told
        return wanted
    return stored if stored.name.removesuffix("_block") == wanted.name else wanted


def _weights(config: Mapping[str, object]) -> Dtype:
    """What the matrices of a quantised checkpoint are stored in."""
    method = str(config.get("quant_method", "")).lower()
    if method in ("fp8", "fbgemm_fp8"):
        return DTYPES["fp8_block" if config.get("weight_block_size") else "fp8"]
    if method in ("mxfp4", "gpt_oss_mxfp4"):
        return DTYPES["mxfp4"]
    if method in ("awq", "gptq", "auto-round"):
        bits, group = _whole(config.get("bits") or config.get("w_bit"), 4), _whole(config.get("group_size"), 128)
        zeros = bits if config.get("zero_point") or config.get("sym") is False else 0
        return _grouped(bits, group, zeros)
    if method == "compressed-tensors":
        groups = config.get("config_groups")
        first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
        weights = first.get("weights") if isinstance(first, Mapping) else None
        inputs = first.get("input_activations") if isinstance(first, Mapping) else None
        if isinstance(weights, Mapping):
            return _compressed(weights, quantised_inputs=inputs is not None)
    if method == "modelopt" or "quant_algo" in config or "quantization" in config:
        algo = str(_modelopt(config).get("quant_algo", "")).upper()
        if algo == "MIXED_PRECISION":
            raise InputError(
                "checkpoints of mixed precision are not read layer by layer",
                field="quant_algo",
                found=algo,
                allowed="name the commonest format as the engine option `quantization`",
            )
        if "NVFP4" in algo:
            return DTYPES["nvfp4"]
        if "FP8" in algo:
            return DTYPES["fp8"]
    raise InputError(
        "unsupported quantization_config",
        field="quantization_config.quant_method",
        found=method or None,
        allowed="fp8, mxfp4, awq, gptq, auto-round, compressed-tensors, modelopt",
    )


def _compressed(weights: Mapping[str, object], *, quantised_inputs: bool) -> Dtype:
    bits = _whole(weights.get("num_bits"), 8)
    if weights.get("type") == "float":
        return DTYPES["nvfp4"] if bits == 4 else DTYPES["fp8_block" if weights.get("block_structure") else "fp8"]
    if bits == 8 and quantised_inputs:
        return DTYPES["int8"]
    zeros = 0 if weights.get("symmetric", True) else bits
    return _grouped(bits, _whole(weights.get("group_size"), 128), zeros)


def _grouped(bits: int, group: int, zeros: int) -> Dtype:
    """Integer weights with one float16 scale (and a zero point of `zeros` bits) a group; -1 = one a channel."""
    overhead = 0.0 if group <= 0 else (16 + zeros) / group
    name = "int8_weight" if bits == 8 else f"int{bits}"
    return replace(DTYPES.get(name, Dtype(name, bits, "bf16")), bits=bits + overhead)


def _modelopt(config: Mapping[str, object]) -> Mapping[str, object]:
    inner = config.get("quantization")
    return inner if isinstance(inner, Mapping) else config


def _cache(config: Mapping[str, object]) -> Dtype | None:
    """The KV format that a checkpoint asks for, None when it does not."""
    scheme = config.get("kv_cache_scheme")
    asked = _modelopt(config).get("kv_cache_quant_algo")
    if asked:
        return dtype(str(asked).lower(), "kv_cache_quant_algo")
    if isinstance(scheme, Mapping) and _whole(scheme.get("num_bits"), 16) == 8:
        return DTYPES["fp8"]
    return None


_MODULES = {
    "attention": re.compile(r"(self_attn|linear_attn|\.attn|mixer)\W*($|(q|k|v|o|in|out|q_a|q_b|kv_b|qkv)_proj)"),
    "mlp": re.compile(
        r"shared_experts?\W*($|(gate|up|down|gate_up)_proj)|mlp\W*$|mlp\W+\(?(gate|up|down|gate_up)(_proj|\|)"
    ),
}
"""how checkpoints name the modules of a part"""


def _kept(config: Mapping[str, object], layers: int) -> set[str]:
    """Parts that a checkpoint's list of unquantised modules covers: by a pattern, or in at least half of the layers.
    Embeddings, output projection and routers are kept in any case."""
    names: list[str] = []
    for key in ("modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules"):
        value = _modelopt(config).get(key) or config.get(key)
        names += [str(v) for v in value] if isinstance(value, list | tuple) else []
    kept = set()
    for part, modules in _MODULES.items():
        hits = [name for name in names if modules.search(name)]
        numbers = {found.group(1) for name in hits if (found := re.search(r"\.(\d+)\.", name))}
        if 2 * len(numbers) >= layers or any(not re.search(r"\.\d+\.", name) for name in hits):
            kept.add(part)
    return kept


def _whole(value: object, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else default
