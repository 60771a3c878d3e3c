"""Reading configurations, and saying what is wrong with them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from servetwin.errors import InputError
from servetwin.model import architecture_of, load_architecture, parameters
from servetwin.model.layers import Attention

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


def test_from_file_folder_and_catalogue(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    for ref in (tmp_path, tmp_path / "config.json", str(tmp_path), "meta-llama/Llama-3.1-8B"):
        assert parameters(load_architecture(ref)).total == 8_030_261_248


def test_a_modelopt_file_beside_the_configuration_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    quantization = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(quantization))
    assert dict(load_architecture(tmp_path).quantization)["quant_method"] == "modelopt"


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"model_type": "lama"}, "model_type", "'llama'"),
        ({"model_type": None}, "model_type", "lacks"),
        ({"num_attention_heads": None}, "num_attention_heads", "lacks"),
        ({"hidden_size": "4096"}, "hidden_size", "whole number"),
        ({"num_key_value_heads": 0}, "num_key_value_heads", ">= 1"),
        ({"num_hidden_layers": -1}, "num_hidden_layers", ">= 1"),
        ({"torch_dtype": "bfloat61"}, "torch_dtype", "bfloat16"),
        ({"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok", "<= 4"),
        ({"hidden_size": True}, "hidden_size", "whole number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings", "true or false"),
        ({"layer_types": ["full_attention"]}, "layer_types", "one kind a layer"),
    ],
)
def test_wrong_configurations_name_file_and_key(change: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        architecture_of({**LLAMA, **change}, "models/mine/config.json")
    assert (caught.value.where, caught.value.field) == ("models/mine/config.json", field)
    assert words in str(caught.value)


def test_unsupported_type_lists_what_is_supported() -> None:
    with pytest.raises(InputError, match=r"deepseek_v3.*qwen3_moe"):
        architecture_of({"model_type": "t5"})


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_unreadable_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(InputError) as caught:
        load_architecture(path)
    assert caught.value.where == str(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_architecture(tmp_path / "nothing" / "config.json")


def test_the_text_part_of_a_multimodal_model() -> None:
    arch = architecture_of({"model_type": "llava", "text_config": LLAMA, "vision_config": {"hidden_size": 1024}})
    assert parameters(arch).total == 8_030_261_248
    assert arch.excluded_parts == ("vision tower",)


def test_windows_alternate_as_the_family_says() -> None:
    def windows(config: dict[str, Any]) -> list[int | None]:
        return [m.window for m in architecture_of({**LLAMA, **config}).mixers if isinstance(m, Attention)]

    assert windows({"model_type": "gemma2", "sliding_window": 4096})[:3] == [4096, None, 4096]
    assert windows({"model_type": "gemma3_text", "sliding_window": 1024})[:7] == [1024] * 5 + [None, 1024]
    assert windows({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}) == [None] * 32
    assert windows({"model_type": "mistral", "sliding_window": 4096}) == [4096] * 32
    kinds = ["sliding_attention", "full_attention"] * 16
    assert windows({"model_type": "gemma2", "sliding_window": 8, "layer_types": kinds[::-1]})[:2] == [None, 8]


def test_importing_the_room_is_light() -> None:
    code = "import sys, servetwin.model; print([m for m in ('numpy', 'pyarrow', 'pydantic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
