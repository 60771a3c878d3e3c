"""The reference's rings, against figures measured on its own analytical back-end.

The traces behind the measurements also hold k us of compute and one 11 ns load, which are added to the collectives.
"""

from __future__ import annotations

import pytest

from servetwin.fabric.reference import Dimension, ReferenceLinks, ReferenceRings
from servetwin.model.kernels import Collective

GIB = 2**30
WIDE, NARROW = (128 * GIB, 500), (16 * GIB, 20_000)
MEMORY = 1597e9


def rings(*dimensions: tuple[int, tuple[float, float]]) -> ReferenceRings:
    return ReferenceRings(tuple(Dimension(ranks, *link) for ranks, link in dimensions), MEMORY)


def dispatch_and_combine(ranks: int) -> float:
    group = rings((ranks, NARROW))
    return group.allgather(69_632) + group.reducescatter(131_072)


def two_dimensions() -> float:
    return rings((2, WIDE), (2, NARROW)).allreduce(655_360)


CASES = [
    ("all-reduce of 2", lambda: rings((2, NARROW)).allreduce(655_360), 0, 78_791.6, 78_791, 78_791),
    ("all-reduce of 4", lambda: rings((4, NARROW)).allreduce(1_000_000), 0, 208_784.9, 208_790, 208_790),
    ("gather and scatter of 2", lambda: dispatch_and_combine(2), 7_011, 55_041, 55_051, 55_051),
    ("gather and scatter of 4", lambda: dispatch_and_combine(4), 7_011, 145_155.7, 145_161, 145_161),
    ("hand-over", lambda: Dimension(2, *NARROW).message_ns(4_456_448), 4_011, 283_410, 283_410, 283_410),
    ("two dimensions", two_dimensions, 3_011, 68_844.3, 68_842, 68_872),
    ("first dimension alone", lambda: rings((2, WIDE)).allreduce(655_360), 3_011, 9_424.6, 9_424, 9_424),
]


@pytest.mark.parametrize(
    ("price", "around", "predicted", "least", "most"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_formulas_give_the_predicted_and_nearly_the_measured_times(price, around, predicted, least, most) -> None:
    total = price() + around
    # The gather's prediction is written in whole ns.
    assert total == pytest.approx(predicted, abs=0.06 if predicted % 1 else 0.2)
    # Ranks of that back-end run up to 10 ns apart.
    assert least - 10 <= total <= most + 1


def collective(kind: str, ranks: int, size: int) -> Collective:
    return Collective(name="x", kind=kind, ranks=ranks, bytes_a_row=size)


def test_a_replica_is_priced_in_whole_nanoseconds() -> None:
    links = ReferenceLinks(NARROW, NARROW, MEMORY)
    assert links.collective_ns(collective("allreduce", 2, 655_360), 1) == 78_791
    assert links.collective_ns(collective("allreduce", 2, 5_120 * 2), 64) == 78_791
    # An all-gather counts the whole result here, the chunk of a rank there.
    gathered = links.collective_ns(collective("allgather", 2, 2 * 69_632), 1)
    scattered = links.collective_ns(collective("reducescatter", 2, 131_072), 1)
    assert gathered + scattered == 48_030
    assert links.collective_ns(collective("sendrecv", 2, 4_456_448), 1) == 279_399


def test_four_sends_in_a_row() -> None:
    """KV of four layers, 1 MB each, after 11 010 ns, and the output at the end, 20 014 ns: measured 343 852 ns."""
    assert 11_010 + 4 * Dimension(2, *NARROW).message_ns(1_000_000) + 20_014 == 343_852


def test_floors_are_taken_for_each_message() -> None:
    """3 bytes over 2 B/ns take 1 ns a message, not 1.5."""
    assert rings((2, (2e9, 0))).allgather(3) == 2 * 10 + 1
    assert rings((5, (2e9, 0))).allgather(3) == 5 * 10 + 4
