"""What timers know, as tables that compiled code reads. Entries are made when a step first needs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from servetwin.engine.compiled import columns as c
from servetwin.timing.kernels.curve import HOWS, Curve, PowerCurve
from servetwin.timing.ledger import KINDS
from servetwin.timing.linear import LinearTimer
from servetwin.timing.operators import UNEVEN, OperatorTimer
from servetwin.timing.protocol import StepTimer
from servetwin.timing.shape import StepShape
from servetwin.timing.silicon import Decodes, Prompts

Ints = NDArray[np.int64]


def tells_all(timer: StepTimer) -> bool:
    """Whether tables can hold what `timer` does: the linear law, and sums of operators with attention from measured
    kernels."""
    if isinstance(timer, OperatorTimer):
        return (
            not timer.on_step
            and all(isinstance(pricer, Decodes) for _, pricer in timer.on_decodes)
            and all(isinstance(pricer, Prompts) for _, pricer in timer.on_prefills)
        )
    return type(timer) is LinearTimer


class Prices:
    """The prices of several timers, up to `tokens` new tokens and `seqs` sequences in a step.

    `tables` is what the kernel takes, in this order:

    - `timers` (timers, TIMER_COLUMNS): the law and its numbers;
    - `padded` (timers, tokens + 1): tokens that the device computes;
    - `dense` (timers, tokens + 1, kinds), `head` (timers, seqs + 1, kinds): ns by kind of knowledge of what depends on
      the padded tokens, or on the logits, alone; -1: not known yet;
    - `decode_line` (timers, parts, seqs + 1): which of the lines gives decode attention for so many sequences; -1: not
      known yet. `decode_parts` (timers, parts, 4) floats: factor, calls a step, most keys, share of the unevenness;
    - `prefill_line`, `prefill_parts`: the same of prefill attention; factor, calls, window, nothing;
    - `lines` (lines, 5, points) floats: x, y, slope or power, kind of knowledge at each point and behind it;
    - `places` (2 parts,): where the last look-ups on lines have ended, which the kernel notes.
    """

    def __init__(self, timers: Sequence[StepTimer], tokens: int, seqs: int) -> None:
        self._timers, count = timers, len(timers)
        by_operator = [timer for timer in timers if isinstance(timer, OperatorTimer)]
        parts = max([1, *(max(len(t.on_decodes), len(t.on_prefills)) for t in by_operator)])
        if not by_operator:
            tokens = seqs = 0
        self._laws = np.zeros((count, c.TIMER_COLUMNS), np.int64)
        self._padded = np.tile(np.arange(tokens + 1, dtype=np.int64), (count, 1))
        self._dense = np.full((count, tokens + 1, len(KINDS)), -1, np.int64)
        self._head = np.full((count, seqs + 1, len(KINDS)), -1, np.int64)
        self._line_of = [np.full((count, parts, seqs + 1), -1, np.int64) for _ in range(2)]
        self._parts = [np.zeros((count, parts, 4)) for _ in range(2)]
        self._lines, self._known = np.full((64, 5, 2), np.inf), 0
        self._places = np.zeros(2 * parts, np.int64)
        self.booked = np.zeros((count, len(KINDS)), np.int64)
        """ns priced by kind of knowledge, for each timer; the kernel adds to it"""
        for i, timer in enumerate(timers):
            if isinstance(timer, OperatorTimer):
                self._prepare(i, timer)
            else:
                assert isinstance(timer, LinearTimer)
                law = (timer.base_ns, timer.per_prefill_token_ns, timer.per_decode_seq_ns, timer.per_context_token_ns)
                self._laws[i, : c.DECODE_PARTS] = (c.LINEAR, *law)

    def _prepare(self, i: int, timer: OperatorTimer) -> None:
        self._laws[i, c.KIND] = c.BY_OPERATOR
        self._laws[i, c.DECODE_PARTS :] = len(timer.on_decodes), len(timer.on_prefills)
        if timer.padded is not None:
            # Pure decode and mixed steps are padded alike (see `servetwin.timing.graphs.padding`).
            widths = [timer.padded(tokens, 0) for tokens in range(self._padded.shape[1])]
            self._padded[i] = widths
            if max(widths) >= self._dense.shape[1]:
                more = np.full((len(self._timers), max(widths) + 1, len(KINDS)), -1, np.int64)
                more[:, : self._dense.shape[1]] = self._dense
                self._dense = more
        for part, (calls, pricer) in enumerate(timer.on_decodes):
            assert isinstance(pricer, Decodes)
            self._parts[0][i, part] = pricer.factor, calls, pricer.generation.clip or np.inf, UNEVEN
        for part, (calls, pricer) in enumerate(timer.on_prefills):
            assert isinstance(pricer, Prompts)
            self._parts[1][i, part] = pricer.factor, calls, pricer.context.window, 0

    @property
    def tables(self) -> tuple[Any, ...]:
        (decode_line, prefill_line), (decode_parts, prefill_parts) = self._line_of, self._parts
        known = self._laws, self._padded, self._dense, self._head
        return *known, decode_line, decode_parts, prefill_line, prefill_parts, self._lines, self._places

    def learn(self, i: int, shape: StepShape) -> None:
        """Make what the price of a step of `shape` by timer `i` needs."""
        timer = self._timers[i]
        assert isinstance(timer, OperatorTimer)
        tokens = int(self._padded[i, shape.tokens])
        self._dense[i, tokens] = timer.on_tokens(tokens)
        self._head[i, shape.logits] = timer.on_logits(shape.logits)
        for part, (_, pricer) in enumerate(timer.on_decodes if shape.decode_seqs else ()):
            assert isinstance(pricer, Decodes)
            self._draw(0, i, part, shape.decode_seqs, pricer.generation.curve(shape.decode_seqs))
        for part, (_, pricer) in enumerate(timer.on_prefills if shape.prefill_seqs else ()):
            assert isinstance(pricer, Prompts)
            self._draw(1, i, part, shape.prefill_seqs, pricer.context.curve(shape.prefill_seqs))

    def _draw(self, which: int, i: int, part: int, seqs: int, curve: Curve | PowerCurve) -> None:
        if self._line_of[which][i, part, seqs] >= 0:
            return
        points, line, lines = len(curve.xs), self._known, self._lines
        if points > lines.shape[2] or line == len(lines):
            more = np.full((2 * len(lines), 5, max(points, lines.shape[2])), np.inf)
            more[: len(lines), :, : lines.shape[2]] = lines
            self._lines = lines = more
        lines[line, 0, :points], lines[line, 1, :points] = curve.xs, curve.ys
        lines[line, 2, :points] = curve.slopes if isinstance(curve, Curve) else curve.powers
        kinds = [[HOWS.index(how) for how in curve.known(point)] for point in range(points)]
        lines[line, 3:, :points] = np.transpose(kinds)
        self._line_of[which][i, part, seqs] = line
        self._known += 1

    def settle(self) -> None:
        """Book what was priced in the timers' ledgers."""
        for timer, booked in zip(self._timers, self.booked, strict=True):
            timer.ledger.book(booked.tolist())
        self.booked[:] = 0
