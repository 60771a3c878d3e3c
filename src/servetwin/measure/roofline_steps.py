"""Whole steps priced by the laws of the roofline, fitted without the device, against its own kernel tables.

    python -m servetwin.measure.roofline_steps

prints the table of docs/roofline.md. A tool for development. Collectives are left out: both price them alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from servetwin import catalog
from servetwin.measure.fit_efficiency import CHIPS, Laws, by_chip, fit, load
from servetwin.measure.kernel_points import TABLES
from servetwin.model import Sharding, dtypes_of, load_architecture
from servetwin.model.kernels import Collective, Operator
from servetwin.model.operators import operators
from servetwin.timing.kernels.tables import KernelTables
from servetwin.timing.operators import OperatorTimer, Source
from servetwin.timing.roofline import Roofline
from servetwin.timing.shape import StepShape
from servetwin.timing.silicon import Silicon

CASES = (
    ("meta-llama/Llama-3.1-70B", "fp8", 4, "h200_sxm"),
    ("meta-llama/Llama-3.1-8B", None, 1, "h100_sxm"),
    ("meta-llama/Llama-3.1-8B", None, 1, "a100_sxm"),
    ("meta-llama/Llama-3.1-8B", None, 1, "l40s"),
    ("meta-llama/Llama-3.1-8B", None, 1, "rtx_pro_6000"),
    ("openai/gpt-oss-120b", None, 2, "h100_sxm"),
    ("Qwen/Qwen3-30B-A3B", None, 1, "h200_sxm"),
    ("meta-llama/Llama-3.1-70B", "fp8", 4, "b200_sxm"),
)
"""model, quantisation, tensor-parallel degree, device"""


def decode(seqs: int, context: int) -> StepShape:
    """One token for each of `seqs` sequences of `context` tokens."""
    return StepShape(0, 0, 0, 0, seqs, seqs, seqs * context, context, context)


def prefill(seqs: int, tokens: int) -> StepShape:
    """Prompts of `tokens` tokens, nothing before them."""
    return StepShape(seqs, seqs * tokens, 0, seqs * tokens * (tokens + 1) // 2, 0, 0, 0, 0, 0)


STEPS = {
    "decode 1 x 1k": decode(1, 1024),
    "decode 16 x 2k": decode(16, 2048),
    "decode 64 x 2k": decode(64, 2048),
    "decode 256 x 1k": decode(256, 1024),
    "prefill 1 x 512": prefill(1, 512),
    "prefill 1 x 2k": prefill(1, 2048),
    "prefill 1 x 8k": prefill(1, 8192),
}


class Compared(NamedTuple):
    """One step: time by the device's own tables, and by laws that know nothing of its chip, in ns."""

    model: str
    device: str
    step: str
    silicon: int
    roofline: int

    @property
    def error(self) -> float:
        return self.roofline / self.silicon - 1


def compare(
    cases: Sequence[tuple[str, str | None, int, str]] = CASES, kinds: Sequence[str] = tuple(TABLES)
) -> Iterator[Compared]:
    """Every step of every case, with laws of the `kinds` of kernels that its model needs."""
    data = load(kinds)
    without: dict[str, Laws] = {}
    for model, quantization, tensor, name in cases:
        chip = CHIPS[name]
        if chip not in without:
            without[chip] = fit(data, by_chip()[chip])
        sharding = Sharding(tensor)
        arch = load_architecture(model)
        found = [
            op
            for op in operators(arch, dtypes_of(arch, quantization=quantization), sharding)
            if not isinstance(op, Collective)
        ]
        device = catalog.device(name)
        fitted = Roofline(device, fitted=without[chip])
        silicon = _timer(found, [Silicon(KernelTables.for_device(name), sharding), fitted])
        roofline = _timer(found, [fitted])
        for step, shape in STEPS.items():
            yield Compared(model, name, step, silicon.step_ns(shape), roofline.step_ns(shape))


def _timer(found: list[Operator], sources: list[Source]) -> OperatorTimer:
    return OperatorTimer(found, sources)


if __name__ == "__main__":
    for row in compare():
        print(
            f"{row.model} {row.device} | {row.step} | {row.silicon / 1e6:.2f} | {row.roofline / 1e6:.2f} "
            f"| {row.error:+.0%}"
        )
