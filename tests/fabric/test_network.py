"""The network of a scenario: the named algorithm, or a graph, or the reference's rings."""

from __future__ import annotations

from pathlib import Path

import pytest

from servetwin.errors import InputError
from servetwin.fabric.build import Computer, Wires
from servetwin.fabric.collectives import ring_allreduce_ns
from servetwin.fabric.network import COLLECTIVES, Network
from servetwin.model.kernels import Collective

TWO = (Computer(2, Wires("switch", 16 * 2**30, 20_000), nics=1),) * 2
BETWEEN = Wires("switch", 16 * 2**30, 20_000)
PAIR = Collective(name="x", kind="allreduce", ranks=2, bytes_a_row=655_360)


def test_every_algorithm_prices_a_replica() -> None:
    times = {
        name: Network(TWO, BETWEEN, collectives=name).links([0, 1], 2, 1, 1, 1597e9).collective_ns(PAIR, 1)
        for name in COLLECTIVES
    }
    assert times["llmservingsim"] == 78_791
    assert times["auto"] == min(times["one_shot"], times["ring"])
    # The plain ring and what a call takes beyond it.
    assert times["ring"] == pytest.approx(ring_allreduce_ns(2, 655_360, 16 * 2**30, 20_000) + 18_000)


def test_the_reference_knows_two_dimensions() -> None:
    network = Network(TWO, BETWEEN, collectives="llmservingsim")
    whole = Collective(name="x", kind="allreduce", ranks=4, bytes_a_row=655_360)
    links = network.links([0, 1, 2, 3], 4, 1, 1, 1597e9)
    assert links.spans_nodes(whole)
    assert links.collective_ns(whole, 1) > 3 * 20_000


def test_a_graph_has_as_many_devices_as_the_nodes(tmp_path: Path) -> None:
    path = tmp_path / "net.csv"
    path.write_text("from,to,bandwidth,latency,both\ngpu0,gpu1,10GB/s,1us,true\n")
    network = Network((Computer(2, BETWEEN),), graph=path, collectives="ring", explicit=False)
    links = network.links([0, 1], 2, 1, 1, 1e12)
    assert links.explicit
    assert links.collective_ns(PAIR, 1) == pytest.approx(ring_allreduce_ns(2, 655_360, 10e9, 1000) + 18_000)
    with pytest.raises(InputError, match="found 2; allowed: 4"):
        Network(TWO, graph=path).links([0, 1], 2, 1, 1, 1e12)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match=r"network\.collectives.*did you mean 'ring'"):
        Network(TWO, BETWEEN, collectives="rings")
    with pytest.raises(InputError, match="not a graph"):
        Network(TWO, graph=Path("net.csv"), collectives="llmservingsim")
