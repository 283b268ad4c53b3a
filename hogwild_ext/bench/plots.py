"""Plots of `hogwild bench attention`: a picture for each kind of step and dtype."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from .report import Record, Report, Table, short_count

PANEL = 2.7, 2.3  # inches
COLOURS = ("#1b6ca8", "#2a9d5c", "#d9822b", "#b5334a")  # of the numbers of workers
DASHES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")  # of kinds of segments


class PlottedReport:
    """Another report that also keeps the records, to be drawn when all are there."""

    def __init__(self, shown: Report) -> None:
        self._shown = shown
        self.records: list[Record] = []

    def about(self, lines: Sequence[str], facts: Record) -> None:
        self._shown.about(lines, facts)

    def table(self, table: Table) -> None:
        self._shown.table(table)
        self.records += table.records


def speed_ups(records: Sequence[Record]) -> dict[tuple[Any, ...], tuple[Record, Record]]:
    """Of each cell, ours (`step.attend`) and the fastest of the others; cells without others are
    left out."""
    cells: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if not record["error"]:
            names = ("heads", "dtype", "step", "segments", "context", "workers")
            cells.setdefault(tuple(record[name] for name in names), []).append(record)
    found = {}
    for key, those in cells.items():
        ours = [r for r in those if r["what"] == "step.attend"]
        others = [r for r in those if not r["is_ours"]]
        if ours and others:
            found[key] = ours[0], min(others, key=lambda r: float(r["times_ours"]))
    return found


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Writes the pictures and returns their paths. Needs matplotlib; OSError if the folder cannot
    be written to."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    compared = speed_ups(records)
    kinds = dict.fromkeys((step, dtype) for _, dtype, step, *_ in compared)
    paths = []
    for step, dtype in kinds:
        those = {key: pair for key, pair in compared.items() if key[1:3] == (dtype, step)}
        path = folder / f"attention_{step}_{dtype}.png"
        _draw_kind(those, f"{step}, {dtype}", path)
        paths.append(path)
    return paths


def _draw_kind(
    compared: dict[tuple[Any, ...], tuple[Record, Record]], title: str, path: Path
) -> None:
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    heads = list(dict.fromkeys(key[0] for key in compared))
    segments = list(dict.fromkeys(key[3] for key in compared))
    workers = sorted({key[5] for key in compared})
    contexts = sorted({key[4] for key in compared})
    width, height = PANEL
    figure, axes = pyplot.subplots(
        2, len(heads), figsize=(max(2, len(heads)) * width, 2 * height + 0.5), sharex=True,
        sharey="row", squeeze=False, layout="constrained",
    )  # fmt: skip
    for column, name in enumerate(heads):
        upper, lower = axes[0][column], axes[1][column]
        for kind, count in itertools.product(segments, workers):
            line = sorted(
                (key[4], ours, best) for key, (ours, best) in compared.items()
                if (key[0], key[3], key[5]) == (name, kind, count)
            )  # fmt: skip
            places = [contexts.index(context) for context, _, _ in line]
            style: dict[str, Any] = {
                "color": COLOURS[workers.index(count) % len(COLOURS)],
                "linestyle": DASHES[segments.index(kind) % len(DASHES)],
                "marker": "o", "markersize": 3, "linewidth": 1.4,
            }  # fmt: skip
            roofline = [100 * ours.get("part_of_roofline", 0) for _, ours, _ in line]
            upper.plot(places, roofline, **style)
            lower.plot(places, [best["times_ours"] for *_, best in line], **style)
        model = next(ours["model"] for key, (ours, _) in compared.items() if key[0] == name)
        upper.set_title(f"{model}\n{name}" if model else name, fontsize=10)
        upper.axhline(100, color="#999999", linewidth=0.8)
        lower.axhline(1, color="#999999", linewidth=0.8)
        lower.set_yscale("log", base=2)
        lower.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        lower.set_xticks(range(len(contexts)), [short_count(context) for context in contexts])
        lower.set_xlabel("tokens of context")
        for panel in (upper, lower):
            panel.grid(axis="y", color="#e5e5e5", linewidth=0.7)
            panel.spines[["top", "right"]].set_visible(False)
            panel.tick_params(labelsize=9)
    axes[0][0].set_ylim(bottom=0)
    axes[0][0].set_ylabel("% of roofline")
    axes[1][0].set_ylabel("times as fast as\nthe best peer")
    legend = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], label=f"{n} worker{'s' * (n > 1)}")
        for i, n in enumerate(workers)
    ] + [
        Line2D([], [], color="#444444", linestyle=DASHES[i % len(DASHES)], label=f"{kind} segments")
        for i, kind in enumerate(segments)
    ]
    figure.suptitle(title, fontsize=11)
    figure.legend(
        handles=legend, loc="outside lower center", ncols=3 if len(heads) <= 2 else 6,
        frameon=False, fontsize=9,
    )  # fmt: skip
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
