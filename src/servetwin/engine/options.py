"""What one engine's scheduler is told: vLLM's options, resolved to numbers, and the switches of its version."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from servetwin.memory.blocks import BlockPool
from servetwin.memory.counted import CountedKV
from servetwin.memory.full import FullKV
from servetwin.memory.kv import KVCache, groups_for
from servetwin.memory.tables import TablePool


@dataclass(frozen=True)
class SchedulerOptions:
    """Names as in vLLM. `usable_blocks`: KV blocks without the null block. `max_batches`: batches in flight."""

    usable_blocks: int
    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    block_size: int = 16
    max_num_active_seqs: int | None = None
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    long_prefill_token_threshold_adaptive: bool = False
    scheduler_reserve_full_isl: bool = True
    watermark: float = 0.0
    priority: bool = False
    async_scheduling: bool = False
    pipeline: int = 1
    speculative_tokens: int = 0
    accepted_drafts: int | None = None
    """how many of `speculative_tokens` the model accepts in every step; None: that is drawn"""
    lookahead_tokens: int = 0
    prefill_schedule_interval: int = 1
    windows: tuple[int | Literal["state"] | None, ...] = (None,)
    """one entry a KV group: None = full attention, else its sliding window; "state" = a recurrent state"""
    kv_consumer: bool = False
    kv_producer: bool = False
    unkeyed_blocks_first: bool = True
    """freed blocks without a cached key are reused first (older engines: last)"""
    priority_self_preemption_continues: bool = True
    """priority policy: after a request preempted itself, the ones behind it are still tried (0.33)"""
    commits_drafts_at_output: bool = True
    """speculative decoding: blocks filled by accepted drafts become findable with the output (0.33), not only when the
    next step is scheduled"""
    sliding_replay_tails: bool = True
    """sliding-window groups cache only the windows at which a later request can resume (see `KVCache`)"""
    lone_prefill_unlimited: bool = True
    """long_prefill_token_threshold does not hold for a request that is alone"""

    @property
    def max_batches(self) -> int:
        """Batches in flight: two when scheduling runs ahead of the device, one a stage in a pipeline."""
        return max(2 if self.async_scheduling else 1, self.pipeline)

    @property
    def decode_width(self) -> int:
        """Tokens that a step computes of a request past its prompt: the last known one and drafts."""
        return 1 + self.speculative_tokens

    @property
    def decode_growth(self) -> int:
        """How many of them it keeps, where that is known of every step."""
        return 1 + (self.accepted_drafts or 0)

    def new_kv_cache(self, shared: bool = True) -> KVCache | FullKV | CountedKV:
        """An empty KV cache of the size and with the groups that these options name.

        `shared` False: no two requests have a prefix in common (or none would be found), and nobody asks for blocks.
        """
        transfers = self.kv_consumer or self.kv_producer
        if self.windows == (None,) and not transfers:
            if shared and self.enable_prefix_caching:
                pool = TablePool(self.usable_blocks, self.unkeyed_blocks_first)
                return FullKV(pool, self.block_size, self.max_model_len)
            return CountedKV(
                self.usable_blocks,
                self.block_size,
                self.max_model_len,
                self.enable_prefix_caching,
                self.unkeyed_blocks_first,
            )
        groups = groups_for(
            self.windows, self.block_size, self.max_batches, self.max_num_batched_tokens, self.max_model_len
        )
        return KVCache(
            BlockPool(self.usable_blocks, self.unkeyed_blocks_first),
            self.block_size,
            self.max_model_len,
            self.enable_prefix_caching,
            groups,
            self.sliding_replay_tails,
        )
