"""The requests of a workload, column by column, so that a million of them fit in little memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
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

    `segments[r]` is the prompt of request r as segments whose lengths add up to input_tokens[r]; `segments` None means
    that all prompts are distinct. `token_ids[r]`, where a trace has real ids, replaces `segments` (int32 array,
    len = input_tokens[r]).
    """

    arrival_ns: Ints
    input_tokens: Ints
    output_tokens: Ints
    segments: Sequence[Sequence[Segment]] | None = None
    token_ids: Sequence[NDArray[np.int32]] | None = None
    session: Ints | None = None
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

    @staticmethod
    def output_seed(request: int) -> int:
        """Seed of the tokens that `request` generates (negative, so that it never meets a prompt's own seed)."""
        return -1 - request
