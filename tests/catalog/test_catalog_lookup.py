from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from servetwin import catalog
from servetwin.catalog import lookup
from servetwin.errors import InputError

MINE = "memory: {size: 10GiB, bandwidth: 1TB/s}\npeak: {bf16: 1TFLOPS}\n"


@pytest.fixture(autouse=True)
def no_added_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "_added", [])
    monkeypatch.delenv(lookup.VARIABLE, raising=False)


def write(folder: Path, kind: str, stem: str, text: str) -> Path:
    (folder / kind).mkdir(parents=True, exist_ok=True)
    path = folder / kind / f"{stem}.yaml"
    path.write_text(text)
    return path


def test_ignores_case_and_the_sign_between_words() -> None:
    device = catalog.device("h100_sxm")
    assert catalog.device("H100_SXM") == catalog.device("h100-sxm") == catalog.device("h100") == device
    assert catalog.device("RTXPRO6000").id == "rtx_pro_6000"
    assert catalog.model("llama-3.1-8b").id == "meta-llama/Llama-3.1-8B"
    assert catalog.model("qwen/QWEN3-8b").id == "Qwen/Qwen3-8B"


def test_unknown_name() -> None:
    with pytest.raises(InputError) as caught:
        catalog.device("h100_smx")
    assert str(caught.value) == (
        "unknown device; found 'h100_smx'; allowed: what `servetwin list devices` prints; did you mean 'h100_sxm'?"
    )
    with pytest.raises(InputError, match=r"unknown model; found 'Qwen3-9B'; .*list models.*did you mean 'Qwen3-8B'"):
        catalog.model("Qwen3-9B")
    with pytest.raises(InputError, match=r"unknown kind of entry; .*did you mean 'devices'"):
        catalog.names("device")


def test_a_look_up_by_id_parses_one_file_and_its_links(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []
    lookup._content.cache_clear()
    read_yaml = lookup.read_yaml
    monkeypatch.setattr(lookup, "read_yaml", lambda path: parsed.append(path.stem) or read_yaml(path))  # type: ignore[func-returns-value]
    catalog.device("h100_sxm")
    assert sorted(parsed) == ["h100_sxm", "nvlink4", "pcie5_x16"]


def test_import_is_cheap() -> None:
    heavy = "{'numpy', 'pydantic', 'pyarrow', 'yaml'}"
    code = f"import sys, servetwin.catalog; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_smallest_device_of_ones_own(tmp_path: Path) -> None:
    write(tmp_path, "devices", "my_chip", MINE)
    catalog.add_folder(tmp_path)
    device = catalog.device("my_chip")
    assert (device.memory_bytes, device.visible_bytes, device.peak) == (10 * 2**30, 10 * 2**30, {"bf16": 1e12})
    assert (device.scale_up, device.tdp_w, device.launch_ns) == (None, None, 2000)
    assert "my_chip" in catalog.names("devices")


def test_later_folder_before_earlier_before_environment_before_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def size() -> int:
        return catalog.device("l40s").memory_bytes // 2**30

    for number, folder in enumerate(("env1", "env2", "first", "second"), start=1):
        write(tmp_path / folder, "devices", "l40s", MINE.replace("10GiB", f"{number}GiB"))
    assert size() == 48
    monkeypatch.setenv(lookup.VARIABLE, os.pathsep.join([str(tmp_path / "env1"), str(tmp_path / "env2")]))
    assert size() == 1
    catalog.add_folder(tmp_path / "first")
    assert size() == 3
    catalog.add_folder(tmp_path / "second")
    assert size() == 4
    assert catalog.names("devices").count("l40s") == 1


def test_alias_in_block_style_and_changed_file(tmp_path: Path) -> None:
    path = write(tmp_path, "devices", "my_chip", "aliases:\n  # what we say\n  - The Chip\n\n  - Chip2\n" + MINE)
    catalog.add_folder(tmp_path)
    assert catalog.device("the chip").id == catalog.device("CHIP2").id == "my_chip"
    path.write_text(MINE.replace("10GiB", "11GiB"))
    os.utime(path, ns=(1, 1))
    assert catalog.device("my_chip").memory_bytes == 11 * 2**30


def test_link_written_out_in_place(tmp_path: Path) -> None:
    wires = "interconnect: {scale_up: {link: {bandwidth: 100GB/s, latency: 1us}, domain: 4}, host: {link: pcie4}}\n"
    write(tmp_path, "devices", "my_chip", MINE + wires)
    catalog.add_folder(tmp_path)
    device = catalog.device("my_chip")
    assert device.scale_up is not None and device.host_link is not None
    assert (device.scale_up.bandwidth, device.scale_up.link.latency_ns, device.scale_up.domain) == (100e9, 1000, 4)
    assert device.host_link.id == "pcie4_x16"


def test_engine_is_a_mapping_of_facts(tmp_path: Path) -> None:
    write(tmp_path, "engines", "my-engine-1.0", "block_size: 16\nnested: {a: [1, 2]}\nsources: {s: release notes}\n")
    catalog.add_folder(tmp_path)
    engine = catalog.engine("my-engine-1.0")
    assert engine == catalog.EngineVersion(
        "my-engine-1.0", {"block_size": 16, "nested": {"a": [1, 2]}}, {"s": "release notes"}
    )


def test_model_of_ones_own_needs_only_a_configuration(tmp_path: Path) -> None:
    write(tmp_path, "models", "me__tiny", "config: {model_type: llama, hidden_size: 64}\n")
    catalog.add_folder(tmp_path)
    model = catalog.model("me/tiny")
    assert (model.id, model.config, model.published) == ("me/tiny", {"model_type": "llama", "hidden_size": 64}, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("peak: {bf16: 1TFLOPS}\n", "memory: is missing"),
        (MINE.replace("10GiB", "10GHz"), r"memory\.size: 'GHz' is not a unit of size; found '10GHz'"),
        (MINE.replace("10GiB", "0"), r"memory\.size: must be more than 0"),
        (MINE.replace("bf16", "bf61"), r"peak\.bf61: unknown field; .*did you mean 'bf16'"),
        (MINE + "tpd: 700W\n", "tpd: unknown field; .*did you mean 'tdp'"),
        (MINE + "tdp: {value: 700W, source: nowhere}\n", r"tdp\.source: unknown value; found 'nowhere'"),
        (MINE + "kind: gpus\n", "kind: unknown value; found 'gpus'; allowed: gpu, tpu, npu; did you mean 'gpu'"),
        (
            MINE + "interconnect: {host: {link: pcie9_x16}}\n",
            r"interconnect\.host\.link: unknown link; found 'pcie9_x16'",
        ),
        (MINE + "sources: {a: 3}\n", r"sources\.a: must be a text; found 3"),
        (MINE + "aliases: chip\n", "aliases: must be a list"),
        ("memory: {size: 1GiB\npeak: [\n", "line [0-9]+: not valid YAML"),
        ("- a\n- b\n", "must be a mapping"),
        ("", "must be a mapping"),
        ("memory: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_malformed_entry_names_file_and_field(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, "devices", "broken", text)
    catalog.add_folder(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        catalog.device("broken")
    assert caught.value.where == str(path)


def test_folder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="add_folder: is not a folder"):
        catalog.add_folder(tmp_path / "absent")
    monkeypatch.setenv(lookup.VARIABLE, str(tmp_path / "absent"))
    with pytest.raises(InputError, match="SERVETWIN_CATALOG: is not a folder"):
        catalog.device("l40s")
