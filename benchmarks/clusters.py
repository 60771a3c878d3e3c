"""CPU seconds and memory of large clusters.

    python benchmarks/clusters.py [--requests 100000] [--gpus 64 1024]

Llama 3.1 70B in fp8 on nodes of eight H100, four to a replica, 512 prompt tokens and 128 output tokens, Poisson
arrivals at 6 requests/s a replica, join-shortest-queue. Each size runs in a process of its own, whole command included:
reading the scenario, simulating, writing the result folder.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from servetwin.scenario import document


def scenario(gpus: int, requests: int) -> dict[str, object]:
    replicas = gpus // 4
    return {
        "model": "meta-llama/Llama-3.1-70B",
        "workload": {
            "arrivals": {"process": "poisson", "rate": 6 * replicas},
            "requests": requests,
            "input_tokens": 512,
            "output_tokens": 128,
        },
        "nodes": [{"count": gpus // 8, "devices": {"h100_sxm": 8}, "host": "dgx_h100"}],
        "pools": [
            {
                "device": "h100_sxm",
                "replicas": replicas,
                "parallelism": {"tensor": 4},
                "engine": {"quantization": "fp8"},
            }
        ],
        "routing": {"policy": "join_shortest_queue"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--gpus", type=int, nargs="+", default=[64, 1024])
    args = parser.parse_args()
    print("  GPUs  engines  completed  failed  CPU s  peak RSS MiB     steps  mean TTFT ms  mean TPOT ms")
    for gpus in args.gpus:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "scenario.yaml"
            file.write_text(document.write(scenario(gpus, args.requests)), encoding="utf-8")
            before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
            command = "import resource, sys; from servetwin.cli import main\n"
            command += "try:\n    main()\nfinally:\n"
            command += "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
            run = [sys.executable, "-c", command, "run", str(file), "-o", f"{folder}/out", "--format", "json"]
            done = subprocess.run(run, check=True, capture_output=True, text=True)
            user = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
            summary, rss = json.loads(done.stdout), int(done.stderr.split()[-1]) / 1024
            ended = f"{summary['completed']:9d}  {summary['failed']:6d}"
            figures = f"{summary['mean_ttft_ms']:12.1f}  {summary['mean_tpot_ms']:12.2f}"
            steps = summary["simulation"]["steps"]
            print(f"{gpus:6d}  {gpus // 4:7d}  {ended}  {user:5.1f}  {rss:12.0f}  {steps:8d}  {figures}", flush=True)


if __name__ == "__main__":
    main()
