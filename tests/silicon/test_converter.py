"""The converter's rules, on small tables; and on the real wheel where SERVETWIN_AICONFIGURATOR_WHEEL names it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from servetwin.catalog.profiles import packaged_folder
from servetwin.errors import InputError
from servetwin.interop.aiconfigurator.clean import holes, monotone, must_clean, to_nanoseconds, wiggle
from servetwin.interop.aiconfigurator.convert import convert
from servetwin.interop.aiconfigurator.errors import leave_one_out
from servetwin.interop.aiconfigurator.host import host_bound, host_entry
from servetwin.timing.kernels.profile import Device


def gemm(times: list[float], n: int = 8192, k: int = 8192) -> dict[str, np.ndarray]:
    m = [1, 2, 4, 8, 16, 32, 64, 128][: len(times)]
    size = len(times)
    return {"n": np.full(size, n), "k": np.full(size, k), "m": np.array(m), "ms": np.array(times)}


def test_milliseconds_become_sorted_whole_nanoseconds() -> None:
    raw = {name: column[::-1] for name, column in gemm([0.01, 0.0112345, 0.02]).items()}
    columns, merged = to_nanoseconds("t", "gemm", raw)
    assert columns["m"].tolist() == [1, 2, 4]
    assert columns["ns"].tolist() == [10000, 11234, 20000]
    assert merged == 0


def test_a_size_measured_twice_takes_the_median() -> None:
    raw = {name: np.concatenate([column, column[:1]]) for name, column in gemm([0.010, 0.020]).items()}
    raw["ms"][-1] = 0.014
    columns, merged = to_nanoseconds("t", "gemm", raw)
    assert columns["ns"].tolist() == [12000, 20000]
    assert merged == 1


@pytest.mark.parametrize("time", [0.0, -1.0, float("nan"), 1e-6, 3e4])
def test_times_that_are_no_milliseconds_are_refused(time: float) -> None:
    with pytest.raises(InputError, match="milliseconds"):
        to_nanoseconds("t", "gemm", gemm([0.01, time]))


def test_a_spike_at_small_m_fails_the_check_and_the_envelope_removes_it() -> None:
    columns, _ = to_nanoseconds("t", "gemm", gemm([0.033, 0.038, 0.0187, 0.0188, 0.019, 0.018, 0.0181, 0.030]))
    assert wiggle("gemm", columns) == 1.0
    assert must_clean("gemm", 1.0)
    cleaned = monotone("gemm", columns)
    assert cleaned["ns"].tolist() == [18000] * 6 + [18100, 30000]
    assert wiggle("gemm", cleaned) == 0.0


def test_noise_and_other_kinds_are_left_alone() -> None:
    columns, _ = to_nanoseconds("t", "gemm", gemm([0.020, 0.018, 0.019, 0.018, 0.019, 0.018, 0.025, 0.030]))
    assert wiggle("gemm", columns) == 0.0
    assert not must_clean("gemm", 0.16)
    assert not must_clean("moe", 0.9)


def test_the_check_looks_at_large_shapes_and_small_m() -> None:
    small, _ = to_nanoseconds("t", "gemm", gemm([0.04, 0.01, 0.01], n=64, k=64))
    large, _ = to_nanoseconds("t", "gemm", gemm([0.01, 0.01, 0.01]))
    both = {name: np.concatenate([small[name], large[name]]) for name in small}
    assert wiggle("gemm", both) == 0.0
    late, _ = to_nanoseconds("t", "gemm", gemm([0.01] * 7 + [0.005]))
    assert wiggle("gemm", late) == 0.0


def test_holes_count_the_sizes_not_timed() -> None:
    raw = {"heads": [8, 8, 8], "batch": [1, 1, 2], "length": [16, 32, 16], "ms": [0.1, 0.2, 0.2]}
    columns, _ = to_nanoseconds("t", "mla_context", {name: np.array(column) for name, column in raw.items()})
    assert holes("mla_context", columns) == 1


def test_leave_one_out_is_nought_for_what_the_law_fits_and_not_for_a_step() -> None:
    device = Device("x", 1e12, 0.8, 3000.0, {"bf16": 1e14})
    m = np.array([1, 2, 4, 8, 16])
    columns = {"gpus": np.full(5, 2), "bytes": m, "ns": 1000 + 50 * m}
    assert leave_one_out("nccl", "all_reduce", columns, device)["bytes"]["p90"] == 0.0
    columns["ns"] = np.array([1000, 1000, 3000, 3000, 3000])
    assert leave_one_out("nccl", "all_reduce", columns, device)["bytes"]["median"] > 0.2


def test_products_that_timed_the_host_are_found() -> None:
    shapes = [(n, k, m) for n in (64, 1024, 16384) for k in (64, 1024, 16384) for m in (1, 8, 64, 8192)]
    n, k, m = np.array(shapes).T
    device = np.maximum(4000, (n * k * m) // 50_000)
    fast = {"n": n, "k": k, "m": m, "ns": device}
    slow = {**fast, "ns": np.maximum(90_000, device * 11 // 10)}
    assert host_bound(fast) is None
    assert host_bound(slow) == 90_000
    entry = host_entry("gemm_fp8_block", slow, {"gemm_fp8": fast})
    assert entry == {"host_ns": 90_000, "stand_in": "gemm_fp8", "ratio": pytest.approx(1.1)}
    assert host_entry("gemm_bf16", slow, {"gemm_fp8": fast}) == {"host_ns": 90_000}
    assert host_entry("gemm_fp8", fast, {}) is None


def test_another_file_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "aiconfigurator_core-0.12.0.whl"
    wheel.write_bytes(b"PK")
    with pytest.raises(InputError, match="sha256"):
        convert(wheel, tmp_path / "out")
    with pytest.raises(InputError, match="cannot be read"):
        convert(tmp_path / "none.whl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_wheel_gives_the_shipped_bytes(tmp_path: Path) -> None:
    wheel = os.environ.get("SERVETWIN_AICONFIGURATOR_WHEEL")
    if not wheel:
        pytest.skip("needs the aiconfigurator-core 0.12.0 wheel (set SERVETWIN_AICONFIGURATOR_WHEEL)")
    with pytest.raises(InputError, match="h100_sxm"):
        convert(Path(wheel), tmp_path, ["h100_sx"])
    (folder,) = convert(Path(wheel), tmp_path, ["a100_sxm"]).values()
    same = packaged_folder() / "kernels" / "a100_sxm"
    assert {path.name for path in folder.iterdir()} == {path.name for path in same.iterdir()}
    for path in folder.iterdir():
        assert path.read_bytes() == (same / path.name).read_bytes(), path.name
