"""Replay measured closed-loop serving points and print how far off TTFT and TPOT are.

    python benchmarks/silicon.py ROWS.csv [--tier A1 ...] [--system h200_sxm ...] [--overlay FILE] [--out FILE]
    python benchmarks/silicon.py ROWS.csv --calibrate [--model NAME ...]

ROWS.csv is a table of points with columns tier, system, model_path, precision, kv_dtype, isl, osl, range_ratio,
batch_size, num_prompts, tp_size, moe_ep_size, attention_dp_size, max_num_batched_tokens, silicon_ttft_ms and
silicon_tpot_ms (NVIDIA AIConfigurator's list of SemiAnalysis InferenceX results, Apache-2.0). Client lengths are
uniform in [ratio L, L]; measured values are taken as means. Rows of the same configuration are averaged first.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

MODELS = {
    "meta-llama/Llama-3.1-70B": ("meta-llama/Llama-3.1-70B", "fp8"),
    "openai/gpt-oss-120b": ("openai/gpt-oss-120b", None),
    "MiniMaxAI/MiniMax-M2.5": ("MiniMaxAI/MiniMax-M2.5", None),
    "moonshotai/Kimi-K2.5": ("moonshotai/Kimi-K2.5", None),
}
ENGINES = {"0.10.2": "vllm-0.10"}


@dataclass(frozen=True)
class Point:
    """One measured configuration, repeats averaged."""

    tier: str
    saturated: bool
    system: str
    model: str
    precision: str
    kv_dtype: str
    isl: int
    osl: int
    ratio: float
    concurrency: int
    prompts: int
    tensor: int
    expert: int
    budget: int
    engine: str
    release: str
    """of vLLM, as the table gives it"""
    ttft_ms: float
    tpot_ms: float


@dataclass(frozen=True)
class Result:
    point: Point
    ttft_ms: float
    tpot_ms: float
    ttft_interval: tuple[float, float] = (0.0, 0.0)
    tpot_interval: tuple[float, float] = (0.0, 0.0)
    error: str = ""


def read_points(path: Path) -> list[Point]:
    """The points of a table, one a configuration; those with attention data parallelism are left out."""
    groups: dict[tuple[object, ...], list[dict[str, str]]] = defaultdict(list)
    with path.open() as file:
        for row in csv.DictReader(file):
            if float(row["attention_dp_size"] or 1) > 1 or row["tier"] == "X":
                continue
            key = tuple(row[k] for k in ("system", "model_path", "precision", "kv_dtype", "isl", "osl", "batch_size"))
            groups[(*key, row["tp_size"], row["moe_ep_size"], row["vllm"][:6])].append(row)
    points = []
    for rows in groups.values():
        row = rows[0]
        points.append(
            Point(
                tier=row["tier"],
                saturated=row["kv_saturated"] == "True",
                system=row["system"],
                model=row["model_path"],
                precision=row["precision"],
                kv_dtype="fp8" if row["kv_dtype"].startswith("fp8") else "auto",
                isl=int(row["isl"]),
                osl=int(row["osl"]),
                ratio=float(row["range_ratio"] or 0.8),
                concurrency=int(row["batch_size"]),
                prompts=int(float(row["num_prompts"] or 10 * int(row["batch_size"]))),
                tensor=int(row["tp_size"]),
                expert=int(row["moe_ep_size"] or 1),
                budget=int(float(row["max_num_batched_tokens"] or 8192)),
                release=row["vllm"].split(" ")[0],
                engine=ENGINES.get(row["vllm"].split(" ")[0], "vllm-0.19"),
                ttft_ms=statistics.fmean(float(r["silicon_ttft_ms"]) for r in rows),
                tpot_ms=statistics.fmean(float(r["silicon_tpot_ms"]) for r in rows),
            )
        )
    return points


def scenario_of(point: Point, overlay: str | None) -> dict[str, object]:
    """The scenario that replays a point."""
    model, quantization = MODELS[point.model]
    if point.precision == "fp4" and quantization == "fp8":
        quantization = "nvfp4"

    def lengths(longest: int) -> dict[str, object]:
        return {"distribution": "range_ratio", "max": longest, "ratio": point.ratio}

    engine = {
        "version": point.engine,
        "max_num_batched_tokens": max(point.budget, point.concurrency),
        "max_num_seqs": max(point.concurrency, 16),
        "gpu_memory_utilization": 0.9,
        "enable_prefix_caching": False,
        "kv_cache_dtype": point.kv_dtype,
        "max_model_len": point.isl + point.osl + 256,
    }
    if "gpt-oss" in point.model and point.system in ("h100_sxm", "h200_sxm"):
        engine["moe_backend"] = "marlin"  # these rows were served with VLLM_MXFP4_USE_MARLIN=1
    if quantization:
        engine["quantization"] = quantization
    return {
        "model": model,
        "workload": {
            "arrivals": {"process": "closed_loop", "concurrency": point.concurrency},
            "requests": point.prompts,
            "input_tokens": lengths(point.isl),
            "output_tokens": lengths(point.osl),
        },
        "timing": {"source": "silicon", **({"overlay": overlay} if overlay else {})},
        "pools": [
            {
                "device": point.system,
                "parallelism": {"tensor": point.tensor, "expert": point.expert},
                "engine": engine,
            }
        ],
    }


def simulate_point(job: tuple[Point, str | None]) -> Result:
    from servetwin.errors import InputError
    from servetwin.results.metrics import summarize
    from servetwin.scenario.load import from_data
    from servetwin.simulation import simulate

    point, overlay = job
    try:
        scenario = from_data(scenario_of(point, overlay), "point", Path())  # type: ignore[arg-type]
        summary = summarize(simulate(scenario))
    except InputError as error:
        return Result(point, 0, 0, error=str(error))
    interval = summary["interval"]
    return Result(
        point,
        summary["mean_ttft_ms"],
        summary["mean_tpot_ms"],
        interval["mean_ttft_ms"],
        interval["mean_tpot_ms"],
    )


def errors(results: Iterable[Result]) -> tuple[int, float, float, float, float]:
    """Number of points, MAPE and mean signed error (%) of TTFT, the same of TPOT."""
    ttft = [100 * (r.ttft_ms / r.point.ttft_ms - 1) for r in results]
    tpot = [100 * (r.tpot_ms / r.point.tpot_ms - 1) for r in results]
    mean = statistics.fmean
    return len(ttft), mean(map(abs, ttft)), mean(ttft), mean(map(abs, tpot)), mean(tpot)


def show(title: str, results: list[Result]) -> None:
    if results:
        n, a, b, c, d = errors(results)
        held = [
            100 * statistics.fmean(low <= measured <= high for measured, (low, high) in pairs)
            for pairs in (
                [(r.point.ttft_ms, r.ttft_interval) for r in results],
                [(r.point.tpot_ms, r.tpot_interval) for r in results],
            )
        ]
        inside = f"inside the interval {held[0]:3.0f} % {held[1]:3.0f} %"
        print(f"{title:<48} {n:>4}  TTFT {a:6.1f} ({b:+6.1f})  TPOT {c:6.1f} ({d:+6.1f})  {inside}")


TERMS = ("prefill_factor", "decode_factor", "attention_factor", "gap_ns", "gap_seq_ns", "request_ns")
WITH_TOKENS = (*TERMS, "request_token_ns")
FEW_KEYS = ("prefill_factor", "decode_factor", "gap_ns", "gap_seq_ns", "request_ns", "request_token_ns")
FEWEST = 8
"""points that a fit needs"""
SHORT = ((1024, 1024), (8192, 1024))
"""Shapes that are fitted; 1k/8k is always left unseen."""


@dataclass(frozen=True)
class Protocol:
    """What a family is fitted on (every other point of it, or all) and tested on."""

    model: str
    systems: tuple[str, ...]
    halves: bool
    """fit on every other point only, and test on the rest too"""
    elsewhere: tuple[str, ...] = ()
    """systems that the fit never sees"""
    terms: tuple[str, ...] = TERMS


PROTOCOLS = (
    # The terms that `servetwin calibrate` takes of these points when none are named.
    Protocol("meta-llama/Llama-3.1-70B", ("h200_sxm",), False, ("h100_sxm",), WITH_TOKENS),
    # Half of its layers see 128 keys, so decode attention is a tenth of a step: too little to fit a factor. Its short
    # steps show the front end's time a token.
    Protocol("openai/gpt-oss-120b", ("h100_sxm", "h200_sxm"), True, terms=FEW_KEYS),
    Protocol("MiniMaxAI/MiniMax-M2.5", ("h200_sxm",), False),
    # Ten points: the terms that they tell apart.
    Protocol("moonshotai/Kimi-K2.5", ("h200_sxm",), False, terms=TERMS[:4]),
)


def calibrated(points: list[Point], protocol: Protocol, jobs: int) -> list[Result]:
    """Fit a family's overlay, print the errors on what the fit saw and on what it did not; the latter calibrated.

    The points are of one release of vLLM: an overlay is a deployment's, of one device and engine.
    """
    import numpy as np

    from servetwin.measure.calibrate import calibrate
    from servetwin.measure.calibration_data import point as observed_point
    from servetwin.scenario.load import from_data

    def order(p: Point) -> tuple[object, ...]:
        return p.system, p.tensor, p.isl, p.osl, p.concurrency

    family = sorted((p for p in points if p.model == protocol.model and not p.saturated), key=order)
    short = [p for p in family if p.system in protocol.systems and (p.isl, p.osl) in SHORT]
    fitted = short[::2] if protocol.halves else short
    observed = [
        observed_point(f"point {i}", from_data(scenario_of(p, None), "point", Path()), p.ttft_ms, p.tpot_ms)  # type: ignore[arg-type]
        for i, p in enumerate(fitted)
    ]
    found = calibrate(observed, [np.ones(len(one), dtype=bool) for one in observed], protocol.terms, workers=jobs)
    systems, release = ", ".join(protocol.systems), fitted[0].release or "unknown"
    print(f"\n{protocol.model}, vLLM {release}: fitted on {len(fitted)} points of 1k/1k and 8k/1k, {systems}")
    unseen: list[Result] = []
    print("    " + ", ".join(f"{term.name} {term.value:.4g}" for term in found.terms))
    with tempfile.TemporaryDirectory() as folder:
        overlay = Path(folder) / "overlay.yaml"
        overlay.write_text(found.text([]))
        parts = {
            "seen": fitted,
            "other half of 1k/1k and 8k/1k": [p for p in short if p not in fitted],
            "1k/8k, unseen": [p for p in family if p.system in protocol.systems and (p.isl, p.osl) not in SHORT],
            f"{', '.join(protocol.elsewhere)}, never fitted": [p for p in family if p.system in protocol.elsewhere],
        }
        for title, part in parts.items():
            for name, used in (("raw", None), ("calibrated", str(overlay))):
                with ProcessPoolExecutor(jobs) as workers:
                    results = list(workers.map(simulate_point, [(p, used) for p in part], chunksize=2))
                show(f"    {title}, {name}", [r for r in results if not r.error])
                if used and title != "seen" and "never fitted" not in title:
                    unseen += [r for r in results if not r.error]
    return unseen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--tier", nargs="*")
    parser.add_argument("--system", nargs="*")
    parser.add_argument("--model", nargs="*")
    parser.add_argument("--overlay")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--calibrate", action="store_true", help="fit an overlay a family, test it on the rest")
    args = parser.parse_args()
    points = [
        p
        for p in read_points(args.rows)
        if (not args.tier or p.tier in args.tier)
        and (not args.system or p.system in args.system)
        and (not args.model or any(m in p.model for m in args.model))
    ]
    if args.calibrate:
        unseen: dict[str, list[Result]] = defaultdict(list)
        for protocol in PROTOCOLS:
            family = [p for p in points if p.model == protocol.model]
            for release in sorted({p.release for p in family if p.system in protocol.systems}):
                same = [p for p in family if p.release == release or p.system in protocol.elsewhere]
                if sum((p.isl, p.osl) in SHORT and p.system in protocol.systems for p in same) >= FEWEST:
                    unseen[protocol.model] += calibrated(same, protocol, args.jobs)
        for model, results in unseen.items():
            show(f"{model}: all rows not fitted, calibrated", results)
        return
    with ProcessPoolExecutor(args.jobs) as workers:
        results = list(workers.map(simulate_point, [(p, args.overlay) for p in points], chunksize=4))
    failed = [r for r in results if r.error]
    done = [r for r in results if not r.error]
    print("mean absolute percentage error (mean signed error), rows de-duplicated")
    groups: dict[tuple[str, str, str], list[Result]] = defaultdict(list)
    for result in done:
        if not result.point.saturated:
            groups[result.point.model, result.point.precision, result.point.system].append(result)
    for key, found in sorted(groups.items()):
        show(" ".join(key), found)
        for shape in sorted({(r.point.isl, r.point.osl) for r in found}):
            show(f"    {shape[0]}/{shape[1]}", [r for r in found if (r.point.isl, r.point.osl) == shape])
    show("KV-saturated", [r for r in done if r.point.saturated])
    for r in done:
        if r.point.saturated:
            p = r.point
            print(
                f"    {p.system} tp{p.tensor} {p.isl}/{p.osl} c{p.concurrency}: TTFT {r.ttft_ms / 1e3:.2f} s"
                f" (measured {p.ttft_ms / 1e3:.2f}), TPOT {r.tpot_ms:.1f} ms ({p.tpot_ms:.1f})"
            )
    for r in failed[:5]:
        print("not priced:", r.point.system, r.point.model, r.error)
    if args.out:
        args.out.write_text(json.dumps([asdict(r) for r in results]))


if __name__ == "__main__":
    main()
