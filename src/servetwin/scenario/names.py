"""The names in a scenario that stand for something elsewhere: devices, models, engine versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from servetwin import catalog
from servetwin.errors import InputError
from servetwin.scenario.schema import Scenario

MODEL_KINDS = "a model that `servetwin list models` prints, or the path of a Hugging Face config.json or of its folder"

TEXT_PARTS = ("text_config", "llm_config", "language_config")


def check_names(scenario: Scenario, base: Path, where: str | None) -> None:
    """Look up every name. Raises InputError with its field and the nearest valid name."""
    _at(where, "model", lambda: model_config(scenario.model, base))
    for index, node in enumerate(scenario.nodes or ()):
        for kind in node.devices:
            _at(where, f"nodes[{index}].devices", lambda name=kind: catalog.device(name))
        if node.host is not None:
            _at(where, f"nodes[{index}].host", lambda name=node.host: catalog.host(name))
        if node.nic is not None and node.nic.link is not None:
            _at(where, f"nodes[{index}].nic.link", lambda name=node.nic.link: catalog.link(name))
    for level in ("inside", "between"):
        topology = getattr(scenario.network, level, None)
        if topology is not None and topology.link is not None:
            _at(where, f"network.{level}.link", lambda name=topology.link: catalog.link(name))
    for index, pool in enumerate(scenario.pools):
        _at(where, f"pools[{index}].device", lambda name=pool.device: catalog.device(name))
        if pool.model is not None:
            _at(where, f"pools[{index}].model", lambda name=pool.model: model_config(name, base))
        if pool.engine.version is not None:
            _at(where, f"pools[{index}].engine.version", lambda name=pool.engine.version: catalog.engine(name))


def _at(where: str | None, field: str, look_up: Any) -> None:
    try:
        look_up()
    except InputError as error:
        raise error.at(where, field) from None


def model_config(name: str, base: Path) -> dict[str, Any]:
    """The Hugging Face configuration that `name` stands for: of a path (relative to `base`), else of the catalogue.

    Raises InputError when there is none.
    """
    path = model_path(name, base)
    if path is None:
        try:
            return catalog.model(name).config
        except InputError as error:
            if error.where is None and error.allowed:
                error.allowed = MODEL_KINDS
            raise error.at() from None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("no such model configuration", found=str(path), allowed=MODEL_KINDS) from None
    except OSError as error:
        raise InputError(f"the model configuration cannot be read: {error.strerror}", found=str(path)) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"the model configuration is not JSON ({error})", found=str(path)) from None
    if not isinstance(config, dict):
        raise InputError("the model configuration is not a JSON object", found=str(path))
    return config


def language_part(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the language model within that of a multimodal one; of others, the whole."""
    return next((config[part] for part in TEXT_PARTS if isinstance(config.get(part), dict)), config)


def model_path(name: str, base: Path) -> Path | None:
    """The `config.json` that `name` names, or None when `name` is a name of the catalogue."""
    written_as_path = name.endswith(".json") or name.startswith((".", "/", "~"))
    try:
        path = base / Path(name).expanduser()
        folder = path.is_dir()
        if written_as_path or path.is_file() or (path / "config.json").is_file():
            return path / "config.json" if folder else path
    except (OSError, RuntimeError, ValueError):  # too long, no such home, a null byte
        pass
    return None
