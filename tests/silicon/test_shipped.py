"""The kernel profiles that come with the package: whole, in the right units, and looked up as they stand."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import yaml

from servetwin.catalog.profiles import packaged_folder, read_profile
from servetwin.errors import InputError
from servetwin.timing.kernels import KernelProfile, KernelTables, moe
from servetwin.timing.kernels.attention import causal_pairs
from servetwin.timing.kernels.gemm import FORMATS, roofline_ns
from servetwin.timing.kernels.latent import attention_part, idle_ns, other_kernels_ns
from servetwin.timing.kernels.mla import MlaTable
from servetwin.timing.kernels.profile import LAYOUTS

BLACKWELL = {"b200_sxm", "b300_sxm", "gb200", "gb300"}
REQUIRED = {"h100_sxm", "h200_sxm", "a100_sxm", "l40s", "b200_sxm", "rtx_pro_6000"}
FOLDERS = {path.parent.name: path.parent for path in sorted(packaged_folder().glob("kernels/*/profile.yaml"))}


def profile_of(device: str) -> KernelProfile:
    return KernelProfile(read_profile(FOLDERS[device]))


ALL = [(device, table) for device in FOLDERS for table in profile_of(device).tables]


@pytest.fixture(scope="module")
def h200() -> KernelTables:
    return KernelTables.for_device("h200_sxm")


def test_the_promised_devices_are_there() -> None:
    assert set(FOLDERS) >= REQUIRED
    catalog = packaged_folder().parent / "devices"
    for device in FOLDERS:
        assert (catalog / f"{device}.yaml").is_file(), f"no device {device} in the catalogue"


def test_everything_together_stays_small() -> None:
    assert sum(path.stat().st_size for folder in FOLDERS.values() for path in folder.iterdir()) < 12e6


@pytest.mark.parametrize("device", FOLDERS)
def test_files_are_those_of_the_header(device: str) -> None:
    header = yaml.safe_load((FOLDERS[device] / "profile.yaml").read_text())
    files = {entry["file"]: entry["sha256"] for entry in header["tables"].values()}
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in FOLDERS[device].glob("*.parquet")}
    assert found == files
    assert header["device"] == device
    assert header["provenance"]["licence"] == "Apache-2.0"
    assert len(header["provenance"]["sha256"]) == 64
    assert all(entry["source"].endswith(".parquet") for entry in header["tables"].values())


@pytest.mark.parametrize(("device", "table"), ALL)
def test_a_table_is_sorted_unique_and_positive(device: str, table: str) -> None:
    profile = profile_of(device)
    columns, entry = profile.columns(table), profile.tables[table]
    assert columns is not None
    layout = LAYOUTS[entry["kind"]]
    keys = np.stack([columns[name] for name in (*layout.keys, *layout.axes)], axis=1)
    order = np.lexsort(keys.T[::-1])
    assert (order == np.arange(len(keys))).all()
    assert (np.diff(keys, axis=0) != 0).any(axis=1).all()
    assert len(keys) == entry["rows"]
    assert (columns["ns"] >= 400).all()
    assert all(0 <= error["median"] <= error["p90"] for error in entry["error"].values())


@pytest.mark.parametrize(("device", "table"), [(d, t) for d, t in ALL if t.startswith("gemm_")])
def test_the_envelope_is_where_the_check_failed_and_nowhere_else(device: str, table: str) -> None:
    profile = profile_of(device)
    quality = profile.tables[table]["quality"]
    failed = quality["wiggle"] > 0.5
    assert quality["envelope"] == failed == ("cleaned" in quality["flags"])
    assert failed == (device in BLACKWELL and table in ("gemm_fp8", "gemm_fp8_block"))
    assert (quality["cleaned_cells"] > 0) == failed
    columns = profile.columns(table)
    assert columns is not None
    same = (np.diff(columns["n"]) == 0) & (np.diff(columns["k"]) == 0)
    falls = (np.diff(columns["ns"]) < 0) & same
    assert bool(falls.any()) != failed


def test_only_matrix_products_were_cleaned() -> None:
    for device in FOLDERS:
        for table, entry in profile_of(device).tables.items():
            assert entry["kind"] == "gemm" or entry["quality"]["cleaned_cells"] == 0, (device, table)


def test_no_product_beats_its_roofline_by_more_than_the_cache() -> None:
    """Weights that fit the 50 MB cache can be read faster than from memory, arithmetic cannot be beaten: this
    would show a wrong unit of the times or of the peak rates."""
    for device in ("h100_sxm", "h200_sxm"):
        profile = profile_of(device)
        for dtype in ("bf16", "fp8", "fp8_block"):
            columns = profile.columns(f"gemm_{dtype}")
            assert columns is not None
            n, k, m, ns = (columns[name].astype(float) for name in ("n", "k", "m", "ns"))
            arithmetic = 2 * m * n * k / profile.device.flops[FORMATS[dtype].peak] * 1e9
            assert (ns > 0.95 * arithmetic).all()
            large = n * k * FORMATS[dtype].weight_bytes > 200e6
            ideal = np.array(
                [roofline_ns(profile.device, dtype, *at) for at in zip(m[large], n[large], k[large], strict=True)]
            )
            assert (ns[large] > 0.95 * ideal).all()
            assert np.median(ns[large] / ideal) < 2.5


def test_collective_sizes_are_bytes(h200: KernelTables) -> None:
    """2^28 elements of two bytes: vLLM's all-reduce hands over to NCCL there, and both tables must agree."""
    ours, nccl = h200.allreduce(8, 2**29), h200.nccl("all_reduce", 8, 2**29)
    assert ours is not None and nccl is not None
    assert ours[0] == pytest.approx(nccl[0], rel=0.1)
    assert ours[1] == nccl[1] == "measured"
    per_link = 2 * 7 / 8 * 2**29 / ours[0]  # bytes/ns through each device's links in a ring
    assert 250 < per_link < 900, "NVLink 4 carries 450 GB/s a direction; switches reduce inside"
    gathered = h200.nccl("all_gather", 8, 2**29)
    assert gathered is not None
    assert 200 < 7 / 8 * 2**29 / gathered[0] < 450, "bytes are those of the gathered vector"


def test_one_device_needs_no_collective_and_a_second_node_has_no_table(h200: KernelTables) -> None:
    assert h200.allreduce(1, 10**6) == (0.0, "measured")
    assert h200.nccl("all_gather", 1, 10**6) == (0.0, "measured")
    assert h200.allreduce(16, 10**6) is None
    assert KernelTables.for_device("gb200").allreduce(8, 10**6) is None
    six = h200.allreduce(6, 2**20)
    four, eight = h200.allreduce(4, 2**20), h200.allreduce(8, 2**20)
    assert six is not None and four is not None and eight is not None
    assert six == ((four[0] + eight[0]) / 2, "interpolated")


@pytest.mark.parametrize("device", ["h100_sxm", "h200_sxm", "b200_sxm", "a100_sxm"])
def test_look_ups_give_the_table_at_its_points(device: str) -> None:
    tables = KernelTables.for_device(device)
    rng = np.random.default_rng(5)
    for name in tables.profile.tables:
        kind = tables.profile.tables[name]["kind"]
        columns = tables.profile.columns(name)
        assert columns is not None
        if "host" in tables.profile.tables[name]:
            continue
        for i in rng.integers(0, len(columns["ns"]), 25):
            row = {column: int(values[i]) for column, values in columns.items()}
            found = _look_up(tables, name, kind, row)
            if kind == "moe" and found[1] == "interpolated":  # a size that `moe.without_the_dip` leaves out
                assert row["skew"] and row["tokens"] * row["topk"] <= row["experts"] and found[0] > row["ns"]
                continue
            assert found[0] == pytest.approx(row["ns"], rel=1e-12), (name, row)
            assert found[1] == "measured", (name, row)


def _look_up(tables: KernelTables, name: str, kind: str, row: dict[str, int]) -> tuple[float, str]:
    dtype = name.removeprefix(f"{kind}_")
    found: tuple[float, str] | None
    if kind == "gemm":
        found = tables.gemm(dtype, row["m"], row["n"], row["k"])
    elif kind == "moe":
        skew = {0: "balanced", 101: "power_law_1.01", 120: "power_law_1.2"}[row["skew"]]
        shape = [row[part] for part in ("tokens", "hidden", "inter", "topk", "experts", "tp", "ep")]
        entry = tables.profile.tables[name]
        assert name == f"moe_{entry['dtype']}_{entry['backend']}"
        found = tables.moe(entry["dtype"], *shape, skew, entry["backend"])
        assert found == tables.moe(entry["dtype"], *shape, skew), "what vLLM chose is what was timed"
    elif kind in ("allreduce", "nccl"):
        size = (row["gpus"], row["bytes"])
        found = tables.allreduce(*size, graph=dtype == "graph") if kind == "allreduce" else tables.nccl(dtype, *size)
    elif kind == "alltoall":
        backend, _, phase = dtype.rpartition("_")
        curve = tables.alltoall_curve(phase, row["ep"], row["hidden"], row["topk"], row["experts"], backend)
        assert curve is not None
        found = curve.ns(row["tokens"]), curve.how(row["tokens"])
    elif kind == "quantize":
        found = tables.quantize(row["m"], row["k"], dtype == "dynamic")
    elif kind == "mla_bmm":
        curve = tables.mla_bmm_curve(row["heads"], dtype == "post")
        assert curve is not None
        found = curve.ns(row["tokens"]), curve.how(row["tokens"])
    else:
        batch, length = row["batch"], row["length"]
        prefill = (batch, batch * length, batch * length * (length + 1) // 2)
        if kind.startswith("mla"):
            weights, _, kv = dtype.rpartition("_")
            look = tables.mla_context if kind == "mla_context" else tables.mla_generation
            attention = look(row["heads"], weights, kv)
        else:
            look = tables.context_attention if kind == "context_attention" else tables.generation_attention
            attention = look(row["heads"], row["kv_heads"], row["head_dim"], row["window"], dtype)
        assert attention is not None
        sums = prefill if "context" in kind else (batch, batch * (length - 1))
        found = attention.ns(*sums), attention.how(*sums)
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_a_product_between_shapes_lies_between_them_in_efficiency(h200: KernelTables, dtype: str) -> None:
    """Positive, continuous in n, and within the ratios to the roofline of its four neighbours at every m."""
    m = np.array([1, 16, 64, 256, 1024, 8192])

    def ratios(n: int, k: int) -> np.ndarray:
        curve = h200.gemm_curve(dtype, n, k)
        assert curve is not None
        return curve.many(m) / roofline_ns(h200.device, dtype, m.astype(float), n, k)

    corners = np.array([ratios(n, k) for n in (5120, 6144) for k in (12288, 16384)])
    inner = ratios(5600, 14336)
    assert (inner >= corners.min(axis=0) * (1 - 1e-9)).all()
    assert (inner <= corners.max(axis=0) * (1 + 1e-9)).all()
    for n in (6143, 6145):
        near, at = h200.gemm_curve(dtype, n, 4096), h200.gemm_curve(dtype, 6144, 4096)
        assert near is not None and at is not None
        assert near.many(m) == pytest.approx(at.many(m), rel=2e-3)


def test_a_table_that_timed_the_host_is_flagged_and_stood_in_for() -> None:
    """Eight tables of block-scaled products take 60 to 400 us for any tiny shape; the other formats a few."""
    bound = {(device, table) for device, table in ALL if "host" in profile_of(device).tables[table]}
    assert {device for device, table in bound if table == "gemm_fp8_block"} == set(FOLDERS) - {
        "a100_sxm",
        "arc_pro_b60",
    }
    assert bound - {(device, "gemm_fp8_block") for device in FOLDERS} == {
        ("arc_pro_b60", "gemm_bf16"),
        ("arc_pro_b60", "gemm_fp8"),
    }
    for device, table in ALL:
        entry = profile_of(device).tables[table]
        assert ("host_bound" in entry["quality"]["flags"]) == ((device, table) in bound)


@pytest.mark.parametrize("device", ["h100_sxm", "h200_sxm", "b200_sxm", "gb300", "l40s", "rtx_pro_6000"])
def test_block_scaled_products_cost_the_device_about_what_fp8_ones_do(device: str) -> None:
    tables = KernelTables.for_device(device)
    entry = tables.profile.tables["gemm_fp8_block"]["host"]
    for n, k in ((1024, 1024), (4096, 4096), (6144, 3072), (8192, 8192)):
        block, plain = tables.gemm_curve("fp8_block", n, k), tables.gemm_curve("fp8", n, k)
        assert block is not None and plain is not None
        assert block.shape_how == "extrapolated"
        assert block.ns(16) == pytest.approx(entry["ratio"] * plain.ns(16))
        assert block.ns(16) < 0.5 * entry["host_ns"]
    measured = tables.profile.columns("gemm_fp8_block")
    assert measured is not None
    if "sparse" not in tables.profile.tables["gemm_fp8_block"]["quality"]["flags"]:
        row = (measured["n"] == 16384) & (measured["k"] == 16384) & (measured["m"] == 16384)
        found = tables.gemm("fp8_block", 16384, 16384, 16384)
        assert found is not None and found[0] == measured["ns"][row][0], "long products keep their own times"


def test_a_vocabulary_beyond_the_table_scales_with_its_weights(h200: KernelTables) -> None:
    wide, widest = h200.gemm("bf16", 64, 65536, 4096), h200.gemm("bf16", 64, 131072, 4096)
    assert wide is not None and widest is not None
    assert widest[1] == "extrapolated"
    assert widest[0] == pytest.approx(2 * wide[0], rel=0.02)


def test_a_given_scale_is_cheaper_than_one_to_be_found(h200: KernelTables) -> None:
    for m in (1, 64, 1000, 8192):
        found, given = h200.gemm("fp8", m, 4096, 4096), h200.gemm("fp8_static", m, 4096, 4096)
        dynamic, static = h200.quantize(m, 4096, True), h200.quantize(m, 4096)
        assert found is not None and given is not None and dynamic is not None and static is not None
        assert found[0] - given[0] == pytest.approx(dynamic[0] - static[0], rel=0.05)
        assert 0 < given[0] < found[0]


def test_attention_of_unmeasured_heads(h200: KernelTables) -> None:
    context, step = (4, 4 * 1024, 4 * 1024 * 1025 // 2), (64, 64 * 1023)
    for heads, kv in ((20, 8), (28, 4), (36, 4), (32, 32), (56, 8), (10, 5)):
        prefill, decode = h200.context_attention(heads, kv, 128), h200.generation_attention(heads, kv, 128)
        assert prefill is not None and decode is not None
        assert prefill.ns(*context) > 0 and decode.ns(*step) > 0
    between = [h200.context_attention(heads, 4, 128) for heads in (24, 28, 32)]
    times = [attention.ns(*context) for attention in between if attention is not None]
    assert times[1] == pytest.approx((times[0] + times[2]) / 2)
    full, cut = h200.generation_attention(32, 8, 128), h200.generation_attention(32, 8, 128, window=4096)
    assert full is not None and cut is not None
    assert cut.ns(8, 8 * 1000) == full.ns(8, 8 * 1000)
    assert cut.ns(8, 8 * 100_000) == full.ns(8, 8 * 4095)
    assert cut.how(8, 8 * 1000) == "extrapolated"


def test_decode_attention_grows_with_context_and_batch(h200: KernelTables) -> None:
    attention = h200.generation_attention(8, 1, 128, kv_dtype="fp8")
    assert attention is not None
    run = attention.run(100, 100 * 500, 30_000)
    assert run.tolist()[::997] == [attention.ns(100, 100 * 500 + 100 * i) for i in range(0, 30_000, 997)]
    smooth = np.abs(np.diff(run)) / run[:-1]
    assert smooth.max() < 0.01, "one token more never jumps"
    by_batch = [attention.ns(b, b * 4096) for b in range(1, 300)]
    assert min(np.diff(by_batch) / np.array(by_batch[:-1])) > -0.05
    assert by_batch[-1] > 20 * by_batch[0] / 4


def test_prefill_with_a_prefix_lies_between_the_prompts(h200: KernelTables) -> None:
    attention = h200.context_attention(32, 8, 128)
    assert attention is not None
    fresh = attention.ns(1, 512, causal_pairs(512))
    costs = [attention.ns(1, 512, 512 * c + 512 * 513 // 2) for c in (0, 1, 128, 1024, 4096, 15_000)]
    assert costs[0] == fresh
    assert costs == sorted(costs)
    assert costs[1] == pytest.approx(fresh, rel=0.01)
    assert costs[-1] < attention.ns(1, 15_512, int(causal_pairs(15_512)))
    assert attention.how(1, 512, 512 * 1024 + 512 * 513 // 2) == "interpolated"
    assert attention.how(1, 512, 512 * 60_000 + 512 * 513 // 2) == "extrapolated"


def test_unmeasured_experts_stand_on_the_nearest(h200: KernelTables) -> None:
    known = h200.moe("fp8_block", 1024, 7168, 2048, 8, 256, 1, 8)
    assert known is not None and known[1] == "measured"
    other = h200.moe("fp8_block", 1024, 7168, 2100, 8, 256, 1, 8)
    assert other is not None and other[1] == "extrapolated"
    assert other[0] == pytest.approx(known[0] * 2100 / 2048, rel=0.05)
    with pytest.raises(InputError, match=r"power_law_1\.2"):
        h200.moe("bf16", 1, 4096, 1024, 8, 64, distribution="power_law_1.3")


def test_dispatch_was_read_as_microseconds(h200: KernelTables) -> None:
    """Each token goes to at most 8 ranks as 7168 bytes of fp8 or 14336 of bf16, over links of 450 GB/s."""
    curve = h200.alltoall_curve("dispatch", 8, 7168, 8, 256, "deepep_ht")
    assert curve is not None
    assert 65536 * 8 * 7168 / 450 < curve.ns(65536) < 100e6
    decode = h200.alltoall_curve("dispatch", 8, 7168, 8, 256)
    assert decode is not None and 20e3 < decode.ns(64) < 100e3
    assert h200.alltoall_curve("dispatch", 16, 7168, 8, 256) is None
    near = h200.alltoall_curve("combine", 8, 7000, 8, 256)
    assert near is not None and near.shape_how == "extrapolated"


def test_tables_a_device_lacks_are_none() -> None:
    a100 = KernelTables.for_device("a100_sxm")
    assert a100.gemm("fp8", 1, 4096, 4096) is None
    assert a100.gemm_curve("fp8_static", 4096, 4096) is None
    assert a100.context_attention(32, 8, 128, kv_dtype="fp8") is None
    assert a100.mla_context(16) is None
    assert a100.quantize(1, 4096) is None
    assert a100.errors("gemm_fp8") is None
    assert KernelTables.for_device("h100_sxm").gemm("int4_wo", 1, 4096, 4096) is None


def test_errors_are_given_for_every_table(h200: KernelTables) -> None:
    errors = h200.errors("gemm_bf16")
    assert errors is not None
    assert set(errors) == {"m", "shape"}
    assert 0 < errors["shape"][0] < 0.05 < errors["shape"][1] < 0.2


def test_a_layer_not_measured_with_a_backend_stands_on_one_that_was(h200: KernelTables) -> None:
    """gpt-oss on Hopper was timed with Triton; Marlin, which computes slower there, with other models."""
    shape = (2880, 2880, 4, 128)
    chosen, triton = h200.moe_curve("w4a16_mxfp4", *shape), h200.moe_curve("w4a16_mxfp4", *shape, backend="triton")
    marlin = h200.moe_curve("w4a16_mxfp4", *shape, backend="marlin")
    assert chosen is not None and triton is not None and marlin is not None
    assert chosen.ys == triton.ys and chosen.shape_how == "measured"
    assert marlin.shape_how == "extrapolated"
    assert 1.5 < marlin.ns(8192) / triton.ns(8192) < 4
    assert h200.moe_curve("w4a16_mxfp4", *shape, backend="flashinfer_trtllm") is None
    assert h200.moe_curve("fp8", 2048, 768, 8, 128, backend="marlin") is None


@pytest.mark.parametrize("device", ["l40s", "rtx_pro_6000"])
def test_marlin_of_one_weight_format_stands_in_for_another(device: str) -> None:
    """Predicts the layers of gpt-oss, timed with Marlin on these devices, from the int4 layers of Kimi-K2."""
    tables = KernelTables.for_device(device)
    measured, other = tables._moe("w4a16_mxfp4", "marlin"), tables._moe("int4_wo", "marlin")
    assert measured is not None and other is not None
    errors = []
    for shape in measured.shapes:
        known = measured.curve(shape)
        guess = other.stand_in(shape, np.ones(len(other.shapes), dtype=bool), "w4a16_mxfp4")
        errors.append(guess.many(known.xs) / np.array(known.ys) - 1)
    assert np.median(np.abs(np.concatenate(errors))) < 0.28
    blackwell = KernelTables.for_device("b200_sxm")
    assert blackwell._moe("w4a16_mxfp4", "marlin") is not None


@pytest.mark.parametrize("device", ["h100_sxm", "h200_sxm", "b200_sxm", "l40s", "rtx_pro_6000"])
def test_tensor_parallelism_does_not_cut_the_rows_between_products(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Predicts Marlin's layers of Kimi-K2 over 2 to 32 ranks, 1024 tokens and more, from the one on a single rank."""
    table = KernelTables.for_device(device)._moe("int4_wo", "marlin")
    assert table is not None
    whole = [shape.tp == shape.ep == 1 and shape.skew == 120 for shape in table.shapes]
    assert sum(whole) == 1

    def bias() -> float:
        errors = []
        for shape in table.shapes:
            if shape.tp > 1 and shape.skew == 120:
                known = table.curve(shape)
                guess = table.stand_in(shape, np.array(whole)).many(known.xs) / np.array(known.ys) - 1
                errors.append(guess[np.array(known.xs) >= 1024])
        return float(np.median(np.concatenate(errors)))

    assert abs(bias()) < 0.18
    monkeypatch.setattr(moe, "ROW_PASSES", 0)
    assert bias() < -0.25, "without them every rank would be too fast"


def test_a_stand_in_takes_at_least_what_the_least_layer_does(h200: KernelTables) -> None:
    tiny = h200.moe("int4_wo", 1, 256, 64, 2, 8)
    table = h200._moe("int4_wo", None)
    assert tiny is not None and table is not None
    assert tiny == (min(table.curve(shape).ys[0] for shape in table.shapes), "extrapolated")


def test_small_kernels_are_bytes_over_bandwidth_and_a_launch(h200: KernelTables) -> None:
    cast = h200.profile.columns("quantize_static")
    assert cast is not None
    assert h200.elementwise_ns(0) == cast["ns"].min() == 1690
    assert h200.elementwise_ns(4.8e9) == pytest.approx(1690 + 1e6 / 0.857, rel=1e-2)
    a100 = KernelTables.for_device("a100_sxm")
    assert a100.elementwise_ns(0) == 3000, "without a timed cast: AIConfigurator's rule"
    assert a100.elementwise_ns(2.039e9) == pytest.approx(3000 + 1e6 / 0.8)


@pytest.mark.parametrize("device", sorted({d for d, table in ALL if table == "quantize_static"}))
def test_the_law_of_small_kernels_meets_the_cast_where_memory_bounds_it(device: str) -> None:
    tables = KernelTables.for_device(device)
    cast = tables.profile.columns("quantize_static")
    assert cast is not None
    moved = 3 * cast["k"] * cast["m"]
    error = np.array([tables.elementwise_ns(float(size)) for size in moved]) / cast["ns"] - 1
    assert abs(np.median(error[moved >= 200_000_000])) < 0.001
    assert np.quantile(np.abs(error[moved >= 200_000_000]), 0.9) < 0.1
    shorter = (moved >= 50_000_000) & (moved < 200_000_000)  # the law was not drawn through these
    if device not in ("l40s", "rtx_pro_6000"):  # whose caches hold them
        assert abs(np.median(error[shorter])) < (0.01 if device in ("h100_sxm", "h200_sxm") else 0.12)


@pytest.mark.parametrize("device", ["h200_sxm", "b200_sxm", "gb200"])
@pytest.mark.parametrize("phase", ["context", "generation"])
def test_a_latent_module_is_the_sum_of_its_parts(device: str, phase: Literal["context", "generation"]) -> None:
    """At the measured points, but where attention would be faster than its roofline."""
    tables = KernelTables.for_device(device)
    columns = tables.profile.columns(f"mla_{phase}_bf16_bf16")
    surface = attention_part(tables, phase, 16, "bf16")
    assert columns is not None and surface is not None
    host = idle_ns(tables, phase, "bf16", MlaTable(columns))
    rows = np.flatnonzero(columns["heads"] == 16)
    floored = 0
    for batch, length, ns in zip(*(columns[name][rows].tolist() for name in ("batch", "length", "ns")), strict=True):
        tokens = batch * length if phase == "context" else batch
        part = surface.ns[surface.batches.index(batch), surface.lengths.index(length)]
        rest = other_kernels_ns(tables, 16, 2, np.array([float(tokens)]))[0]
        assert part > 0
        if part + rest + host == pytest.approx(ns, rel=1e-9):
            continue
        assert part + rest + host > ns
        floored += 1
    assert floored <= 0.05 * len(rows)
    assert surface.how == ("extrapolated" if host else "interpolated")


def test_latent_modules_that_waited_for_the_host_are_corrected() -> None:
    """gb200 has the chip of b200_sxm: what its module of next to no work takes more is the host's."""
    host, least = {}, {}
    for device in ("b200_sxm", "gb200"):
        tables = KernelTables.for_device(device)
        columns = tables.profile.columns("mla_generation_bf16_bf16")
        assert columns is not None
        host[device] = idle_ns(tables, "generation", "bf16", MlaTable(columns))
        least[device] = columns["ns"][(columns["heads"] == 1) & (columns["batch"] == 1)].min()
    assert host["b200_sxm"] == 0
    assert host["gb200"] == pytest.approx(least["gb200"] - least["b200_sxm"], rel=0.2)


def test_a_kv_format_without_latent_modules_takes_the_other(h200: KernelTables) -> None:
    l40s = KernelTables.for_device("l40s")
    fp8, bf16 = l40s.latent_generation(16, "fp8"), l40s.latent_generation(16)
    assert fp8 is not None and bf16 is not None
    assert fp8.ns(8, 8 * 1000) == bf16.ns(8, 8 * 1000)
    assert fp8.how(8, 8 * 1024 - 8) == "extrapolated"
    assert KernelTables.for_device("a100_sxm").latent_context(16) is None
    assert h200.latent_context(16) is not None


def test_bad_profiles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="h200_sxm"):
        KernelTables.for_device("h200_sx")
    with pytest.raises(InputError, match="cannot be read"):
        KernelTables.load(tmp_path)
    header = (FOLDERS["a100_sxm"] / "profile.yaml").read_text()
    (tmp_path / "profile.yaml").write_text(header.replace("schema: 1", "schema: 2"))
    with pytest.raises(InputError, match="schema"):
        KernelTables.load(tmp_path)
    (tmp_path / "profile.yaml").write_text(header.replace("memory_bandwidth", "bandwidth"))
    with pytest.raises(InputError, match="memory_bandwidth"):
        KernelTables.load(tmp_path).elementwise_ns(1)
    for path in FOLDERS["a100_sxm"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "gemm_bf16.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="sha256"):
        KernelTables.load(tmp_path).gemm("bf16", 1, 4096, 4096)


def test_a_dense_model_loads_only_its_tables_and_quickly() -> None:
    code = """
import time, numpy, yaml, pyarrow.parquet
from servetwin.timing.kernels import KernelTables
start = time.process_time()
tables = KernelTables.for_device("h200_sxm")
for n, k in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)):
    tables.gemm_curve("bf16", n, k).ns(100)
tables.context_attention(32, 8, 128).ns(1, 512, 512 * 513 // 2)
tables.generation_attention(32, 8, 128).ns(32, 32 * 1000)
spent = time.process_time() - start
print(spent, *sorted(tables.profile._columns))
"""
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(3)
    ]
    assert runs[0][1:] == ["context_attention_bf16", "gemm_bf16", "generation_attention_bf16"]
    assert min(float(run[0]) for run in runs) < 0.08


def test_a_streaming_kernel_costs_a_launch_when_small_and_its_bytes_when_large(h200: KernelTables) -> None:
    curve = h200.streaming_curve()
    assert curve is not None
    assert curve.shape_how == "extrapolated"
    assert h200.elementwise_ns(1000) < curve.ns(1000) < 3000
    assert curve.ns(1e9) == pytest.approx(1e9 / h200.device.memory_bandwidth * 1e9, rel=0.25)
