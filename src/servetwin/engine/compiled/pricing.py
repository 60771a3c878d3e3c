"""The price of a step from the tables of `Prices`, compiled by numba: bit for bit that of the timer they stand for."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, no-any-return"
from __future__ import annotations

import numba

from servetwin.engine.compiled.columns import *

compiled = numba.njit(cache=True, error_model="numpy")
inlined = numba.njit(error_model="numpy", inline="always")
"""For what is called in every step: handing over arrays takes longer than the work."""


@compiled
def step_ns(timer, prefills, prefill_tokens, prefill_context, pairs, decodes, context, most, prices, booked):
    """`StepTimer.step_ns` of the shape, booked; -1 when the tables lack something (see `Prices`)."""
    timers, padded, dense, head, decode_line, decode_parts, prefill_line, prefill_parts, lines, places = prices
    if timers[timer, KIND] == LINEAR:
        tokens = prefill_context + prefill_tokens + context + decodes
        ns = (
            timers[timer, BASE]
            + timers[timer, A_PREFILL_TOKEN] * prefill_tokens
            + timers[timer, A_DECODE] * decodes
            + timers[timer, A_CONTEXT_TOKEN] * tokens
        )
        booked[timer, ANALYTIC_KIND] += ns
        return ns
    rows, logits = padded[timer, prefill_tokens + decodes], prefills + decodes
    if dense[timer, rows, 0] < 0 or head[timer, logits, 0] < 0:
        return -1
    for part in range(timers[timer, DECODE_PARTS] if decodes else 0):
        if decode_line[timer, part, decodes] < 0:
            return -1
    for part in range(timers[timer, PREFILL_PARTS] if prefills else 0):
        if prefill_line[timer, part, prefills] < 0:
            return -1
    total = 0
    for kind in range(booked.shape[1]):
        share = dense[timer, rows, kind] + head[timer, logits, kind]
        booked[timer, kind] += share
        total += share
    for part in range(timers[timer, PREFILL_PARTS] if prefills else 0):
        line, window = prefill_line[timer, part, prefills], prefill_parts[timer, part, 2]
        ns, kind = _context_attention(prefills, prefill_tokens, pairs, window, lines, line)
        whole = int(ns * prefill_parts[timer, part, 0] * prefill_parts[timer, part, 1])
        booked[timer, kind] += whole
        total += whole
    if decodes:
        total += decode_attention(timer, decodes, context, most, decode_line, decode_parts, lines, places, booked, 1)
    return total


@inlined
def decode_attention(timer, decodes, context, most, decode_line, decode_parts, lines, places, booked, sign):
    """ns over all parts of the model, booked (`sign` 1) or unbooked (-1)."""
    total, differ = 0, most * decodes > context
    for part in range(decode_line.shape[1]):
        line = decode_line[timer, part, decodes]
        if line < 0:  # a model of fewer parts
            break
        factor, clip = decode_parts[timer, part, 0], decode_parts[timer, part, 2]
        ns, kind = _on_line(lines, line, min(context / decodes + 1.0, clip), places, 2 * part)
        ns *= factor
        if differ:
            longest, _ = _on_line(lines, line, min(most + 1.0, clip), places, 2 * part + 1)
            ns += decode_parts[timer, part, 3] * (longest * factor - ns)
        whole = int(ns * decode_parts[timer, part, 1])
        booked[timer, kind] += sign * whole
        total += whole
    return total


@compiled
def fixed_ns(timer, decodes, prices):
    """What a step of so many decodes takes at least, whatever their contexts; -1 when the tables lack it."""
    timers, padded, dense, head, _, _, _, _, _, _ = prices
    if timers[timer, KIND] == LINEAR:
        return timers[timer, BASE] + timers[timer, A_DECODE] * decodes
    rows = padded[timer, decodes]
    if dense[timer, rows, 0] < 0 or head[timer, decodes, 0] < 0:
        return -1
    total = 0
    for kind in range(dense.shape[2]):
        total += dense[timer, rows, kind] + head[timer, decodes, kind]
    return total


@compiled
def book_fixed(timer, decodes, steps, prices, booked):
    """Book `fixed_ns` of so many steps."""
    timers, padded, dense, head, _, _, _, _, _, _ = prices
    if timers[timer, KIND] == LINEAR:
        booked[timer, ANALYTIC_KIND] += steps * fixed_ns(timer, decodes, prices)
        return
    rows = padded[timer, decodes]
    for kind in range(dense.shape[2]):
        booked[timer, kind] += steps * (dense[timer, rows, kind] + head[timer, decodes, kind])


@compiled
def _point(lines, line, at):
    """The last of a line's rising xs that is not beyond `at`, -1 before the first: `bisect_right(xs, at) - 1`."""
    low, high = 0, lines.shape[2]
    while low < high:
        middle = (low + high) // 2
        if at < lines[line, 0, middle]:
            high = middle
        else:
            low = middle + 1
    return low - 1


@inlined
def _on_line(lines, line, at, places, last):
    """`Curve.price`; a line is (xs, ys, slopes, kinds at points, kinds behind them), xs filled up with infinity.

    `places[last]` is where it was found last: mostly it is there again.
    """
    i = places[last]
    if i < 0 or i + 1 >= lines.shape[2] or at < lines[line, 0, i] or at >= lines[line, 0, i + 1]:
        i = places[last] = _point(lines, line, at)
    if i < 0:
        return lines[line, 1, 0], EXTRAPOLATED_KIND
    beyond = at - lines[line, 0, i]
    if beyond:
        return lines[line, 1, i] + lines[line, 2, i] * beyond, int(lines[line, 4, i])
    return lines[line, 1, i], int(lines[line, 3, i])


@compiled
def _on_curve(lines, line, at):
    """`PowerCurve.price`, laid out as a line, with powers for slopes."""
    i = _point(lines, line, at)
    if i < 0:
        return lines[line, 1, 0], EXTRAPOLATED_KIND
    known = lines[line, 0, i]
    if at == known:
        return lines[line, 1, i], int(lines[line, 3, i])
    return lines[line, 1, i] * (at / known) ** lines[line, 2, i], int(lines[line, 4, i])


@compiled
def _causal_pairs(length, window):
    if window and length > window:
        return window * (window + 1) / 2 + (length - window) * window
    return length * (length + 1) / 2


@compiled
def _context_attention(seqs, tokens, pairs, window, lines, line):
    """`ContextAttention.price`."""
    new = tokens / seqs
    before = max(pairs / tokens - (new + 1) / 2, 0.0)
    whole = _causal_pairs(before + new, window)
    spent = whole - _causal_pairs(before, window) if window else pairs / seqs
    alone = _causal_pairs(new, window)
    fresh, how = _on_curve(lines, line, alone)
    if spent <= alone:
        return fresh, how
    full, how_full = _on_curve(lines, line, whole)
    kind = EXTRAPOLATED_KIND if how == EXTRAPOLATED_KIND or how_full == EXTRAPOLATED_KIND else 1
    return fresh + (full - fresh) * (spent - alone) / (whole - alone), kind
