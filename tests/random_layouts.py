"""Random layouts on the emulated GPU, by the thousand.

    python tests/random_layouts.py --count 5000 --seed 1

Most are calls of the op as `op_cases.layouts` draws them, every fifth is a life of a cache (see
paged_games.py). Each output is compared with the float64 oracle by the limits of the tests, and the
sanitizer watches every launch. Ends in 1 if anything was found. What was done is noted in the file
--log, if one is given: a run that was cut short goes on from there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

CHUNK = 25  # layouts that are drawn together, from one seed
PAGED = 5  # every fifth chunk

Record = dict[str, Any]


def start(architecture: int) -> None:
    """In each process: the emulated GPU in place of the CPU."""
    os.environ["HOGWILD_EMULATE"] = "1"
    from emulator import session

    session.start(architecture)
    import torch

    torch.set_num_threads(1)


def run_chunk(job: tuple[int, int, int]) -> list[Record]:
    """`count` layouts of chunk `chunk` of the run with this seed; one record each."""
    seed, chunk, count = job
    number = seed * 1_000_003 + chunk
    return list((_lives if chunk % PAGED == PAGED - 1 else _calls)(number, count))


def _calls(seed: int, count: int) -> Iterator[Record]:
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as hypothesis_seed

    from compare import assert_lse_matches, assert_out_near
    from op_cases import Layout, layouts

    records: list[Record] = []

    @hypothesis_seed(seed)
    @settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(layout=layouts())
    def draw(layout: Layout) -> None:
        record: Record = {"kind": "call", "dtype": str(layout.dtype), "dim": layout.dim}
        records.append(record)
        try:
            case = layout.build()
            out, lse = case.run()
            expected, expected_lse = case.reference()
            record["worst"] = assert_out_near(out, expected, case.eager)
            assert_lse_matches(lse, expected_lse, layout.dtype)
        except Exception as error:
            _note(record, error, repr(layout))

    draw()
    yield from records


def _lives(seed: int, count: int) -> Iterator[Record]:
    from paged_games import Game

    for i in range(count):
        game = Game(seed * 1009 + i)
        record: Record = {"kind": "life", "dtype": str(game.dtype), "dim": game.dim}
        try:
            game.play(4)
        except Exception as error:
            _note(record, error, f"Game({seed * 1009 + i}).play(4)")
        record["worst"] = game.worst
        yield record


def _note(record: Record, error: Exception, what: str) -> None:
    finding = type(error).__name__ == "SanitizerError"
    record["finding" if finding else "failure"] = f"{what}\n{traceback.format_exc(limit=-1)}"


# ---- the whole run -------------------------------------------------------------------------------


def finished(log: Path | None, run: list[int]) -> dict[int, list[Record]]:
    """Chunks that an earlier run with the same options has done."""
    chunks = {}
    if log and log.exists():
        for line in log.read_text().splitlines():
            entry = json.loads(line)
            if entry["run"] == run:
                chunks[entry["chunk"]] = entry["records"]
    return chunks


def report(records: list[Record], seconds: float, options: argparse.Namespace) -> bool:
    """Prints what was found; True if nothing was."""
    cells: dict[tuple[str, int], list[Record]] = defaultdict(list)
    for record in records:
        cells[record["dtype"].removeprefix("torch."), record["dim"]].append(record)
    dims = sorted({dim for _, dim in cells})
    print("\nlayouts (worst error as a share of its limit)\n")
    print("| | " + " | ".join(f"D {dim}" for dim in dims) + " |")
    print("| --- |" + " --- |" * len(dims))
    for dtype in sorted({dtype for dtype, _ in cells}):
        row = []
        for dim in dims:
            cell = cells[dtype, dim]
            worst = max((record.get("worst", 0.0) for record in cell), default=0.0)
            row.append(f"{len(cell)} ({worst:.2f})")
        print(f"| {dtype} | " + " | ".join(row) + " |")
    bad = [r for r in records if "finding" in r or "failure" in r]
    for record in bad:
        print("\n" + (record.get("finding") or record["failure"]))
    findings = sum("finding" in record for record in bad)
    lives = sum(record["kind"] == "life" for record in records)
    worst = max((record.get("worst", 0.0) for record in records), default=0.0)
    print(
        f"\n{len(records)} layouts ({lives} of them lives of a cache), seed {options.seed}, "
        f"sm_{options.architecture}, {seconds:.0f} s: worst error {worst:.2f} of its limit, "
        f"{findings} sanitizer findings, {len(bad) - findings} failures"
    )
    return not bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--architecture", type=int, default=90, choices=(80, 90, 100))
    parser.add_argument("--log", type=Path, help="file to note finished work in, and to go on from")
    options = parser.parse_args()

    started = time.monotonic()
    run = [options.seed, options.count, options.architecture]
    done = finished(options.log, run)
    jobs = [
        (options.seed, chunk, min(CHUNK, options.count - chunk * CHUNK))
        for chunk in range(-(-options.count // CHUNK))
        if chunk not in done
    ]
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.processes, start, (options.architecture,)) as pool:
        for job, records in zip(jobs, pool.imap(run_chunk, jobs), strict=True):
            done[job[1]] = records
            if options.log:
                with options.log.open("a") as file:
                    file.write(json.dumps({"run": run, "chunk": job[1], "records": records}) + "\n")
            count = sum(map(len, done.values()))
            print(f"\r{count} of {options.count}", end="", file=sys.stderr, flush=True)
    records = [record for _, chunk in sorted(done.items()) for record in chunk]
    return 0 if report(records, time.monotonic() - started, options) else 1


if __name__ == "__main__":
    sys.exit(main())
