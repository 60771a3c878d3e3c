"""Collective algorithms: which rank sends how much to which, round by round.

Sizes are in chunks, equal parts of the message, so everything here is whole numbers. Ranks are numbered 0, 1, ... along
a grid of sides `dims`, first side fastest (`(8, 4)`: four nodes of eight); a flat algorithm has one side.

All-reduce of a message is a reduce-scatter followed by an all-gather (Rabenseifner; Thakur, Rabenseifner and Gropp,
Int. J. High Perform. Comput. Appl. 19, 2005), except for the double tree and the one-shot kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import gcd, prod
from typing import Literal, NamedTuple

Flow = tuple[int, int, int]
"""(from rank, to rank, chunks)"""
Method = Literal["ring", "direct", "doubling"]
"""How the ranks of one line exchange: neighbour to neighbour, all at once, or in rounds of doubling distance"""


class Round(NamedTuple):
    """`times` rounds of the same flows, one after the other; each flow is busy in `busy` of them (fewer while a
    pipeline fills and drains)."""

    times: int
    flows: tuple[Flow, ...]
    busy: int


class Schedule(NamedTuple):
    """A message cut in `chunks`, and the rounds that move it."""

    chunks: int
    rounds: tuple[Round, ...]


def once(flows: Iterator[Flow] | list[Flow], times: int = 1) -> Round:
    return Round(times, tuple(flows), times)


def all_gather(dims: Sequence[int], methods: Sequence[Method]) -> Schedule:
    """Every rank ends with the chunks of all; the last side first, so that what crosses it is least."""
    rounds: list[Round] = []
    held = 1
    for side in reversed(range(len(dims))):
        rounds += _gather(dims, side, methods[side], held)
        held *= dims[side]
    return Schedule(prod(dims), tuple(rounds))


def reduce_scatter(dims: Sequence[int], methods: Sequence[Method]) -> Schedule:
    """The all-gather backwards."""
    gather = all_gather(dims, methods)
    return Schedule(gather.chunks, gather.rounds[::-1])


def all_reduce(dims: Sequence[int], methods: Sequence[Method]) -> Schedule:
    """Reduce-scatter, then all-gather: over several sides, RS(first) ... AR(last) ... AG(first)."""
    gather = all_gather(dims, methods)
    return Schedule(gather.chunks, gather.rounds[::-1] + gather.rounds)


def _gather(dims: Sequence[int], side: int, method: Method, held: int) -> list[Round]:
    """All-gather along one side by ranks that hold `held` chunks each. `doubling` is Bruck's algorithm (IEEE Trans.
    Parallel Distrib. Syst. 8, 1997), which takes any number of ranks."""
    n = dims[side]
    match method:
        case "ring":
            return [once(_shifted(dims, side, 1, held), n - 1)] if n > 1 else []
        case "direct":
            flows = [flow for shift in range(1, n) for flow in _shifted(dims, side, shift, held)]
            return [once(flows)] if n > 1 else []
        case "doubling":
            steps = [1 << k for k in range((n - 1).bit_length())]
            return [once(_shifted(dims, side, step, held * min(step, n - step))) for step in steps]


def _shifted(dims: Sequence[int], side: int, shift: int, chunks: int) -> Iterator[Flow]:
    """From every rank to the one `shift` further along a side."""
    step, n = prod(dims[:side]), dims[side]
    for rank in range(prod(dims)):
        at = rank // step % n
        yield rank, rank + ((at + shift) % n - at) * step, chunks


def rings(ranks: int, strides: Sequence[int], passes: int) -> Schedule:
    """Rings at once, one for each stride (coprime with `ranks`; negative: backwards), each with its share of the
    message. `passes`: 1 for an all-gather or reduce-scatter, 2 for an all-reduce."""
    flows = [(rank, (rank + stride) % ranks, 1) for stride in strides for rank in range(ranks)]
    return Schedule(ranks * len(strides), (once(flows, passes * (ranks - 1)),))


def stride_sets(ranks: int) -> list[tuple[int, ...]]:
    """One ring, one in each direction, and one for every stride that visits all ranks."""
    every = tuple(stride for stride in range(1, ranks) if gcd(stride, ranks) == 1)
    return list(dict.fromkeys([(1,), (1, ranks - 1) if ranks > 2 else (1,), every]))


def one_shot(ranks: int) -> Schedule:
    """All-reduce in which every rank reads the whole message of all others."""
    return Schedule(1, (once([(a, b, 1) for a in range(ranks) for b in range(ranks) if a != b]),))


SEGMENTS = (1, 4, 16, 64, 256)
"""Pieces into which a tree cuts what flows through it; the best is taken."""


def double_tree(ranks: int, segments: int) -> Schedule:
    """All-reduce up and down two binary trees at once, each with half of the message, in which no rank is inside both
    (Sanders, Speck and Träff, Parallel Comput. 35, 2009). `segments` pieces of a half follow each other."""
    flows: list[Flow] = []
    for tree in (lambda rank: rank, (lambda rank: ranks - 1 - rank) if ranks % 2 == 0 else _next(ranks)):
        for position in range(1, ranks + 1):
            parent = _parent(position, ranks)
            if parent:
                a, b = tree(position - 1), tree(parent - 1)
                flows += [(a, b, 1), (b, a, 1)]
    height = max(_depth(position, ranks) for position in range(1, ranks + 1))
    return Schedule(2 * segments, (Round(2 * height + segments - 1, tuple(flows), segments),))


def _next(ranks: int) -> Callable[[int], int]:
    return lambda rank: (rank + 1) % ranks


def _parent(position: int, ranks: int) -> int:
    """In the in-order binary tree over 1..ranks whose leaves are the odd positions; 0 for the root."""
    bit = position & -position
    while bit <= ranks:
        position, bit = position - bit | bit << 1, bit << 1
        if position <= ranks:  # else that inner node does not exist, and its own parent takes its place
            return position
    return 0


def _depth(position: int, ranks: int) -> int:
    depth = 0
    while position := _parent(position, ranks):
        depth += 1
    return depth


def pairwise(ranks: int) -> Schedule:
    """All-to-all, one partner after the other."""
    return Schedule(ranks, tuple(once(_shifted((ranks,), 0, shift, 1)) for shift in range(1, ranks)))


def exchange(dims: Sequence[int]) -> Schedule:
    """All-to-all along one side after the other, last side first: what is meant for another node crosses to the device
    at the same place there, which hands it on (one side: all ranks to all at once)."""
    total = prod(dims)
    rounds = [
        once([f for shift in range(1, dims[side]) for f in _shifted(dims, side, shift, total // dims[side])])
        for side in reversed(range(len(dims)))
    ]
    return Schedule(total, tuple(rounds))


def exchange_doubling(ranks: int) -> Schedule:
    """Bruck's all-to-all: few rounds, each with about half of the message."""
    rounds = []
    for k in range((ranks - 1).bit_length()):
        blocks = sum(1 for block in range(ranks) if block >> k & 1)
        rounds.append(once(_shifted((ranks,), 0, 1 << k, blocks)))
    return Schedule(ranks, tuple(rounds))


def broadcast_ring(ranks: int) -> Schedule:
    """Scatter from rank 0, then all-gather over a ring (van de Geijn; Thakur et al. 2005)."""
    scatter = once([(0, rank, 1) for rank in range(1, ranks)])
    return Schedule(ranks, (scatter, *all_gather((ranks,), ("ring",)).rounds))


def broadcast_tree(dims: Sequence[int]) -> Schedule:
    """Binomial tree from rank 0: first along the last side, then from there along the others."""
    rounds: list[Round] = []
    have = [0]
    for side in reversed(range(len(dims))):
        step, start = prod(dims[:side]), list(have)
        for k in range((dims[side] - 1).bit_length()):
            reached = range(1 << k, min(2 << k, dims[side]))
            flows = [(root + (at - (1 << k)) * step, root + at * step, 1) for root in start for at in reached]
            rounds.append(once(flows))
            have += [flow[1] for flow in flows]
    return Schedule(1, tuple(rounds))


def broadcast_at_once(ranks: int) -> Schedule:
    return Schedule(1, (once([(0, rank, 1) for rank in range(1, ranks)]),))


def transfer() -> Schedule:
    """Rank 0 to rank 1."""
    return Schedule(1, (once([(0, 1, 1)]),))
