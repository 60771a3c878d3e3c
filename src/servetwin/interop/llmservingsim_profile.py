"""Read a profile bundle of LLMServingSim 2.0 (`.../<hardware>/<org>/<model>/<variant>`) into a profile of our own."""

from __future__ import annotations

import csv
import hashlib
import math
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from servetwin.catalog.fields import Fields, one_of, read_yaml, text
from servetwin.catalog.profiles import HEADER, SCHEMA, user_folder
from servetwin.errors import InputError
from servetwin.timing.layers.skew import fit, fit_walk
from servetwin.timing.layers.tables import write_table

DENSE_MLP, MOE_MLP = ("gate_up_proj", "act_fn", "down_proj"), ("moe",)
PLAIN, NORMED = (), ("qk_norm",)
ARCHITECTURES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "llama": (PLAIN, DENSE_MLP),
    "qwen3": (NORMED, DENSE_MLP),
    "qwen3_moe": (NORMED, MOE_MLP),
    "mixtral": (PLAIN, MOE_MLP),
    "phimoe": (PLAIN, MOE_MLP),
}
"""Per architecture of that project: norms between the QKV projection and the rotary embedding, and the MLP half."""

SAME_ON_EVERY_RANK = ("layernorm", "final_layernorm", "qk_norm", "sampler")
"""Layers that it measures at tensor degree 1 only and uses at every degree ("tp_stable")."""

NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)*")

DTYPES = ("bf16", "fp16", "fp32", "fp8", "int8")

Rows = list[tuple[Any, ...]]


def import_profile(folder: Path, device: str, dest: Path | None = None, *, layers: int | None = None) -> Path:
    """Convert the bundle in `folder` (it holds `meta.yaml` and `tp<N>/*.csv`) and return the folder of the profile.

    `device` is the catalogue's id of what the bundle calls its hardware. `dest` is the folder that holds all profiles
    (default: the user's). `layers` is the number of layers of the model, which a bundle does not know. A profile that
    is there already is replaced. Raises InputError when a file or column is missing or a number is malformed.
    """
    meta_path = folder / "meta.yaml"
    meta = Fields(read_yaml(meta_path), str(meta_path))
    model = meta.get("model", _name)
    variant = meta.maybe("variant", _name, folder.name)
    architecture = meta.get("architecture", lambda value: one_of(value, ARCHITECTURES))
    dtype, _, kv_dtype = variant.partition("-kv")
    for part in (dtype, kv_dtype or dtype):
        if part not in DTYPES:
            allowed = "<dtype> or <dtype>-kv<dtype> of " + ", ".join(DTYPES)
            raise InputError("unknown variant", where=str(meta_path), field="variant", found=variant, allowed=allowed)
    if "/" in device or not NAME.fullmatch(device):
        raise InputError("not an id of a device", field="device", found=device)
    degrees = sorted(int(path.name[2:]) for path in folder.glob("tp*") if path.is_dir() and path.name[2:].isdecimal())
    if not degrees:
        raise InputError("the bundle has no folder tp<N> with measurements", where=str(folder))
    source = _Source(folder)
    source.note(meta_path)

    sequence = _sequence(architecture)
    tables: dict[str, Rows] = {"dense": [], "per_sequence": [], "attention": [], "moe": [], "skew": []}
    for tensor in degrees:
        for name, axis in (("dense", "tokens"), ("per_sequence", "sequences")):
            own = source.read(tensor, name, ("layer", axis, "time_us"), (str, _whole, _ns))
            stable = [row[1:] for row in tables[name] if row[0] == 1 and row[1] in SAME_ON_EVERY_RANK]
            kept = [row for row in own if not (stable and row[0] in SAME_ON_EVERY_RANK)]
            tables[name] += [(tensor, *row) for row in kept + stable]
        columns = ("prefill_chunk", "n_decode", "kv_prefill", "kv_decode", "time_us")
        rows = source.read(tensor, "attention", columns, (_whole, _whole, _whole, _whole, _ns))
        tables["attention"] += [(tensor, *row) for row in rows]
        if "moe" in sequence["mlp"] and tensor == 1:
            rows = source.read(1, "moe", ("activated_experts", "tokens", "time_us"), (_whole, _whole, _ns))
            tables["moe"] += [(1, *row) for row in rows]
        if (folder / f"tp{tensor}" / "skew.csv").is_file():
            names = ("pc", "kp", "n", "kv_big", "kv_mean", "kvs", "t_mean_us", "t_max_us", "t_skew_us")
            rows = source.read(tensor, "skew", names, (*[_whole] * 6, _ns, _ns, _ns))
            tables["skew"] += [(tensor, *row) for row in rows]
    if "moe" in sequence["mlp"] and not tables["moe"]:
        raise InputError("the experts are measured in tp1, which is missing", where=str(folder / "tp1"))
    _check_layers(tables, sequence, degrees, folder)

    place = (dest or user_folder()) / device / model.replace("/", "__") / variant
    header: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": "layers",
        "device": device,
        "model": model,
        "dtype": dtype,
        "kv_dtype": kv_dtype or dtype,
        "engine": {"name": "vllm", "version": str(meta.get("vllm_version", str))},
        "tensor": degrees,
        "limits": _limits(tables),
        "layers": layers,
        "architecture": architecture,
        "sequence": sequence,
    }
    if tables["moe"]:
        header["experts"] = {
            "count": max(row[1] for row in tables["moe"]),
            "top_k": min(row[1] for row in tables["moe"]),
        }
    if tables["skew"]:
        header["skew"] = {tensor: _fit_skew(tables, tensor, meta) for tensor in degrees if _of(tables["skew"], tensor)}
    header["provenance"] = {
        "tool": f"LLMServingSim profiler {meta.maybe('profiler_version', str, 'of unknown version')}",
        "project": "https://github.com/casys-kaist/LLMServingSim",
        "licence": "MIT (CASYS Lab, KAIST)",
        "hardware": meta.maybe("hardware", text, "not stated"),
        "gpu": meta.maybe("gpu", text, "not stated"),
        "cuda": str(meta.maybe("cuda_version", str, "not stated")),
        "measured_at": str(meta.maybe("profiled_at", str, "not stated")),
        "sources": dict(sorted(source.hashes.items())),
    }
    return _write(place, header, {name: rows for name, rows in tables.items() if rows})


class _Source:
    """Reads the files of a bundle and keeps their hashes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hashes: dict[str, str] = {}

    def note(self, path: Path) -> None:
        self.hashes[path.relative_to(self.folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()

    def read(self, tensor: int, name: str, columns: tuple[str, ...], types: tuple[Callable[[str], Any], ...]) -> Rows:
        path = self.folder / f"tp{tensor}" / f"{name}.csv"
        if not path.is_file():
            raise InputError("the bundle lacks this file", where=str(path))
        self.note(path)
        rows: Rows = []
        try:
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.reader(file)
                head = next(reader, [])
                for column in columns:
                    if column not in head:
                        raise InputError("missing column", where=str(path), field=column, found=",".join(head))
                places = [(head.index(column), convert) for column, convert in zip(columns, types, strict=True)]
                for cells in reader:
                    if len(cells) != len(head):
                        message = f"{len(cells)} cells where the header has {len(head)}"
                        raise InputError(message, where=str(path), field=f"line {reader.line_num}")
                    try:
                        rows.append(tuple(convert(cells[place]) for place, convert in places))
                    except ValueError:
                        raise self._bad_cell(path, reader.line_num, cells, columns, places) from None
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"not a CSV file: {error}", where=str(path)) from None
        if not rows:
            raise InputError("has no rows", where=str(path))
        return rows

    @staticmethod
    def _bad_cell(path: Path, line: int, cells: list[str], columns: tuple[str, ...], places: Any) -> InputError:
        for column, (place, convert) in zip(columns, places, strict=True):
            try:
                convert(cells[place])
            except ValueError:
                allowed = "a time of at least 0 µs" if convert is _ns else "a whole number of at least 0"
                field = f"line {line}, {column}"
                return InputError("bad number", where=str(path), field=field, found=cells[place], allowed=allowed)
        raise AssertionError("every cell of the line is good")


def _name(value: object) -> str:
    """A text that is safe as a part of a path."""
    name = text(value)
    if ".." in name or not NAME.fullmatch(name):
        raise InputError("must be a name of letters, digits, '.', '_', '-' and '/'", found=name)
    return name


def _whole(cell: str) -> int:
    value = int(cell)
    if value < 0:
        raise ValueError
    return value


def _ns(cell: str) -> int:
    value = float(cell)
    if not 0 <= value < math.inf:
        raise ValueError
    return max(1, round(value * 1000))


def _sequence(architecture: str) -> dict[str, list[str]]:
    norms, mlp = ARCHITECTURES[architecture]
    return {
        "prologue": ["embedding"],
        "pre_attn": ["layernorm", "qkv_proj", *norms, "rotary_emb", "attention"],
        "post_attn": ["o_proj", "layernorm"],
        "mlp": list(mlp),
        "head": ["final_layernorm", "lm_head", "sampler"],
    }


def _check_layers(tables: dict[str, Rows], sequence: dict[str, list[str]], degrees: list[int], folder: Path) -> None:
    for tensor in degrees:
        known = {row[1] for name in ("dense", "per_sequence") for row in tables[name] if row[0] == tensor}
        for layer in (layer for layers in sequence.values() for layer in layers):
            if layer not in known | {"attention", "moe"}:
                where = str(folder / f"tp{tensor}" / ("per_sequence.csv" if layer == "lm_head" else "dense.csv"))
                raise InputError("a layer of the architecture has no rows", where=where, found=layer)


def _limits(tables: dict[str, Rows]) -> dict[str, int]:
    return {
        "max_tokens": max(row[2] for row in tables["dense"]),
        "max_seqs": max(row[2] for row in tables["per_sequence"]),
        "max_context": max(max(row[3], row[4]) for row in tables["attention"]),
    }


def _of(rows: Rows, tensor: int) -> Rows:
    return [row[1:] for row in rows if row[0] == tensor]


def _fit_skew(tables: dict[str, Rows], tensor: int, meta: Fields) -> dict[str, Any]:
    """The skew model of one tensor degree with its errors, beside those of the bundle's own table of factors."""
    import numpy as np

    attention = {row[:4]: row[4] for row in _of(tables["attention"], tensor)}
    walks = sorted((chunk, kv, ns) for (chunk, n, kp, kv), ns in attention.items() if chunk and n == 1 and kp == 0)
    shortest = [(kv, ns) for chunk, kv, ns in walks if chunk == walks[0][0]]
    walk = fit_walk([kv for kv, _ in shortest], [ns for _, ns in shortest])
    names = ("chunk", "history", "decodes", "longest", "mean", "shortest", "t_mean", "t_max", "t_skew")
    rows = _of(tables["skew"], tensor)
    shots = {name: np.array(column, dtype=float) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    # The two files need not be on one scale (a skew shot may be the sum of its repetitions): the calls in both tell.
    ratios = [
        row[7] / attention[row[0], row[2], row[1], row[3]]
        for row in rows
        if (row[0], row[2], row[1], row[3]) in attention
    ]
    scale = float(f"{np.median(ratios):.3g}") if ratios else 1.0
    for name in ("t_mean", "t_max", "t_skew"):
        shots[name] /= scale
    model, statistics = fit(shots, walk)
    fitted: Any = meta.maybe("skew_fit", lambda value: value, {})
    theirs = (fitted.get("per_tp") or {}).get(tensor, {}) if isinstance(fitted, dict) else {}
    named = {"p50": "rel_err_p50", "p90": "rel_err_p90", "signed_mean": "signed_mean"}
    bundle = {ours: theirs[name] for ours, name in named.items() if name in theirs}
    return {**model.header(), "fit": {"scale": scale, **statistics, "bundle_table": bundle}}


def _write(place: Path, header: dict[str, Any], tables: dict[str, Rows]) -> Path:
    """Write the profile beside its place and then move it there, so that a half-written one is never found."""
    import yaml

    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".") as scratch:
        fresh = Path(scratch) / "new"
        fresh.mkdir()
        header["tables"] = {name: write_table(fresh / f"{name}.parquet", name, rows) for name, rows in tables.items()}
        head = yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=120)
        (fresh / HEADER).write_text(head, encoding="utf-8")
        if place.exists():
            shutil.rmtree(place)
        fresh.rename(place)
    return place
