"""What a timing source needs to know about one engine step."""

from __future__ import annotations

from typing import NamedTuple


class StepShape(NamedTuple):
    """The work of one engine step, summed over its sequences (all fields are counts, `int`).

    For a scheduled sequence, let c be its computed tokens before the step and q its new tokens. A sequence is a
    *decode*
    when q = 1 or when it carries draft tokens, else a *prefill* (so the one-token rest of a prompt counts as a decode,
    as in the attention kernels).
    """

    prefill_seqs: int
    prefill_tokens: int
    """sum of q over the prefills"""
    prefill_context: int
    """sum of c over the prefills"""
    prefill_pairs: int
    """query-key pairs that causal attention computes for the prefills: sum of q*c + q*(q+1)/2"""
    decode_seqs: int
    decode_tokens: int
    """sum of q over the decodes (= decode_seqs unless there are draft tokens)"""
    decode_context: int
    """sum of c over the decodes"""
    decode_max: int
    """largest c of a decode, 0 when there is none"""
    decode_min: int
    """smallest c of a decode, 0 when there is none"""

    @property
    def tokens(self) -> int:
        """New tokens of the whole step."""
        return self.prefill_tokens + self.decode_tokens

    @property
    def seqs(self) -> int:
        return self.prefill_seqs + self.decode_seqs

    @property
    def logits(self) -> int:
        """Rows of the output projection: one a prefill (also of an unfinished chunk), one a decode token."""
        return self.prefill_seqs + self.decode_tokens

    @property
    def context(self) -> int:
        """Computed tokens before the step plus new tokens, over all sequences."""
        return self.prefill_context + self.prefill_tokens + self.decode_context + self.decode_tokens

    def later(self, steps: int) -> StepShape:
        """The shape of the same pure-decode batch `steps` steps later (each sequence has grown by as many tokens)."""
        return StepShape(
            self.prefill_seqs,
            self.prefill_tokens,
            self.prefill_context,
            self.prefill_pairs,
            self.decode_seqs,
            self.decode_tokens,
            self.decode_context + steps * self.decode_seqs,
            self.decode_max + steps,
            self.decode_min + steps,
        )
