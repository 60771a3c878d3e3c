"""Collectives priced from the links between a replica's devices."""

from __future__ import annotations

from typing import Protocol

from servetwin.errors import InputError
from servetwin.model.kernels import Collective, Operator
from servetwin.timing.operators import Pricer


class Links(Protocol):
    """What joins the devices of a replica: one link (`fabric.link.DeviceLink`), a place in a topology
    (`fabric.group.DeviceGroup`), or the reference's rings (`fabric.reference.ReferenceLinks`)."""

    @property
    def explicit(self) -> bool:
        """Whether the links inside nodes were described for this machine, rather than taken from the catalogue."""

    def collective_ns(self, operator: Collective, rows: int) -> float:
        """Time of a collective over `rows` rows, the mean over the pipeline stages that run it."""

    def spans_nodes(self, operator: Collective) -> bool:
        """Whether a group that runs it has devices in more than one node."""


class LinkSource:
    """Collectives over links, by the schedules of `servetwin.fabric`; with `only_across_nodes` those of groups that are
    spread over several nodes."""

    name = "link"

    def __init__(self, links: Links | None, only_across_nodes: bool = False) -> None:
        self._links, self._only_across = links, only_across_nodes

    def pricer(self, operator: Operator) -> Pricer | None:
        """Raises InputError for a collective when there is no link."""
        if not isinstance(operator, Collective):
            return None
        links = self._links
        if links is None:
            raise InputError("the device has no link to others: give the pool one", field="link")
        if self._only_across and not links.spans_nodes(operator):
            return None
        return lambda rows: (links.collective_ns(operator, rows), "analytic")
