"""Routing to where a prompt's prefix is cached."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import Literal

import numpy as np

from servetwin.cluster.routing.candidates import Candidates, Ints
from servetwin.cluster.routing.policies import first_of_least
from servetwin.engine.request import Request

PrefixIndex = Literal["exact", "approximate"]


class ExactIndex:
    """The engines' own prefix caches, block by block: what they would find if the request were there now."""

    def cached_tokens(self, request: Request, candidates: Candidates) -> Ints:
        return candidates.cached_tokens(request)

    def sent(self, request: Request, candidates: Candidates, position: int) -> None:
        """Nothing to remember: the engine itself is asked."""


class ApproximateIndex:
    """What the router itself remembers: an engine is taken to hold the blocks of the prompts that it was sent last, as
    many as it has KV blocks. It knows neither outputs nor what the engine has evicted or not yet computed."""

    def __init__(self) -> None:
        self._holders: dict[Hashable, set[int]] = {}
        self._blocks: dict[int, OrderedDict[Hashable, None]] = {}
        """names of the prefixes that each engine was sent, least recently used first"""

    def cached_tokens(self, request: Request, candidates: Candidates) -> Ints:
        found = np.zeros(len(candidates), np.int64)
        for size in set(candidates.block_size.tolist()):
            chain = candidates.chain(request, size)
            if chain is None:
                continue
            blocks = (request.prompt - 1) // size
            left: set[int] | None = None
            for block in range(blocks):
                holders = self._holders.get(chain[block], set())
                if left is not None:
                    for position in left - holders:
                        found[position] = block * size
                    holders = left & holders
                left = holders
                if not left:
                    break
            for position in left or ():
                found[position] = blocks * size
        return found

    def sent(self, request: Request, candidates: Candidates, position: int) -> None:
        """`request` goes to the engine at `position`."""
        size = int(candidates.block_size[position])
        chain = candidates.chain(request, size)
        if chain is None:
            return
        recent = self._blocks.setdefault(position, OrderedDict())
        # The head of a prefix is used last, so that it is forgotten after its tail, as the engine does it.
        for block in range(request.prompt // size - 1, -1, -1):
            link = chain[block]
            recent[link] = None
            recent.move_to_end(link)
            self._holders.setdefault(link, set()).add(position)
        while len(recent) > candidates.usable_blocks[position]:
            link, _ = recent.popitem(last=False)
            holders = self._holders[link]
            holders.remove(position)
            if not holders:
                del self._holders[link]


def new_index(kind: PrefixIndex) -> ExactIndex | ApproximateIndex:
    return ExactIndex() if kind == "exact" else ApproximateIndex()


class PrefixAware:
    """The engine with the smallest

        overlap_weight x blocks of the prompt to prefill + blocks in use,

    the cost of Dynamo's KV router at temperature 0. Blocks in use are those that the engine's requests hold, and the
    blocks to prefill of requests sent there that no step has begun yet. Engines that are equal take turns.
    """

    def __init__(self, overlap_weight: float = 1.0, index: PrefixIndex = "exact") -> None:
        self._weight, self._index = overlap_weight, new_index(index)
        self._start = 0
        self._pending = np.zeros(0, np.int64)
        """tokens to prefill of each engine's requests that have not begun, as far as the router sees"""
        self._to_begin: dict[int, deque[tuple[Request, int]]] = {}

    def choose(self, request: Request, candidates: Candidates, now: int) -> int:
        if not len(self._pending):
            self._pending = np.zeros(len(candidates), np.int64)
        self._forget_begun(candidates.shown_before)
        prefill = request.prompt - self._index.cached_tokens(request, candidates)
        costs = (self._weight * prefill + self._pending) / candidates.block_size + candidates.kv_used
        chosen = first_of_least(costs, self._start)
        self._start = (chosen + 1) % len(candidates)
        self._pending[chosen] += prefill[chosen]
        self._to_begin.setdefault(chosen, deque()).append((request, int(prefill[chosen])))
        self._index.sent(request, candidates, chosen)
        return chosen

    def _forget_begun(self, before: int) -> None:
        """Requests that began before `before` count among the blocks in use."""
        for position in list(self._to_begin):
            queue = self._to_begin[position]
            while queue and (0 <= queue[0][0].scheduled_ns < before or queue[0][0].finished):
                self._pending[position] -= queue.popleft()[1]
            if not queue:
                del self._to_begin[position]
