"""From a Hugging Face `config.json` to an `Architecture`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from servetwin.errors import InputError, nearest
from servetwin.model.config import Config
from servetwin.model.families import FAMILIES
from servetwin.model.layers import Architecture

_TEXT_PARTS = ("text_config", "llm_config", "language_config")
"""where multimodal configurations keep their language model"""


def architecture_of(config: Mapping[str, object], where: str = "config.json") -> Architecture:
    """The architecture that `config` describes; of a multimodal model, its text part.

    `where` names the file or model in errors. Raises InputError on an unsupported `model_type`, a missing key or a
    value of the wrong kind.
    """
    for key in _TEXT_PARTS:
        part = config.get(key)
        if isinstance(part, Mapping):
            outer = {
                k: config[k]
                for k in ("tie_word_embeddings", "quantization_config", "torch_dtype", "dtype")
                if config.get(k) is not None
            }
            return _read({**outer, **part}, where, ("vision tower",))
    return _read(config, where, ())


def _read(config: Mapping[str, object], where: str, left_out: tuple[str, ...]) -> Architecture:
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise InputError("the model configuration lacks a key that it needs", where=where, field="model_type")
    family = FAMILIES.get(kind) or FAMILIES.get(f"{kind}_text")
    if family is None:
        raise InputError(
            "unsupported model_type",
            where=where,
            field="model_type",
            found=kind,
            allowed=", ".join(FAMILIES),
            hint=nearest(kind, FAMILIES),
        )
    arch = family(Config(config, where))
    if not left_out:
        return arch
    return replace(arch, excluded_parts=left_out + arch.excluded_parts)


def load_architecture(ref: str | Path) -> Architecture:
    """The architecture named by `ref`: a `config.json`, a folder that holds one, or the name of a catalogue entry.

    Beside a `config.json`, a `hf_quant_config.json` (ModelOpt checkpoints) is read too. Raises InputError when the
    file cannot be read or the name is not in the catalogue.
    """
    path = Path(ref)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        config = _json(path)
        quant = path.with_name("hf_quant_config.json")
        if quant.is_file() and not config.get("quantization_config"):
            config = {**config, "quantization_config": {"quant_method": "modelopt", **_json(quant)}}
        return architecture_of(config, str(path))
    if path.suffix == ".json" or isinstance(ref, Path):
        raise InputError("no such file", where=str(path))
    from servetwin import catalog

    return architecture_of(catalog.model(str(ref)).config, str(ref))


def _json(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as fault:
        raise InputError(f"cannot be read as JSON: {fault}", where=str(path)) from fault
    if not isinstance(value, dict):
        raise InputError("must hold a JSON object", where=str(path), found=type(value).__name__)
    return value
