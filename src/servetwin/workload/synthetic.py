"""A workload drawn from distributions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from servetwin.errors import InputError
from servetwin.workload.arrivals import arrival_times
from servetwin.workload.lengths import draw_lengths, draw_times
from servetwin.workload.prefixes import prefixed_prompts
from servetwin.workload.streams import stream
from servetwin.workload.table import Ints, RequestTable, Segment

if TYPE_CHECKING:
    from servetwin.scenario.schema import Lengths, SyntheticWorkload


def synthetic(workload: SyntheticWorkload, seed: int, base: Path) -> RequestTable:
    """Draw `workload.requests` requests; arrivals, lengths, prefixes, priorities, patience each from their own stream.

    Raises `InputError` with the field of the scenario that is wrong.
    """
    count, arrivals = workload.requests, workload.arrivals

    def tokens(name: str, lengths: Lengths) -> Ints:
        try:
            return draw_lengths(lengths, count, stream(seed, name), base)
        except InputError as error:
            raise error.at(field=f"workload.{name}") from None

    input_tokens = tokens("input_tokens", workload.input_tokens)
    arrival_ns = arrival_times(arrivals, count, stream(seed, "arrivals"))
    patience = None if workload.patience is None else draw_times(workload.patience, count, stream(seed, "patience"))
    return RequestTable(
        arrival_ns=arrival_ns,
        input_tokens=input_tokens,
        output_tokens=tokens("output_tokens", workload.output_tokens),
        segments=_prompts(workload, input_tokens, seed, base),
        priority=_priorities(workload.priorities, count, seed),
        abort_ns=None if patience is None else arrival_ns + patience,
        concurrency=arrivals.concurrency if arrivals.process == "closed_loop" else None,
        output_known=workload.output_ends == "length",
    )


def _prompts(workload: SyntheticWorkload, input_tokens: Ints, seed: int, base: Path) -> list[list[Segment]] | None:
    if workload.prefixes is None:
        return None
    try:
        return prefixed_prompts(workload.prefixes, input_tokens, seed, base)
    except InputError as error:
        raise error.at(field="workload.prefixes") from None


def _priorities(weights: list[float] | None, count: int, seed: int) -> Ints | None:
    """Class 0 … len(weights)-1 of each request, drawn in proportion to `weights`."""
    if weights is None:
        return None
    share = np.asarray(weights, np.float64)
    return stream(seed, "priorities").choice(len(weights), count, p=share / share.sum()).astype(np.int64)
