"""Reading a bundle: what is there comes through unchanged, what is wrong is named."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from profile_bundle import write_bundle
from profile_shapes import shape

from servetwin.catalog.profiles import all_profiles, by_id, find, profile_hash, read_profile, user_folder
from servetwin.errors import InputError
from servetwin.interop.llmservingsim_profile import import_profile
from servetwin.timing.layers.tables import read_table
from servetwin.timing.profile import ProfileTimer


def test_round_trip(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path)
    profile = read_profile(import_profile(bundle, "tiny", tmp_path / "profiles"))
    assert (profile.kind, profile.device, profile.model, profile.dtype) == ("layers", "tiny", "org/model", "bf16")
    assert profile.tensor == (1,), "the meta names two degrees, but only one is there"
    table = read_table(profile, "attention", 1)
    with (bundle / "tp1/attention.csv").open(encoding="utf-8") as file:
        want = {
            tuple(int(row[c]) for c in ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")): max(
                1, round(float(row["time_us"]) * 1000)
            )
            for row in csv.DictReader(file)
        }
    keys = zip(*(table[c] for c in ("chunk", "history", "decodes", "context")), strict=True)
    assert dict(zip(keys, table["time_ns"], strict=True)) == want
    assert set(profile.data["provenance"]["sources"]) == {
        "meta.yaml", "tp1/attention.csv", "tp1/dense.csv", "tp1/per_sequence.csv", "tp1/skew.csv"
    }  # fmt: skip


def test_same_bundle_same_bytes(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path)
    first, second = (import_profile(bundle, "tiny", tmp_path / name) for name in ("a", "b"))
    assert profile_hash(first) == profile_hash(second)
    assert profile_hash(import_profile(bundle, "tiny", tmp_path / "a")) == profile_hash(second), "replaced in place"
    assert [p.name for p in first.parent.iterdir()] == ["bf16"]


def test_found_in_the_user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVETWIN_PROFILES", str(tmp_path / "mine"))
    assert user_folder() == tmp_path / "mine"
    assert find("tiny", "org/model", "bf16", "auto") is None
    place = import_profile(write_bundle(tmp_path), "tiny")
    assert place == tmp_path / "mine" / "tiny" / "org__model" / "bf16"
    assert find("tiny", "org/model", "bf16", "auto", "layers") == place
    assert find("tiny", "org/model", "bf16", "fp8") is None
    assert find("tiny", "org/model", "bf16", "bf16", "kernels") is None
    assert "tiny/org__model/bf16" in {profile.id for profile in all_profiles()}
    assert by_id("tiny/org__model/bf16").folder == place
    with pytest.raises(InputError, match="did you mean 'tiny/org__model/bf16'"):
        by_id("tiny/org__model/bf15")


def _edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        path = bundle / name
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new, 1), encoding="utf-8")

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda bundle: (bundle / "tp1/dense.csv").unlink(), r"dense\.csv: the bundle lacks this file"),
        (lambda bundle: (bundle / "meta.yaml").unlink(), r"meta\.yaml: cannot be read"),
        (lambda bundle: shutil.rmtree(bundle / "tp1"), r"no folder tp<N>"),
        (lambda bundle: (bundle / "tp1/dense.csv").write_text("layer,tokens,time_us\n"), r"dense\.csv: has no rows"),
        (_edit("tp1/attention.csv", "kv_decode", "kv"), r"attention\.csv: kv_decode: missing column"),
        (_edit("tp1/dense.csv", "embedding,3,", "embedding,three,"), r"line 4, tokens: bad number; found 'three'"),
        (_edit("tp1/dense.csv", "embedding,3,", "embedding,3,-"), r"line 4, time_us: bad number; found '-"),
        (_edit("tp1/dense.csv", "embedding,3,", "embedding,3,nan,"), r"line 4: 4 cells where the header has 3"),
        (_edit("tp1/per_sequence.csv", "lm_head,1,101.0", "lm_head,1,inf"), r"line 2, time_us: bad number"),
        (_edit("meta.yaml", "llama", "lama"), r"architecture: unknown value; found 'lama'.*did you mean 'llama'"),
        (_edit("meta.yaml", "llama", "qwen3"), r"dense\.csv: a layer of the architecture has no rows; found 'qk_norm'"),
        (_edit("meta.yaml", "variant: bf16", "variant: bf61"), r"variant: unknown variant; found 'bf61'"),
        (_edit("meta.yaml", "org/model", "../../model"), r"model: must be a name"),
    ],
)
def test_faults_are_named(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    bundle = write_bundle(tmp_path)
    spoil(bundle)
    with pytest.raises(InputError, match=message):
        import_profile(bundle, "tiny", tmp_path / "profiles")
    assert not list((tmp_path / "profiles").rglob("profile.yaml")), "nothing half-done is left behind"


def test_a_device_that_is_a_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not an id of a device"):
        import_profile(write_bundle(tmp_path), "../tiny", tmp_path / "profiles")


def test_changed_tables_and_headers_are_noticed(tmp_path: Path) -> None:
    place = import_profile(write_bundle(tmp_path), "tiny", tmp_path / "profiles", layers=2)
    header = (place / "profile.yaml").read_text(encoding="utf-8")
    for old, new, message in (
        ("schema: 1", "schema: 2", "unknown schema"),
        ("kind: layers", "kind: kernels", "not a per-layer profile"),
        ("layers: 2", "layers: null", "does not say how many layers"),
        ("  - o_proj", "  - p_proj", "has no measurements; found 'p_proj'"),
        ("file: dense.parquet", "file: ../dense.parquet", "inside the profile's folder"),
    ):
        assert old in header
        (place / "profile.yaml").write_text(header.replace(old, new, 1), encoding="utf-8")
        with pytest.raises(InputError, match=message):
            ProfileTimer.load(place, 1)
    (place / "profile.yaml").write_text(header, encoding="utf-8")
    with (place / "dense.parquet").open("ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match="its sha256 differs"):
        ProfileTimer.load(place, 1)


def test_mixture_of_experts(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path, "qwen3_moe", degrees=(1, 2))
    place = import_profile(bundle, "tiny", tmp_path / "profiles", layers=3)
    header = yaml.safe_load((place / "profile.yaml").read_text(encoding="utf-8"))
    assert header["experts"] == {"count": 16, "top_k": 2}
    timer = ProfileTimer.load(place, 1)
    assert timer.moe_ns(64, 8) == 10_000 + 8_000 + 16_000
    assert timer.moe_ns(40, 6) == 10_000 + 6_000 + 10_000
    assert timer.moe_ns(2048, 16) > timer.moe_ns(1024, 16)
    one = shape([], [100])
    assert ("moe", 3 * timer.moe_ns(1, 2), "measured") in timer.explain(one), "one token hits exactly top_k experts"
    halves = ProfileTimer.load(place, 2)
    assert halves.step_ns(one) < timer.step_ns(one)


def test_without_skew_measurements_contexts_count_as_equal(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path)
    (bundle / "tp1/skew.csv").unlink()
    timer = ProfileTimer.load(import_profile(bundle, "tiny", tmp_path / "profiles", layers=1), 1)
    assert timer.step_ns(shape([], [100, 300])) == timer.step_ns(shape([], [200, 200]))
