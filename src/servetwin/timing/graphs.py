"""CUDA graphs: steps are padded to the sizes that the engine captured."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from servetwin import catalog
from servetwin.scenario.schema import Pool


def capture_sizes(max_num_seqs: int, drafts: int = 0, largest: int = 512) -> list[int]:
    """The token counts for which vLLM captures graphs by default (0.32, 0.33): 1, 2, 4, multiples of 8 up to 248, then
    of 16 up to twice `max_num_seqs` (1 + drafts) tokens, at most `largest`."""
    limit = min(max_num_seqs * (1 + drafts) * 2, largest)
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, limit + 1, 16)]
    return [size for size in sizes if size <= limit]


def graph_sizes(pool: Pool) -> list[int]:
    """The sizes that the engines of a resolved pool capture; none where they run without graphs."""
    engine = pool.engine
    if catalog.device(pool.device).kind != "gpu" or engine.enforce_eager:
        return []
    assert engine.max_num_seqs is not None
    return capture_sizes(engine.max_num_seqs, engine.num_speculative_tokens or 0)


def padding(sizes: list[int]) -> Callable[[int, int], int]:
    """Tokens that a step computes, for (its tokens, its prefills): the next captured size, or as they are beyond the
    largest. Decode steps replay whole graphs, mixed ones piecewise graphs of the same sizes."""

    def padded(tokens: int, prefills: int) -> int:
        at = bisect_left(sizes, tokens)
        return sizes[at] if at < len(sizes) else tokens

    return padded
