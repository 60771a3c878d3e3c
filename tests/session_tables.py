"""Random sessions for properties: any graph of turns, rows in any order, prompts that extend earlier turns."""

from __future__ import annotations

from random import Random

import numpy as np
from hypothesis import strategies as st

from running import MS
from servetwin.workload.dependence import Dependence
from servetwin.workload.table import RequestTable

OWN = 1 << 20


def _session(random: Random, first: int) -> list[dict[str, int | list[int]]]:
    """Turns numbered from `first`; each waits for some of those before it."""
    turns: list[dict[str, int | list[int]]] = []
    for at in range(random.randint(1, 6)):
        parents = [first + p for p in range(at) if random.random() < 0.45]
        if at and not parents and random.random() < 0.8:
            parents = [first + at - 1]
        turns.append({"parents": parents, "delay": random.choice([0, 0, 7, 3 * MS, 40 * MS]) if parents else 0})
    return turns


def random_sessions(random: Random, sessions: int, concurrency: int | None, spread_ms: int) -> RequestTable:
    """`sessions` sessions and some requests of none, in shuffled rows."""
    turns: list[dict[str, int | list[int]]] = []
    session: list[int] = []
    for number in range(sessions):
        lone = random.random() < 0.2
        new = [{"parents": [], "delay": 0}] if lone else _session(random, len(turns))
        turns += new  # type: ignore[arg-type]
        session += [-1 if lone else number] * len(new)
    count = len(turns)
    row_of = list(range(count))
    random.shuffle(row_of)
    parents: list[list[int]] = [[] for _ in range(count)]
    arrival, delay, label, extends = (np.zeros(count, np.int64) for _ in range(4))
    prompts, outputs, abort = (np.zeros(count, np.int64) for _ in range(3))
    segments: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    for turn, facts in enumerate(turns):  # parents come first here
        row = row_of[turn]
        assert isinstance(facts["parents"], list)
        parents[row] = [row_of[parent] for parent in facts["parents"]]
        delay[row], label[row] = facts["delay"], session[turn]
        arrival[row] = random.choice([0, random.randrange(spread_ms + 1) * MS, random.randrange(spread_ms * MS + 1)])
        outputs[row] = random.choice([1, random.randint(1, 5), random.randint(1, 60)])
        extends[row] = random.choice(parents[row]) if parents[row] and random.random() < 0.8 else -1
        old = prompts[extends[row]] + outputs[extends[row]] if extends[row] >= 0 else 0
        shared = [(random.randrange(3), random.choice([16, 40]))] if random.random() < 0.5 else []
        own = random.randint(1, 400 if random.random() < 0.05 else 50)
        segments[row] = [*shared, (OWN + row, own)]
        prompts[row] = old + sum(length for _, length in segments[row])
        patience = random.choice([0, random.randrange(400 * MS)])
        abort[row] = arrival[row] + patience if random.random() < 0.08 else -1
    return RequestTable(
        arrival_ns=arrival,
        input_tokens=prompts,
        output_tokens=outputs,
        segments=segments,
        session=label,
        waits_for=Dependence.of(parents, delay.tolist()),
        extends=extends,
        abort_ns=abort,
        concurrency=concurrency,
        output_known=random.random() < 0.5,
    )


@st.composite
def session_tables(draw: st.DrawFn, most: int = 8) -> RequestTable:
    """Some prompts exceed `workloads.MAX_MODEL_LEN`, some clients give up."""
    return random_sessions(
        Random(draw(st.integers(0, 2**32))),
        draw(st.sampled_from([most, most // 2, 2, 1])),
        draw(st.sampled_from([None, None, 1, 2, 5])),
        draw(st.sampled_from([0, 30, 300])),
    )
