"""Which table prices an operator, and over which rows."""

from __future__ import annotations

import pytest

from servetwin.model import Dtypes, Sharding, dtypes_of, load_architecture
from servetwin.model.kernels import AttentionKernel, Experts, Operator
from servetwin.model.operators import operators
from servetwin.timing.kernels import KernelTables
from servetwin.timing.kernels.attention import causal_pairs
from servetwin.timing.silicon import Silicon


@pytest.fixture(scope="module")
def h200() -> KernelTables:
    return KernelTables.for_device("h200_sxm")


def step(model: str, sharding: Sharding, dtypes: Dtypes | None = None) -> dict[str, Operator]:
    arch = load_architecture(model)
    return {op.name: op for op in operators(arch, dtypes or dtypes_of(arch, "auto", None, "auto"), sharding)}


def test_experts_run_the_backend_that_was_asked_for(h200: KernelTables) -> None:
    experts = step("openai/gpt-oss-120b", Sharding(tensor=2))["experts"]
    for backend, how in (("auto", "measured"), ("triton", "measured"), ("marlin", "extrapolated")):
        pricer = Silicon(h200, Sharding(tensor=2), backend).pricer(experts)
        curve = h200.moe_curve("w4a16_mxfp4", 2880, 2880, 4, 128, 2, backend=None if backend == "auto" else backend)
        assert pricer is not None and curve is not None
        assert pricer(4096) == (curve.ns(4096), how)


def test_a_format_in_which_the_layer_was_timed_comes_first() -> None:
    """On b200_sxm vLLM ran gpt-oss with 16-bit activations, other mxfp4 models with 8-bit ones."""
    tables = KernelTables.for_device("b200_sxm")
    experts = step("openai/gpt-oss-120b", Sharding())["experts"]
    pricer = Silicon(tables, Sharding()).pricer(experts)
    assert pricer is not None
    assert pricer(1024) == tables.moe("w4a16_mxfp4", 1024, 2880, 2880, 4, 128)
    assert pricer(1024)[1] == "measured"


def test_experts_count_the_tokens_of_the_whole_group(h200: KernelTables) -> None:
    """Four data-parallel ranks of two devices each bring their tokens; two tensor-parallel ones hold the same."""
    sharding = Sharding(tensor=2, data=4, expert=8)
    experts = step("deepseek-ai/DeepSeek-V3", sharding)["experts"]
    assert isinstance(experts, Experts) and (experts.rows, experts.data, experts.local_experts) == ("gathered", 4, 32)
    pricer = Silicon(h200, sharding).pricer(experts)
    curve = h200.moe_curve("fp8_block", 7168, 2048, 8, 256, 1, 8)
    assert pricer is not None and curve is not None and curve.shape_how == "measured"
    assert pricer(1024) == curve.price(1024)
    alone = Silicon(h200, Sharding(tensor=8, expert=8)).pricer(
        step("deepseek-ai/DeepSeek-V3", Sharding(tensor=8, expert=8))["experts"]
    )
    assert alone is not None and alone(256) == curve.price(256)


def test_latent_attention_is_priced_without_the_projections(h200: KernelTables) -> None:
    """A decode step of one attention layer is the timed module, less the time of the host."""
    parts = step("moonshotai/Kimi-K2.5", Sharding(tensor=4))
    decode, prefill = parts["mla_generation"], parts["mla_context"]
    assert isinstance(decode, AttentionKernel) and decode.heads == 16
    silicon = Silicon(h200, Sharding(tensor=4))
    on_decodes, on_prefills = silicon.pricer(decode), silicon.pricer(prefill)
    generation, module = h200.latent_generation(16), h200.mla_generation(16)
    assert on_decodes is not None and on_prefills is not None and generation is not None and module is not None
    assert on_decodes(8, 8, 8 * 4096) == generation.price(8, 8 * 4096)
    assert on_decodes(8, 8, 8 * 4096)[0] < module.ns(8, 8 * 4096)
    fresh, how = on_prefills(1, 1024, 0, int(causal_pairs(1024)))
    later, _ = on_prefills(1, 1024, 4096, int(1024 * 4096 + causal_pairs(1024)))
    rebuilt = h200.gemm("bf16", 4096, 16 * 256, 512)
    assert rebuilt is not None and how in ("interpolated", "extrapolated")
    assert later > fresh + rebuilt[0]


def test_latent_attention_of_other_widths_has_no_table(h200: KernelTables) -> None:
    sparse = step("deepseek-ai/DeepSeek-V3.2", Sharding(tensor=8))["mla_generation"]
    assert Silicon(h200, Sharding(tensor=8)).pricer(sparse) is None
