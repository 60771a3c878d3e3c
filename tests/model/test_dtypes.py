"""Number formats of checkpoints and engine options."""

from __future__ import annotations

from typing import Any

import pytest

from servetwin import catalog
from servetwin.errors import InputError
from servetwin.model import Dtypes, architecture_of, dtype, dtypes_of, weight_bytes

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


def names(d: Dtypes) -> tuple[str, ...]:
    return (d.attention.name, d.mlp.name, d.expert.name, d.embedding.name, d.kv.name, d.activation.name)


def quantised(config: dict[str, Any], **options: Any) -> Dtypes:
    return dtypes_of(architecture_of({**LLAMA, "quantization_config": config}), **options)


def test_effective_bits() -> None:
    bits = {name: dtype(name).bits for name in ("bf16", "fp8", "int4", "mxfp4", "nvfp4", "fp32")}
    assert bits == {"bf16": 16, "fp8": 8, "int4": 4.125, "mxfp4": 4.25, "nvfp4": 4.5, "fp32": 32}
    assert dtype("nvfp4").bytes(16) == 9
    assert dtype("int4").bytes(1) == 1


def test_a_plain_checkpoint_runs_as_stored() -> None:
    assert names(dtypes_of(architecture_of(LLAMA))) == ("bf16",) * 6
    assert names(dtypes_of(architecture_of({**LLAMA, "torch_dtype": "float16"}))) == ("fp16",) * 6
    assert names(dtypes_of(architecture_of(LLAMA), model_dtype="float32")) == ("fp32",) * 6


def test_engine_options_override() -> None:
    d = dtypes_of(architecture_of(LLAMA), quantization="fp8", kv_cache_dtype="fp8_e4m3")
    assert names(d) == ("fp8", "fp8", "fp8", "bf16", "fp8", "bf16")


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8_block"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, "int4"),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, "int8_weight"),
        ({"quant_method": "modelopt", "quantization": {"quant_algo": "NVFP4"}}, "nvfp4"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "group_0": {"weights": {"num_bits": 8, "type": "int"}, "input_activations": {"num_bits": 8}}
                },
            },
            "int8",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "group_0": {"weights": {"num_bits": 8, "type": "float"}, "input_activations": {"num_bits": 8}}
                },
            },
            "fp8",
        ),
    ],
)
def test_checkpoints(config: dict[str, Any], part: str) -> None:
    assert names(quantised(config)) == (part, part, part, "bf16", "bf16", "bf16")


def test_scales_follow_the_group() -> None:
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
    assert quantised(awq).mlp.bits == 4 + 20 / 128
    assert quantised({"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}).mlp.bits == 4.5


def test_what_a_checkpoint_leaves_unquantised_stays_so() -> None:
    """gpt-oss and Kimi-K2.5 quantise their experts only."""
    for name, small in (("openai/gpt-oss-120b", "mxfp4"), ("moonshotai/Kimi-K2.5", "int4")):
        d = dtypes_of(architecture_of(catalog.model(name).config, name))
        assert (d.attention.name, d.expert.name, d.embedding.name) == ("bf16", small, "bf16")
    norms = [f"model.layers.{i}.{n}" for i in range(32) for n in ("post_attention_layernorm", "mlp.gate")]
    assert quantised({"quant_method": "fp8", "modules_to_not_convert": ["lm_head", *norms]}).attention.name == "fp8"
    half = [f"model.layers.{i}.self_attn*" for i in range(32)]
    assert quantised({"quant_method": "fp8", "ignored_layers": half}).attention.name == "bf16"
    assert quantised({"quant_method": "fp8", "ignored_layers": half[:3]}).attention.name == "fp8"


def test_an_engine_told_what_the_checkpoint_says_anyway_reads_the_checkpoint() -> None:
    config = {"quant_method": "compressed-tensors", "ignore": ["re:.*self_attn.*"], "config_groups": {"group_0": {
        "weights": {"num_bits": 4, "type": "int", "group_size": 32}}}}  # fmt: skip
    assert quantised(config, quantization="int4") == quantised(config)
    blocks = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert quantised(blocks, quantization="fp8").mlp.name == "fp8_block"


def test_gpt_oss_checkpoint_size() -> None:
    """The model card gives checkpoint sizes of 60.8 and 12.8 GiB (arXiv:2508.10925, table 1)."""
    for name, size in (("openai/gpt-oss-120b", 60.8), ("openai/gpt-oss-20b", 12.8)):
        arch = architecture_of(catalog.model(name).config, name)
        assert weight_bytes(arch, dtypes_of(arch)) / 2**30 == pytest.approx(size, abs=0.05)


def test_kv_format_asked_for_by_the_checkpoint() -> None:
    d = quantised({"quant_method": "modelopt", "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}})
    assert d.kv.name == "fp8"
    assert quantised({"quant_method": "fp8"}).kv.name == "bf16"


@pytest.mark.parametrize(
    "config", [{"quant_method": "quip"}, {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}]
)
def test_unknown_formats_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        quantised(config)
    with pytest.raises(InputError, match="fp8"):
        dtype("fp9")
    assert quantised(config, quantization="nvfp4").mlp.name == "nvfp4"
