"""What model families write alike: the usual keys of a `config.json`, and the windows of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from servetwin.errors import InputError
from servetwin.model.config import Config
from servetwin.model.layers import Architecture, Attention, DenseMlp, Layer, MoE

DTYPE_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def build(
    c: Config,
    layers: Iterable[Layer],
    *,
    tied: bool = False,
    norm_bias: bool = False,
    head_bias: bool = False,
) -> Architecture:
    """The parts that all families write alike; `tied` is the family's default."""
    named = (c.text("dtype") or c.text("torch_dtype") or "bfloat16").removeprefix("torch.")
    if named not in DTYPE_NAMES:
        raise InputError(
            "unknown number format", where=c.where, field="torch_dtype", found=named, allowed=", ".join(DTYPE_NAMES)
        )
    layers = tuple(layers)
    for layer in dict.fromkeys(layers):
        if isinstance(layer.mlp, MoE) and layer.mlp.top_k > layer.mlp.experts:
            experts = f"<= {layer.mlp.experts}, the number of experts"
            raise InputError(
                "too many", where=c.where, field="num_experts_per_tok", found=layer.mlp.top_k, allowed=experts
            )
    return Architecture(
        model_type=c.text("model_type"),
        hidden=c.int("hidden_size", "n_embd", "d_model"),
        vocab=c.int("vocab_size"),
        layers=layers,
        max_positions=c.int("max_position_embeddings", "n_positions", "max_seq_len", default=2048),
        tied=c.flag("tie_word_embeddings", default=tied),
        norm_bias=norm_bias,
        head_bias=head_bias,
        dtype=DTYPE_NAMES[named],
        state_dtype=DTYPE_NAMES.get(c.text("mamba_ssm_cache_dtype") or c.text("mamba_ssm_dtype")),
        quantization=tuple(sorted(c.within("quantization_config").items())),
        excluded_parts=("multi-token prediction",) if predicts_ahead(c) else (),
    )


def predicts_ahead(c: Config) -> bool:
    keys = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")
    return any(c.int(key, default=0) > 0 for key in keys)


def depth(c: Config) -> int:
    return c.int("num_hidden_layers", "n_layer")


def attention(
    c: Config,
    *,
    window: int | None = None,
    bias: bool = False,
    out_bias: bool | None = None,
    qk_norm: bool = False,
    sinks: bool = False,
    gate: bool = False,
    head_dim: int | None = None,
) -> Attention:
    """Grouped-query attention from the usual keys; `attention_bias` covers the output projection unless told apart."""
    heads = c.int("num_attention_heads", "n_head")
    bias = c.flag("attention_bias", default=bias)
    return Attention(
        heads=heads,
        kv_heads=c.int("num_key_value_heads", default=heads),
        head_dim=c.int("head_dim", default=head_dim or c.int("hidden_size", "n_embd") // heads),
        window=window,
        qkv_bias=bias,
        out_bias=bias if out_bias is None else out_bias,
        qk_norm="head" if qk_norm else None,
        sinks=sinks,
        gate=gate,
    )


def windows(c: Config, windowed: Callable[[int], bool]) -> list[int | None]:
    """The window of every layer: from `layer_types` when given, else `windowed(layer)` says which layers have one."""
    size = c.int("sliding_window", default=0) or None
    kinds = c.list("layer_types")
    if kinds:
        one_a_layer(c, "layer_types", kinds)
        return [size if kind == "sliding_attention" else None for kind in kinds]
    return [size if windowed(layer) else None for layer in range(depth(c))]


def one_a_layer(c: Config, key: str, values: list[object]) -> None:
    if len(values) != depth(c):
        raise InputError(
            "must name one kind a layer", where=c.where, field=key, found=len(values), allowed=f"{depth(c)} entries"
        )


def dense_mlp(c: Config) -> DenseMlp:
    return DenseMlp(c.int("intermediate_size"), bias=c.flag("mlp_bias"))


def qwen_windows(c: Config) -> list[int | None]:
    """Qwen names a window in its file and switches it off; when on, it starts at layer `max_window_layers`."""
    first = c.int("max_window_layers", default=28) if c.flag("use_sliding_window") else depth(c)
    return windows(c, lambda layer: layer >= first)
