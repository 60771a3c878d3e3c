"""What a router sees of the engines that serve a model.

Signals are columns, one entry an engine, so that a choice among a thousand engines is a few operations on arrays. They
are read only from engines that have changed since they were last read.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from servetwin.engine.engine import Engine
from servetwin.engine.request import Request
from servetwin.memory.blocks import NULL
from servetwin.memory.counted import CountedKV
from servetwin.memory.full import FullKV
from servetwin.memory.kv import Chain, KVCache

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

Chains = Callable[[int, int], Chain | None]
"""The chain of the KV blocks of a row's prompt, by (row, block size); None: no other request shares its prompt."""


class Candidates:
    """The engines that serve one model, by position 0 … len - 1, in the order of the pools.

    With `refresh` R > 0 (ns), `running`, `waiting`, `load`, `kv_used` and `kv_usage` show the engines as they were at
    the last multiple of R, before anything else that happened at that very moment; with 0, as they are. What the router
    knows by itself (`in_flight`) is never stale. No array may be written to.
    """

    def __init__(self, engines: Sequence[Engine], refresh: int = 0, chains: Chains = lambda row, block_size: None):
        self.engines = tuple(engines)
        self.max_num_seqs = self._column(engine.scheduler.options.max_num_seqs for engine in engines)
        self.usable_blocks = self._column(engine.scheduler.options.usable_blocks for engine in engines)
        self.block_size = self._column(engine.scheduler.options.block_size for engine in engines)
        self._refresh, self._chains = refresh, chains
        self._in_flight, self.in_flight = self._writable()
        """requests that the router sent and that have not ended, shape (engines,)"""
        self._running, running = self._writable()
        self._used, used = self._writable()
        self._sent, sent = self._writable()
        self._shown = (running, used, sent if refresh else self.in_flight)
        self._moved: set[int] = set()
        """positions of engines that may differ from their entries in the columns"""
        self._epoch = 0
        self._epochs = [0] * len(self.engines)
        """multiple of the interval for which each entry holds, when a change has brought it up to date"""
        self._now, self._woken = 0, -1
        self._caches: dict[int, list[tuple[int, Engine, Callable[[Hashable], int], KVCache | FullKV]]] = {}
        """by block size: (position, engine, look-up of a block, cache) of the engines that cache prefixes. Where blocks
        are only counted nobody shares any."""
        for position, engine in enumerate(self.engines):
            kv = engine.scheduler.kv
            if kv.caching and not isinstance(kv, CountedKV):
                self._caches.setdefault(kv.block_size, []).append((position, engine, kv.pool.find, kv))

    def __len__(self) -> int:
        return len(self.engines)

    def _column(self, values: object) -> Ints:
        column: Ints = np.fromiter(values, np.int64, len(self.engines))  # type: ignore[call-overload]
        column.flags.writeable = False
        return column

    def _writable(self) -> tuple[Ints, Ints]:
        """A column of zeros, and the same one as others see it."""
        column = np.zeros(len(self.engines), np.int64)
        shown = column.view()
        shown.flags.writeable = False
        return column, shown

    # What policies read --------------------------------------------------------------------------------------------

    @property
    def shown_before(self) -> int:
        """The columns that may be stale show what engines did before this time (ns), and nothing later."""
        return self._now - self._now % self._refresh if self._refresh else self._now + 1

    @property
    def running(self) -> Ints:
        """Requests that run."""
        self._look()
        return self._shown[0]

    @property
    def waiting(self) -> Ints:
        """Requests that wait, those on their way to the engine included."""
        self._look()
        return self._shown[2] - self._shown[0]

    @property
    def load(self) -> Ints:
        """Requests running and waiting."""
        if self._refresh:
            self._look()
        return self._shown[2]

    @property
    def kv_used(self) -> Ints:
        """KV blocks that requests hold; a block that several share counts once."""
        self._look()
        return self._shown[1]

    @property
    def kv_usage(self) -> Floats:
        """The part of an engine's KV blocks that requests hold, 0 to 1."""
        return self.kv_used / self.usable_blocks

    def cached_tokens(self, request: Request) -> Ints:
        """Prompt tokens of `request` that each engine would find in its prefix cache now (whole blocks, and never the
        last token, which is always computed). Looking changes nothing, and is never stale: engines tell of every
        block that they cache or forget, rather than being asked now and then."""
        found = np.zeros(len(self.engines), np.int64)
        for size, caches in self._caches.items():
            chain = self._chains(request.row, size)
            if chain is None:
                continue
            first = chain[0]
            for position, engine, find, kv in caches:
                engine.catch_up(self._now, engine.number <= self._woken)
                # Most engines do not even have the first block.
                if not kv.uniform or find(first) != NULL:
                    found[position] = kv.lookup(chain, request.prompt - 1).tokens
        return found

    def chain(self, request: Request, block_size: int) -> Chain | None:
        """Names of the prefixes of `request`'s prompt: element i stands for its first i + 1 blocks of `block_size`
        tokens; None when no other request shares its prompt."""
        return self._chains(request.row, block_size)

    # What the router tells -----------------------------------------------------------------------------------------

    def at(self, now: int, woken: int = -1) -> None:
        """A choice is made at `now`, when engines up to number `woken` have been woken at that moment."""
        self._now, self._woken = now, woken

    def touch(self, position: int, now: int) -> None:
        """An engine is about to change: what it is until now may have to be shown a while longer."""
        if self._refresh:
            epoch = now // self._refresh
            if self._epochs[position] < epoch and self._epoch < epoch:
                self._read(position)
                self._epochs[position] = epoch
        self._moved.add(position)

    def sent(self, position: int, now: int) -> None:
        """A request was sent to an engine."""
        self.touch(position, now)
        self._in_flight[position] += 1

    def ended(self, position: int) -> None:
        """A request that was sent to an engine has ended (while the engine, which was touched, was at work)."""
        self._in_flight[position] -= 1

    def _look(self) -> None:
        """Bring the columns up to date."""
        moved = self._moved
        if not self._refresh:
            for position, engine in enumerate(self.engines):
                if engine.run is not None:
                    engine.catch_up(self._now, engine.number <= self._woken)
                    moved.add(position)
            for position in moved:
                self._read(position)
            moved.clear()
            return
        epoch = self._now // self._refresh
        if epoch > self._epoch:
            self._epoch, epochs = epoch, self._epochs
            untouched = [position for position in moved if epochs[position] < epoch]
            for position in untouched:
                self._read(position)
            moved.difference_update(untouched)

    def _read(self, position: int) -> None:
        scheduler = self.engines[position].scheduler
        self._running[position] = len(scheduler.running)
        self._used[position] = scheduler.kv.pool.used
        self._sent[position] = self._in_flight[position]
