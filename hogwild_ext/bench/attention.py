"""`hogwild bench attention`: one layer's attention over a grid of steps.

On a GPU every cell is computed by ours and by its peers, compared, then timed in turns. Without one
the work is counted from the tables of the step and a roofline model says what it would cost.
"""

from __future__ import annotations

import importlib
import itertools
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import _C
from .grid import Cell
from .inputs import Inputs
from .peers import OURS, PEERS, Candidate, Peer, is_installed
from .report import Column, Record, Report, Table
from .roofline import GPUS, LAUNCH_SECONDS, estimate
from .timing import Timer
from .work import SECTOR, check, count_layer, step_bytes, step_tables

ROUNDS = 30
COPY_BYTES = 1 << 30
# ||out - ours|| / ||ours|| that a worker may be off: loose, since peers round differently, and far
# below what a wrong mask, rotation or page would do.
TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 3e-2}


def run(cells: Sequence[Cell], bench: Bench, report: Report) -> int:
    """Reports on all cells, a table for each kind of step. Returns the exit code: 2 if a peer
    computes something else than ours. Raises ValueError for a cell that cannot be."""
    for cell in cells:
        bench.check(cell)  # before anything that takes time
    report.about(*bench.about())
    differing = 0
    for (heads, dtype, step), group in itertools.groupby(
        cells, lambda cell: (cell.heads, cell.dtype, cell.step)
    ):
        records = [record for cell in group for record in bench.records(cell)]
        differing += sum(record.get("error", "").startswith("differs") for record in records)
        title = f"{bench.title}: {step}, {heads.title}, {dtype}"
        report.table(Table(title, bench.columns, records))
    return 2 if differing else 0


class Bench(Protocol):
    """What a cell is put through."""

    title: str  # of every table
    columns: Sequence[Column]

    def check(self, cell: Cell) -> None:
        """Raises ValueError for a cell that cannot be."""

    def about(self) -> tuple[list[str], Record]:
        """What `Report.about` gets."""

    def records(self, cell: Cell) -> list[Record]:
        """Rows of a table."""


def _number(key: str, scale: float = 1, form: str = ".1f") -> Callable[[Record], str]:
    def text(record: Record) -> str:
        value = record.get(key)
        return "" if value is None else format(value * scale, form)

    return text


def _of_cell(cell: Cell) -> dict[str, Any]:
    return {**asdict(cell), "heads": str(cell.heads), "model": cell.heads.model}


_CELL_COLUMNS = (
    Column("segs", lambda r: str(r["segments"]), is_text=True),
    Column("context", _number("context", form=",d")),
    Column("W", _number("workers", form="d")),
)


# ---- measured -----------------------------------------------------------------------------------


class Measured:
    """Candidates compared and timed on a device."""

    title = "Measured"
    columns = (
        *_CELL_COLUMNS,
        Column("what", lambda r: ": ".join(filter(None, (r["what"], r["error"]))), is_text=True),
        Column("µs", _number("seconds", 1e6)),
        Column("±", _number("spread", form=".0%")),
        Column("GB/s", _number("bytes_per_second", 1e-9, ".0f")),
        Column("of copy", _number("part_of_copy", form=".0%")),
        Column("MB", _number("bytes", 1e-6), wide=True),
        Column("times step.attend", _number("times_ours", form=".2f"), wide=True),
    )

    def __init__(
        self,
        device: torch.device,
        device_name: str,
        timer: Timer,
        cold: bool,
        peers: Sequence[Peer] = PEERS,
        rounds: int = ROUNDS,
        copy_bytes: int = COPY_BYTES,
    ) -> None:
        self._device = device
        self._device_name = device_name
        self._timer = timer
        self._cold = cold
        self._peers = [peer for peer in peers if is_installed(peer)]
        self._missing = [peer.name for peer in peers if not is_installed(peer)]
        self._rounds = rounds
        source = torch.zeros(copy_bytes, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copy = timer({"copy": lambda: target.copy_(source)}, 10)["copy"]
        self._copy_rate = 2 * copy_bytes / copy.median  # bytes a second, read and written

    def check(self, cell: Cell) -> None:
        cell.layout()

    def about(self) -> tuple[list[str], Record]:
        libraries = sorted({"torch", *(peer.library for peer in self._peers)})
        versions = {name: _version(name) for name in libraries}
        named = ", ".join(f"{name} {version}" for name, version in versions.items())
        cache = "cold" if self._cold else "warm"
        lines = [
            f"{self._device_name}; hogwild_ext {_C.__version__}, {named}",
            f"a copy reaches {self._copy_rate / 1e9:.0f} GB/s, bytes read and written both counted",
            f"µs: median of {self._rounds} calls, everybody in turn, with a {cache} L2 cache; "
            "±: half the distance between the quartiles",
            "GB/s counts keys and values once as each stores them, queries and outputs, and what "
            "ours writes and reads of partial results",
            "plans and page tables are made beforehand, except by concurrent_attention, which "
            "makes them in every call",
        ]
        if self._missing:
            lines.append(f"not installed, so not shown: {', '.join(self._missing)}")
        facts = {
            "measured": True, "device": self._device_name, "python": platform.python_version(),
            "versions": {"hogwild_ext": _C.__version__, **versions}, "missing": self._missing,
            "copy_bytes_per_second": self._copy_rate, "cold": self._cold, "rounds": self._rounds,
        }  # fmt: skip
        return lines, facts

    @torch.inference_mode()
    def records(self, cell: Cell) -> list[Record]:
        """One for each candidate that fits the cell; with an `error` and no time for a peer that
        raised something or computes something else. Raises RuntimeError if ours disagree."""
        inputs = Inputs.make(cell, self._device)
        ours, op = (peer.prepare(inputs) for peer in OURS)
        assert ours and op
        out = ours.run()
        expected = out.clone()
        candidates = {OURS[0].name: ours, OURS[1].name: op}
        if (graph := _captured(ours, self._timer)) is not None:
            candidates[f"{OURS[0].name}, CUDA graph"] = graph
        for name, candidate in candidates.items():
            out.zero_()  # a graph writes there too: what an earlier call left must not count
            if difference := _difference(candidate, expected, cell):
                raise RuntimeError(f"{name} {difference} from {OURS[0].name} in {cell}")
        own = set(candidates)
        errors: dict[str, str] = {}
        for peer in self._peers:
            try:
                if (prepared := peer.prepare(inputs)) is None:
                    continue
                if difference := _difference(prepared, expected, cell):
                    errors[peer.name] = difference
                else:
                    candidates[peer.name] = prepared
            except Exception as error:  # whatever a library does not like about a cell
                errors[peer.name] = " ".join(f"{type(error).__name__}: {error}".split())[:120]

        functions = {name: candidate.run for name, candidate in candidates.items()}
        timings = self._timer(functions, self._rounds)
        baseline = timings[OURS[0].name].median
        least = step_bytes(cell, step_tables(cell))
        records: list[Record] = []
        for name, timing in timings.items():
            partial = 2 * least.partial if name in own else 0
            moved = candidates[name].cache_bytes + least.operands + partial
            rate = moved / timing.median
            records.append({
                **_of_cell(cell), "what": name, "error": "", "bytes": moved,
                "seconds": timing.median, "spread": timing.spread,
                "bytes_per_second": rate, "part_of_copy": rate / self._copy_rate,
                "times_ours": timing.median / baseline,
            })  # fmt: skip
        return records + [
            {**_of_cell(cell), "what": name, "error": error} for name, error in errors.items()
        ]


def _captured(ours: Candidate, timer: Timer) -> Candidate | None:
    """`Step.attend` as a graph, which writes to the same tensor."""
    replay = timer.captured(ours.run)
    if replay is None:
        return None
    out = ours.run()

    def run() -> Tensor:
        replay()
        return out

    return Candidate(run, ours.cache_bytes, ours.packed)


def _difference(candidate: Candidate, expected: Tensor, cell: Cell) -> str:
    """ "differs by ..." if a candidate does something else than the cell asks for."""
    out = candidate.packed(candidate.run()).double()
    right = (expected if candidate.expected is None else candidate.expected).double()
    if out.shape != right.shape:
        return f"differs in shape: {list(out.shape)} instead of {list(right.shape)}"
    error = (out - right).norm(dim=(1, 2)) / right.norm(dim=(1, 2))  # of each token
    worst = float(error.max())
    return "" if worst <= TOLERANCE[cell.dtype] else f"differs by {worst:.2g}"


def _version(library: str) -> str:
    return str(getattr(importlib.import_module(library), "__version__", "?"))


# ---- modelled -----------------------------------------------------------------------------------


class Modelled:
    """Work counted from the tables, and the roofline model's time for it."""

    columns = (
        *_CELL_COLUMNS,
        Column("launches", _number("launches", form="d"), wide=True),
        Column("blocks", _number("blocks", form=",d")),
        Column("rows", _number("block_rows", form="d")),
        Column("tiles", _number("tiles", form=",d")),
        Column("MB in", _number("read_bytes", 1e-6)),
        Column("MB out", _number("written_bytes", 1e-6)),
        Column("partials", _number("partial_results", form=",d"), wide=True),
        Column("Msectors", _number("load_sectors", 1e-6, ".2f"), wide=True),
        Column("Mmma", _number("mma", 1e-6, ".2f"), wide=True),
        Column("waves", _number("waves", form="d"), wide=True),
        Column("µs", _number("seconds", 1e6)),
        Column("GB/s", _number("bytes_per_second", 1e-9, ".0f"), wide=True),
        Column("limit", lambda r: str(r["limit"]), is_text=True),
    )

    def __init__(self, gpu: str, reason: str) -> None:
        self._gpu = GPUS[gpu]
        self._reason = reason
        self.title = f"Model of {self._gpu.title}, not measured"

    def check(self, cell: Cell) -> None:
        check(cell)

    def about(self) -> tuple[list[str], Record]:
        gpu = self._gpu
        lines = [
            f"no time here was measured ({self._reason}): work is counted from the tables of the "
            f"step, time is a roofline model of {gpu.title}",
            f"{gpu.multiprocessors} multiprocessors at {gpu.clock / 1e9:.2f} GHz, "
            f"{gpu.bytes_per_second / 1e9:,.0f} GB/s, {gpu.tensor_flops / 1e12:,.0f} TFLOP/s; "
            f"{LAUNCH_SECONDS * 1e6:.1f} µs a launch; no latency, so a GPU can only be slower",
            "rows: of a block, of the attention kernel; tiles: of 64 keys and as many values, "
            "loads of all blocks; MB in and out: of all launches, from L2 or memory",
        ]
        return lines, {"measured": False, "reason": self._reason, "gpu": asdict(gpu)}

    def records(self, cell: Cell) -> list[Record]:
        work = count_layer(cell)
        model = estimate(work, self._gpu)
        loads, stores, mma = (
            sum(getattr(launch, name) for launch in work.launches)
            for name in ("load_sectors", "store_sectors", "mma")
        )
        return [{
            **_of_cell(cell), "launches": len(work.launches), "blocks": work.attention.blocks,
            "block_rows": 16 * work.kernel.row_tiles, "tiles": work.tiles,
            "partial_results": work.merged_slots, "load_sectors": loads,
            "store_sectors": stores, "read_bytes": loads * SECTOR, "written_bytes": stores * SECTOR,
            "mma": mma, "instructions": model.instructions, "waves": model.waves,
            "least_bytes": work.bytes.total, "seconds": model.seconds, "limit": model.limit,
            "bytes_per_second": work.bytes.total / model.seconds,
        }]  # fmt: skip
