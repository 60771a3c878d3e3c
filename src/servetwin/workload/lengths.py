"""How many tokens, and how long: the distributions of prompts, outputs and shared prefixes, and of times."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from servetwin.errors import InputError
from servetwin.workload.readers.csv_table import CsvTable
from servetwin.workload.readers.jsonl import json_rows
from servetwin.workload.readers.source import LATEST_NS, MOST_TOKENS, TraceFile
from servetwin.workload.table import Ints

if TYPE_CHECKING:
    from servetwin.scenario.schema import Lengths, Times, Zipf

MOST_ZIPF_VALUES = 1 << 24
"""the cumulative distribution is a table of one float64 a value (128 MiB at this size)"""

LONGEST_NS = 1 << 61
"""73 years: added to any arrival it stays inside an int64"""


def draw_lengths(lengths: Lengths, count: int, random: np.random.Generator, base: Path) -> Ints:
    """Token counts, shape (count,). `base` is the folder that a relative `file` refers to.

    A plain int stands for itself. Distributions (all bounds inclusive):
      fixed        value
      uniform      whole numbers from min to max
      range_ratio  whole numbers from ratio·max (rounded down, at least 1) to max
      lognormal    median·exp(sigma·N(0, 1)), rounded, then clipped to min (1 if not given) and max
      zipf         n from min to max with probability proportional to n^-alpha
      empirical    the counts in `file` (see `read_counts`), drawn with replacement

    Raises `InputError` for a bad file or too wide a zipf.
    """
    if isinstance(lengths, int):
        return np.full(count, lengths, np.int64)
    match lengths.distribution:
        case "fixed":
            return np.full(count, lengths.value, np.int64)
        case "uniform":
            return random.integers(lengths.min, lengths.max, count, np.int64, endpoint=True)
        case "range_ratio":
            least = max(1, int(lengths.ratio * lengths.max))
            return random.integers(least, lengths.max, count, np.int64, endpoint=True)
        case "lognormal":
            with np.errstate(over="ignore"):
                drawn = np.rint(lengths.median * np.exp(lengths.sigma * random.standard_normal(count)))
            return drawn.clip(lengths.min or 1, lengths.max or MOST_TOKENS).astype(np.int64)
        case "zipf":
            return _zipf(lengths, count, random)
        case "empirical":
            return np.asarray(random.choice(read_counts(base / lengths.file), count), np.int64)


def draw_times(times: Times, count: int, random: np.random.Generator) -> Ints:
    """Durations in ns, shape (count,), at most 146 years each. A plain duration stands for itself. Distributions:
    uniform (min to max), lognormal (median·exp(sigma·N(0, 1))) and exponential (mean), the last two cut at `max`.
    """
    drawn: NDArray[np.float64]
    if isinstance(times, int):
        return np.full(count, times, np.int64)
    match times.distribution:
        case "uniform":
            return random.integers(times.min, times.max, count, np.int64, endpoint=True)
        case "lognormal":
            with np.errstate(over="ignore"):  # below e^700, so that a median of 0 stays 0
                drawn = times.median * np.exp((times.sigma * random.standard_normal(count)).clip(max=700))
        case "exponential":
            drawn = random.exponential(times.mean, count)
    most = LATEST_NS if times.max is None else times.max
    whole: Ints = np.rint(drawn.clip(max=most)).astype(np.int64)
    return whole


def _zipf(lengths: Zipf, count: int, random: np.random.Generator) -> Ints:
    values = lengths.max - lengths.min + 1
    if values > MOST_ZIPF_VALUES:
        raise InputError("too wide a zipf", found=values, allowed=f"at most {MOST_ZIPF_VALUES} values from min to max")
    return lengths.min + power_law(lengths.alpha, lengths.min, values, count, random)


def power_law(alpha: float, first: int, values: int, count: int, random: np.random.Generator) -> Ints:
    """`count` draws of k from 0 … values-1, each with a probability proportional to (first + k)^-alpha."""
    # dividing by `first` keeps the weights away from underflow
    cumulative = np.cumsum((np.arange(first, first + values) / first) ** -alpha)
    drawn: Ints = np.searchsorted(cumulative, random.random(count) * cumulative[-1], side="right")
    return np.minimum(drawn, values - 1)  # a product may round up to the very end


def read_counts(path: Path) -> Ints:
    """The token counts in a file: one a line, or the column `tokens` of a CSV or JSONL file. Raises `InputError`."""
    file = TraceFile.open(path)
    first = file.first_line()[1]
    if first.startswith("{"):
        return np.array([row.tokens("tokens") for row in json_rows(file)], np.int64)
    is_header = any(character.isalpha() for character in first)
    return CsvTable(file, header=None if is_header else ["tokens"]).tokens("tokens")
