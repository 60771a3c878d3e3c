"""Fits the laws of `servetwin.timing.efficiency` on the shipped kernel tables and writes `catalog/efficiency.yaml`, and
beside it `efficiency_errors.yaml`.

    python -m servetwin.measure.fit_efficiency

A tool for development. Least squares of the logarithm of time; every chip weighs the same, and every device of a chip
(H100 and H200 are one chip, the four Blackwell data-centre devices another). Every law is fitted again without each
device, and without each chip, and its error on what was left out is written beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from servetwin import catalog
from servetwin.measure.kernel_points import LIMITS, TABLES, Floats, Points, fitted_devices, pick, points_of, tables_used
from servetwin.timing.efficiency import ERRORS, FILE, TERMS, USUAL_UNITS, Law, family, law_ns
from servetwin.timing.kernels.tables import KernelTables

CHIPS = {
    "a100_sxm": "GA100",
    "h100_sxm": "GH100",
    "h200_sxm": "GH100",
    "l40s": "AD102",
    "rtx_pro_6000": "GB202",
    "b200_sxm": "GB100",
    "gb200": "GB100",
    "b300_sxm": "GB100",
    "gb300": "GB100",
}
"""The silicon of a device, from its maker's architecture papers; GB100 stands for B200's and B300's (GB102, GB110),
which share their units and memory."""
MOST = 1500
"""points a device and kind"""
SHARPEST = 2.0
"""logarithm of the largest s - 1: beyond, the corner cannot be told from a maximum"""

Data = dict[str, Points]
"""points of one kind by device"""
Laws = dict[str, Law]


def load(kinds: Sequence[str] = tuple(TABLES), most: int = MOST) -> dict[str, Data]:
    """Points of every kind and device."""
    found: dict[str, Data] = {kind: {} for kind in kinds}
    for name in fitted_devices():
        tables, device = KernelTables.for_device(name), catalog.device(name)
        for kind in kinds:
            points = points_of(device, tables, kind, most)
            if points is not None:
                found[kind][name] = points
    return found


def fit(data: dict[str, Data], without: Sequence[str] = ()) -> Laws:
    """Laws of every kind of `data` that a device is left for, fitted without some devices."""
    laws: Laws = {}
    for kind in data:  # `cast` stands before the products that need it
        used = {name: _full(points) for name, points in data[kind].items() if name not in without}
        if used:
            laws[kind] = _fit(kind, used, laws.get("cast"))
    return laws


def _full(points: Points) -> Points:
    if not points.windowed.any():
        return points
    kept = np.flatnonzero(~points.windowed)
    return points._replace(
        work=pick(points.work, kept), size=points.size[kept], windowed=points.windowed[kept], ns=points.ns[kept]
    )


def predict(law: Law, cast: Law | None, name: str, points: Points) -> Floats:
    """Times in ns that a law gives at the points of a device."""
    device = catalog.device(name)
    sizes = points.peak, device.memory_bandwidth, float(device.launch_ns)
    times: Floats = law_ns(law, points.work, *sizes)
    if points.cast is not None:
        assert cast is not None
        times = times + law_ns(cast, points.cast, *sizes)
    return times


def _fit(kind: str, data: Data, cast: Law | None) -> Law:
    computes = kind not in ("small", "cast")
    tiled = family(kind) in ("gemm", "experts")
    terms = len(TERMS[family(kind)])

    def law(p: Floats) -> Law:
        share = 1 / (1 + np.exp(-p[:2]))
        fixed, sharp, waves = np.exp(np.minimum(p[2:5], (16, SHARPEST, 16)))
        return Law(
            float(fixed),
            float(share[0]) if computes else 1.0,
            float(share[1]),
            float(1 + sharp) if computes else 1.0,
            float(waves) if tiled else 0.0,
            tuple(np.exp(p[5:]).tolist()),
        )

    chips = [CHIPS[name] for name in data]
    weights = [
        np.full(len(points.ns), (len(points.ns) * chips.count(CHIPS[name])) ** -0.5) for name, points in data.items()
    ]

    def residuals(p: Floats) -> Floats:
        current = law(p)
        logs = [np.log(predict(current, cast, name, points) / points.ns) for name, points in data.items()]
        weighted: Floats = np.concatenate(logs) * np.concatenate(weights)
        return weighted

    start = np.array([1.0, 1.5, 7.5, 0.0, -2.0, *[-1.0] * terms])
    return law(least_squares(residuals, start))


def least_squares(residuals: Callable[[Floats], Floats], start: Floats, rounds: int = 80) -> Floats:
    """The least sum of squares near `start`, by Levenberg and Marquardt's method with differences for derivatives.
    Parameters stay within -16 and 16: they are logarithms, and one that runs away says that its term is nought."""
    at, damping = start, 1e-2
    here = residuals(at)
    for _ in range(rounds):
        slopes = np.stack([(residuals(at + step) - here) / 1e-4 for step in np.eye(len(at)) * 1e-4], axis=1)
        square, down = slopes.T @ slopes, slopes.T @ here
        for _ in range(10):
            step = np.linalg.solve(square + damping * np.diag(np.diag(square) + 1e-6), -down)
            there: Floats = np.clip(at + np.clip(step, -2, 2), -16, 16)
            new = residuals(there)
            gain = float(here @ here - new @ new)
            if gain > 0:
                break
            damping *= 4
        else:
            return at
        done = gain < 1e-8 * float(here @ here)
        at, here, damping = there, new, damping / 3
        if done:
            return at
    return at


def errors(law: Law, cast: Law | None, name: str, kind: str, points: Points) -> dict[str, list[float]]:
    """[median |error|, 90th percentile, median error] over all, small and large sizes; relative to measured."""
    off = _off(law, cast, name, points)
    groups = {"all": np.ones(len(off), dtype=bool)}
    if limits := LIMITS.get(kind.split("_")[0]):
        groups |= {"small": points.size <= limits[0], "large": points.size >= limits[1]}
    if points.windowed.any():
        groups = {group: chosen & ~points.windowed for group, chosen in groups.items()} | {"window": points.windowed}
    return {group: _summary(off[chosen]) for group, chosen in groups.items() if chosen.any()}


def _off(law: Law, cast: Law | None, name: str, points: Points) -> Floats:
    off: Floats = predict(law, cast, name, points) / points.ns - 1
    return off


def _summary(off: Floats) -> list[float]:
    return [round(float(v), 3) for v in (np.median(abs(off)), np.percentile(abs(off), 90), np.median(off))]


def left_out(data: dict[str, Data], groups: dict[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """Errors by kind of the devices of each group, on which the laws were fitted without that group."""
    found: dict[str, dict[str, Any]] = {kind: {} for kind in data}
    pooled: dict[str, list[Floats]] = {kind: [] for kind in data}
    for group in groups.values():
        laws = fit(data, without=group)
        for kind, points in data.items():
            for name in set(group) & set(points) if kind in laws else ():
                law, cast = laws[kind], laws.get("cast")
                found[kind][name] = errors(law, cast, name, kind, points[name])
                off = _off(law, cast, name, _full(points[name]))
                # as many of every device, so that all weigh the same
                pooled[kind].append(np.quantile(off, (np.arange(1000) + 0.5) / 1000))
    result = {}
    for kind, devices in found.items():
        if devices:
            median, p90, bias = _summary(np.concatenate(pooled[kind]))
            overall = {"median": median, "p90": p90, "bias": bias}
            result[kind] = overall | {"devices": {name: devices[name] for name in sorted(devices)}}
    return result


def by_device() -> dict[str, Sequence[str]]:
    """Every fitted device as a group of its own."""
    return {name: [name] for name in fitted_devices()}


def by_chip() -> dict[str, Sequence[str]]:
    """The fitted devices, those of one chip together."""
    names = fitted_devices()
    return {chip: [name for name in names if CHIPS[name] == chip] for chip in sorted({CHIPS[n] for n in names})}


def documents() -> tuple[dict[str, Any], dict[str, Any]]:
    """What `catalog/efficiency.yaml` and `efficiency_errors.yaml` hold."""
    data = load()
    device, chip = left_out(data, by_device()), left_out(data, by_chip())
    fitted = {
        "by": "servetwin.measure.fit_efficiency: least squares of log time, equal weight a chip",
        "on": {name: tables_hash(name) for name in fitted_devices()},
        "usual_units": USUAL_UNITS,
        "tables": {kind: list(tables) for kind, tables in TABLES.items()},
        "points": {kind: sum(len(p.ns) for p in data[kind].values()) for kind in data},
    }
    laws = {kind: _written(kind, law) for kind, law in fit(data).items()}
    errors = {kind: {"device_out": device[kind], "chip_out": chip[kind]} for kind in data}
    return {"schema": 1, "fitted": fitted, "laws": laws}, {"schema": 1, "errors": errors}


def tables_hash(device: str) -> str:
    """sha256 over the names and hashes of the tables of a device that laws are fitted on."""
    used = tables_used(KernelTables.for_device(device))
    lines = [f"{name} {digest}\n" for name, digest in sorted(used.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _written(kind: str, law: Law) -> dict[str, Any]:
    def short(value: float) -> float:
        return float(f"{value:.4g}") if value > 1e-5 else 0.0

    return {
        "fixed_ns": short(law.fixed_ns),
        "compute": short(law.compute),
        "memory": short(law.memory),
        "sharpness": short(law.sharpness),
        "waves": short(law.waves),
        "terms": {name: short(v) for name, v in zip(TERMS[family(kind)], law.terms, strict=True)},
    }


HEAD = """\
# How much of its datasheet a device reaches, by kind of kernel (servetwin.timing.efficiency, docs/roofline.md).
# Written by `python -m servetwin.measure.fit_efficiency`; not to be edited.
# Fitted on kernel tables derived from NVIDIA AIConfigurator (Apache-2.0, see NOTICE): `fitted.on` is the sha256
# of the names and hashes of each device's tables.
"""
HEAD_OF_ERRORS = """\
# How far the laws of efficiency.yaml are off: [median |error|, 90th percentile, median error], relative to measured
# times, of laws fitted without the device (device_out) or without all devices of its chip (chip_out).
# Written by `python -m servetwin.measure.fit_efficiency`; not to be edited.
"""


def write(laws: dict[str, Any], errors: dict[str, Any]) -> None:
    import yaml

    for path, head, data in ((FILE, HEAD, laws), (ERRORS, HEAD_OF_ERRORS, errors)):
        path.write_text(head + yaml.safe_dump(data, sort_keys=False, width=120, default_flow_style=None))


if __name__ == "__main__":
    write(*documents())
