"""Many passes of a lock-step group at once, while the batch of every rank stays as it is (see `coast`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from servetwin.engine.coast import SHORTEST, apply, batch_in_flight, note, plan
from servetwin.engine.rank import Rank, Stage
from servetwin.errors import InputError
from servetwin.timing.shape import StepShape

if TYPE_CHECKING:
    from servetwin.engine.lockstep import LockStep

NOTHING = StepShape(0, 0, 0, 0, 0, 0, 0, 0, 0)


class Start(NamedTuple):
    """The ranks of a group that could coast, and where they stand before the first pass of the run."""

    busy: list[Rank]
    """at the top of their loops, all at the same time"""
    idle: list[Rank]
    """with dummy batches"""
    passes: int
    """passes of the wave before the run"""
    idle_ready: int
    """when the last idle rank comes to the first pass"""


class Times(NamedTuple):
    """When the passes of a run happen, in ns; lists have one entry a pass, `tops` one more."""

    tops: list[int]
    """tops of the busy ranks' loops, before each pass and after the last"""
    outputs: list[int]
    """when the busy ranks hand out what the oldest batch in flight gave"""
    begins: list[int]
    ends: list[int]
    idle_tops: list[int]
    """tops of the idle ranks' loops after each pass"""


def coast(group: LockStep, now: int) -> int:
    """Carry out as many passes as possible at once; the time at which the busy ranks are back at the tops of their
    loops (`now`, when nothing was done or nobody is busy). Same results as pass by pass."""
    start = _start(group, now)
    if start is None:
        return now
    horizon = min((each for rank in group.ranks if (each := rank.horizon()) is not None), default=None)
    steps = None if start.busy else group.check_every
    if horizon is not None:
        typical = max(1, group.last_ns)
        if now + SHORTEST * typical >= horizon:
            return now
        most = (horizon - now) // typical + 2
        steps = most if steps is None else min(steps, most)
    shapes = dict.fromkeys(group.ranks, NOTHING)
    for rank in start.busy:
        planned = plan(rank.scheduler, rank.flying, steps)
        if planned is None:
            return now
        shapes[rank], steps = planned
    assert steps is not None
    saved = [rank.timer.ledger.copy() for rank in group.ranks]
    try:
        run = _times(group, start, now, _durations(group, shapes, steps), horizon)
        done = len(run.ends)
    except InputError:  # a pass of the run cannot be priced, but the group may never come to that one
        done = 0
    if done < steps:
        # Passes priced for nothing must not count in the ledgers.
        for rank, ledger in zip(group.ranks, saved, strict=True):
            rank.timer.ledger.restore(ledger)
        if done < SHORTEST:
            return now
        _durations(group, shapes, done)
    _carry_out(group, start, run, shapes)
    return run.tops[-1]


def _start(group: LockStep, now: int) -> Start | None:
    """Where the ranks stand, if all of them are steady and about to begin the same pass."""
    busy: list[Rank] = []
    idle: list[Rank] = []
    if not all(rank.coasts for rank in group.ranks):
        return None
    positions: set[tuple[int, int]] = set()
    idle_ready = 0
    for rank in group.ranks:
        launched, passes = rank.launched, rank.passes
        if rank.inbox:
            return None
        if rank.stage is Stage.TOP and rank.scheduler.running:
            if not rank.full or (rank.flying is not None and not len(rank.flying)):
                return None
            busy.append(rank)
        elif rank.idle and rank.stage in (Stage.TOP, Stage.DUMMY):
            idle.append(rank)
            ready = rank.at + rank.host.before(0)
            if rank.stage is Stage.DUMMY and rank.due_ns is None:  # it has come to the next pass already
                ready = group.pending[0][rank.place].ready_ns
                launched -= 1
            elif rank.stage is Stage.DUMMY:
                assert rank.due_ns is not None
                ready = rank.due_ns + rank.host.before(0)
                passes += 1
                if group.checks(passes):
                    return None
            idle_ready = max(idle_ready, ready)
        else:
            return None
        positions.add((launched, passes))
    if len(positions) > 1 or positions.pop()[0] != group.passes:
        return None
    if not busy and not group.running:
        return None
    return Start(busy, idle, passes, idle_ready)


def _durations(group: LockStep, shapes: dict[Rank, StepShape], steps: int) -> list[int]:
    tokens = group.computed([rank.tokens(shapes[rank]) for rank in group.ranks])
    gathered = sum(tokens)
    each = []
    for rank, own in zip(group.ranks, tokens, strict=True):
        gap = rank.host.gap(shapes[rank].seqs)
        each.append([ns + gap for ns in _rank_ns(rank, shapes[rank], steps, own, gathered)])
    return [max(column) for column in zip(*each, strict=True)]


def _rank_ns(rank: Rank, shape: StepShape, steps: int, own: int, gathered: int) -> list[int]:
    """Device times of consecutive passes of a rank (see `coast.price`)."""
    growth = rank.scheduler.riding.growth
    if growth == 1:
        return rank.timer.lockstep_run_ns(shape, steps, own, gathered)
    return [rank.timer.lockstep_ns(shape.later(i * growth), own, gathered) for i in range(steps)]


def _times(group: LockStep, start: Start, now: int, durations: Sequence[int], horizon: int | None) -> Times:
    """The times of the passes of a run, up to the first that may see something from outside, or that ends a wave."""
    run = Times([now], [], [], [], [])
    before = max((rank.host.before(len(rank.scheduler.running)) for rank in start.busy), default=0)
    before_idle = group.ranks[0].host.before(0)
    ahead = group.ends.maxlen == 2
    ends = [0, 0, *group.ends]
    top, idle_ready, passes = now, start.idle_ready, start.passes
    for ns in durations:
        passes += 1
        checks = group.checks(passes)
        if checks and not start.busy:
            break
        all_here = top + before if start.busy else 0
        if start.idle:
            all_here = max(all_here, idle_ready)
        begin = max(all_here, ends[-1])
        ends.append(begin + ns)
        top = output = ends[-2] if ahead else ends[-1]
        idle_top = max(all_here, ends[-3] if ahead else ends[-2])
        if checks:
            top = idle_top = max(top, idle_top) if start.idle else top
        if horizon is not None and ((start.busy and top >= horizon) or (start.idle and idle_top >= horizon)):
            break
        idle_ready = idle_top + before_idle
        run.begins.append(begin)
        run.ends.append(ends[-1])
        run.outputs.append(output)
        run.idle_tops.append(idle_top)
        if start.busy:
            run.tops.append(top)
    return run


def _carry_out(group: LockStep, start: Start, run: Times, shapes: dict[Rank, StepShape]) -> None:
    steps, end, passes = len(run.ends), run.ends[-1], start.passes + len(run.ends)
    group.ran(run.ends, run.ends[-1] - run.begins[-1])
    for rank in start.busy:
        scheduler, shape, flying = rank.scheduler, shapes[rank], None
        rows = [request.row for request in scheduler.running] if scheduler.riding.keeps_entries else []
        used = apply(scheduler, run.outputs)
        queue = (len(scheduler.running), scheduler.waiting_count)
        note(rank, shape, run.begins, run.ends, used, queue, rows)
        if rank.flying is not None:
            flying = batch_in_flight(scheduler, shape.later((steps - 1) * scheduler.riding.growth), run.tops[-2])
            flying.index, flying.begin_ns, flying.end_ns = rank.steps + steps - 1, run.begins[-1], end
        rank.ran(steps, flying)
        rank.passes, rank.at = passes, run.tops[-1]
    for rank in start.idle:
        used = [rank.scheduler.kv.pool.used] * steps
        rank.log.run(rank.number, rank.steps, NOTHING, run.begins, run.ends, used, (0, 0), [])
        rank.ran(steps, None)
        if group.checks(passes):  # all have been at the check
            rank.passes, rank.at = passes, run.idle_tops[-1]
            rank.go_to(Stage.TOP)
        else:
            rank.passes = passes - 1
            rank.waits(run.idle_tops[-1])
