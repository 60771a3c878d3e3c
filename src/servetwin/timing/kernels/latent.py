"""The attention alone of latent-attention modules, which were timed whole (see `mla`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from servetwin.timing.kernels.attention import Surface
from servetwin.timing.kernels.curve import Curve, Floats, How, worst
from servetwin.timing.kernels.mla import MlaTable

if TYPE_CHECKING:
    from servetwin.timing.kernels.tables import KernelTables

Phase = Literal["context", "generation"]


@dataclass(frozen=True)
class Module:
    """Widths of a latent-attention module (names as in a Hugging Face config). A product is (n, k), one rank's."""

    hidden: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope: int
    qk_rope: int
    v: int

    @property
    def latent(self) -> int:
        """Elements that the cache keeps of a token."""
        return self.kv_lora_rank + self.qk_rope

    @property
    def context_widths(self) -> tuple[int, int]:
        """A head's width of keys and of values in prefill, which rebuilds both."""
        return self.qk_nope + self.qk_rope, self.v

    @property
    def generation_widths(self) -> tuple[int, int]:
        """The same in decode, which attends to the latents."""
        return self.latent, self.kv_lora_rank

    def kv_up(self, heads: int) -> tuple[int, int]:
        """The product that rebuilds keys and values."""
        return heads * (self.qk_nope + self.v), self.kv_lora_rank

    def projections(self, heads: int) -> list[tuple[int, int]]:
        """Its products: q_a and kv_a in one, q_b, kv_b, o. Decode spends that of kv_b before and after attention."""
        down = (self.q_lora_rank + self.latent, self.hidden)
        up = (heads * (self.qk_nope + self.qk_rope), self.q_lora_rank)
        return [down, up, self.kv_up(heads), (self.hidden, heads * self.v)]

    def small_kernels(self, heads: int, kv_bytes: int) -> list[int]:
        """Bytes that its small kernels move a token: norms of the latents, rotary embedding, KV write; activations
        of two bytes."""
        return [
            2 * 2 * (self.q_lora_rank + self.kv_lora_rank),
            2 * 2 * (heads + 1) * self.qk_rope,
            (2 + kv_bytes) * self.latent,
        ]

    def context_work(self, heads: int, kv_bytes: int, batch: Floats, length: Floats) -> tuple[Floats, Floats]:
        """FLOPs and bytes from memory of the attention over whole prompts."""
        pairs = batch * length * (length + 1) / 2
        return 2 * heads * sum(self.context_widths) * pairs, batch * length * self.latent * kv_bytes

    def generation_work(self, heads: int, kv_bytes: int, batch: Floats, length: Floats) -> tuple[Floats, Floats]:
        """The same of one new token a sequence over `length` keys."""
        keys = batch * length
        return 2 * heads * sum(self.generation_widths) * keys, keys * self.latent * kv_bytes


DEEPSEEK = Module(hidden=7168, q_lora_rank=1536, kv_lora_rank=512, qk_nope=128, qk_rope=64, v=128)
"""The module that was timed: DeepSeek-V3 (its config.json; Kimi-K2 has the same widths)."""


def attention_part(tables: KernelTables, phase: Phase, heads: int, kv_dtype: str) -> Surface | None:
    """A module's time less that of its projections and small kernels, as this device's tables have them, less what its
    host spent (`idle_ns`), and not under the roofline of attention at peak rates.

    A difference of times, at best interpolated; extrapolated where the host's time is taken off, or when the KV format
    was not timed and the other one stands in. Absorbed products before and after attention are part of it in decode.
    """
    timed = next((kv for kv in (kv_dtype, "bf16", "fp8") if f"mla_{phase}_bf16_{kv}" in tables.profile.tables), None)
    columns = None if timed is None else tables.profile.columns(f"mla_{phase}_bf16_{timed}")
    products = [tables.gemm_curve("bf16", *product) for product in DEEPSEEK.projections(heads)]
    if timed is None or columns is None or None in products:
        return None
    kv_bytes = 1 if timed == "fp8" else 2
    table = MlaTable(columns)
    module = table.surface(heads)
    batch, length = np.meshgrid(np.array(module.batches, float), np.array(module.lengths, float), indexing="ij")
    idle = idle_ns(tables, phase, timed, table)
    work = DEEPSEEK.context_work if phase == "context" else DEEPSEEK.generation_work
    flops, moved = work(heads, kv_bytes, batch, length)
    least = np.maximum(flops / tables.device.flops["bf16"], moved / tables.device.memory_bandwidth) * 1e9
    rows = batch * length if phase == "context" else batch
    how: How = "extrapolated" if idle or timed != kv_dtype else "interpolated"
    times = np.maximum(module.ns - other_kernels_ns(tables, heads, kv_bytes, rows) - idle, least)
    return module._replace(ns=times, how=worst(module.how, how))


def other_kernels_ns(tables: KernelTables, heads: int, kv_bytes: int, rows: Floats) -> Floats:
    """Time of a module's projections and small kernels over `rows` tokens."""
    times = np.zeros_like(rows)
    for n, k in DEEPSEEK.projections(heads):
        curve: Curve | None = tables.gemm_curve("bf16", n, k)
        assert curve is not None
        times = times + curve.many(rows)
    for size in DEEPSEEK.small_kernels(heads, kv_bytes):
        fixed = tables.elementwise_ns(0)
        times = times + fixed + (tables.elementwise_ns(size) - fixed) * rows
    return times


def idle_ns(tables: KernelTables, phase: Phase, kv_dtype: str, table: MlaTable) -> float:
    """What the least module takes beyond its kernels: time in which the device waits for the host.

    A module of one head over one token has next to no work. On b200_sxm it takes what its kernels take; on others, of
    which gb200 has the same chip, 25 to 50 us more, whatever the heads, which an engine that replays CUDA graphs does
    not spend. Its kernels are those of `other_kernels_ns` and attention at the least time in its own table. Products
    with absorbed weights are hidden behind these when there is one head: b200_sxm leaves no time for them, and without
    them gb200 comes out as far above b200_sxm as it was timed.
    """
    heads = table.heads[0]
    module = table.surface(heads)
    rows = np.array([float(module.batches[0] * (module.lengths[0] if phase == "context" else 1))])
    spent = float(other_kernels_ns(tables, heads, 1 if kv_dtype == "fp8" else 2, rows)[0])
    attention = tables.profile.columns(f"{phase}_attention_{kv_dtype}")
    spent += tables.elementwise_ns(0) if attention is None else float(attention["ns"].min())
    return max(float(module.ns[0, 0]) - spent, 0.0)
