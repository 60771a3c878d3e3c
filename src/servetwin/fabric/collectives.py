"""How long ranks take to exchange data over links of a given bandwidth and latency."""

from __future__ import annotations


def ring_allreduce_ns(ranks: int, size: float, bandwidth: float, latency_ns: float) -> float:
    """All-reduce of `size` bytes over a ring: 2(N-1) rounds, each moving size/N bytes over every link.

    Bandwidth in B/s in one direction. The bandwidth-optimal schedule (Patarasuk and Yuan, J. Parallel Distrib. Comput.
    69, 2009); time for the additions is left out.
    """
    rounds = 2 * (ranks - 1)
    return rounds * (latency_ns + size / ranks / bandwidth * 1e9)


def ring_gather_ns(ranks: int, size: float, bandwidth: float, latency_ns: float) -> float:
    """All-gather whose whole result has `size` bytes, or reduce-scatter of `size` bytes: half of an all-reduce."""
    return (ranks - 1) * (latency_ns + size / ranks / bandwidth * 1e9)


def exchange_ns(ranks: int, size: float, bandwidth: float, latency_ns: float) -> float:
    """All-to-all in which every rank sends `size` bytes in all, 1/N of them to itself."""
    return latency_ns + size * (ranks - 1) / ranks / bandwidth * 1e9


def transfer_ns(size: float, bandwidth: float, latency_ns: float) -> float:
    """One message of `size` bytes from one rank to another."""
    return latency_ns + size / bandwidth * 1e9
