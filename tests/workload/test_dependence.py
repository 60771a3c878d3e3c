"""The graph of turns: both ways round, over a part of the rows, and refused when it is none."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servetwin.errors import InputError
from servetwin.workload.dependence import Dependence
from servetwin.workload.table import RequestTable
from session_tables import session_tables


@settings(max_examples=100, deadline=None)
@given(session_tables())
def test_children_are_parents_the_other_way_round(table: RequestTable) -> None:
    waits = table.waits_for
    assert waits is not None
    waits.check(table.session)
    offsets, children = waits.children()
    edges = {(child, parent) for child in range(len(table)) for parent in waits[child].tolist()}
    assert {
        (child, parent)
        for parent, (begin, end) in enumerate(pairwise(offsets.tolist()))
        for child in children[begin:end].tolist()
    } == edges
    assert len(children) == len(waits.parents)
    assert waits.roots.tolist() == [not len(waits[row]) for row in range(len(table))]


@settings(max_examples=100, deadline=None)
@given(session_tables(), st.data())
def test_whole_sessions_can_be_taken(table: RequestTable, data: st.DataObject) -> None:
    """What is left says the same of each row as before, by its old number."""
    units = table.units()
    kept = data.draw(st.sets(st.integers(0, int(units.max())), min_size=1))
    rows = np.flatnonzero(np.isin(units, list(kept)))
    taken = table.take(rows)
    assert taken.waits_for is not None and table.waits_for is not None
    assert taken.extends is not None and table.extends is not None and taken.session is not None
    taken.waits_for.check(taken.session)
    for new, old in enumerate(rows.tolist()):
        assert rows[taken.waits_for[new]].tolist() == table.waits_for[old].tolist()
        before = int(taken.extends[new])
        assert (-1 if before < 0 else rows[before]) == table.extends[old]
        assert taken.input_tokens[new] == table.input_tokens[old]
        assert taken.waits_for.delay_ns[new] == table.waits_for.delay_ns[old]


def test_units_are_sessions_and_lone_requests() -> None:
    zeros = np.zeros(6, np.int64)
    label = np.array([7, -1, 3, 7, -1, 3])
    table = RequestTable(zeros, zeros + 1, zeros + 1, session=label)
    assert table.units().tolist() == [0, 1, 2, 3, 4, 5], "a label alone binds nobody"
    waits = Dependence.of([[], [], [], [0], [], []], [0, 0, 0, 5, 0, 0])
    table = RequestTable(zeros, zeros + 1, zeros + 1, session=label, waits_for=waits)
    assert table.units().tolist() == [0, 1, 2, 0, 3, 2]


@pytest.mark.parametrize(
    ("parents", "session", "message"),
    [
        ([[], [2]], [0, 0], "row 1: a parent is no row; found 2; allowed: a row from 0 to 1"),
        ([[], [-1]], [0, 0], "row 1: a parent is no row; found -1; allowed: a row from 0 to 1"),
        (
            [[], [0]],
            [0, 1],
            "row 1: a parent is of another session; found 0; allowed: a row of the same session (column session, "
            "from 0 on)",
        ),
        (
            [[], [0]],
            None,
            "row 1: a parent is of another session; found 0; allowed: a row of the same session (column session, "
            "from 0 on)",
        ),
        ([[], [1]], [0, 0], "row 1: requests wait for each other in a circle: 1 -> 1"),
        ([[], [0, 3], [1], [2], [3]], [0] * 5, "row 1: requests wait for each other in a circle: 1 -> 3 -> 2 -> 1"),
        # Row 0 waits for the circle, and is none of it.
        ([[2], [2], [1]], [0] * 3, "row 1: requests wait for each other in a circle: 1 -> 2 -> 1"),
    ],
)
def test_what_is_no_graph_of_sessions(parents: list[list[int]], session: list[int] | None, message: str) -> None:
    with pytest.raises(InputError) as raised:
        Dependence.of(parents, [0] * len(parents)).check(None if session is None else np.array(session))
    assert str(raised.value) == message


def test_rows_in_any_order_are_no_circle() -> None:
    Dependence.of([[1], [2], [], [0, 1]], [0] * 4).check(np.zeros(4, np.int64))


def test_a_long_chain_is_checked_without_recursion() -> None:
    count = 200_000
    backwards = [[row + 1] for row in range(count - 1)] + [[]]
    waits = Dependence.of(backwards, [0] * count)
    waits.check(np.zeros(count, np.int64))
    assert waits.descends(0, count - 1) and not waits.descends(5, 4)


def test_a_million_turns_take_little_memory() -> None:
    count = 1_000_000
    waits = Dependence(np.arange(count + 1), np.arange(count) - 1, np.zeros(count, np.int64))
    assert sum(part.nbytes for part in (waits.offsets, waits.parents, waits.delay_ns)) <= 24 * count + 8
