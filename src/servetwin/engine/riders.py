"""Requests that ride: running ones that go on alike in every batch until they end, kept as a sum instead of a loop.

In most steps most requests differ from the step before in nothing but one more token. While a request *rides*, its
fields stand still at what they were when it joined (batch `joined`, from 1), and what they would be follows from
two counters of the scheduler: batches scheduled and batches processed. What a step needs of all riders together is kept
here, so that a step costs what changes in it, whatever the size of the batch:

- how many there are; the sum and the extremes of their contexts. A rider's context before batch s is
  `base + growth * (s - 1)` with a `base` that never changes, and `growth` 1, or with it the drafts that are accepted;
- who has to do with the KV cache when (takes a block of each group, gives back one that slid out of its window, makes
  a full one findable): riders by `base` modulo the block size, as contexts grow together;
- who must leave when: riders by the batch that brings their last token.

`Riding` decides who joins and leaves; a request that leaves gets the fields that single steps would have given it.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable

from servetwin.engine.request import Request


class Riders:
    """`size`: tokens in a KV block. `groups`: KV groups in which a request takes a block every `size` tokens. `slots`:
    how many slots beyond its context a rider needs in a batch.

    `calls`: what a rider's context exceeds a multiple of `size` by when it has to do with the KV cache, that is, in the
    batch in which it has come to it; empty: blocks are only counted, so no list of who needs one is kept.
    """

    def __init__(self, size: int, groups: int = 1, calls: Iterable[int] = (), growth: int = 1, slots: int = 1) -> None:
        self.size, self.groups, self.growth, self.slots = size, groups, growth, slots
        self._next = 2 - slots
        reached = [context + beyond for context in calls for beyond in range(min(growth, size))]
        self._calls = list(dict.fromkeys(context % size for context in reached))
        self.listed = bool(self._calls)
        self.count = 0
        self.handing = 0
        """riders that get a token from the next batch to be processed: all but those that joined in a later one"""
        self.total = 0
        """sum of all bases"""
        self.bases: list[int] = []
        """in rising order"""
        self.due = [0] * size
        """riders by base modulo block size"""
        self.due_for: list[list[Request]] = [[] for _ in range(size)] if self.listed else []
        """the same, one by one"""
        self.leaving: dict[int, list[Request]] = {}
        """riders by the batch of their last token"""
        self._leaves: list[int] = []
        """keys of `leaving`, in a heap; some may have gone since"""

    def add(self, request: Request) -> None:
        """`request` has joined: its `base`, `joined` and `rides_to` are set."""
        base = request.base
        self.count += 1
        self.total += base
        insort(self.bases, base)
        slot = base % self.size
        self.due[slot] += 1
        if self.listed:
            self.due_for[slot].append(request)
        known = self.leaving.get(request.rides_to)
        if known is None:
            self.leaving[request.rides_to] = [request]
            heapq.heappush(self._leaves, request.rides_to)
        else:
            known.append(request)

    def remove(self, request: Request) -> None:
        """Take it out of all sums but `handing`."""
        base = request.base
        self.count -= 1
        self.total -= base
        del self.bases[bisect_left(self.bases, base)]
        slot = base % self.size
        self.due[slot] -= 1
        if self.listed:
            self.due_for[slot].remove(request)
        known = self.leaving.get(request.rides_to)
        if known is not None:
            known.remove(request)
            if not known:
                del self.leaving[request.rides_to]

    def next_leave(self) -> int:
        """The batch that brings the next last token; there are riders."""
        leaves = self._leaves
        while leaves[0] not in self.leaving:
            heapq.heappop(leaves)
        return leaves[0]

    def contexts(self, batch: int) -> tuple[int, int, int]:
        """Sum, maximum and minimum of the contexts before batch number `batch`; there are riders."""
        before = self.growth * (batch - 1)
        return self.total + self.count * before, self.bases[-1] + before, self.bases[0] + before

    def batches_below(self, context: int, first: int, most: int) -> int:
        """How many batches from number `first` on, at most `most`, come before the one in which a rider that is not
        beyond `context` yet has come to it."""
        i = bisect_right(self.bases, context - first + 1)
        return min(most, context - first + 1 - self.bases[i - 1]) if i else most

    def blocks(self, batch: int) -> int:
        """How many blocks they need in batch number `batch`: a rider needs one when its slots have come beyond a
        multiple of the block size."""
        if self.growth == 1:
            return self.groups * self.due[(self._next - batch) % self.size]
        growth, size = self.growth, self.size
        first = 1 - self.slots - growth * (batch - 1)
        due = sum(self.due[(first + beyond) % size] for beyond in range(growth % size))
        return self.groups * (self.count * (growth // size) + due)

    def calling(self, batch: int) -> list[Request]:
        """Who has to do with the KV cache in batch number `batch`."""
        due_for, size, before = self.due_for, self.size, self.growth * (batch - 1)
        found: list[Request] = []
        for context in self._calls:
            found += due_for[(context - before) % size]
        return found
