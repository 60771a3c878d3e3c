"""How fast whole runs are: user CPU seconds and peak memory of `servetwin run`, beside what they should be.

    python benchmarks/speed.py [--traces DIR] [--only NAME...] [--peer NAME OPTION...]

Every workload runs in a process of its own; start-up and result files count. Traces are not part of the project: those
of DIR (`azure_2023_conv.csv`, `mooncake_conversation.jsonl`; see docs/performance.md) are used where they are. Of
the simulators of others, it says which are not installed, and runs those that are, with options given by `--peer`, in
the same session; their ratio is to our target for workload A.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import yaml


class Case(NamedTuple):
    """A workload, the most user CPU seconds and MiB that it should take, and the trace it needs."""

    scenario: dict[str, Any]
    seconds: float
    mebibytes: int | None = None
    trace: str | None = None


def synthetic(
    requests: int, input_tokens: int, output_tokens: int, replicas: int = 1, **arrivals: Any
) -> dict[str, Any]:
    workload = {
        "arrivals": arrivals,
        "requests": requests,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
    }
    return {
        "model": "meta-llama/Llama-3.1-8B",
        "workload": workload,
        "pools": [{"device": "h100_sxm", "replicas": replicas}],
        "routing": {"policy": "least_loaded"},
    }


def replayed(trace: str, replicas: int, **workload: Any) -> dict[str, Any]:
    scenario = synthetic(1, 1, 1, replicas, process="all_at_once")
    return scenario | {"workload": {"trace": trace, **workload}}


AZURE, MOONCAKE = "azure_2023_conv.csv", "mooncake_conversation.jsonl"
CASES = {
    "open-300": Case(synthetic(300, 512, 128, process="poisson", rate=10), 0.8),
    "A": Case(synthetic(10_000, 512, 128, process="poisson", rate=10), 2.0, 250),
    "A-40": Case(synthetic(100_000, 512, 128, process="poisson", rate=40), 7.0),
    "replicas-32": Case(synthetic(100_000, 512, 128, 32, process="poisson", rate=640), 9.0),
    "closed-64": Case(synthetic(20_000, 1024, 256, process="closed_loop", concurrency=64), 3.0),
    # 19,366 requests an hour, 52 times over; 40 times as fast gives each of the replicas 3.4 requests/s
    "azure-million": Case(replayed(AZURE, 64, repeat=52, rate_scale=40.0), 60.0, 1536, AZURE),
    "azure-million-own-pace": Case(replayed(AZURE, 64, repeat=52), 60.0, 1536, AZURE),
    "mooncake": Case(replayed(MOONCAKE, 1), 6.0, None, MOONCAKE),
    "mooncake-8": Case(replayed(MOONCAKE, 8), 6.0, None, MOONCAKE),
}

PEERS: dict[str, tuple[str, ...]] = {
    "aisimulate": ("aisimulate", "predict"),
    "vidur": (sys.executable, "-m", "vidur.main"),
}
"""How a peer's simulation is started; `--peer` gives its own options for workload A, which differ between releases."""


def measured(command: list[str], **options: Any) -> tuple[float, float, int]:
    """User CPU seconds, peak MiB and exit status of a command."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **options)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        print(said.decode(errors="replace"), file=sys.stderr)
    return usage.ru_utime, usage.ru_maxrss / 1024, process.returncode


def run_cases(names: list[str], traces: Path) -> None:
    print(f"{'workload':<24} {'user s':>8} {'target':>7} {'ratio':>6} {'MiB':>7} {'target':>7}")
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            case = CASES[name]
            scenario = case.scenario
            if case.trace is not None:
                path = (traces / case.trace).resolve()
                if not path.is_file():
                    print(f"{name:<24} no file {path}")
                    continue
                scenario = scenario | {"workload": scenario["workload"] | {"trace": str(path)}}
            file = Path(folder) / f"{name}.yaml"
            file.write_text(yaml.safe_dump(scenario), encoding="utf-8")
            main = "from servetwin.cli import main; main()"
            seconds, mebibytes, status = measured(
                [sys.executable, "-c", main, "run", str(file), "-o", str(Path(folder) / name), "--format", "json"]
            )
            shutil.rmtree(Path(folder) / name, ignore_errors=True)
            limit = str(case.mebibytes or "-")
            ratio = seconds / case.seconds
            row = f"{name:<24} {seconds:8.2f} {case.seconds:7.1f} {ratio:6.2f} {mebibytes:7.0f} {limit:>7}"
            print(row if not status else f"{name:<24} failed with status {status}", flush=True)


def run_peers(options: list[list[str]]) -> None:
    """Workload A on the peers that are installed; `options`: a peer's name and its command-line options."""
    given = {name: rest for name, *rest in options}
    for name, command in PEERS.items():
        if not (shutil.which(command[0]) if command[0] != sys.executable else find_spec(name)):
            print(f"{name:<24} not installed")
        elif name not in given:
            print(f"{name:<24} installed: give its options for workload A with --peer {name} ...")
        else:
            seconds, mebibytes, status = measured([*command, *given[name]])
            ratio = seconds / CASES["A"].seconds
            print(f"{name:<24} {seconds:8.2f} {'':>7} {ratio:6.2f} {mebibytes:7.0f} {'':>7}  status {status}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, default=Path("traces"))
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--peer", nargs="+", action="append", default=[], metavar="NAME OPTION")
    known, rest = parser.parse_known_args()
    if rest and known.peer:
        known.peer[-1] += rest
    elif rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    run_cases(known.only, known.traces)
    run_peers(known.peer)


if __name__ == "__main__":
    main()
