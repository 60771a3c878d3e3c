"""Which source prices a collective: links that a person described, measured tables, links of the catalogue."""

from __future__ import annotations

from pathlib import Path

import pytest

from running import WORKLOAD
from servetwin.fabric.build import Computer, Wires, build_topology
from servetwin.fabric.group import Fabric
from servetwin.fabric.link import DeviceLink
from servetwin.fabric.reference import ReferenceLinks
from servetwin.scenario.load import from_data
from servetwin.scenario.resolve import resolve
from servetwin.timing.choose import Pricing, pricing_for
from servetwin.timing.links import Links
from servetwin.timing.operators import OperatorTimer
from servetwin.timing.shape import StepShape

DECODE = StepShape(0, 0, 0, 0, 8, 8, 8000, 1000, 1000)


def pricing(device: str = "h100_sxm", link: dict[str, str] | None = None, source: str = "auto") -> Pricing:
    pool: dict[str, object] = {"device": device, "parallelism": {"tensor": 4}}
    if link is not None:
        pool["link"] = link
    data = {
        "model": "meta-llama/Llama-3.1-8B",
        "workload": WORKLOAD,
        "pools": [pool],
        "timing": {"source": source},
    }
    scenario = resolve(from_data(data, "test", Path()), Path())
    return pricing_for(scenario, scenario.pools[0], Path())


def allreduce(timer: object) -> tuple[int, str, str]:
    """ns, kind of knowledge and source of the all-reduces after attention."""
    assert isinstance(timer, OperatorTimer)
    return next(row[1:] for row in timer.explain(DECODE) if row[0] == "mixer_allreduce")


def replica(spread: bool, explicit: bool) -> Links:
    """Four tensor ranks in one node, or two in each of two."""
    topology = build_topology([Computer(4, Wires("switch", 300e9, 1000), nics=4)] * 2, Wires("switch", 50e9, 2000))
    fabric = Fabric(topology, explicit=explicit)
    return fabric.replica([0, 1, 4, 5] if spread else [0, 1, 2, 3], 4)


def test_a_table_comes_before_the_catalogue() -> None:
    assert allreduce(pricing().new_timer())[2] == "silicon"
    assert pricing().source == "silicon > link > roofline"


def test_a_link_that_was_given_comes_before_a_table() -> None:
    found = pricing(link={"bandwidth": "16GB/s", "latency": "20us"})
    ns, how, source = allreduce(found.new_timer())
    assert (how, source) == ("analytic", "link")
    assert ns >= 32 * 6 * 20_000
    assert found.source == "link > silicon > roofline"


def test_without_a_table_the_catalogue_is_what_there_is() -> None:
    assert allreduce(pricing(source="roofline").new_timer())[2] == "link"


@pytest.mark.parametrize(
    ("spread", "explicit", "source"),
    [(False, False, "silicon"), (True, False, "link"), (False, True, "link"), (True, True, "link")],
)
def test_a_network_prices_what_no_table_of_one_node_can(spread: bool, explicit: bool, source: str) -> None:
    links = replica(spread, explicit)
    ns, _, found = allreduce(pricing().new_timer(links))
    assert found == source
    if source == "link":
        operator = next(p.operator for p in pricing().new_timer().parts if p.operator.name == "mixer_allreduce")
        assert ns == int(links.collective_ns(operator, 8) * 32)


def test_timers_of_one_pool_may_stand_in_different_places() -> None:
    found = pricing()
    near, far = (found.new_timer(replica(spread, True)).step_ns(DECODE) for spread in (False, True))
    assert near < far
    assert found.new_timer(DeviceLink(300e9, 1000)).step_ns(DECODE) > 0
    assert found.new_timer(ReferenceLinks((300e9, 1000), (50e9, 2000), 3.35e12)).step_ns(DECODE) > 0
