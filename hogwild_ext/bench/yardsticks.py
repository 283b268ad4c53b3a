"""What times are held against: on a GPU a copy in its memory, on the CPU a measured roofline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from .. import _C
from .ceilings import Ceilings, Work
from .grid import Cell
from .peers import Candidate
from .report import Column, Record, number
from .timing import Function, Timer, Timing
from .work import step_bytes, step_tables

COPY_BYTES = 1 << 30
COPY_ROUNDS = 10


class Yardstick(Protocol):
    """Turns times into rates, and rates into parts of what the device can do."""

    columns: Sequence[Column]

    def about(self) -> tuple[list[str], Record]:
        """What `Report.about` gets."""

    def functions(self, cell: Cell) -> Mapping[str, Function]:
        """What is to be timed in turn with the candidates."""

    def figures(
        self, cell: Cell, candidate: Candidate, is_ours: bool, timing: Timing,
        timings: Mapping[str, Timing],
    ) -> Record:  # fmt: skip
        """Of a candidate; `timings` are those of `functions`."""


class CopyRate:
    """The rate of a copy in the device's memory, measured once."""

    columns: Sequence[Column] = (
        Column("GB/s", number("bytes_per_second", 1e-9, ".0f")),
        Column("of copy", number("part_of_copy", form=".0%")),
        Column("MB", number("bytes", 1e-6), wide=True),
    )

    def __init__(self, device: torch.device, timer: Timer, copy_bytes: int = COPY_BYTES) -> None:
        source = torch.zeros(copy_bytes, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copy = timer({"copy": lambda: target.copy_(source)}, COPY_ROUNDS)["copy"]
        self._rate = 2 * copy_bytes / copy.median  # bytes a second, read and written

    def about(self) -> tuple[list[str], Record]:
        lines = [
            f"a copy reaches {self._rate / 1e9:.0f} GB/s, bytes read and written both counted",
            "GB/s counts keys and values once as each stores them, queries and outputs, and what "
            "ours writes and reads of partial results",
        ]
        return lines, {"copy_bytes_per_second": self._rate}

    def functions(self, cell: Cell) -> Mapping[str, Function]:
        return {}

    def figures(
        self, cell: Cell, candidate: Candidate, is_ours: bool, timing: Timing,
        timings: Mapping[str, Timing],
    ) -> Record:  # fmt: skip
        least = step_bytes(cell, step_tables(cell))
        partial = 2 * least.partial if is_ours else 0
        moved = candidate.cache_bytes + least.operands + partial
        rate = moved / timing.median
        return {"bytes": moved, "bytes_per_second": rate, "part_of_copy": rate / self._rate}


class Roofline:
    """The time that a step takes at least at the rates measured beside it."""

    columns: Sequence[Column] = (
        Column("GB/s", number("bytes_per_second", 1e-9)),
        Column("GFMA/s", number("fmas_per_second", 1e-9, ".0f")),
        Column("roof", number("part_of_roofline", form=".0%")),
        Column("limit", lambda r: str(r.get("limit", "")), wide=True, is_text=True),
        Column("read GB/s", number("read_bytes_per_second", 1e-9), wide=True),
        Column("peak GFMA/s", number("peak_fmas_per_second", 1e-9, ".0f"), wide=True),
    )

    def __init__(self, ceilings: Ceilings) -> None:
        self._ceilings = ceilings

    def about(self) -> tuple[list[str], Record]:
        threads, isa = self._ceilings.threads, _C.isa()
        lines = [
            f"{threads} threads ({_C.thread_pool()}), {isa} kernels",
            "GB/s counts keys and values once as each stores them, GFMA/s 2 D multiply-adds for "
            "each query row and key that it sees",
            "roof: part of the roofline, the larger one of (keys and values seen, once) / (read "
            "bandwidth) and (multiply-adds) / (their peak), both measured in turn with the cell; "
            "above 100% where a cache holds what is read",
        ]
        return lines, {"threads": threads, "thread_pool": _C.thread_pool(), "isa": isa}

    def functions(self, cell: Cell) -> Mapping[str, Function]:
        return self._ceilings.functions(cell.dtype)

    def figures(
        self, cell: Cell, candidate: Candidate, is_ours: bool, timing: Timing,
        timings: Mapping[str, Timing],
    ) -> Record:  # fmt: skip
        work, rates = Work.of(cell), self._ceilings.rates(cell.dtype, timings)
        least = rates.least_seconds(work)
        return {
            "bytes": candidate.cache_bytes,
            "bytes_per_second": candidate.cache_bytes / timing.median,
            "fmas": work.fmas, "fmas_per_second": work.fmas / timing.median,
            "roofline_seconds": least, "part_of_roofline": least / timing.median,
            "limit": rates.limit(work), "read_bytes_per_second": rates.bytes_per_second,
            "peak_fmas_per_second": rates.fmas_per_second,
        }  # fmt: skip
