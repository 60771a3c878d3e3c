"""Agentic sessions drawn from distributions: turns that extend a conversation, tools between them, fan-out and join."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from servetwin.errors import InputError
from servetwin.workload.arrivals import arrival_times
from servetwin.workload.dependence import Dependence
from servetwin.workload.identity import own_seed
from servetwin.workload.lengths import draw_times
from servetwin.workload.readers.source import MOST_TOKENS
from servetwin.workload.segments import SegmentRows
from servetwin.workload.streams import stream
from servetwin.workload.synthetic import models_of, priorities_of, prompts_of, tokens_of
from servetwin.workload.table import Ints, RequestTable

if TYPE_CHECKING:
    from servetwin.scenario.schema import FanOut, SessionWorkload


def agentic(workload: SessionWorkload, seed: int, base: Path) -> RequestTable:
    """Draw `workload.sessions` sessions; the rows of one follow each other, branches right behind the turn they leave.

    A turn's prompt is that of the turn before, its output, with a join the outputs of the branches between them (in
    their order), and new tokens. A branch's prompt is that of its turn, its output, and new tokens. Every wait is one
    draw of `tool_time`.

    Raises `InputError` with the field of the scenario that is wrong.
    """
    count, arrivals = workload.sessions, workload.arrivals
    turns = tokens_of("turns", workload.turns, count, seed, base)
    first = turns.cumsum() - turns  # of the main line: turns alone, without branches
    main = int(turns.sum())
    session = np.repeat(np.arange(count), turns)
    opens = np.zeros(main, np.bool_)
    opens[first] = True
    new = tokens_of("input_tokens", workload.input_tokens, main, seed, base)
    new[first] = tokens_of("first_input_tokens", workload.first_input_tokens, count, seed, base)
    outputs = tokens_of("output_tokens", workload.output_tokens, main, seed, base)

    width = np.zeros(main, np.int64)
    if workload.fan_out is not None:
        width = _widths(workload.fan_out, np.append(~opens[1:], False), seed, base)
    branches = int(width.sum())
    # Rows: a turn, the branches that leave it, the next turn.
    row_of = np.arange(main) + width.cumsum() - width
    rows = main + branches
    branch = np.ones(rows, np.bool_)
    branch[row_of] = False
    leaves = np.repeat(np.arange(main), width)  # the turn that each branch leaves

    branch_new = branch_outputs = np.zeros(0, np.int64)
    heard = np.zeros(main, np.int64)  # tokens of branches that the next turn reads
    joins = np.zeros(main, np.bool_)
    if workload.fan_out is not None:
        branch_new = tokens_of("fan_out.input_tokens", workload.fan_out.input_tokens, branches, seed, base)
        branch_outputs = tokens_of("fan_out.output_tokens", workload.fan_out.output_tokens, branches, seed, base)
        if workload.fan_out.join:
            joins = width > 0
            np.add.at(heard, leaves, branch_outputs)

    follows = np.flatnonzero(~opens)
    grows = new.copy()
    grows[follows] += outputs[follows - 1] + heard[follows - 1]
    total = grows.cumsum()
    prompts = total - np.repeat(total[first] - grows[first], turns)
    input_tokens, output_tokens = np.empty(rows, np.int64), np.empty(rows, np.int64)
    input_tokens[row_of], output_tokens[row_of] = prompts, outputs
    input_tokens[branch], output_tokens[branch] = (prompts + outputs)[leaves] + branch_new, branch_outputs
    if input_tokens.max() > MOST_TOKENS:
        raise InputError(
            "conversations get too long",
            field="workload.turns",
            found=int(input_tokens.max()),
            allowed=f"prompts of up to {MOST_TOKENS} tokens",
        )

    extends = np.full(rows, -1)
    extends[row_of[follows]], extends[branch] = row_of[follows - 1], row_of[leaves]
    # A row's parents are neighbours: the turn before it, or the branches right behind that turn.
    parents, begin = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    parents[branch], begin[branch] = 1, row_of[leaves]
    joined = joins[follows - 1]
    parents[row_of[follows]] = np.where(joined, width[follows - 1], 1)
    begin[row_of[follows]] = row_of[follows - 1] + joined
    offsets = np.concatenate(([0], parents.cumsum()))
    flat = np.repeat(begin - offsets[:-1], parents) + np.arange(offsets[-1])
    delay = np.zeros(rows, np.int64)
    waits = parents > 0
    delay[waits] = draw_times(workload.tool_time, int(waits.sum()), stream(seed, "tool_time"))

    in_session = np.empty(rows, np.int64)
    in_session[row_of], in_session[branch] = session, session[leaves]
    priority = priorities_of(workload.priorities, count, seed)
    model, models = models_of(workload.models, count, seed)
    return RequestTable(
        arrival_ns=arrival_times(arrivals, count, stream(seed, "arrivals"))[in_session],
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        segments=_prefixed(workload, input_tokens, output_tokens, extends, row_of[first], seed, base),
        session=in_session,
        waits_for=Dependence(offsets, flat, delay),
        extends=extends,
        model=None if model is None else model[in_session],
        models=models,
        priority=None if priority is None else priority[in_session],
        concurrency=arrivals.concurrency if arrivals.process == "closed_loop" else None,
        output_known=workload.output_ends == "length",
    )


def _widths(fan_out: FanOut, may: np.ndarray[tuple[int], np.dtype[np.bool_]], seed: int, base: Path) -> Ints:
    """Number of branches that leave each turn of the main line; `may`: whether a turn has one after it."""
    width = tokens_of("fan_out.width", fan_out.width, len(may), seed, base)
    fans = may & (stream(seed, "fan_out.chance").random(len(may)) < fan_out.chance)
    return np.where(fans, width, 0)


def _prefixed(
    workload: SessionWorkload, inputs: Ints, outputs: Ints, extends: Ints, roots: Ints, seed: int, base: Path
) -> SegmentRows | None:
    """With prefixes, what is new in each prompt: of a first one the shared prefix and the rest, of others the rest."""
    shared = prompts_of(workload.prefixes, inputs[roots], seed, base)
    if shared is None:
        return None
    head = np.zeros(len(inputs), np.int64)
    group = np.zeros(len(inputs), np.int64)
    head[roots] = [prompt[0][1] for prompt in shared]
    group[roots] = [prompt[0][0] for prompt in shared]
    tail = inputs - head - np.where(extends < 0, 0, inputs[extends] + outputs[extends])
    seeds = np.stack((group, own_seed(0) + np.arange(len(inputs))), axis=1).ravel()
    lengths = np.stack((head, tail), axis=1).ravel()
    kept = lengths > 0
    offsets = np.concatenate(([0], kept.reshape(-1, 2).sum(axis=1).cumsum()))
    return SegmentRows(offsets, seeds[kept], lengths[kept])
