"""Expert layers as shipped: which sizes were timed with another load than their neighbours."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from servetwin.timing.kernels import KernelTables
from servetwin.timing.kernels.curve import Floats
from servetwin.timing.kernels.moe import Experts, without_the_dip


def test_skewed_loads_dip_where_rows_are_as_many_as_experts_and_only_there() -> None:
    """At the last size with no more rows than experts, over the layers of five devices; not at its neighbours, and
    not with the balanced load."""
    below: dict[tuple[bool, int], list[bool]] = {(skewed, k): [] for skewed in (True, False) for k in (-1, 0, 1)}
    for device in ("h100_sxm", "h200_sxm", "b200_sxm", "l40s", "rtx_pro_6000"):
        for shape, tokens, times in _layers(KernelTables.for_device(device)):
            at = int(np.searchsorted(tokens * shape.topk, shape.experts, side="right")) - 1
            if not 3 <= at < len(tokens) - 2 or times[at + 1] < 2 * times[0]:
                continue  # launches, not weights
            for k in (-1, 0, 1):
                line = np.interp(tokens[at + k], tokens[[at + k - 1, at + k + 1]], times[[at + k - 1, at + k + 1]])
                below[shape.skew > 0, k].append(bool(times[at + k] < line))
            kept, _ = without_the_dip(shape, tokens, times)
            assert len(kept) == len(tokens) - (shape.skew > 0 and below[True, 0][-1])
    share = {key: float(np.mean(found)) for key, found in below.items()}
    assert share[True, 0] > 0.8, share
    assert max(share[True, -1], share[True, 1], share[False, 0]) < 0.15, share


def _layers(tables: KernelTables) -> Iterator[tuple[Experts, Floats, Floats]]:
    """Measured expert layers with their sizes and times, as shipped."""
    for name, entry in tables.profile.tables.items():
        columns = tables.profile.columns(name)
        if entry["kind"] != "moe" or columns is None:
            continue
        keys = np.stack([columns[part] for part in Experts._fields], axis=1)
        starts = np.flatnonzero((np.diff(keys, axis=0) != 0).any(axis=1)) + 1
        for rows in np.split(np.arange(len(keys)), starts):
            shape = Experts(*keys[rows[0]].tolist())
            yield shape, columns["tokens"][rows].astype(np.float64), columns["ns"][rows].astype(np.float64)


def test_the_dip_is_left_out_and_nothing_else() -> None:
    """16 experts, two a token: 8 tokens are the last with no more rows than experts."""
    tokens, times = np.array([1.0, 2, 4, 8, 16, 32]), np.array([10.0, 19, 33, 40, 80, 90])
    shape = Experts(2048, 1024, 2, 16, 1, 1, 120)
    kept = without_the_dip(shape, tokens, times)
    assert [column.tolist() for column in kept] == [[1, 2, 4, 16, 32], [10, 19, 33, 80, 90]]
    times[3] = 50
    for untouched in (
        without_the_dip(shape, tokens, times),  # above the line from 33 to 80, which passes 48.7
        without_the_dip(shape._replace(skew=0), tokens, np.array([10.0, 19, 33, 40, 80, 90])),
        without_the_dip(shape._replace(experts=1), tokens, times),
        without_the_dip(shape._replace(experts=64), tokens, times),  # at the end of the table
    ):
        assert len(untouched[0]) == len(tokens)
