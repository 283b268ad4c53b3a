"""What a step costs outside of the model, by steps and workers: `python bench/page_growth.py`

The engine, the page and the trace are the real ones; the model is left out (tests/no_model.py): a
pass stores its tokens without keys and values, and everybody says "z", each with a finished
paragraph every 20 tokens. So what is timed is views, room, pages, commits, sampling (greedy), text
and trace.

    ms a step    CPU time (which a busy machine disturbs less): the median of 200 steps, and the
                 95th percentile, up to the step that is named
    trace        bytes of that step's lines, on average, beside those of its token lines alone

Prints tables of Markdown. 10,000 steps of 64 workers take some minutes.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from no_model import NoModel, large_team, work_of_steps

WINDOW = 200  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("`")[0].strip())
    parser.add_argument("--workers", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--layout", default="combined")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    print(f"{options.layout}, {os.cpu_count()} cores, load {load:.1f} at the beginning\n")
    print("| workers | up to step | ms a step | 95% below | trace, bytes a step | tokens alone |")
    print("| --- | --- | --- | --- | --- | --- |")
    with pytest.MonkeyPatch.context() as patched, tempfile.TemporaryDirectory() as folder:
        NoModel(patched)
        for workers in options.workers:
            measure(workers, options.steps, options.layout, Path(folder) / "run.jsonl")


def measure(workers: int, steps: int, layout: str, path: Path) -> None:
    """Prints a row at steps that double, and at the last one."""
    team = large_team(workers, steps, layout=layout)
    wanted = {steps, *(WINDOW * 2**i for i in range(20) if WINDOW * 2**i <= steps // 2)}
    times: list[float] = []
    written = 0
    with team.stream("p", steps, trace=path) as run, open(path, "rb") as trace:
        before = time.thread_time()
        for step in work_of_steps(run):
            now = time.thread_time()
            times.append(now - before)
            if step in wanted:
                lines = trace.read()[-WINDOW * 400 * workers :].splitlines(keepends=True)[1:]
                counted = len({line.partition(b'"step": ')[2].partition(b",")[0] for line in lines})
                written = sum(map(len, lines)) / counted
                tokens = sum(len(x) for x in lines if x.startswith(b'{"kind": "token"')) / counted
                ms = np.array(times[-WINDOW:]) * 1000
                print(
                    f"| {workers} | {step:,} | {np.median(ms):.2f} | {np.quantile(ms, 0.95):.2f} | "
                    f"{written:,.0f} | {tokens:,.0f} |",
                    flush=True,
                )
            before = time.thread_time()


if __name__ == "__main__":
    main()
