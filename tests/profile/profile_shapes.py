"""Step shapes from lists of (new tokens, computed tokens)."""

from __future__ import annotations

from servetwin.timing.shape import StepShape


def shape(prefills: list[tuple[int, int]], decodes: list[int]) -> StepShape:
    """`prefills` are (q, c), `decodes` computed tokens."""
    return StepShape(
        prefill_seqs=len(prefills),
        prefill_tokens=sum(q for q, _ in prefills),
        prefill_context=sum(c for _, c in prefills),
        prefill_pairs=sum(q * c + q * (q + 1) // 2 for q, c in prefills),
        decode_seqs=len(decodes),
        decode_tokens=len(decodes),
        decode_context=sum(decodes),
        decode_max=max(decodes, default=0),
        decode_min=min(decodes, default=0),
    )
