"""Every shipped entry loads, says where its facts come from, and agrees with itself."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from servetwin import catalog

FOLDER = Path(catalog.__file__).parent
FACTS = [("devices", name) for name in catalog.names("devices")]
FACTS += [("links", name) for name in catalog.names("links")]
FACTS += [("hosts", name) for name in catalog.names("hosts")]
FACTS += [("models", name) for name in catalog.names("models")]
LOOK_UP: dict[str, Any] = {
    "devices": catalog.device,
    "links": catalog.link,
    "hosts": catalog.host,
    "models": catalog.model,
    "engines": catalog.engine,
}
UNSOURCED = {"name", "vendor", "kind", "aliases", "id", "sources"}


def content(kind: str, name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / kind / f"{name.replace('/', '__')}.yaml").read_text())
    return loaded


def sources_named(data: object) -> list[str]:
    if not isinstance(data, dict):
        return []
    here = [data["source"]] if "source" in data else []
    return here + [name for value in data.values() for name in sources_named(value)]


@pytest.mark.parametrize(("kind", "name"), FACTS)
def test_loads_and_every_group_of_facts_names_its_source(kind: str, name: str) -> None:
    entry = LOOK_UP[kind](name)
    assert entry.id == name
    data = content(kind, name)
    for key, value in data.items():
        if key == "interconnect":
            assert all("source" in part for part in value.values())
        elif key not in UNSOURCED:
            assert "source" in value, f"{key} has no source"
    assert set(sources_named(data)) <= set(data["sources"]), "a source that is not written out"
    assert data["sources"] == entry.sources
    assert all(len(text) > 20 for text in entry.sources.values())


@pytest.mark.parametrize("kind", catalog.KINDS)
def test_no_name_stands_for_two_entries(kind: str) -> None:
    names = list(catalog.names(kind))
    for name in catalog.names(kind):
        aliases = content(kind, name).get("aliases", [])
        names += aliases
        assert all(LOOK_UP[kind](alias) == LOOK_UP[kind](name) for alias in aliases)
    folded = Counter(name.casefold().replace("-", "_").replace(" ", "_") for name in names)
    assert [name for name, times in folded.items() if times > 1] == []


def test_breadth() -> None:
    assert len(catalog.names("devices")) >= 35
    assert len(catalog.names("links")) >= 14
    assert len(catalog.names("models")) >= 25
    assert {catalog.device(name).vendor for name in catalog.names("devices")} >= {
        "NVIDIA",
        "AMD",
        "Intel",
        "Google",
        "AWS",
        "Huawei",
    }


@pytest.mark.parametrize(
    ("name", "gib", "gb_s", "bf16", "fp8", "watts", "scale_up_gb_s", "domain"),
    [
        ("a100_sxm", 80, 2039, 312, None, 400, 300, 8),
        ("h100_sxm", 80, 3350, 989.4, 1978.9, 700, 450, 8),
        ("h200_sxm", 141, 4800, 989.4, 1978.9, 700, 450, 8),
        ("b200_sxm", 180, 7700, 2250, 4500, 1000, 900, 8),
        ("gb200", 186, 8000, 2500, 5000, 1200, 900, 72),
        ("l40s", 48, 864, 362.05, 733, 350, 31.5, 8),
        ("rtx_pro_6000", 96, 1597, 468, 936, 600, 63, 8),
        ("mi300x", 192, 5300, 1307.4, 2614.9, 750, 448, 8),
    ],
)
def test_headline_facts(
    name: str, gib: int, gb_s: float, bf16: float, fp8: float | None, watts: float, scale_up_gb_s: float, domain: int
) -> None:
    device = catalog.device(name)
    assert device.memory_bytes == gib * 2**30
    assert device.memory_bandwidth == gb_s * 1e9
    assert device.peak["bf16"] == bf16 * 1e12
    assert device.peak.get("fp8") == (None if fp8 is None else fp8 * 1e12)
    assert device.tdp_w == watts
    assert device.scale_up is not None
    assert (device.scale_up.bandwidth, device.scale_up.domain) == (scale_up_gb_s * 1e9, domain)


@pytest.mark.parametrize("name", catalog.names("devices"))
def test_device_agrees_with_itself(name: str) -> None:
    device = catalog.device(name)
    assert 0.9 * device.memory_bytes <= device.visible_bytes <= device.memory_bytes
    assert "fp16" in device.peak or "bf16" in device.peak
    half = max(device.peak.get("fp16", 0.0), device.peak.get("bf16", 0.0))
    if "fp8" in device.peak:  # a sparse figure that slipped in would double a ratio
        assert device.peak["fp8"] / half == pytest.approx(1.0 if name == "gaudi3" else 2.0, rel=0.03)
    if "tf32" in device.peak:
        assert device.peak["tf32"] <= half
    if device.scale_up is not None:
        assert device.scale_up.bandwidth <= device.scale_up.link.bandwidth * 1.0001
        assert device.scale_up.domain >= 1
    if device.idle_w is not None and device.tdp_w is not None:
        assert device.idle_w < device.tdp_w


def dense_parameters(config: dict[str, Any]) -> int:
    """Parameters of a dense Llama-like transformer: projections, gated feed-forward, norms, embeddings."""
    hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    width = config.get("head_dim", hidden // heads)
    query, key = heads * width, config["num_key_value_heads"] * width
    attention = hidden * (2 * query + 2 * key)
    attention += query + 2 * key if config["model_type"] == "qwen2" else 0  # biases of q, k, v
    attention += 2 * width if config["model_type"] == "qwen3" else 0  # norms of q and k
    norms = (4 if config["model_type"] == "gemma2" else 2) * hidden
    layer = attention + 3 * hidden * config["intermediate_size"] + norms
    embeddings = config["vocab_size"] * hidden * (1 if config["tie_word_embeddings"] else 2)
    return int(layers * layer + embeddings + hidden)


@pytest.mark.parametrize("name", catalog.names("models"))
def test_configuration_gives_the_published_parameters(name: str) -> None:
    model = catalog.model(name)
    published = model.published
    assert published is not None
    assert model.config.keys() >= {"architectures", "model_type"}
    if published.active_parameters is not None:
        assert published.active_parameters < published.parameters
    if model.config["model_type"] not in ("llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3"):
        return
    counted = dense_parameters(model.config)
    if published.digits is None:
        assert counted == published.parameters
    else:
        step = 10 ** (len(str(published.parameters)) - published.digits)
        assert abs(counted - published.parameters) <= step / 2


def test_published_kv_bytes() -> None:
    published = catalog.model("meta-llama/Llama-3.1-405B").published
    assert published is not None
    assert published.kv_bytes_per_token == 126 * 8 * 128 * 2 * 2
