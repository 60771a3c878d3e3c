"""Model families: how each `model_type` of Hugging Face writes its layers down.

One reader a family, `Config -> Architecture`. Where a configuration may leave a key out, the default is that of the
family's configuration class in the `transformers` library.
"""

from __future__ import annotations

from collections.abc import Callable

from servetwin.model.config import Config
from servetwin.model.families import dense, experts, hybrid
from servetwin.model.layers import Architecture

Reader = Callable[[Config], Architecture]

FAMILIES: dict[str, Reader] = {
    "deepseek_v2": experts.deepseek,
    "deepseek_v3": experts.deepseek,
    "deepseek_v32": experts.deepseek,
    "falcon": dense.falcon,
    "gemma": dense.gemma,
    "gemma2": dense.gemma2,
    "gemma3_text": dense.gemma3,
    "glm4_moe": experts.glm4_moe,
    "glm_moe_dsa": experts.deepseek,
    "gpt_neox": dense.gpt_neox,
    "gpt_oss": experts.gpt_oss,
    "kimi_k2": experts.deepseek,
    "llama": dense.llama,
    "minimax_m2": experts.minimax_m2,
    "ministral": dense.llama,
    "mistral": dense.llama,
    "mixtral": experts.mixtral,
    "nemotron_h": hybrid.nemotron_h,
    "phi3": dense.phi3,
    "phimoe": experts.phimoe,
    "qwen2": dense.qwen2,
    "qwen2_moe": experts.qwen2_moe,
    "qwen3": dense.qwen3,
    "qwen3_5_moe_text": hybrid.qwen3_next,
    "qwen3_5_text": hybrid.qwen3_next,
    "qwen3_moe": experts.qwen3_moe,
    "qwen3_next": hybrid.qwen3_next,
    "qwen3_vl_moe_text": experts.qwen3_moe,
    "qwen3_vl_text": dense.qwen3,
}
"""`model_type` -> reader"""
