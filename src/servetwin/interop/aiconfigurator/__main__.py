"""`python -m servetwin.interop.aiconfigurator WHEEL -o DIR [--system h100_sxm ...]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from servetwin.errors import InputError
from servetwin.interop.aiconfigurator.convert import convert


def main() -> int:
    """Convert; exit status 2 when the wheel or a system name is wrong."""
    parser = argparse.ArgumentParser(prog="python -m servetwin.interop.aiconfigurator", description=__doc__)
    parser.add_argument("wheel", type=Path, help="the aiconfigurator-core wheel of the pinned version")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the profiles, one folder a device")
    parser.add_argument("--system", nargs="+", help="systems of the wheel (default: all that have tables)")
    args = parser.parse_args()
    try:
        for device, folder in convert(args.wheel, args.output, args.system).items():
            size = sum(path.stat().st_size for path in folder.iterdir())
            print(f"{device}: {size / 1e6:.2f} MB in {folder}", file=sys.stderr)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
