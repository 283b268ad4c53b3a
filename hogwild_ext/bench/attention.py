"""`hogwild bench attention`: one layer's attention over a grid of steps.

Every cell is computed by ours and by its peers, compared, then timed in turns. For a GPU that is
not there the work is counted from the tables of the step and a roofline model says what it would
cost.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import _C
from .ceilings import Ceilings
from .grid import Cell
from .inputs import Inputs
from .peers import CPU_PEERS, GPU_PEERS, OURS, Candidate, Peer
from .report import Column, Record, Report, Table, number, short_count
from .roofline import GPUS, LAUNCH_SECONDS, estimate
from .timing import ClockTimer, CudaTimer, Timer
from .work import SECTOR, check, count_layer
from .yardsticks import CopyRate, Roofline, Yardstick

ROUNDS = 30
CPU_CELL_SECONDS = 3.0  # of rounds, if there are enough of them by then
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


def _of_cell(cell: Cell) -> dict[str, Any]:
    return {**asdict(cell), "heads": str(cell.heads), "model": cell.heads.model}


def _microseconds(record: Record) -> str:
    if "seconds" not in record:
        return ""
    value = record["seconds"] * 1e6
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


_CELL_COLUMNS = (
    Column("segs", lambda r: str(r["segments"]), is_text=True),
    Column("ctx", lambda r: short_count(r["context"])),
    Column("W", number("workers", form="d")),
)


# ---- measured -----------------------------------------------------------------------------------


class Measured:
    """Candidates compared and timed on a device."""

    title = "Measured"

    def __init__(
        self,
        device: torch.device,
        device_name: str,
        timer: Timer,
        yardstick: Yardstick,
        caches: str,
        peers: Sequence[Peer],
        rounds: int = ROUNDS,
    ) -> None:
        """`caches`: words for the state in which a call finds the device's caches."""
        self._device = device
        self._device_name = device_name
        self._timer = timer
        self._yardstick = yardstick
        self._caches = caches
        reasons = {peer.name: peer.why_not() for peer in peers}
        self._peers = [peer for peer in peers if not reasons[peer.name]]
        self._missing = {name: reason for name, reason in reasons.items() if reason}
        self._rounds = rounds
        self.columns: Sequence[Column] = (
            *_CELL_COLUMNS,
            Column(
                "what", lambda r: ": ".join(filter(None, (r["what"], r["error"]))), is_text=True
            ),
            Column("µs", _microseconds),
            Column("±", number("spread", form=".0%")),
            *yardstick.columns,
            Column("ratio", number("times_ours", form=".2f")),
        )

    def check(self, cell: Cell) -> None:
        cell.layout()

    def about(self) -> tuple[list[str], Record]:
        libraries = sorted({"torch", *(peer.library for peer in self._peers)})
        versions = {name: _version(name) for name in libraries}
        named = ", ".join(f"{name} {version}" for name, version in versions.items())
        measure_lines, measure_facts = self._yardstick.about()
        lines = [
            f"{self._device_name}; hogwild_ext {_C.__version__}, {named}",
            f"µs: median of up to {self._rounds} calls, everybody in turn, {self._caches}; "
            "±: half the distance between the quartiles; ratio: times as long as step.attend",
            *measure_lines,
            "plans and page tables are made beforehand, except by concurrent_attention, which "
            "makes them in every call",
        ]
        lines += [f"not shown: {name} ({reason})" for name, reason in self._missing.items()]
        facts = {
            "measured": True, "device": self._device_name, "python": platform.python_version(),
            "versions": {"hogwild_ext": _C.__version__, **versions}, "missing": self._missing,
            "caches": self._caches, "rounds": self._rounds, **measure_facts,
        }  # fmt: skip
        return lines, facts

    @torch.inference_mode()
    def records(self, cell: Cell) -> list[Record]:
        """One for each candidate that fits the cell; with an `error` and no time for a peer that
        raised something or computes something else. Raises RuntimeError if ours disagree."""
        gc.collect()  # a step and its cache know each other; with the tensors of the cell before
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
        timings = self._timer({**self._yardstick.functions(cell), **functions}, self._rounds)
        baseline = timings[OURS[0].name]
        records: list[Record] = []
        for name, candidate in candidates.items():
            timing = timings[name]
            ratio = timing.over(baseline)
            records.append({
                **_of_cell(cell), "what": name, "error": "", "is_ours": name in own,
                "seconds": timing.median, "spread": timing.spread, "calls": len(timing.seconds),
                **self._yardstick.figures(cell, candidate, name in own, timing, timings),
                "times_ours": ratio.median, "ratio_spread": ratio.spread,
            })  # fmt: skip
        return records + [
            {**_of_cell(cell), "what": name, "error": error} for name, error in errors.items()
        ]


def on_gpu(device: str, cold: bool) -> Measured:
    """On a GPU, before each call of which the L2 cache is written over if `cold`."""
    cuda = torch.device(device)
    timer = CudaTimer(cuda, cold)
    caches = f"with a {'cold' if cold else 'warm'} L2 cache"
    name = torch.cuda.get_device_name(cuda)
    return Measured(cuda, name, timer, CopyRate(cuda, timer), caches, GPU_PEERS)


def on_cpu(
    peers: Sequence[Peer] = CPU_PEERS,
    ceilings: Ceilings | None = None,
    seconds: float = CPU_CELL_SECONDS,
) -> Measured:
    """On the CPU, with the threads that torch has; about so many seconds a cell."""
    return Measured(
        torch.device("cpu"),
        cpu_name(),
        ClockTimer(seconds),
        Roofline(ceilings or Ceilings()),
        "with other data read in between",
        peers,
    )


def cpu_name() -> str:
    """What the CPU calls itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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

    columns: Sequence[Column] = (
        *_CELL_COLUMNS,
        Column("launches", number("launches", form="d"), wide=True),
        Column("blocks", number("blocks", form=",d")),
        Column("rows", number("block_rows", form="d")),
        Column("tiles", number("tiles", form=",d")),
        Column("MB in", number("read_bytes", 1e-6)),
        Column("MB out", number("written_bytes", 1e-6)),
        Column("partials", number("partial_results", form=",d"), wide=True),
        Column("Msectors", number("load_sectors", 1e-6, ".2f"), wide=True),
        Column("Mmma", number("mma", 1e-6, ".2f"), wide=True),
        Column("waves", number("waves", form="d"), wide=True),
        Column("µs", number("seconds", 1e6)),
        Column("GB/s", number("bytes_per_second", 1e-9, ".0f"), wide=True),
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
