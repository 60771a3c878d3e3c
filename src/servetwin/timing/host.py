"""Time that the host spends around a step: scheduling, input preparation, output handling, the front end."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HostOverhead:
    """Host times of one engine version, integer ns.

    A step costs `step_ns + seq_ns * sequences` on the host before the device may start. With asynchronous scheduling
    that work overlaps the step before it; `gap_ns + gap_seq_ns * sequences` (launch and sampling hand-over) never does.
    `request_ns` passes between a client's request and its arrival in the engine (parsing, delivery), and
    `request_token_ns` a token while its prompt is tokenised (see `servetwin.cluster.frontend`).
    """

    step_ns: int = 0
    seq_ns: int = 0
    gap_ns: int = 0
    gap_seq_ns: int = 0
    gap_error_ns: int = 0
    """one standard deviation of what is known of the gap of a step"""
    request_ns: int = 0
    request_token_ns: int = 0

    def before(self, seqs: int) -> int:
        return self.step_ns + self.seq_ns * seqs

    def gap(self, seqs: int) -> int:
        return self.gap_ns + self.gap_seq_ns * seqs


NO_OVERHEAD = HostOverhead()
