"""When each token of a request was handed out, without a number for each of them."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


class TokenTimes:
    """Ranges of batches: an engine notes once when the outputs of each of its batches were handed out, and a request
    that was in many one after the other needs no more than the first and the last of them."""

    __slots__ = ("_ranges",)

    def __init__(self) -> None:
        self._ranges: list[tuple[array[int], int, int, int]] = []
        """times of batches (ns), first and last + 1 of them, tokens from each"""

    def add(self, output_ns: array[int], first: int, last: int, tokens: int = 1) -> None:
        """So many tokens came with each of the batches `first` up to before `last`, in the order of `output_ns`, which
        may only grow from now on."""
        if first >= last:
            return
        if self._ranges:
            before, begin, end, each = self._ranges[-1]
            if before is output_ns and end == first and each == tokens:
                self._ranges[-1] = output_ns, begin, last, tokens
                return
        self._ranges.append((output_ns, first, last, tokens))

    def ns(self) -> NDArray[np.int64]:
        """The time of each token."""
        parts = [np.repeat(np.array(times[first:last], np.int64), each) for times, first, last, each in self._ranges]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def __len__(self) -> int:
        return sum((last - first) * each for _, first, last, each in self._ranges)

    def __iter__(self) -> Iterator[int]:
        return iter(self.ns().tolist())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, TokenTimes | list):
            return list(self) == list(other)
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"TokenTimes({list(self)})"
