"""The roofline: any device from its datasheet row, by laws fitted on measured tables."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from servetwin import catalog
from servetwin.catalog import Device
from servetwin.model import Sharding, dtypes_of, load_architecture
from servetwin.model.dtypes import DTYPES, Dtype
from servetwin.model.kernels import AttentionKernel, Collective, Experts, Gemm, Operator
from servetwin.model.operators import operators
from servetwin.timing.efficiency import kinds, law_ns, laws, roofline_error, units_of, work
from servetwin.timing.operators import OperatorTimer, needs
from servetwin.timing.roofline import Roofline, peak_of
from servetwin.timing.shape import StepShape

MODELS = (
    "meta-llama/Llama-3.1-8B",
    "openai/gpt-oss-120b",
    "deepseek-ai/DeepSeek-V3.2",
    "Qwen/Qwen3-Next-80B-A3B-Instruct",
)
DEVICES = ("h100_sxm", "a100_sxm", "mi300x", "tpu_v5p", "gaudi3", "t4", "trainium2", "arc_pro_b60", "b300_sxm")


def operators_of(model: str) -> list[Operator]:
    arch = load_architecture(model)
    return [op for op in operators(arch, dtypes_of(arch), Sharding(2)) if not isinstance(op, Collective)]


def work_of(operator: Operator, size: int) -> tuple[Any, ...]:
    """Arguments of a pricer for a batch that grows with `size` in every respect."""
    match needs(operator):
        case "rows":
            return (size,)
        case "prefills":
            return 2, 2 * size, 0, size * (size + 1)
        case "decodes":
            return 4, 4, 4 * size
        case "step":
            return (StepShape(1, size, 0, size * (size + 1) // 2, 4, 4, 4 * size, size, size),)


def price(device: Device, operator: Operator, size: int) -> float:
    pricer = Roofline(device).pricer(operator)
    assert pricer is not None
    ns, _ = pricer(*work_of(operator, size))
    return ns


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("model", MODELS)
def test_every_operator_has_a_positive_time_that_never_falls_with_the_work(name: str, model: str) -> None:
    device = catalog.device(name)
    sizes = (1, 2, 3, 15, 16, 17, 100, 127, 128, 129, 1000, 4096, 4097, 30000)
    for operator in operators_of(model):
        times = [price(device, operator, size) for size in sizes]
        if operator.name != "moe_sum":
            assert times[0] > 0, operator.name
        assert all(a <= b for a, b in itertools.pairwise(times)), (operator.name, times)


@pytest.mark.parametrize("model", MODELS)
def test_one_row_more_changes_little(model: str) -> None:
    """No steps: from 64 rows, tokens or keys on, one more costs at most a tenth."""
    device = catalog.device("l40s")
    for operator in operators_of(model):
        for size in (64, 128, 256, 1024, 8191):
            assert price(device, operator, size + 1) <= 1.1 * price(device, operator, size), operator.name


@pytest.mark.parametrize("model", ("openai/gpt-oss-120b", "deepseek-ai/DeepSeek-V3"))
def test_prepared_pricers_are_the_law(model: str) -> None:
    device = catalog.device("h200_sxm")
    for operator in operators_of(model):
        match operator:
            case Gemm():
                kind = "gemm_8bit" if operator.dtype.bits < 10 else "gemm_16bit"
            case Experts():
                kind = "experts_weight_only" if operator.dtype.name == "mxfp4" else "experts_8bit"
            case AttentionKernel():
                kind = f"{'context' if operator.is_context else 'generation'}_attention_16bit"
            case _:
                continue
        for size in (1, 37, 5000):
            at = work_of(operator, size)
            shape = {
                "rows": lambda at: StepShape(0, 0, 0, 0, at[0], at[0], 0, 0, 0),
                "prefills": lambda at: StepShape(*at, 0, 0, 0, 0, 0),
                "decodes": lambda at: StepShape(0, 0, 0, 0, *at, 0, 0),
            }[needs(operator)](at)
            peak = peak_of(device, operator.dtype if isinstance(operator, Gemm | Experts) else None)
            load = work(operator, shape, units_of(device))
            expected = law_ns(laws()[kind], load, peak, device.memory_bandwidth, device.launch_ns)
            assert price(device, operator, size) == pytest.approx(expected, rel=1e-9), operator.name


def test_no_kernel_beats_its_datasheet() -> None:
    """Neither the peak nor the bandwidth is passed: the fitted shares are shares."""
    for kind, law in laws().items():
        assert 0 < law.compute <= 1, kind
        assert 0 < law.memory <= 1, kind
        assert law.sharpness >= 1, kind
        assert min(law.fixed_ns, law.waves, *law.terms) >= 0, kind


def gemm(dtype: Dtype) -> Gemm:
    return Gemm(name="gemm", n=8192, k=8192, dtype=dtype)


def test_faster_devices_are_faster() -> None:
    """At the sizes that their datasheets tell of: H200 reads faster than H100, B200 computes faster than both."""
    h100, h200, b200 = (Roofline(catalog.device(name)) for name in ("h100_sxm", "h200_sxm", "b200_sxm"))

    def ns(source: Roofline, rows: int) -> float:
        pricer = source.pricer(gemm(DTYPES["bf16"]))
        assert pricer is not None
        return float(pricer(rows)[0])

    assert ns(h200, 1) < 0.8 * ns(h100, 1)
    assert ns(h200, 8192) > 0.95 * ns(h100, 8192)
    assert ns(b200, 8192) < 0.6 * ns(h100, 8192)


def test_a_format_without_arithmetic_of_its_own_is_widened() -> None:
    """A100 has no fp8: the weights are half as long to read, the product takes what a 16-bit one takes."""
    a100 = catalog.device("a100_sxm")
    wide, narrow = gemm(DTYPES["bf16"]), gemm(DTYPES["fp8"])
    assert price(a100, narrow, 1) < 0.65 * price(a100, wide, 1)
    assert price(a100, narrow, 8192) == pytest.approx(price(a100, wide, 8192), rel=0.02)


def test_what_nobody_measured_is_assumed() -> None:
    device = catalog.device("h100_sxm")
    known: dict[str, set[str]] = {}
    for model in MODELS:
        for operator in operators_of(model):
            pricer = Roofline(device).pricer(operator)
            assert pricer is not None
            known.setdefault(operator.kind, set()).add(pricer(*work_of(operator, 100))[1])
    assumed = {kind for kind, hows in known.items() if "assumed" in hows}
    assert assumed == {"sampler", "mla_context", "mla_generation", "indexer", "linear_attention"}
    assert all(hows <= {"analytic", "assumed"} for hows in known.values())


def test_memory_bandwidth_can_be_replaced() -> None:
    device = catalog.device("h100_sxm")
    slow = Roofline(device, bandwidth=device.memory_bandwidth / 2).pricer(gemm(DTYPES["bf16"]))
    assert slow is not None
    assert slow(1)[0] > 1.7 * price(device, gemm(DTYPES["bf16"]), 1)


def test_a_device_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three lines of a datasheet price a whole step; it has no units, no launch latency, no fp8."""
    folder = tmp_path / "devices"
    folder.mkdir()
    (folder / "napkin.yaml").write_text(
        "memory: {size: 64GiB, bandwidth: 2TB/s}\npeak: {bf16: 500TFLOPS}\nsources: {napkin: a drawing on a napkin}\n"
    )
    monkeypatch.setenv("SERVETWIN_CATALOG", str(tmp_path))
    device = catalog.device("napkin")
    assert device.compute_units is None
    arch = load_architecture("meta-llama/Llama-3.1-8B")
    timer = OperatorTimer(operators(arch, dtypes_of(arch)), [Roofline(device)])
    step = timer.step_ns(StepShape(0, 0, 0, 0, 16, 16, 16 * 1000, 1000, 1000))
    read = 16e9 / 2e12 * 1e9  # ns for the weights alone
    assert read < step < 2 * read


def test_every_law_states_its_error() -> None:
    for kind in kinds():
        median, p90 = roofline_error(kind)
        assert 0 < median < p90 < 2, kind
    gemms = [roofline_error(kind) for kind in kinds() if kind.startswith("gemm")]
    assert min(gemms) < roofline_error("gemm") < max(gemms)
    assert roofline_error("norm") == roofline_error("small")
    assert roofline_error("linear_attention") == max(roofline_error(kind) for kind in kinds())
