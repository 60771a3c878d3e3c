"""Prompts that begin alike: groups of requests that share a prefix (a system prompt, a document)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from servetwin.errors import InputError
from servetwin.workload.identity import own_seed
from servetwin.workload.lengths import draw_lengths, power_law
from servetwin.workload.streams import stream
from servetwin.workload.table import Ints, Segment

if TYPE_CHECKING:
    from servetwin.scenario.schema import Prefixes

MOST_GROUPS = 1 << 24


def prefixed_prompts(prefixes: Prefixes, input_tokens: Ints, seed: int, base: Path) -> list[list[Segment]]:
    """The prompt of each request as segments: first the prefix of its group (seed = group), then tokens of its own.

    The prefix counts as part of `input_tokens`; a prompt that is shorter than it is a prefix of the prefix. Each group
    draws one prefix length. A request falls into group g with equal probability, or, under `{zipf: alpha}`, with one
    proportional to (g + 1)^-alpha.

    Raises `InputError` for a bad file of lengths or more than 2^24 groups.
    """
    if prefixes.groups > MOST_GROUPS:
        raise InputError("too many groups", field="groups", found=prefixes.groups, allowed=f"up to {MOST_GROUPS}")
    count = len(input_tokens)
    random = stream(seed, "prefix_groups")
    if prefixes.popularity == "uniform":
        group = random.integers(0, prefixes.groups, count)
    else:
        group = power_law(prefixes.popularity.zipf, 1, prefixes.groups, count, random)
    length = draw_lengths(prefixes.tokens, prefixes.groups, stream(seed, "prefix_tokens"), base)
    shared = length[group].clip(max=input_tokens)
    own = input_tokens - shared
    return [
        [(g, head), (own_seed(request), tail)] if tail else [(g, head)]
        for request, (g, head, tail) in enumerate(zip(group.tolist(), shared.tolist(), own.tolist(), strict=True))
    ]
