"""Measured times of single kernels (matrix products, attention, experts, collectives), by device.

The tables are NVIDIA AIConfigurator's, cleaned and repacked; docs/silicon.md tells how.
"""

from __future__ import annotations

from servetwin.timing.kernels.curve import Curve, How, worst
from servetwin.timing.kernels.profile import KernelProfile
from servetwin.timing.kernels.tables import KernelTables

__all__ = ["Curve", "How", "KernelProfile", "KernelTables", "worst"]
