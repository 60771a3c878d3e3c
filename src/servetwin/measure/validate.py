"""How far a simulated run is from a real one: distributions side by side, and request by request.

Equal distributions can hide wrong requests (errors of either sign cancel in a mean), so both are shown. Requests are
matched by their position in the workload; only those with the same input and output lengths are compared.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from servetwin.errors import InputError
from servetwin.measure.comparison import METRICS, NAMED_MISMATCHES, Floats, Ints, Metric, Pair, Report
from servetwin.measure.real_runs import RealRun, read_real_run
from servetwin.results.files import SavedRun, read_run
from servetwin.results.metrics import latencies


@dataclass(frozen=True)
class _Simulated:
    """The finished requests of a simulated run, in the form of a `RealRun`."""

    request: Ints
    input_tokens: Ints
    output_tokens: Ints
    ttft_ms: Floats
    tpot_ms: Floats
    e2el_ms: Floats

    @classmethod
    def of(cls, run: SavedRun) -> _Simulated:
        finished = np.array([status == "finished" for status in run.requests["status"]], dtype=bool)
        if not finished.any():
            raise InputError("holds no finished request", where=str(run.folder))

        def column(name: str) -> Ints:
            values: Ints = np.asarray(run.requests[name], dtype=np.int64)[finished]
            return values

        times = latencies(*(column(name) for name in ("arrival_ns", "first_token_ns", "finish_ns", "output_tokens")))
        milliseconds = {f"{name}_ms": values / 1e6 for name, values in times.items()}
        return cls(column("request"), column("input_tokens"), column("output_tokens"), **milliseconds)


def _mismatches(simulated: _Simulated, real: RealRun, at: Ints, at_real: Ints) -> list[dict[str, int]]:
    return [
        {
            "request": int(simulated.request[i]),
            "real_input_tokens": int(real.input_tokens[j]),
            "simulated_input_tokens": int(simulated.input_tokens[i]),
            "real_output_tokens": int(real.output_tokens[j]),
            "simulated_output_tokens": int(simulated.output_tokens[i]),
        }
        for i, j in zip(at.tolist(), at_real.tolist(), strict=True)
    ]


def _totals(run: SavedRun, simulated: _Simulated, real: RealRun) -> dict[str, Pair]:
    durations = (real.duration_s, run.summary.get("duration_s"))
    amounts = {
        "request_throughput": (len(real.request), len(simulated.request)),
        "output_throughput": (int(real.output_tokens.sum()), int(simulated.output_tokens.sum())),
    }
    rates = {
        name: Pair(*(n / seconds if seconds else None for n, seconds in zip(both, durations, strict=True)))
        for name, both in amounts.items()
    }
    return {"duration_s": Pair(*durations), **rates}


def _notes(run: SavedRun, real: RealRun, common: int, mismatches: list[dict[str, int]]) -> list[str]:
    notes = list(real.notes)
    if real.unfinished:
        notes.append(f"{real.unfinished} requests of the real run did not finish and are left out")
    if run.summary.get("partial"):
        notes.append("the simulated run was interrupted")
    if not common:
        notes.append("no request number occurs in both runs: nothing could be matched")
    if mismatches:
        first = mismatches[0]
        named = ", ".join(str(row["request"]) for row in mismatches[:NAMED_MISMATCHES])
        more = ", ..." if len(mismatches) > NAMED_MISMATCHES else ""
        notes.append(
            f"{len(mismatches)} of {common} requests have other lengths in the simulated run and are not matched: "
            f"{named}{more} (request {first['request']}: {first['simulated_input_tokens']} input and "
            f"{first['simulated_output_tokens']} output tokens, really {first['real_input_tokens']} and "
            f"{first['real_output_tokens']}); was the same workload simulated?"
        )
    return notes


def compare(run: SavedRun, real: RealRun, against: str) -> Report:
    """Compare finished requests. Raises InputError when none finished in the simulated run."""
    simulated = _Simulated.of(run)
    common, at, at_real = np.intersect1d(simulated.request, real.request, return_indices=True)
    same = simulated.input_tokens[at] == real.input_tokens[at_real]
    same &= simulated.output_tokens[at] == real.output_tokens[at_real]
    mismatches = _mismatches(simulated, real, at[~same], at_real[~same])
    metrics = {}
    for name in METRICS:
        ours, theirs = getattr(simulated, name), getattr(real, name)
        pairs = np.stack([theirs[at_real[same]], ours[at[same]]])
        known = ~np.isnan(pairs).any(axis=0)  # no TPOT for requests of one token
        metrics[name] = Metric(
            real=theirs[~np.isnan(theirs)],
            simulated=ours[~np.isnan(ours)],
            pair_request=common[same][known],
            pair_real=pairs[0, known],
            pair_simulated=pairs[1, known],
        )
    return Report(
        run=str(run.folder),
        against=against,
        source=real.source,
        real_requests=len(real.request),
        simulated_requests=len(simulated.request),
        common_requests=len(common),
        mismatches=mismatches,
        totals=_totals(run, simulated, real),
        metrics=metrics,
        notes=_notes(run, real, len(common), mismatches),
    )


def validate(run_dir: Path, against: Path, out: Path | None = None) -> Report:
    """Compare the result folder `run_dir` with the real run `against` (see `read_real_run`).

    Writes `validation.json` and, where plotly is installed, `validation.html` into `out` (the run folder when None).
    Raises InputError for input that is missing, damaged, or cannot be compared.
    """
    report = compare(read_run(run_dir), read_real_run(against), str(against))
    folder = out or run_dir
    page, table = folder / "validation.html", folder / "validation.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            from servetwin.measure.validation_page import page_of
        except ImportError:
            report.notes.append("no plots: they need plotly (pip install 'servetwin[plot]')")
        else:
            page.write_text(page_of(report), encoding="utf-8", newline="\n")
            report.files.append(page)
        text = json.dumps(report.as_dict(), indent=2, allow_nan=False)
        table.write_text(text + "\n", encoding="utf-8", newline="\n")
        report.files.insert(0, table)
    except OSError as error:
        raise InputError(f"cannot write: {error.strerror or error}", where=str(folder)) from error
    return report
