"""The cluster file of LLMServingSim 2.0: its nodes, and the instances on them.

What such a file can say and a scenario cannot is refused by its name; nothing in it is ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servetwin.catalog.fields import Fields, count, text
from servetwin.errors import InputError
from servetwin.interop.llmservingsim_options import ENGINE, MEMORY_SHARE, REFUSED_SWITCHES, number, share, switch

GIB = 1 << 30
"""That project's unit of memory sizes and of link bandwidths; bandwidths of memories are in 1e9 B/s."""


@dataclass(frozen=True)
class Host:
    """The host memory of a node: bytes, and B/s."""

    memory: int
    bandwidth: float


@dataclass(frozen=True)
class Instance:
    """What that project calls an instance: a scheduler and its devices."""

    place: str
    """in the file, such as `nodes[0].instances[1]`"""
    node: int
    model: str
    hardware: str
    memory: int
    """bytes of one device"""
    memory_bandwidth: float
    """B/s of one device"""
    tensor: int
    pipeline: int
    expert: int | None
    """of the whole data-parallel group; None: as that project infers it"""
    group: str | None
    """the data-parallel group that it is a member of"""
    engine: Mapping[str, Any]
    """options of its own, which override flags"""

    @property
    def devices(self) -> int:
        return self.tensor * self.pipeline


@dataclass(frozen=True)
class Cluster:
    """A whole file. Links are per dimension of that project's network, or one for all: GiB/s, ns a hop."""

    path: Path
    hosts: tuple[Host, ...]
    instances: tuple[Instance, ...]
    """in the order of the file"""
    link_bw: list[float] | float
    link_latency: list[float] | float


def json_fields(path: Path, content: str | None = None, field: str | None = None) -> Fields:
    """The JSON object in the file `path`, or in `content`, a part of it. Raises InputError when it is not one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8") if content is None else content)
    except FileNotFoundError:
        raise InputError("no such file", where=str(path)) from None
    except json.JSONDecodeError as error:
        place = field or f"line {error.lineno}, column {error.colno}"
        raise InputError(f"not JSON: {error.msg}", where=str(path), field=place) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}", where=str(path), field=field) from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from None
    if not isinstance(data, dict):
        message = "not a JSON object"
        raise InputError(message, where=str(path), field=field, found=type(data).__name__, allowed="a JSON object")
    return Fields(data, str(path))


def read_cluster(path: Path) -> Cluster:
    """What stands in the cluster file `path`.

    Raises InputError for what is wrong in the file, and for features that cannot be imported, all of them by name.
    """
    top = json_fields(path)
    refused: list[str] = []
    nodes = top.get("nodes", _objects)
    _same_number(top, "num_nodes", len(nodes), "nodes")
    hosts: list[Host] = []
    instances: list[Instance] = []
    for index, data in enumerate(nodes):
        node = Fields(data, str(path), f"nodes[{index}]")
        found = node.get("instances", _objects)
        _same_number(node, "num_instances", len(found), "instances")
        hosts.append(_read_host(node, refused))
        if node.has("power"):
            refused.append(f"{node.path}.power")
        node.done()
        for at, instance in enumerate(found):
            place = f"{node.path}.instances[{at}]"
            instances.append(_read_instance(Fields(instance, str(path), place), index, refused))
    if top.has("cxl_mem"):
        refused.append("cxl_mem")
    links = top.get("link_bw", _numbers), top.get("link_latency", _numbers)
    top.done()
    if refused:
        raise InputError("cannot be imported: " + ", ".join(refused), where=str(path))
    return Cluster(path, tuple(hosts), tuple(instances), *links)


def _read_host(node: Fields, refused: list[str]) -> Host:
    host = Fields(node.get("cpu_mem", _any), node.where, f"{node.path}.cpu_mem")
    pim = host.has("pim_config")
    if pim:
        refused.append(f"{host.path}.pim_config")
    size = int(host.get("mem_size", _positive) * GIB)
    bandwidth = host.maybe("mem_bw", number, 0.0) if pim else host.get("mem_bw", _positive)
    latency = host.maybe("mem_latency", number, 0.0) if pim else host.get("mem_latency", number)
    if latency:
        refused.append(f"{host.path}.mem_latency {latency:g}")
    host.done()
    return Host(size, bandwidth * 1e9)


def _read_instance(fields: Fields, node: int, refused: list[str]) -> Instance:
    memory = Fields(fields.get("npu_mem", _any), fields.where, f"{fields.path}.npu_mem")
    engine = {name: fields.get(name, read) for name, (read, _) in ENGINE.items() if fields.has(name)}
    if memory.has("mem_util"):
        engine[MEMORY_SHARE] = memory.get("mem_util", share)
    if latency := memory.get("mem_latency", number):
        refused.append(f"{memory.path}.mem_latency {latency:g}")
    tensor, pipeline = _parallelism(fields)
    result = Instance(
        place=fields.path,
        node=node,
        model=fields.get("model_name", text),
        hardware=fields.get("hardware", text),
        memory=int(memory.get("mem_size", _positive) * GIB),
        memory_bandwidth=memory.get("mem_bw", _positive) * 1e9,
        tensor=tensor,
        pipeline=pipeline,
        expert=fields.maybe("ep_size", count, None),
        group=fields.maybe("dp_group", text, None),
        engine=engine,
    )
    memory.done()
    if fields.has("pd_type"):
        refused.append(f"{fields.path}.pd_type {fields.get('pd_type', text)!r}")
    if fields.has("placement") and (places := _elsewhere(fields.get("placement", _any), fields)):
        refused.append(f"{fields.path}.placement at {', '.join(sorted(places))}")
    refused += [f"{fields.path}.{name}" for name in REFUSED_SWITCHES if fields.maybe(name, switch, False)]
    fields.maybe("enable_block_copy", switch, True)
    fields.done()
    return result


def _parallelism(fields: Fields) -> tuple[int, int]:
    """Tensor and pipeline degree, inferred from what is given as that project does."""
    names = ("num_npus", "tp_size", "pp_size")
    devices, tensor, stages = (fields.maybe(name, count, None) for name in names)
    if devices is not None and tensor is not None:
        if devices % tensor or stages not in (None, devices // tensor):
            message, allowed = "does not fit", f"tp_size x pp_size ({tensor} x {stages or 'a whole number'})"
            field = f"{fields.path}.num_npus"
            raise InputError(message, where=fields.where, field=field, found=devices, allowed=allowed)
        return tensor, devices // tensor
    stages = stages or 1
    if devices is not None:
        if devices % stages:
            message = f"cannot be split into {stages} pipeline stages"
            raise InputError(message, where=fields.where, field=f"{fields.path}.num_npus", found=devices)
        return devices // stages, stages
    return tensor or 1, stages


def _elsewhere(placement: object, fields: Fields) -> set[str]:
    """Where the placement keeps weights or KV blocks, other than in the device's own memory.

    (Where KV blocks are evicted to only matters with a second tier, so the default, `cpu`, is no other place.)
    """
    at = f"{fields.path}.placement"
    parts = Fields(placement, fields.where, at)
    rules: list[tuple[str, Any]] = [("default", parts.maybe("default", _any, {}))]
    rules += [(f"blocks[{i}]", rule) for i, rule in enumerate(parts.maybe("blocks", _objects, []))]
    layers = Fields(parts.maybe("layers", _any, {}), fields.where, f"{at}.layers")
    rules += [(f"layers.{name}", rule) for name, rule in layers.rest().items()]
    parts.done()
    found = set()
    for name, data in rules:
        rule = Fields(data, fields.where, f"{at}.{name}")
        found |= {rule.maybe("weights", text, "npu"), rule.maybe("kv_loc", text, "npu")} - {"npu"}
        found |= {rule.maybe("kv_evict_loc", text, "cpu")} - {"cpu", "npu"}
        if name.startswith("blocks["):
            rule.get("blocks", text)
        rule.done()
    return found


def _same_number(fields: Fields, name: str, items: int, of: str) -> None:
    stated = fields.get(name, count)
    if stated != items:
        at = f"{fields.path}.{name}" if fields.path else name
        allowed = f"{items}, the length of {of}"
        raise InputError("is wrong", where=fields.where, field=at, found=stated, allowed=allowed)


def _any(value: Any) -> Any:
    return value


def _objects(value: object) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise InputError("must be a list with at least one entry", found=value)
    return value


def _numbers(value: object) -> list[float] | float:
    return [number(item) for item in value] if isinstance(value, list) else number(value)


def _positive(value: object) -> float:
    if not (result := number(value)):
        raise InputError("must be more than 0", found=value)
    return result
