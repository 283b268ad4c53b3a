"""Plants faults, one at a time, and sees the tests catch every one.

    python tests/faults/run.py [cuda|cpu|package|drawn ...] [--list] [--only WORDS] [--check] [-j 1]

For each fault, the sources are copied, one small change is made in the copy, and a choice of tests
runs on that until one fails. A fault that no test sees is a survivor: the tests are too weak, and
the exit status is 1. So it is if the text to change is no longer there exactly once, or if the
changed source does not compile. The tests' numbers are the same in every run. `cuda` needs nvcc,
see ../emulator/README.md; the rest takes about ten minutes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from faults import cpu, cuda, drawn, package
from faults.fault import ROOT, Fault, Outcome, stale_faults

LISTS: dict[str, list[Fault]] = {
    "cuda": cuda.FAULTS,
    "cpu": cpu.FAULTS,
    "package": package.FAULTS,
    "drawn": drawn.FAULTS,
}
FAULTS = [fault for faults in LISTS.values() for fault in faults]
MARKS = {"failed": "caught", "passed": "SURVIVED", "broken": "BROKEN"}


def without_a_fault(faults: Sequence[Fault]) -> Outcome:
    """What the emulated tests say of the kernels as they are."""
    from faults.cuda.tests import OP, PAGES
    from faults.running import run_emulated

    tests = dict.fromkeys(test for fault in faults for test in fault.tests or (*OP, *PAGES))
    return run_emulated(list(tests), ROOT / "csrc")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("lists", nargs="*", default=list(LISTS), help=", ".join(LISTS))
    parser.add_argument("--list", action="store_true", help="names of the faults, and leave")
    parser.add_argument("--only", default="", metavar="WORDS", help="faults with WORDS in the name")
    parser.add_argument("--check", action="store_true", help="see if all can be planted, and leave")
    parser.add_argument("-j", type=int, default=1, dest="jobs", help="how many at a time")
    given = parser.parse_args()
    if unknown := set(given.lists) - set(LISTS):
        parser.error(f"expected {', '.join(LISTS)}, got {', '.join(sorted(unknown))}")

    faults = [f for name in given.lists for f in LISTS[name] if given.only in f.name]
    if given.list:
        print(*(f"{fault.file:32}  {fault.name}" for fault in faults), sep="\n")
        return 0
    if given.check:
        stale = stale_faults(faults)
        print(*stale, f"{len(faults)} faults, {len(stale)} stale", sep="\n")
        return bool(stale)

    from faults.running import try_fault

    began = time.monotonic()
    emulated = [fault for fault in faults if fault.file.startswith("csrc/cuda/")]
    if emulated:
        sound = without_a_fault(emulated)
        print(f"no fault: {sound.words}", flush=True)
        if sound.verdict != "passed":
            return 1
    caught = 0
    with ThreadPoolExecutor(given.jobs) as pool:
        for fault, outcome in zip(faults, pool.map(try_fault, faults), strict=True):
            caught += outcome.verdict == "failed"
            print(
                f"{MARKS[outcome.verdict]:8}  {fault.name}\n          {outcome.words}", flush=True
            )
    minutes = (time.monotonic() - began) / 60
    print(f"{caught} of {len(faults)} faults caught, {minutes:.0f} minutes")
    return caught < len(faults)


if __name__ == "__main__":
    sys.exit(main())
