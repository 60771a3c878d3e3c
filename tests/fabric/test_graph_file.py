"""Networks that a user brings along."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import networkx
import pytest

from servetwin.errors import InputError
from servetwin.fabric.algorithms import IDEAL
from servetwin.fabric.graph_file import read_graph
from servetwin.fabric.group import Fabric
from servetwin.fabric.topology import Topology

TABLE = """from,to,bandwidth,latency,both
node0.gpu0,node0.switch,100GB/s,1us,true
node0.gpu1,node0.switch,100GB/s,1us,true
node1.gpu0,node1.switch,100GB/s,1us,true
node1.gpu1,node1.switch,100GB/s,1us,true
node0.switch,node1.switch,25GB/s,2us,
node1.switch,node0.switch,50GB/s,2us,no
"""


def written(folder: Path, text: str, name: str = "net.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def check(topology: Topology) -> None:
    assert topology.devices == ("node0.gpu0", "node0.gpu1", "node1.gpu0", "node1.gpu1")
    assert topology.nodes == (0, 0, 1, 1)
    law = Fabric(topology, "one_shot", IDEAL).law("sendrecv", [[0, 2]])
    assert law.ns(25_000) == pytest.approx(4000 + 1000)
    back = Fabric(topology, "one_shot", IDEAL).law("sendrecv", [[2, 0]])
    assert back.ns(25_000) == pytest.approx(4000 + 500)


def test_a_table_of_links(tmp_path: Path) -> None:
    check(read_graph(written(tmp_path, TABLE), {"node0": 2, "node1": 2}))


def test_graphs_of_networkx(tmp_path: Path) -> None:
    graph = networkx.DiGraph()
    for line in TABLE.splitlines()[1:]:
        a, b, bandwidth, latency, both = line.split(",")
        for one, other in [(a, b), (b, a)] if both == "true" else [(a, b)]:
            graph.add_edge(one, other, bandwidth=bandwidth, latency=latency)
    networkx.write_graphml(graph, tmp_path / "net.graphml")
    check(read_graph(tmp_path / "net.graphml"))
    for key in ("links", "edges"):
        text = json.dumps(networkx.node_link_data(graph, edges=key))
        check(read_graph(written(tmp_path, text, "net.json")))


def test_edges_without_direction_and_devices_by_attribute(tmp_path: Path) -> None:
    graph = networkx.Graph()
    for i in (2, 10, 1):
        graph.add_node(f"tpu{i}", device=True, node="pod")
        graph.add_edge(f"tpu{i}", "hub", bandwidth="10GB/s", latency="0ns")
    topology = read_graph(written(tmp_path, json.dumps(networkx.node_link_data(graph, edges="edges")), "net.json"))
    assert topology.devices == ("tpu1", "tpu2", "tpu10")
    assert topology.nodes == (0, 0, 0)
    assert len(topology.links) == 6


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("from,to,bandwidth", "from,to,bandwith", r"net.csv: line 1: the column 'bandwidth' is missing.*'bandwith'"),
        ("latency,both", "latency,bothh", r"line 1: unknown column; found 'bothh'.*did you mean 'both'"),
        ("25GB/s", "25", r"line 6: bandwidth"),
        ("25GB/s", "", r"line 6: has no bandwidth"),
        ("25GB/s", "0GB/s", r"line 6: bandwidth: must be more than 0"),
        ("1us,true\nnode0.gpu1", "1us,maybe\nnode0.gpu1", r"line 2: both: neither true nor false; found 'maybe'"),
        ("node0.gpu1,", ",", r"line 3: an end of the link is empty"),
        ("node1.switch,node0.switch", "node1.gpu0,node1.gpu1", r"node0.*cannot reach|cannot reach.*node0"),
    ],
)
def test_mistakes_in_a_table(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TABLE
    with pytest.raises(InputError, match=message):
        read_graph(written(tmp_path, TABLE.replace(old, new, 1)))


def test_mistakes_in_graphs(tmp_path: Path) -> None:
    good = {
        "directed": False,
        "multigraph": False,
        "nodes": [{"id": "gpu0"}, {"id": "gpu1"}],
        "links": [{"source": "gpu0", "target": "gpu1", "bandwidth": "1GB/s", "latency": "1us"}],
    }

    def read(**changes: object) -> None:
        read_graph(written(tmp_path, json.dumps(good | changes), "net.json"))

    read()
    edge = good["links"][0]  # type: ignore[index]
    with pytest.raises(InputError, match="no such endpoint; found 'gpu2'; did you mean 'gpu"):
        read(links=[edge | {"target": "gpu2"}])
    with pytest.raises(InputError, match=r"edge gpu0 to gpu1: has no latency; did you mean 'latncy'"):
        read(links=[{k: v for k, v in edge.items() if k != "latency"} | {"latncy": "1us"}])
    with pytest.raises(InputError, match="gpu1 cannot be reached from gpu0"):
        read(links=[])
    with pytest.raises(InputError, match="has no devices"):
        read(nodes=[{"id": "a"}, {"id": "b"}], links=[edge | {"source": "a", "target": "b"}])
    for text, name in (("{", "a.json"), ("[]", "b.json"), ("<x", "c.graphml")):
        with pytest.raises(InputError, match="not a graph"):
            read_graph(written(tmp_path, text, name))
    with pytest.raises(InputError, match=r"allowed: \.csv"):
        read_graph(written(tmp_path, "", "net.txt"))
    with pytest.raises(InputError, match="no such file"):
        read_graph(tmp_path / "none.csv")
    with pytest.raises(InputError, match="found 4; allowed: 8"):
        read_graph(written(tmp_path, TABLE), {"node0": 4, "node1": 4})


def test_nodes_of_the_scenario_keep_its_order(tmp_path: Path) -> None:
    path = written(tmp_path, TABLE.replace("node0", "hopper").replace("node1", "ada"))
    assert read_graph(path).devices[0] == "ada.gpu0"
    topology = read_graph(path, {"hopper": 2, "ada": 2})
    assert topology.devices == ("hopper.gpu0", "hopper.gpu1", "ada.gpu0", "ada.gpu1")
    assert topology.nodes == (0, 0, 1, 1)
    with pytest.raises(InputError, match="the scenario's node hopper has; found 2; allowed: 1"):
        read_graph(path, {"hopper": 1, "ada": 3})


def test_networkx_is_not_imported_without_need() -> None:
    code = (
        "import sys; import servetwin.fabric.graph_file, servetwin.timing.choose; assert 'networkx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
