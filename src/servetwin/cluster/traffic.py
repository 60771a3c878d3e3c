"""How many bytes each link of the network carried, derived from the steps after a run.

Counted are the collectives of the replicas: every step runs each of them over the rows that the devices computed,
padding to captured graphs included. With draft tokens every decode is taken to carry them all.

Invariant: the bytes on all links add up to those that the collectives' schedules send, hop by hop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from servetwin.cluster.build import Built, Replica
from servetwin.fabric.network import Network
from servetwin.model.kernels import Collective
from servetwin.timing.graphs import graph_sizes

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Steps = Mapping[str, Ints]


def link_bytes(built: Built, steps: Steps) -> Floats:
    """Bytes on each link (by number, as in the topology) over a whole run; `steps` are the columns of the step log."""
    network = built.network
    assert network is not None
    carried = np.zeros(len(network.topology.links))
    numbers = np.arange(len(built.cluster.engines))
    starts = np.searchsorted(steps["engine"], numbers)
    ends = np.searchsorted(steps["engine"], numbers, side="right")
    for replica in built.replicas:
        if replica.pricing.collectives:
            of_ranks = [{name: steps[name][starts[n] : ends[n]] for name in steps} for n in replica.engines]
            carried += _of_replica(network, replica, of_ranks)
    return carried


def _of_replica(network: Network, replica: Replica, of_ranks: Sequence[Steps]) -> Floats:
    degrees, ranks = replica.pool.parallelism, len(of_ranks)
    carried = np.zeros(len(network.topology.links))
    drafts = replica.pool.engine.num_speculative_tokens or 0
    together = ranks > 1 and replica.in_step
    if together:
        of_ranks = _pass_by_pass(of_ranks)
    brought = [steps["prefill_tokens"] + steps["decode_seqs"] * (1 + drafts) for steps in of_ranks]
    if together:
        brought = [np.maximum(tokens, 1 + drafts) for tokens in brought]  # a dummy batch is one decode
        most = np.max(brought, axis=0)
        computed = [_padded(replica, own, most) for own in brought]
        gathered = np.sum(computed, axis=0)
    else:
        computed = [_padded(replica, own, own) for own in brought]
        gathered = np.zeros(0, np.int64)
    each = len(replica.devices) // ranks
    for rank, steps in enumerate(of_ranks):
        own = network.fabric.replica(
            replica.devices[rank * each : (rank + 1) * each], degrees.tensor, degrees.pipeline, 1
        )
        logits = steps["prefill_seqs"] + steps["decode_seqs"] * (1 + drafts)
        for operator in replica.pricing.collectives:
            if not (together and _over_ranks(operator)):
                rows = logits if operator.rows == "logits" else computed[rank]
                carried += own.traffic(operator, np.repeat(rows, steps["steps"]))
    if together:
        whole = network.fabric.replica(replica.devices, degrees.tensor, degrees.pipeline, degrees.data)
        for operator in filter(_over_ranks, replica.pricing.collectives):
            rows = gathered if operator.rows == "gathered" else computed[0]
            carried += whole.traffic(operator, np.repeat(rows, of_ranks[0]["steps"]))
    return carried


def _pass_by_pass(of_ranks: Sequence[Steps]) -> list[Steps]:
    """The steps of ranks that keep step with each other, cut into rows of the same passes: each rank logs all passes,
    dummy batches included, but not with the same rows."""
    ends = [np.cumsum(steps["steps"]) for steps in of_ranks]
    bounds = np.unique(np.concatenate(ends))
    lengths = np.diff(bounds, prepend=0)
    return [
        {name: column[np.searchsorted(end, bounds)] for name, column in steps.items()} | {"steps": lengths}
        for steps, end in zip(of_ranks, ends, strict=True)
    ]


def _over_ranks(operator: Collective) -> bool:
    """Whether data-parallel ranks run it together."""
    return operator.group in ("expert", "data")


def _padded(replica: Replica, tokens: Ints, most: Ints) -> Ints:
    """The rows that a rank computes for its `tokens` when the largest batch beside it has `most`."""
    sizes = np.array(graph_sizes(replica.pool), np.int64)
    if not len(sizes):
        return tokens
    fits = most <= sizes[-1]
    return np.where(fits, sizes[np.searchsorted(sizes, np.minimum(most, sizes[-1]))], tokens)
