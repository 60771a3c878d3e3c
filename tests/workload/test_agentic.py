"""Sessions drawn from distributions: their shape, their tokens, their times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servetwin.errors import InputError
from servetwin.scenario.quantities import FROM_FILE
from servetwin.scenario.schema import SessionWorkload
from servetwin.workload import RequestTable, build
from servetwin.workload.identity import keys_of, own_seed, prompt_of

FAN_OUT = {
    "width": {"distribution": "uniform", "min": 1, "max": 4},
    "chance": 0.5,
    "input_tokens": 7,
    "output_tokens": 9,
}


def workload(**fields: Any) -> SessionWorkload:
    given = {
        "sessions": 500,
        "arrivals": {"process": "poisson", "rate": 2.0},
        "turns": {"distribution": "uniform", "min": 1, "max": 9},
        "first_input_tokens": {"distribution": "uniform", "min": 90, "max": 300},
        "input_tokens": {"distribution": "uniform", "min": 1, "max": 50},
        "output_tokens": {"distribution": "uniform", "min": 1, "max": 80},
        "tool_time": {"distribution": "exponential", "mean": "2s", "max": "9s"},
    }
    return SessionWorkload.model_validate(given | fields, context=FROM_FILE)


def drawn(seed: int = 0, **fields: Any) -> RequestTable:
    table = build(workload(**fields), seed, Path())
    assert table.waits_for is not None and table.extends is not None and table.session is not None
    table.waits_for.check(table.session)
    return table


def test_chains() -> None:
    table = drawn()
    assert table.waits_for is not None and table.extends is not None and table.session is not None
    sizes = np.bincount(table.session)
    assert len(sizes) == 500 and set(sizes.tolist()) == set(range(1, 10))
    for row in range(len(table)):
        before = table.waits_for[row].tolist()
        assert before == ([] if row == 0 or table.session[row - 1] != table.session[row] else [row - 1])
        assert table.extends[row] == (before[0] if before else -1)
        if before:
            new = table.input_tokens[row] - table.input_tokens[row - 1] - table.output_tokens[row - 1]
            assert 1 <= new <= 50
            assert 0 <= table.waits_for.delay_ns[row] <= 9_000_000_000
        else:
            assert 90 <= table.input_tokens[row] <= 300 and table.waits_for.delay_ns[row] == 0
    starts = table.arrival_ns[table.roots]
    assert (np.diff(starts) > 0).all(), "sessions are numbered by arrival"
    assert abs(np.diff(starts).mean() / 5e8 - 1) < 4 / 500**0.5
    assert (table.arrival_ns == starts[table.session]).all()


@pytest.mark.parametrize("join", [True, False])
def test_fan_out(join: bool) -> None:
    # Branches are told by their 9 outputs, which no turn of the main line has.
    outputs = {"distribution": "uniform", "min": 10, "max": 80}
    table = drawn(output_tokens=outputs, fan_out=FAN_OUT | {"join": join})
    assert table.waits_for is not None and table.extends is not None and table.session is not None
    waits, main = table.waits_for, np.flatnonzero(table.output_tokens != 9).tolist()
    fanned = []
    for row, following in zip(main, [*main[1:], len(table)], strict=True):
        branches = list(range(row + 1, following))
        spoken = table.input_tokens[row] + table.output_tokens[row]
        for branch in branches:
            assert waits[branch].tolist() == [row] and table.extends[branch] == row
            assert table.input_tokens[branch] == spoken + 7 and table.session[branch] == table.session[row]
        if following == len(table) or table.session[following] != table.session[row]:
            assert not branches, "the last turn sends out nobody"
            continue
        assert len(branches) <= 4
        fanned.append(bool(branches))
        assert table.extends[following] == row
        assert waits[following].tolist() == (branches if branches and join else [row])
        assert 1 <= table.input_tokens[following] - spoken - (9 * len(branches) if join else 0) <= 50
    assert abs(np.mean(fanned) - 0.5) < 4 * 0.5 / len(fanned) ** 0.5


def test_shared_system_prompts() -> None:
    table = drawn(prefixes={"groups": 3, "tokens": 80}, fan_out=FAN_OUT)
    assert table.segments is not None and table.extends is not None
    groups = set()
    for row in range(len(table)):
        assert sum(length for _, length in prompt_of(table, row)) == table.input_tokens[row]
        head = table.segments[row][0]
        if table.extends[row] < 0:
            groups.add(head)
        else:
            assert [seed for seed, _ in table.segments[row]] == [own_seed(row)]
    assert groups == {(0, 80), (1, 80), (2, 80)}


def test_a_prompt_extends_prompt_and_output_of_the_turn_before() -> None:
    table = drawn(prefixes={"groups": 3, "tokens": 80})
    assert table.extends is not None
    for row in np.flatnonzero(table.extends >= 0)[:200].tolist():
        before = int(table.extends[row])
        mine, theirs = keys_of(table, row, 16), keys_of(table, before, 16)
        shared = int(table.input_tokens[before] + table.output_tokens[before]) // 16
        assert [mine.key(i) for i in range(shared)] == [theirs.key(i) for i in range(shared)]
        assert mine.key(shared + 1) != theirs.key(shared + 1)


def test_models_and_priorities_are_a_sessions_own() -> None:
    table = drawn(models={"a": 1.0, "b": 3.0}, priorities=[1.0, 1.0])
    assert table.models == ("a", "b") and table.model is not None and table.priority is not None
    assert table.session is not None
    for column in (table.model, table.priority):
        assert (column == column[table.roots][table.session]).all()
    assert abs(table.model[table.roots].mean() - 0.75) < 4 * 0.44 / 500**0.5


def test_streams_are_apart() -> None:
    one, other = drawn(), drawn(tool_time="3s", input_tokens=5)
    assert one.waits_for is not None and other.waits_for is not None
    assert np.array_equal(one.waits_for.parents, other.waits_for.parents)
    assert np.array_equal(one.output_tokens, other.output_tokens)
    assert set(other.waits_for.delay_ns.tolist()) == {0, 3_000_000_000}
    assert not np.array_equal(drawn(seed=1).arrival_ns[:9], one.arrival_ns[:9])


@pytest.mark.parametrize(
    ("times", "mean_s", "least_s", "most_s"),
    [
        ("1500ms", 1.5, 1.5, 1.5),
        ({"distribution": "uniform", "min": "1s", "max": "3s"}, 2.0, 1.0, 3.0),
        ({"distribution": "exponential", "mean": "2s"}, 2.0, 0.0, 60.0),
        ({"distribution": "lognormal", "median": "1s", "sigma": 0.5}, np.exp(0.125), 0.05, 20.0),
        ({"distribution": "lognormal", "median": "1s", "sigma": 3.0, "max": "4s"}, 1.766, 0.0, 4.0),
    ],
)
def test_tool_times(times: Any, mean_s: float, least_s: float, most_s: float) -> None:
    table = drawn(tool_time=times, turns=20)
    assert table.waits_for is not None
    seconds = table.waits_for.delay_ns[~table.roots] / 1e9
    assert least_s <= seconds.min() and seconds.max() <= most_s
    assert abs(seconds.mean() - mean_s) <= 4 * seconds.std() / len(seconds) ** 0.5 + 1e-9


def test_a_closed_loop_of_sessions() -> None:
    table = drawn(arrivals={"process": "closed_loop", "concurrency": 8})
    assert table.concurrency == 8 and not table.arrival_ns.any()


def test_times_beyond_the_clock() -> None:
    with pytest.raises(InputError) as raised:
        drawn(turns=300, tool_time="1000000h")
    assert str(raised.value) == (
        "workload: the tool times of a session add up to more than 146 years; found '1.08e+12 s'; "
        "allowed: at most 4611686018 s"
    )


def test_conversations_beyond_measure() -> None:
    with pytest.raises(InputError) as raised:
        drawn(sessions=1, turns=30, input_tokens=100_000_000)
    assert str(raised.value).startswith("workload.turns: conversations get too long; found ")
