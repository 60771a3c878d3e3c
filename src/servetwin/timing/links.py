"""Collectives priced from the link between a replica's devices."""

from __future__ import annotations

from servetwin.errors import InputError
from servetwin.fabric.link import DeviceLink
from servetwin.model.kernels import Collective, Operator
from servetwin.timing.operators import Pricer


class LinkSource:
    """Latency and bandwidth of a link, over the ring schedules of `servetwin.fabric`."""

    name = "link"

    def __init__(self, link: DeviceLink | None) -> None:
        self._link = link

    def pricer(self, operator: Operator) -> Pricer | None:
        """Raises InputError for a collective when there is no link."""
        if not isinstance(operator, Collective):
            return None
        link = self._link
        if link is None:
            raise InputError("the device has no link to others: give the pool one", field="link")
        return lambda rows: (link.collective_ns(operator, rows), "analytic")
