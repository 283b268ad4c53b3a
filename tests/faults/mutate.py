"""Draws small changes of the package and of the CPU's kernels, and sees whether the tests notice.

    python tests/faults/mutate.py --seed 1 --count 50 [--log FILE] [--list] [--only FILE]

Each change is made in a copy: a comparison turned, a bound one off, a term left out, a call
dropped. Kernels are built anew, as far as they changed, and go through the fuzzer first. Ends in 1
if a change survives that is not known to change nothing (see drawn.py). With a log, a run that was
cut short goes on from there: what stands in it is not tried again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from faults.drawn import CHANGES_NOTHING
from faults.fault import ROOT, Fault
from faults.operators import faults_of

# What needs a GPU has faults of its own (run.py cuda), the reference is what tests compare with,
# and these headers declare what others compute.
LEFT_OUT = {
    "cuda_backend.py", "_reference.py", "__init__.py", "__main__.py",
    "backend.h", "kernels.h", "parallel.h", "ceilings.h",
}  # fmt: skip


def files() -> list[str]:
    """What is changed."""
    package = sorted((ROOT / "hogwild_ext").glob("*.py"))
    kernels = [p for p in sorted((ROOT / "csrc/cpu").iterdir()) if p.suffix in (".h", ".cpp")]
    found = [*package, *kernels, ROOT / "csrc/plan.cpp"]
    return [str(path.relative_to(ROOT)) for path in found if path.name not in LEFT_OUT]


def draw(seed: int, count: int, only: str = "") -> list[Fault]:
    """`count` changes, half of them in the package and half in C++.

    Their order is that of a digest of the seed and the text: a change that has been drawn stays
    drawn while other lines come and go.
    """
    halves: list[list[Fault]] = [[], []]
    for file in files():
        if only in file:
            halves[file.endswith(".py")] += faults_of(file, (ROOT / file).read_text())
    for half in halves:
        # Of places that read the same and would after a change, the first.
        half[:] = {key(fault): fault for fault in reversed(half)}.values()
        half.sort(key=lambda fault: hashlib.sha256(repr((seed, key(fault))).encode()).digest())
    longest = max(map(len, halves))
    turns = [half[i] for i in range(longest) for half in halves if i < len(half)]
    return turns[:count]


def key(fault: Fault) -> tuple[str, str]:
    """What a change is known by, wherever its lines stand and however they are indented."""
    return fault.file, " ".join(fault.new.split())


def why_nothing(fault: Fault) -> str | None:
    known = {(file, " ".join(new.split())): why for (file, new), why in CHANGES_NOTHING.items()}
    return known.get(key(fault))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--only", default="", metavar="FILE", help="files with this in the path")
    parser.add_argument("--log", type=Path, help="file to note results in, and to go on from")
    parser.add_argument("--list", action="store_true", help="what would be tried, and leave")
    given = parser.parse_args()

    faults = draw(given.seed, given.count, given.only)
    if given.list:
        for fault in faults:
            print(f"{fault.file}\n- {fault.old}\n+ {fault.new}\n")
        return 0
    done = {}
    if given.log and given.log.exists():
        for line in given.log.read_text().splitlines():
            entry = json.loads(line)
            done[entry["file"], " ".join(entry["new"].split())] = entry

    from faults.running import try_fault

    counts = dict.fromkeys(
        ("caught", "changes nothing", "not compiled", "not for this CPU", "SURVIVED", "BROKEN"), 0
    )
    for number, fault in enumerate(faults):
        entry = done.get(key(fault))
        if entry is None:
            began = time.monotonic()
            outcome = try_fault(fault)
            entry = {
                "file": fault.file, "old": fault.old, "new": fault.new,
                "verdict": outcome.verdict, "words": outcome.words[:2000],
                "seconds": round(time.monotonic() - began),
            }  # fmt: skip
            if given.log:
                with given.log.open("a") as log:
                    log.write(json.dumps(entry) + "\n")
        reason = why_nothing(fault)
        if "same machine code" in entry["words"]:
            reason = entry["words"].partition(": ")[2]
        verdict = {"failed": "caught", "passed": "SURVIVED", "broken": "BROKEN"}[entry["verdict"]]
        if verdict == "SURVIVED" and reason:
            verdict = "changes nothing"
        if verdict == "BROKEN" and "error: " in entry["words"]:
            verdict = "not compiled"
        if verdict == "BROKEN" and "only other CPUs" in entry["words"]:
            verdict = "not for this CPU"
        counts[verdict] += 1
        print(f"{number}: {verdict}, {entry['seconds']} s, {fault.file}: {fault.name}", flush=True)
        print(f"    {(reason or entry['words']).partition(chr(10))[0]}", flush=True)
        if verdict in ("SURVIVED", "BROKEN"):
            print(*(f"    - {line}" for line in fault.old.splitlines()), sep="\n")
            print(*(f"    + {line}" for line in fault.new.splitlines()), sep="\n", flush=True)
    print(f"seed {given.seed}: " + ", ".join(f"{n} {what}" for what, n in counts.items()))
    return bool(counts["SURVIVED"] + counts["BROKEN"])


if __name__ == "__main__":
    sys.exit(main())
