"""Facts: devices, links, hosts, models and engine versions, one YAML file each, every fact with its source.

    >>> from servetwin import catalog
    >>> catalog.device("h100_sxm").peak["bf16"]
    989400000000000.0

The smallest device of one's own is a file `mine/devices/my_chip.yaml` with

    memory: {size: 80GiB, bandwidth: 2TB/s}
    peak: {bf16: 400TFLOPS}

A folder of one's own, with the same sub-folders, is searched first: `add_folder(path)` or the environment variable
SERVETWIN_CATALOG.
"""

from __future__ import annotations

from servetwin.catalog.entries import Device, EngineVersion, Host, Link, ModelEntry, Published, ScaleUp
from servetwin.catalog.lookup import KINDS, add_folder, device, engine, host, link, model, names

__all__ = [
    "KINDS",
    "Device",
    "EngineVersion",
    "Host",
    "Link",
    "ModelEntry",
    "Published",
    "ScaleUp",
    "add_folder",
    "device",
    "engine",
    "host",
    "link",
    "model",
    "names",
]
