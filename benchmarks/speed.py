"""How fast whole runs are: user CPU seconds and peak memory of `servetwin run`, beside what they should be.

    python benchmarks/speed.py [--traces DIR] [--only NAME...] [--peer NAME EXECUTABLE]...

Every workload runs in a process of its own; start-up and result files count. As in an installed package, the bytecode
of modules is there already; where numba is installed, so is compiled code. Traces are not part of the project: those
of DIR (`azure_2023_conv.csv`, `mooncake_conversation.jsonl`; see docs/performance.md) are used where they are.

`--peer` runs a simulator of others, installed in an environment of its own, on the same workloads as far as it knows
them (see `peers.py`), right after ours; its ratio is to our seconds of the same run.
"""

from __future__ import annotations

import argparse
import compileall
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from peers import PEERS


class Case(NamedTuple):
    """A workload, the most user CPU seconds and MiB that it should take, and the trace it needs."""

    scenario: dict[str, Any]
    seconds: float
    mebibytes: int | None = None
    trace: str | None = None


def synthetic(
    requests: int,
    input_tokens: int,
    output_tokens: int,
    replicas: int = 1,
    policy: str = "least_loaded",
    **arrivals: Any,
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
        "routing": {"policy": policy},
    }


def replayed(trace: str, replicas: int, **workload: Any) -> dict[str, Any]:
    scenario = synthetic(1, 1, 1, replicas, process="all_at_once")
    return scenario | {"workload": {"trace": trace, **workload}}


AZURE, MOONCAKE = "azure_2023_conv.csv", "mooncake_conversation.jsonl"
CASES = {
    "open-300": Case(synthetic(300, 512, 128, process="poisson", rate=10), 0.8),
    "A": Case(synthetic(10_000, 512, 128, process="poisson", rate=10), 2.0, 250),
    "A-40": Case(synthetic(100_000, 512, 128, process="poisson", rate=40), 7.0),
    "replicas-32": Case(synthetic(100_000, 512, 128, 32, "join_shortest_queue", process="poisson", rate=640), 9.0),
    "closed-64": Case(synthetic(20_000, 1024, 256, process="closed_loop", concurrency=64), 3.0),
    # 19,366 requests an hour, 52 times over; 40 times as fast gives each of the replicas 3.4 requests/s
    "azure-million": Case(replayed(AZURE, 64, repeat=52, rate_scale=40.0), 60.0, 1536, AZURE),
    "azure-million-own-pace": Case(replayed(AZURE, 64, repeat=52), 60.0, 1536, AZURE),
    "mooncake": Case(replayed(MOONCAKE, 1), 6.0, None, MOONCAKE),
    "mooncake-8": Case(replayed(MOONCAKE, 8), 6.0, None, MOONCAKE),
}


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


def run_cases(names: list[str], traces: Path) -> dict[str, float]:
    """Print what each workload takes; the user seconds of those that were run."""
    took: dict[str, float] = {}
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
            if not status:
                took[name] = seconds
    return took


def run_peer(name: str, executable: str, ours: dict[str, float]) -> None:
    """The workloads that we have run on a peer, as far as it knows them; the ratio is to our seconds."""
    peer = PEERS[name]
    asked = f"import importlib.metadata as m; print(m.version({peer.package!r}))"
    python = Path(executable).with_name("python")
    version = subprocess.run([str(python), "-c", asked], capture_output=True, text=True, check=False).stdout.strip()
    print(f"\n{name} {version or '(version unknown)'}")
    print(f"{'workload':<24} {'user s':>8} {'ours':>7} {'ratio':>6} {'MiB':>7}")
    for case, seconds in ours.items():
        with tempfile.TemporaryDirectory() as folder:
            command = peer.command(CASES[case].scenario, Path(folder))
            if command is None:
                print(f"{case:<24} not known to it")
                continue
            took, mebibytes, status = measured([executable, *command], cwd=folder)
            row = f"{case:<24} {took:8.2f} {seconds:7.2f} {took / seconds:6.2f} {mebibytes:7.0f}"
            print(row if not status else f"{case:<24} failed with status {status}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, default=Path("traces"))
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    executables = "; ".join(f"{name}: {peer.executable}" for name, peer in PEERS.items())
    parser.add_argument(
        "--peer", nargs=2, action="append", default=[], metavar=("NAME", "EXECUTABLE"), help=executables
    )
    known = parser.parse_args()
    for name, executable in known.peer:
        if name not in PEERS:
            parser.error(f"--peer {name}: unknown; allowed: {', '.join(PEERS)}")
        if shutil.which(executable) is None:
            parser.error(f"--peer {name} {executable}: no such executable")
    package = find_spec("servetwin")
    assert package is not None and package.submodule_search_locations
    compileall.compile_dir(package.submodule_search_locations[0], quiet=1)
    if find_spec("numba"):  # long runs take compiled code that is there, and do not wait for it to be made
        subprocess.run([sys.executable, "-m", "servetwin.engine.compiled"], check=True)
    ours = run_cases(known.only, known.traces)
    for name, executable in known.peer:
        run_peer(name, executable, ours)


if __name__ == "__main__":
    main()
