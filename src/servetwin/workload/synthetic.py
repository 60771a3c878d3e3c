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
    from servetwin.scenario.schema import Lengths, Prefixes, SyntheticWorkload


def synthetic(workload: SyntheticWorkload, seed: int, base: Path) -> RequestTable:
    """Draw `workload.requests` requests: arrivals, lengths, prefixes, models, priorities and patience, each from a
    stream of its own.

    Raises `InputError` with the field of the scenario that is wrong.
    """
    count, arrivals = workload.requests, workload.arrivals
    input_tokens = tokens_of("input_tokens", workload.input_tokens, count, seed, base)
    arrival_ns = arrival_times(arrivals, count, stream(seed, "arrivals"))
    model, models = models_of(workload.models, count, seed)
    patience = None if workload.patience is None else draw_times(workload.patience, count, stream(seed, "patience"))
    return RequestTable(
        arrival_ns=arrival_ns,
        input_tokens=input_tokens,
        output_tokens=tokens_of("output_tokens", workload.output_tokens, count, seed, base),
        segments=prompts_of(workload.prefixes, input_tokens, seed, base),
        model=model,
        models=models,
        priority=priorities_of(workload.priorities, count, seed),
        abort_ns=None if patience is None else arrival_ns + patience,
        concurrency=arrivals.concurrency if arrivals.process == "closed_loop" else None,
        output_known=workload.output_ends == "length",
    )


def tokens_of(name: str, lengths: Lengths, count: int, seed: int, base: Path) -> Ints:
    """`count` lengths for the field `workload.<name>`, from the stream of that name. Raises `InputError` naming it."""
    try:
        return draw_lengths(lengths, count, stream(seed, name), base)
    except InputError as error:
        raise error.at(field=f"workload.{name}") from None


def prompts_of(prefixes: Prefixes | None, input_tokens: Ints, seed: int, base: Path) -> list[list[Segment]] | None:
    """The prompts as segments where they share prefixes. Raises `InputError` naming the field."""
    if prefixes is None:
        return None
    try:
        return prefixed_prompts(prefixes, input_tokens, seed, base)
    except InputError as error:
        raise error.at(field="workload.prefixes") from None


def models_of(weights: dict[str, float] | None, count: int, seed: int) -> tuple[Ints | None, tuple[str, ...]]:
    """Index of the model that each request asks for, drawn in proportion to the weights, and the models' names."""
    if weights is None:
        return None, ()
    return _weighted(list(weights.values()), count, stream(seed, "models")), tuple(weights)


def priorities_of(weights: list[float] | None, count: int, seed: int) -> Ints | None:
    """Class 0 … len(weights)-1 of each request, drawn in proportion to `weights`."""
    return None if weights is None else _weighted(weights, count, stream(seed, "priorities"))


def _weighted(weights: list[float], count: int, random: np.random.Generator) -> Ints:
    share = np.asarray(weights, np.float64)
    return random.choice(len(weights), count, p=share / share.sum()).astype(np.int64)
