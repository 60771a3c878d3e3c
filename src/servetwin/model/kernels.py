"""Operators of a step: the dimensions of one rank's work, and its FLOPs and bytes for a given `StepShape`.

A shape is anything with the fields of `servetwin.timing.shape.StepShape`; its fields may be `int`, or NumPy integer
arrays to price many steps at once (all formulas are plain arithmetic). FLOPs count a multiply-add as two. Bytes are the
least a kernel must move: every operand once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from servetwin.model.dtypes import BF16, Dtype

if TYPE_CHECKING:
    from servetwin.model.expert_placement import RankLoads

Kind = Literal[
    "embedding",
    "norm",
    "elementwise",
    "gemm",
    "context_attention",
    "generation_attention",
    "mla_context",
    "mla_generation",
    "indexer",
    "linear_attention",
    "moe",
    "sampler",
    "allreduce",
    "allgather",
    "reducescatter",
    "alltoall",
    "sendrecv",
]
Amount = Any
"""`int` or `float`; an array when the shape holds arrays"""


class Shape(Protocol):
    """The part of a StepShape that operators read (counts; see there)."""

    @property
    def prefill_seqs(self) -> Amount: ...
    @property
    def prefill_tokens(self) -> Amount: ...
    @property
    def prefill_context(self) -> Amount: ...
    @property
    def prefill_pairs(self) -> Amount: ...
    @property
    def decode_seqs(self) -> Amount: ...
    @property
    def decode_tokens(self) -> Amount: ...
    @property
    def decode_context(self) -> Amount: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """One kernel of one rank. On its own, a kernel that only moves bytes."""

    name: str
    kind: Kind
    stages: tuple[int, ...] = ()
    """how many times each pipeline stage runs it in a step"""
    rows: Literal["tokens", "logits", "decodes", "gathered", "step"] = "tokens"
    """what it runs over: all new tokens; only those whose logits are wanted; those of decodes; the tokens of all
    data-parallel ranks, padding included; or once a step, whatever is in it"""
    data: int = 1
    """of gathered rows: the ranks that bring them, each as many as this one where nothing else is said"""
    parts: int = 1
    """tensor-parallel ranks that deal the rows out among themselves"""
    every: int = 1
    """it runs in one of so many steps; its time is spread evenly over them"""
    read_a_row: int = 0
    """bytes"""
    written_a_row: int = 0
    dtype: Dtype = BF16

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that it holds."""
        return 0

    def count(self, shape: Shape) -> Amount:
        """Rows of the step, for one rank."""
        match self.rows:
            case "logits":
                return shape.prefill_seqs + shape.decode_tokens
            case "decodes":
                return shape.decode_tokens
            case "step":
                return 1
        tokens = shape.prefill_tokens + shape.decode_tokens
        if self.rows == "gathered":
            tokens = tokens * self.data
        return tokens if self.parts == 1 else -(-tokens // self.parts)

    def flops(self, shape: Shape) -> Amount:
        return 0

    def bytes_read(self, shape: Shape) -> Amount:
        """Bytes from memory: weights, activations and KV."""
        return self.count(shape) * self.read_a_row

    def bytes_written(self, shape: Shape) -> Amount:
        return self.count(shape) * self.written_a_row

    def kv_bytes(self, shape: Shape) -> Amount:
        """Of the bytes read, those of the KV cache or the recurrent state."""
        return 0

    def message_bytes(self, shape: Shape) -> Amount:
        """Bytes that a rank puts into a collective or a transfer."""
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemm(Operator):
    """rows x k times k x n."""

    kind: Kind = "gemm"
    n: int
    k: int
    activation: Dtype = BF16

    @property
    def weight_bytes(self) -> int:
        return self.dtype.bytes(self.n * self.k)

    def flops(self, shape: Shape) -> Amount:
        return 2 * self.n * self.k * self.count(shape)

    def bytes_read(self, shape: Shape) -> Amount:
        return self.weight_bytes + self.count(shape) * self.activation.bytes(self.k)

    def bytes_written(self, shape: Shape) -> Amount:
        return self.count(shape) * self.activation.bytes(self.n)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionKernel(Operator):
    """Attention over the KV cache, for the prefills (kind context_*) or the decodes (generation_*) of a step.

    `qk_dim` and `v_dim` are the widths a head of the two products, `kv_token_bytes` what one token keeps a layer.
    `window` also stands for the number of keys that a sparse indexer leaves.
    """

    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    kv_token_bytes: int
    window: int | None = None
    expand: int = 0
    """FLOPs to expand one cached token of a prefill (latent attention rebuilds its keys and values)"""
    context: int = 1
    """ranks over which the KV of every decode is dealt out; each attends with the query heads of all of them"""
    activation: Dtype = BF16

    @property
    def is_context(self) -> bool:
        return self.kind in ("context_attention", "mla_context")

    def count(self, shape: Shape) -> Amount:
        return shape.prefill_tokens if self.is_context else shape.decode_tokens

    def pairs(self, shape: Shape) -> Amount:
        """Query-key pairs. With a window: exact when the sequences are alike, else that of their mean."""
        if self.is_context:
            return context_pairs(shape, self.window)
        full = -(-decode_pairs(shape) // self.context)
        return full if self.window is None else least(full, shape.decode_tokens * self.window)

    def kv_tokens(self, shape: Shape) -> Amount:
        """Tokens whose keys and values are read."""
        if self.is_context:
            seqs, new, old = shape.prefill_seqs, shape.prefill_tokens, shape.prefill_context
        else:
            seqs, new, old = shape.decode_seqs, shape.decode_tokens, shape.decode_context
            if self.context > 1:
                return -(-(old + new) // self.context)
        return old + new if self.window is None else least(old + new, seqs * (self.window - 1) + new)

    def flops(self, shape: Shape) -> Amount:
        expand = self.expand * shape.prefill_context if self.expand else 0
        return 2 * self.heads * (self.qk_dim + self.v_dim) * self.pairs(shape) + expand

    def kv_bytes(self, shape: Shape) -> Amount:
        return self.kv_tokens(shape) * self.kv_token_bytes

    def bytes_read(self, shape: Shape) -> Amount:
        return self.kv_bytes(shape) + self.count(shape) * self.activation.bytes(self.heads * self.qk_dim)

    def bytes_written(self, shape: Shape) -> Amount:
        return self.count(shape) * self.activation.bytes(self.heads * self.v_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class Indexer(Operator):
    """Scores of every cached token for every query, to choose the keys of sparse attention (DeepSeek-V3.2)."""

    kind: Kind = "indexer"
    heads: int
    head_dim: int
    kv_token_bytes: int

    def flops(self, shape: Shape) -> Amount:
        return 2 * self.heads * self.head_dim * (shape.prefill_pairs + decode_pairs(shape))

    def kv_bytes(self, shape: Shape) -> Amount:
        old = shape.prefill_context + shape.decode_context
        return (old + shape.prefill_tokens + shape.decode_tokens) * self.kv_token_bytes

    def bytes_read(self, shape: Shape) -> Amount:
        return self.kv_bytes(shape) + self.count(shape) * self.read_a_row


@dataclass(frozen=True, slots=True, kw_only=True)
class Recurrence(Operator):
    """Linear attention or state space: reads and writes one state a sequence, whatever the length.

    Six FLOPs a state element and token: decay and update of the state, and the read-out (arXiv:2412.06464, eq. 10).
    """

    kind: Kind = "linear_attention"
    heads: int
    state: int
    """elements of the recurrent state"""
    state_bytes: int
    """of the recurrent and the convolution state"""

    def flops(self, shape: Shape) -> Amount:
        return 6 * self.state * self.count(shape)

    def kv_bytes(self, shape: Shape) -> Amount:
        return (shape.prefill_seqs + shape.decode_seqs) * self.state_bytes

    def bytes_read(self, shape: Shape) -> Amount:
        return self.kv_bytes(shape) + self.count(shape) * self.read_a_row

    def bytes_written(self, shape: Shape) -> Amount:
        return self.kv_bytes(shape) + self.count(shape) * self.written_a_row


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts(Operator):
    """The routed experts of a rank. Sizes are those of even routing, which are also the mean of all ranks under any
    other; `routing` says what each rank has to do where it is uneven (None: even)."""

    kind: Kind = "moe"
    experts: int
    """of the whole layer"""
    local_experts: int
    top_k: int
    hidden: int
    inter: int
    """a rank's share of an expert's width"""
    gated: bool = True
    redundant: int = 0
    """copies of popular experts beyond one of each"""
    routing: RankLoads | None = None
    activation: Dtype = BF16

    @property
    def _expert(self) -> int:
        return self.hidden * self.inter * (3 if self.gated else 2)

    @property
    def weight_bytes(self) -> int:
        return self.dtype.bytes(self._expert * self.local_experts)

    def pairs(self, shape: Shape) -> Amount:
        """Token-expert pairs that the rank computes."""
        return self.pairs_of(self.count(shape))

    def touched(self, shape: Shape) -> Amount:
        """Expected experts of the rank that get a token."""
        return self.touched_by(self.count(shape))

    def pairs_of(self, tokens: Amount) -> Amount:
        """Pairs that the rank computes of `tokens` of the whole group: T k e / E with e of E experts."""
        return tokens * self.top_k * self.local_experts / (self.experts + self.redundant)

    def touched_by(self, tokens: Amount) -> Amount:
        """Expected experts of the rank that some of `tokens` pick, `top_k` different ones each: e (1 - (1 - k/E)^T)."""
        return self.local_experts * (1 - (1 - self.top_k / (self.experts + self.redundant)) ** tokens)

    def work_of(self, tokens: int) -> Sequence[Sequence[tuple[float, float]]]:
        """(pairs, experts with a token) of every rank, in each of one or more equally likely outcomes."""
        if self.routing is None:
            return [[(self.pairs_of(tokens), self.touched_by(tokens))]]
        return self.routing.of(tokens)

    def flops(self, shape: Shape) -> Amount:
        return 2 * self._expert * self.pairs(shape)

    def bytes_read(self, shape: Shape) -> Amount:
        weights = self.touched(shape) * (self.weight_bytes / self.local_experts)
        return weights + self.pairs(shape) * self.activation.bytes(self.hidden + self.inter)

    def bytes_written(self, shape: Shape) -> Amount:
        return self.pairs(shape) * self.activation.bytes(self.hidden + self.inter * (2 if self.gated else 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective(Operator):
    """Ranks exchange data: all-reduce (bytes of the tensor reduced), all-gather (bytes of the whole result),
    reduce-scatter (bytes of the whole input), all-to-all (bytes that a rank sends, to itself included), send and
    receive to the next stage."""

    ranks: int
    group: Literal["tensor", "expert", "pipeline"] = field(default="tensor")
    bytes_a_row: int = 0

    def message_bytes(self, shape: Shape) -> Amount:
        return self.count(shape) * self.bytes_a_row


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertExchange(Collective):
    """One way of an all-to-all between tokens and the ranks of their experts, over the tokens of one rank."""

    kind: Kind = "alltoall"
    phase: Literal["dispatch", "combine"]
    hidden: int
    top_k: int
    experts: int


def least(a: Amount, b: Amount) -> Amount:
    """The smaller, of integers or arrays."""
    return (a + b - abs(a - b)) // 2


def decode_pairs(shape: Shape) -> Amount:
    """Query-key pairs of the decodes, drafts spread evenly: sum of q*c + q*(q+1)/2."""
    seqs, new, old = shape.decode_seqs, shape.decode_tokens, shape.decode_context
    return new * (2 * old + new + seqs) // (2 * (seqs + (seqs == 0)))


def context_pairs(shape: Shape, window: int | None) -> Amount:
    """Query-key pairs of the prefills. With a window w, of N sequences with mean computed tokens c and new tokens q:
    the first m = clip(w - c, 0, q) queries see all that is before them, the others w tokens."""
    if window is None:
        return shape.prefill_pairs
    seqs, new, old = shape.prefill_seqs, shape.prefill_tokens, shape.prefill_context
    early = least(new, seqs * window - old)
    early = (early + abs(early)) // 2
    some = seqs + (seqs == 0)
    return least(shape.prefill_pairs, early * (2 * old + early + seqs) // (2 * some) + (new - early) * window)
