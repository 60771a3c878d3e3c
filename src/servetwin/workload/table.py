"""The requests of a workload, column by column, so that a million of them fit in little memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from servetwin.workload.dependence import Dependence
from servetwin.workload.dependence import Ints as Ints

Segment = tuple[int, int]
"""A run of prompt tokens `(seed, length)`: token j of seed s is the pair (s, j). Two tokens are the same token exactly
when both seed and j agree, so identity needs no token ids. Seeds >= 0 are the workload's own; see
`RequestTable.output_seed` for the others."""


@dataclass(frozen=True)
class RequestTable:
    """One row a request, ordered by the workload file (row number = `request` of the results).

    `arrival_ns` has one entry a request (ns from the start of the run, not necessarily sorted). In a closed loop
    (`concurrency` set) arrival_ns holds earliest start times, and the runtime releases the next request, in row order,
    as soon as fewer than `concurrency` are unfinished.

    With `waits_for`, rows are turns of sessions (column `session`). Only a root comes at its arrival_ns; for the others
    that column repeats the one of their session and is not read. The places of a closed loop then hold sessions, each
    from its first release to the end of its last request, tools included.

    `segments[r]` is the prompt of request r as segments whose lengths add up to input_tokens[r]; `segments` None means
    that all prompts are distinct. `token_ids[r]`, where a trace has real ids, replaces `segments` (int32 array,
    len = input_tokens[r]). Where `extends[r]` = p is not -1, the prompt of r opens with the whole prompt of p and the
    output of p (an earlier turn), input_tokens[p] + output_tokens[p] tokens, and segments[r] are only the tokens after
    that.
    """

    arrival_ns: Ints
    input_tokens: Ints
    output_tokens: Ints
    segments: Sequence[Sequence[Segment]] | None = None
    token_ids: Sequence[NDArray[np.int32]] | None = None
    output_ids: Sequence[NDArray[np.int32]] | None = None
    """beside `token_ids`: real ids of the output (len = output_tokens[r], or empty where they are not known)"""
    session: Ints | None = None
    """number of the session of a request, -1 = none"""
    waits_for: Dependence | None = None
    extends: Ints | None = None
    model: Ints | None = None
    """index into `models` of the model that a request asks for; None: all ask for the scenario's"""
    models: tuple[str, ...] = ()
    priority: Ints | None = None
    abort_ns: Ints | None = None
    """absolute time at which the client gives up, if its request comes at arrival_ns; -1 = never. Where a request is
    released later, the client waits for as long from then on"""
    concurrency: int | None = None
    output_known: bool = True
    """False: outputs end at a stop token which the scheduler does not foresee"""
    at_engine: bool = False
    """arrivals are when the engine queued the request: the front end's time has passed already"""
    source: str = "synthetic"
    sha256: str | None = None
    """hash of the trace file, None for a synthetic workload"""
    notes: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.input_tokens)

    @property
    def roots(self) -> NDArray[np.bool_]:
        """Mask of the rows that come at their own arrival_ns."""
        return np.ones(len(self), np.bool_) if self.waits_for is None else self.waits_for.roots

    def units(self) -> Ints:
        """What is released, counted and cut as one, shape (rows,): a session with its turns, or a request of none.

        Units are numbered from 0 in the order of their first rows. Without `waits_for` each request is one of its own:
        there a session is no more than a label.
        """
        rows = np.arange(len(self))
        if self.waits_for is None or self.session is None:
            return rows
        label = np.where(self.session < 0, -1 - rows, self.session)
        _, first, unit = np.unique(label, return_index=True, return_inverse=True)
        return np.argsort(np.argsort(first))[unit]

    def take(self, rows: Ints) -> RequestTable:
        """The table of `rows` alone, numbered anew. Rows that another one waits for must not be left behind."""
        new_of = np.full(len(self), -1)
        new_of[rows] = np.arange(len(rows))
        columns = ("arrival_ns", "input_tokens", "output_tokens", "session", "model", "priority", "abort_ns")
        lists = ("token_ids", "output_ids")
        changes: dict[str, object] = {
            name: getattr(self, name)[rows] for name in columns if getattr(self, name) is not None
        }
        changes |= {
            name: [getattr(self, name)[row] for row in rows] for name in lists if getattr(self, name) is not None
        }
        if self.segments is not None:
            changes["segments"] = [self._renumbered(self.segments[row], new_of) for row in rows.tolist()]
        if self.waits_for is not None:
            changes["waits_for"] = self.waits_for.take(rows, new_of)
        if self.extends is not None:
            before = self.extends[rows]
            changes["extends"] = np.where(before < 0, -1, new_of[before])
        return replace(self, **changes)  # type: ignore[arg-type]

    def _renumbered(self, prompt: Sequence[Segment], new_of: Ints) -> Sequence[Segment]:
        """`prompt` with the new seeds of the outputs that it quotes; one left behind gets a seed that nobody has."""
        if all(seed >= 0 for seed, _ in prompt):
            return prompt
        quoted = {seed: int(new_of[-1 - seed]) for seed, _ in prompt if -len(self) <= seed < 0}
        return [
            (seed if seed >= 0 else -1 - quoted[seed] if quoted.get(seed, -1) >= 0 else seed - len(self), tokens)
            for seed, tokens in prompt
        ]

    @staticmethod
    def output_seed(request: int) -> int:
        """Seed of the tokens that `request` generates (negative, so that it never meets a prompt's own seed)."""
        return -1 - request
