"""The time of a step, split over pipeline stages."""

from __future__ import annotations

from collections.abc import Sequence


def apportion(ns: int, weights: Sequence[int]) -> list[int]:
    """`ns` in proportion to `weights` (whole, at least 0), in whole ns that sum to it exactly; equal weights where all
    are 0. Each prefix is rounded down, so no part is off by more than 1 ns, and `weights` that sum to `ns` come back as
    they are."""
    total, done, parts, before = sum(weights), 0, [], 0
    if not total:
        weights, total = [1] * len(weights), len(weights)
    for weight in weights:
        done += weight
        reached = ns * done // total
        parts.append(reached - before)
        before = reached
    return parts
