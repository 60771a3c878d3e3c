"""Random clusters: whatever a scenario asks for, the run ends, every request ends once, and nothing is lost.

`benchmarks/fuzz.py` does the same for thousands.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random as PythonRandom

import numpy as np
import pytest

from clusters import random_scenario
from servetwin.errors import InputError
from servetwin.results.run import Run
from servetwin.scenario.load import from_data
from servetwin.scenario.schema import Scenario
from servetwin.simulation import simulate


def scenario(seed: int) -> Scenario:
    return from_data(random_scenario(PythonRandom(seed)), None, Path())


def check(run: Run) -> None:
    """Every request ends once, with a reason where it was not served; tokens and times add up."""
    assert Counter(run.ints("request").tolist()) == Counter(range(len(run)))
    assert not run.partial
    finished = run.has_status("finished")
    arrival, first, finish = (run.ints(name) for name in ("arrival_ns", "first_token_ns", "finish_ns"))
    assert (finish >= arrival).all()
    assert (first[finished] > arrival[finished]).all() and (finish[finished] >= first[finished]).all()
    assert (run.ints("output_tokens")[finished] > 0).all()
    told = [bool(reason) for reason in run.requests["reason"]]
    np.testing.assert_array_equal(np.array(told), ~finished)
    start, end = run.steps["start_ns"], run.steps["end_ns"]
    assert (end > start).all()


@pytest.mark.parametrize("seed", range(60))
def test_a_random_cluster_ends(seed: int) -> None:
    try:
        data = scenario(seed)
        check(simulate(data))
    except InputError as error:
        assert error.field, str(error)


@pytest.mark.parametrize("seed", range(1000, 1025))
def test_the_same_seed_gives_the_same_and_coalescing_changes_nothing(seed: int) -> None:
    try:
        data = scenario(seed)
        one = simulate(data)
    except InputError:
        return
    for other in (simulate(data), simulate(data, coalesce=False)):
        for name in one.requests:
            assert list(one.requests[name]) == list(other.requests[name]), name
        assert one.priced_ns == other.priced_ns
