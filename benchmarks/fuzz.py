"""Run random scenarios of whole clusters, each within a bound of time.

    python benchmarks/fuzz.py [--scenarios 2000] [--first 0] [--seconds 60]

Scenarios come from tests/clusters.py, by number: dense models and mixtures of experts, pools of several devices and
parallelisms, lock-step groups, every routing policy, admission limits, sessions, far too small KV caches, prompts that
are too long. A scenario ends (every request once, checked as in tests/test_fuzz.py), or is refused with the field that
is wrong. One that takes longer than the bound, or ends otherwise, is printed with its number.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from servetwin.errors import InputError
from servetwin.simulation import simulate
from test_fuzz import check, scenario


class TooLongError(Exception):
    """A scenario has not ended within its bound."""


def _stop(*_: Any) -> None:
    raise TooLongError


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scenarios", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60.0, help="bound of one scenario")
    args = parser.parse_args()
    signal.signal(signal.SIGALRM, _stop)
    ends, statuses = Counter[str](), Counter[str]()
    refused = Counter[str]()
    longest, began = (0.0, -1), time.process_time()
    for seed in range(args.first, args.first + args.scenarios):
        start = time.process_time()
        signal.setitimer(signal.ITIMER_REAL, args.seconds)
        try:
            run = simulate(scenario(seed))
            check(run)
            statuses.update(run.requests["status"])
            ends["ended"] += 1
        except InputError as error:
            refused[f"{error.field}: {error.message}"[:90]] += 1
            ends["refused"] += 1
        except TooLongError:
            print(f"scenario {seed} has not ended within {args.seconds:g} s", flush=True)
            ends["did not end"] += 1
        except Exception:
            print(f"scenario {seed}:\n{traceback.format_exc()}", flush=True)
            ends["fault"] += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        longest = max(longest, (time.process_time() - start, seed))
    print(f"scenarios: {dict(ends)}; requests: {dict(statuses)}")
    print(f"{time.process_time() - began:.0f} CPU s in all, at most {longest[0]:.1f} (scenario {longest[1]})")
    for message, count in refused.most_common(12):
        print(f"{count:6d} refused: {message}")
    return 1 if ends["did not end"] or ends["fault"] else 0


if __name__ == "__main__":
    sys.exit(main())
