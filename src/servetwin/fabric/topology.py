"""Devices and what joins them: a directed graph of links, and the way from one device to another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from servetwin.errors import InputError, nearest


@dataclass(frozen=True, slots=True)
class Link:
    """One direction of a data path. `bandwidth` in B/s, `latency_ns` before the first byte arrives."""

    source: str
    target: str
    bandwidth: float
    latency_ns: float = 0

    def __post_init__(self) -> None:
        if not self.bandwidth > 0:
            raise InputError("must be more than 0", field="bandwidth", found=self.bandwidth)
        if not self.latency_ns >= 0:
            raise InputError("must not be negative", field="latency", found=self.latency_ns)


def both(a: str, b: str, bandwidth: float, latency_ns: float = 0, back_ns: float | None = None) -> list[Link]:
    """The two directions of a data path; `back_ns` is the latency from `b` to `a` where it differs."""
    return [Link(a, b, bandwidth, latency_ns), Link(b, a, bandwidth, latency_ns if back_ns is None else back_ns)]


class Topology:
    """Endpoints joined by links.

    `devices` are the endpoints that compute, numbered in this order; every other endpoint that a link names forwards
    (switch, adapter, bridge). `hosts` are those of them that belong to a processor: what passes them is not
    device-to-device traffic to an engine. `adapters` are those that join a node to the network. `nodes[i]` is the
    computer that device i sits in, `shape` the sides of a torus that the devices fill, first side fastest, and
    `attach[i]` the endpoint where an adapter of device i is plugged in (default: the device).

    Raises:
        InputError: a device is named twice, or cannot be reached by all others.
    """

    def __init__(
        self,
        devices: Sequence[str],
        links: Iterable[Link],
        *,
        hosts: Iterable[str] = (),
        adapters: Iterable[str] = (),
        nodes: Sequence[int] | None = None,
        shape: tuple[int, ...] = (),
        attach: Sequence[str] | None = None,
    ) -> None:
        self.devices, self.links = tuple(devices), tuple(links)
        self.hosts, self.adapters, self.shape = frozenset(hosts), frozenset(adapters), shape
        self.nodes = tuple(nodes) if nodes is not None else (0,) * len(self.devices)
        self.attach = tuple(attach) if attach is not None else self.devices
        self._number = {name: i for i, name in enumerate(self.devices)}
        if len(self._number) < len(self.devices):
            twice = next(name for i, name in enumerate(self.devices) if self._number[name] != i)
            raise InputError("two devices have the same name", field="devices", found=twice)
        self._out: dict[str, list[int]] = {}
        for i, link in enumerate(self.links):
            self._out.setdefault(link.source, []).append(i)
        self._searches: dict[int, _Search] = {}
        self._paths: dict[tuple[int, int], tuple[int, ...]] = {}
        self._check_connected()

    def device(self, name: str) -> int:
        """The number of the device of this name. InputError with the nearest name when there is none."""
        found = self._number.get(name)
        if found is None:
            hint = nearest(name, self._number)
            raise InputError("no such device", found=name, allowed=", ".join(self.devices[:8]), hint=hint)
        return found

    def path(self, source: int, target: int) -> tuple[int, ...]:
        """Numbers of the links from one device to another, in order; none from a device to itself.

        The way that passes the fewest adapters (none inside a node), of those the one with the fewest other devices on
        it, then the least latency, then the fewest links, then the widest ones; what is still equal is decided by the
        order in which links were given.
        """
        found = self._paths.get((source, target))
        if found is None:
            if source not in self._searches:
                self._searches[source] = _Search(self, self.devices[source])
            into = self._searches[source].until(self.devices[target])
            back: list[int] = []
            at, start = self.devices[target], self.devices[source]
            while at != start:
                back.append(into[at])
                at = self.links[into[at]].source
            found = self._paths[source, target] = tuple(reversed(back))
        return found

    def links_from(self, endpoint: str) -> list[int]:
        """Numbers of the links that leave an endpoint."""
        return self._out.get(endpoint, [])

    def is_device(self, endpoint: str) -> bool:
        return endpoint in self._number

    def latency_ns(self, source: int, target: int) -> float:
        """Of the path between two devices."""
        return sum(self.links[i].latency_ns for i in self.path(source, target))

    def passes_host(self, source: int, target: int) -> bool:
        """Whether the path between two devices goes through a processor."""
        return any(self.links[i].target in self.hosts for i in self.path(source, target))

    def _check_connected(self) -> None:
        """All devices reach each other when the first reaches all and all reach the first."""
        for forward, message in ((True, "cannot be reached from"), (False, "cannot reach")):
            seen = self._reached(forward)
            cut_off = [name for name in self.devices if name not in seen]
            if cut_off:
                more = f" (and {len(cut_off) - 3} more)" if len(cut_off) > 3 else ""
                raise InputError(
                    f"{', '.join(cut_off[:3])}{more} {message} {self.devices[0]}: links are missing", field="links"
                )

    def _reached(self, forward: bool) -> set[str]:
        beside: dict[str, list[str]] = {}
        for link in self.links:
            a, b = (link.source, link.target) if forward else (link.target, link.source)
            beside.setdefault(a, []).append(b)
        seen = set(self.devices[:1])
        rest = list(seen)
        while rest:
            for name in beside.get(rest.pop(), ()):
                if name not in seen:
                    seen.add(name)
                    rest.append(name)
        return seen


class _Search:
    """The best ways from one endpoint (Dijkstra's algorithm), found as far as they have been asked for."""

    def __init__(self, topology: Topology, start: str) -> None:
        self._topology, self._start = topology, start
        self._into: dict[str, int] = {}
        self._best: dict[str, tuple[int, int, float, int, float]] = {start: (0, 0, 0, 0, 0)}
        self._queue = [(self._best[start], 0, start)]
        self._settled: set[str] = set()
        self._pushed = 0

    def until(self, target: str) -> dict[str, int]:
        """The link over which the best way reaches each endpoint; final for `target` and what lies before it."""
        topology, best, queue = self._topology, self._best, self._queue
        while target not in self._settled:
            cost, _, at = heappop(queue)
            if at in self._settled:
                continue
            self._settled.add(at)
            adapters = cost[0] + (at in topology.adapters)
            devices = cost[1] + (topology.is_device(at) and at != self._start)
            for i in topology.links_from(at):
                link = topology.links[i]
                latency, wide = cost[2] + link.latency_ns, cost[4] + 1 / link.bandwidth
                onward = (adapters, devices, latency, cost[3] + 1, wide)
                if link.target not in best or onward < best[link.target]:
                    best[link.target], self._into[link.target] = onward, i
                    self._pushed += 1
                    heappush(queue, (onward, self._pushed, link.target))
        return self._into
