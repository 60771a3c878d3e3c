"""A flame graph of a run, from samples of where the program is.

    python benchmarks/flame.py replicas-32 docs/performance-flame.svg [--traces DIR] [--requests N]

Every millisecond of CPU time the stack is noted; the picture shows each function as wide as its share of the samples,
on top of its caller. Sampling costs next to nothing, so the shares are those of a run without it. Also prints the
functions in which the most time is spent themselves.
"""

from __future__ import annotations

import argparse
import signal
from collections import Counter
from pathlib import Path
from types import FrameType
from xml.sax.saxutils import escape

from speed import CASES

from servetwin.scenario.load import from_data
from servetwin.simulation import simulate

WIDTH, ROW, LEAST = 1200, 17, 0.002
"""Pixels, and the smallest share that is drawn."""

Stack = tuple[str, ...]


def sampled(name: str, traces: Path, requests: int | None) -> Counter[Stack]:
    """Stacks of a run, outermost function first, and how often each was seen."""
    case = CASES[name]
    data = case.scenario
    if requests is not None:
        data["workload"] |= {"limit": requests, "repeat": 1} if case.trace else {"requests": requests}
    scenario, stacks = from_data(data, None, Path()), Counter[Stack]()

    def note(_: int, frame: FrameType | None) -> None:
        names = []
        while frame is not None:
            code = frame.f_code
            names.append(f"{Path(code.co_filename).stem}.{code.co_qualname}")
            frame = frame.f_back
        stacks[tuple(reversed(names[:-2]))] += 1  # without this script

    signal.signal(signal.SIGPROF, note)
    signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)
    simulate(scenario, traces)
    signal.setitimer(signal.ITIMER_PROF, 0)
    return stacks


def drawn(stacks: Counter[Stack], depth: int, left: float, whole: int) -> list[str]:
    """Boxes for the functions at `depth` and above; `stacks` share what is below."""
    boxes: list[str] = []
    groups: dict[str, Counter[Stack]] = {}
    for stack, count in stacks.items():
        if len(stack) > depth:
            groups.setdefault(stack[depth], Counter())[stack] += count
    for name, group in sorted(groups.items()):
        count = group.total()
        width = WIDTH * count / whole
        if count >= LEAST * whole:
            hue = 20 + sum(map(ord, name.split(".")[0])) % 40
            label = escape(name[: int(width / 6.2)]) if width > 40 else ""
            y = depth * ROW
            boxes.append(
                f"<g><title>{escape(name)}: {100 * count / whole:.1f} %</title>"
                f'<rect x="{left:.1f}" y="{y}" width="{width:.1f}" height="{ROW - 1}" fill="hsl({hue},80%,65%)"/>'
                f'<text x="{left + 3:.1f}" y="{y + 12}">{label}</text></g>'
            )
            boxes += drawn(group, depth + 1, left, whole)
        left += width
    return boxes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workload", choices=CASES)
    parser.add_argument("svg", type=Path)
    parser.add_argument("--traces", type=Path, default=Path("traces"))
    parser.add_argument("--requests", type=int)
    known = parser.parse_args()
    stacks = sampled(known.workload, known.traces, known.requests)
    whole = stacks.total()
    boxes = drawn(stacks, 0, 0.0, whole)
    height = ROW * max(len(stack) for stack in stacks)
    known.svg.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="monospace" font-size="10">\n' + "\n".join(boxes) + "\n</svg>\n",
        encoding="utf-8",
    )
    own: Counter[str] = Counter()
    for stack, count in stacks.items():
        own[stack[-1] if stack else "-"] += count
    for name, count in own.most_common(30):
        print(f"{100 * count / whole:5.1f} %  {name}")


if __name__ == "__main__":
    main()
