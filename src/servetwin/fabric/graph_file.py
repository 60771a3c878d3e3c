"""A user's own network: a table of links (CSV), or a graph as networkx writes it (node-link JSON, GraphML).

Columns of the table, and attributes of edges: `bandwidth` and `latency` with their units; in the table also `from`,
`to` and, if wanted, `both` (true: the line stands for both directions). In a graph an undirected edge stands for both.

Endpoints named `gpu0`, `node3.gpu1` and so on, or in a graph those with the attribute `device: true`, are the devices,
numbered as their names sort, numbers in them by value. `node` (an attribute, or what stands before the last dot) says
which computer a device is in; computers of the scenario's names stand in the order of the scenario.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from servetwin.catalog.units import duration_ns, rate_of
from servetwin.errors import InputError, nearest
from servetwin.fabric.topology import Link, Topology

_DEVICE = re.compile(r"(?:.*\.)?gpu\d+")
_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0", "")
COLUMNS = ("from", "to", "bandwidth", "latency", "both")


def read_graph(path: Path, computers: Mapping[str, int] | None = None) -> Topology:
    """The topology in a file. `computers` are the scenario's, each with the number of its devices, in order: as many
    devices must be in the file, and where it uses the same names, as many in each.

    Raises:
        InputError: what is wrong, with file and line or edge: a column or attribute that is missing or misspelt, an
            endpoint that is used but not declared (in a graph), devices that are not joined or not as many as wanted.
    """
    if not path.is_file():
        raise InputError("no such file", where=str(path), field="network.graph")
    try:
        match path.suffix.lower():
            case ".csv":
                links, places = _from_table(path)
            case ".json" | ".graphml" | ".xml":
                links, places = _from_graph(path)
            case suffix:
                allowed = ".csv, .json (node-link), .graphml"
                raise InputError("not a graph file", field="network.graph", found=suffix, allowed=allowed)
        names, nodes = _in_order(places, computers)
        return Topology(names, links, nodes=nodes)
    except InputError as error:
        raise error.at(str(path)) from None


def _from_table(path: Path) -> tuple[list[Link], dict[str, str]]:
    links: list[Link] = []
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, skipinitialspace=True)
        _check_columns(rows.fieldnames or ())
        for number, row in enumerate(rows, 2):
            place = f"line {number}"
            ends = [(row[end] or "").strip() for end in ("from", "to")]
            if not all(ends):
                raise InputError("an end of the link is empty", field=place)
            two_way = (row.get("both") or "").strip().casefold()
            if two_way not in _TRUE + _FALSE:
                raise InputError("neither true nor false", field=f"{place}: both", found=row["both"])
            links += _links(ends[0], ends[1], row, two_way in _TRUE, place)
    names = {end: None for link in links for end in (link.source, link.target)}
    return links, _places({name: {} for name in names})


def _check_columns(found: Iterable[str]) -> None:
    found = list(found)
    for name in COLUMNS[:4]:
        if name not in found:
            hint = nearest(name, [column for column in found if column not in COLUMNS])
            raise InputError(f"the column {name!r} is missing", field="line 1", found=", ".join(found), hint=hint)
    for column in found:
        if column not in COLUMNS:
            hint = nearest(column, COLUMNS)
            raise InputError("unknown column", field="line 1", found=column, allowed=", ".join(COLUMNS), hint=hint)


def _from_graph(path: Path) -> tuple[list[Link], dict[str, str]]:
    import networkx  # takes a third of a second, and only these files need it

    try:
        if path.suffix.lower() == ".json":
            text = json.loads(path.read_text(encoding="utf-8"))
            key = "links" if "links" in text else "edges"
            declared = {str(entry["id"]) for entry in text["nodes"]}
            for edge in text[key]:
                for end in ("source", "target"):
                    if str(edge[end]) not in declared:
                        hint = nearest(str(edge[end]), declared)
                        raise InputError("no such endpoint", field=f"{key}: {end}", found=edge[end], hint=hint)
            graph = networkx.node_link_graph(text, edges=key)
        else:
            graph = networkx.read_graphml(path)
    except (ValueError, KeyError, TypeError, SyntaxError, networkx.NetworkXError) as error:
        raise InputError(f"not a graph: {error}", field="network.graph") from None
    links: list[Link] = []
    for a, b, data in graph.edges(data=True):
        links += _links(str(a), str(b), data, not graph.is_directed(), f"edge {a} to {b}")
    return links, _places({str(name): data for name, data in graph.nodes(data=True)})


def _links(a: str, b: str, facts: Mapping[str, Any], two_way: bool, place: str) -> list[Link]:
    values = {}
    for name, read in (("bandwidth", rate_of), ("latency", duration_ns)):
        if facts.get(name) in (None, ""):
            near = nearest(name, [key for key in facts if key not in COLUMNS])
            raise InputError(f"has no {name}", field=place, hint=near)
        try:
            values[name] = float(read(facts[name]))
        except InputError as error:
            raise error.at(field=f"{place}: {name}") from None
    try:
        there = Link(a, b, values["bandwidth"], values["latency"])
    except InputError as error:
        raise InputError(error.message, field=f"{place}: {error.field}", found=error.found) from None
    return [there, Link(b, a, there.bandwidth, there.latency_ns)] if two_way else [there]


def _places(endpoints: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The devices as their names sort, and the computer of each."""
    flagged = [name for name, data in endpoints.items() if data.get("device")]
    names = sorted(flagged or [name for name in endpoints if _DEVICE.fullmatch(name)], key=_by_numbers)
    if not names:
        message = "has no devices"
        raise InputError(message, field="devices", allowed="endpoints named gpu0, node0.gpu1, ... (or device: true)")
    return {name: str(endpoints[name].get("node", name.rpartition(".")[0])) for name in names}


def _in_order(places: Mapping[str, str], computers: Mapping[str, int] | None) -> tuple[list[str], list[int]]:
    """The devices, and the number of each one's computer: in the scenario's order where the names are the same."""
    held = Counter(places.values())
    names = list(places)
    if computers is not None:
        wanted = sum(computers.values())
        if len(names) != wanted:
            message = "another number of devices than the scenario's nodes have"
            raise InputError(message, field="devices", found=len(names), allowed=str(wanted))
        if held.keys() == computers.keys():
            for name, count in computers.items():
                if held[name] != count:
                    message = f"another number of devices than the scenario's node {name} has"
                    raise InputError(message, field="devices", found=held[name], allowed=str(count))
            numbers = {name: number for number, name in enumerate(computers)}
            names.sort(key=lambda name: numbers[places[name]])
    order = {place: number for number, place in enumerate(dict.fromkeys(places[name] for name in names))}
    return names, [order[places[name]] for name in names]


def _by_numbers(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
