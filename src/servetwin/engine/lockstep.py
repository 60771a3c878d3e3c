"""Engines that step together: the data-parallel ranks of a mixture-of-experts model.

The experts are spread over all ranks, so every layer gathers the tokens of all of them: no rank can step alone. Each
rank keeps its own requests, queue and KV cache; what they share is the sequence of *passes* through the model. Pass k
of one rank is pass k of all: it starts when the last rank has come, and ends for all with the slowest. A rank that has
nothing to run comes with a dummy batch, so that the others are not left waiting.

The loop is that of `DPEngineCoreProc` of vLLM 0.19 and 0.33, read. Passes come in *waves*: on some of them (`checks`)
the ranks wait for each other and agree whether anybody has unfinished requests. If not, all pause, and the next request
to come starts the next wave.

Invariants: L1 a pass begins and ends at the same time on all ranks, and passes do not overlap on a pipeline stage; L2
no rank comes to a pass before those that it may not have in flight with it have ended; L3 when a group pauses, all
ranks have come to equally many passes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from servetwin.engine.batch import Batch
from servetwin.engine.lockstep_coast import coast
from servetwin.engine.rank import Rank, Stage
from servetwin.timing.shape import StepShape


class Entry(NamedTuple):
    """What one rank brings to a pass."""

    batch: Batch
    """without requests: a dummy batch"""
    shape: StepShape
    ready_ns: int
    """when its host has prepared it"""


class LockStep:
    """Ranks that step together. Each adds itself when it is made (`Rank`), before the first wake.

    `graphs`: the token counts for which the ranks captured graphs, ascending; none: they run without. `check_every`:
    passes of a wave between two agreements whether to go on; `checks_first`: also after its first pass.
    """

    def __init__(self, *, graphs: Sequence[int] = (), check_every: int = 16, checks_first: bool = True) -> None:
        self.graphs, self.check_every, self.checks_first = graphs, check_every, checks_first
        self.ranks: list[Rank] = []
        self.numbers: list[int] = []
        """of the ranks, as engines"""
        self.running = False
        """a wave is on: ranks without work run dummy batches"""
        self.waves = 0
        """waves that have ended"""
        self.passes = 0
        """passes that all ranks have come to, and whose times are known"""
        self.last_ns = 0
        """device time of the last of them"""
        self.ends: deque[int] = deque()
        """ends of the last passes, as many as a rank may have in flight"""
        self.pending: deque[dict[int, Entry]] = deque()
        """passes that some rank has not come to yet: the entries of the others, by place in the group"""
        self._device_free: list[int] = []
        self._promise: tuple[int, Rank] | None = None
        """the next wake that was asked for, and the rank whose wake it is"""

    def join(self, rank: Rank) -> int:
        """Add a rank; its place in the group."""
        self.ranks.append(rank)
        self.numbers.append(rank.number)
        self._device_free = [0] * rank.scheduler.options.pipeline
        self.ends = deque(maxlen=rank.scheduler.options.max_batches)
        return len(self.ranks) - 1

    @property
    def alone(self) -> bool:
        """A single rank has nobody to wait for: no dummy batches, no waves."""
        return len(self.ranks) == 1

    def checks(self, passes: int) -> bool:
        """Whether the ranks agree on going on after so many passes of a wave."""
        return passes % self.check_every == 0 or (self.checks_first and passes == 1)

    def computed(self, tokens: Sequence[int]) -> list[int]:
        """The tokens that each rank computes, padding included, when they bring `tokens`.

        If all fit into captured graphs, they replay the same one: the smallest that holds the largest batch. Else
        nobody replays one, and each computes its own.
        """
        most = max(tokens)
        if self.graphs and most <= self.graphs[-1]:
            return [self.graphs[bisect_left(self.graphs, most)]] * len(tokens)
        return list(tokens)

    def wake(self, rank: Rank, now: int) -> int | None:
        """Run all ranks from `now` until each must wait; when to wake `rank` next (None: another one's wake will do,
        or only an arrival can)."""
        if self._promise is not None and self._promise[1] is rank:
            self._promise = None
        while True:
            for each in self.ranks:
                each.go_on(now)
            self._agree()
            now = coast(self, now)
            acting = [each for each in self.ranks if each.stage is Stage.TOP]
            if not acting:
                break
            for each in acting:
                each.act()
        dues = [due for each in self.ranks if (due := each.due_ns) is not None]
        if not dues or (self._promise is not None and self._promise[0] <= min(dues)):
            return None
        self._promise = (min(dues), rank)
        return self._promise[0]

    def _agree(self) -> None:
        """When all ranks have come to a check: go on, or pause."""
        if any(rank.stage is not Stage.CHECK for rank in self.ranks):
            return
        unfinished = any(rank.votes for rank in self.ranks)
        self.running = unfinished and not self.alone
        self.waves += not unfinished
        at = max(rank.at for rank in self.ranks)
        for rank in self.ranks:
            rank.at = at
            rank.go_to(Stage.TOP)
            if not unfinished:
                rank.passes = 0

    def launch(self, rank: Rank, batch: Batch, now: int) -> None:
        """`rank` comes to its next pass with `batch`; the first one to come starts the wave."""
        self.running = not self.alone
        place = rank.launched - self.passes
        if place == len(self.pending):
            self.pending.append({})
        self.pending[place][rank.place] = Entry(batch, batch.measure(), now + rank.host.before(len(batch)))
        rank.launched += 1
        while self.pending and len(self.pending[0]) == len(self.ranks):
            self._execute(self.pending.popleft())

    def _execute(self, entries: dict[int, Entry]) -> None:
        """Price a pass to which all have come, and put it on the devices, behind what is there."""
        ranks = self.ranks
        tokens = self.computed([rank.tokens(entries[rank.place].shape) for rank in ranks])
        gathered = sum(tokens)
        self.last_ns, slowest = 0, ranks[0]
        for rank in ranks:
            entry = entries[rank.place]
            ns = rank.timer.lockstep_ns(entry.shape, tokens[rank.place], gathered) + rank.host.gap(len(entry.batch))
            if ns > self.last_ns:
                self.last_ns, slowest = ns, rank
        all_here = max(entry.ready_ns for entry in entries.values())
        free = self._device_free
        begin = at = max(all_here, free[0])
        for stage, ns in enumerate(slowest.stage_times(entries[slowest.place].shape, self.last_ns)):
            at = max(at, free[stage]) + ns
            free[stage] = at
        # A dummy batch keeps its rank's loop until all have come, and no rank runs further ahead of its device than
        # with real batches.
        released = max(all_here, self.ends[0]) if len(self.ends) == self.ends.maxlen else all_here
        self.ends.append(at)
        self.passes += 1
        for rank in ranks:
            rank.executed(entries[rank.place].batch, begin, at, released)

    def ran(self, ends: Sequence[int], last_ns: int) -> None:
        """Passes were carried out in one go, in place of the pending one."""
        self.pending.clear()
        self.passes += len(ends)
        self.ends.extend(ends[-(self.ends.maxlen or 1) :])
        self._device_free[0] = ends[-1]
        self.last_ns = last_ns
