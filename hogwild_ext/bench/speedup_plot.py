"""The speed-up of several workers, drawn beside what the roofline allows. Needs matplotlib."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .generate import PACKED, PLAIN
from .report import Record

FILE = "generate_speedup.svg"


def draw(records: Sequence[Record], folder: Path) -> Path:
    """Writes the plot into the folder, which is made if need be; returns the file.

    A panel for each model and dtype, a colour for each context. Raises ImportError without
    matplotlib.
    """
    import matplotlib
    from matplotlib.figure import Figure

    measured = [record for record in records if "speedup" in record]
    panels = [
        (title, list(group))
        for title, group in itertools.groupby(
            measured, lambda record: f"{record['model']}, {record['dtype']}"
        )
    ]
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context({"svg.hashsalt": "hogwild"}):  # the same file for the same numbers
        figure = Figure(figsize=(5 * columns, 3.8 * rows), layout="constrained")
        grid: Any = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.remove()
        for axes, (title, group) in zip(grid.flat, panels, strict=False):
            _panel(axes, title, group)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / FILE
        figure.savefig(file, metadata={"Date": None})
    return file


def _panel(axes: Any, title: str, records: Sequence[Record]) -> None:
    contexts = sorted({record["context"] for record in records})
    for colour, context in enumerate(contexts):
        for what, style, word in ((PACKED, "o-", "packed"), (PLAIN, "s:", "torch's layers")):
            points = sorted(
                (record["workers"], record["speedup"], record["ideal"])
                for record in records
                if record["what"] == what and record["context"] == context
            )
            if not points:
                continue
            workers, speedups, ideals = zip(*points, strict=True)
            label = f"{context:,} tokens, {word}"
            axes.plot(workers, speedups, style, color=f"C{colour}", label=label, markersize=4)
            if what == PACKED:
                ideal = f"{context:,} tokens, ideal"
                axes.plot(workers, ideals, "--", color=f"C{colour}", alpha=0.5, label=ideal)
    counts = sorted({record["workers"] for record in records})
    axes.set(title=title, xlabel="workers", ylabel="tokens/s against one worker", xticks=counts)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
