"""What a step costs at least on the CPU: its work, beside rates that the same process reaches.

The rates are those of passes that do nothing else (csrc/cpu/ceilings.h): reading memory with all
threads, and multiply-adds in registers with the instructions of the kernels in use. A timer takes
them in turn with what is measured, since the rates of a machine drift.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .. import _C, checks
from ..cpu_backend import CPU
from .grid import Cell
from .timing import ClockTimer, Function, Timing

READ, MULTIPLY_ADD = "read", "multiply-add"  # names of the passes
BUFFER_BYTES = 1 << 30  # a server's last cache can have half of it
PASS_BYTES = 1 << 26
PASS_SECONDS = 1e-2  # of multiply-adds; waking the threads costs little beside it


@dataclass(frozen=True)
class Work:
    """What one layer of a step has to do."""

    bytes: int  # each key and value that anybody sees, once
    fmas: int  # 2 D for each pair of a query row and a key that it sees

    @staticmethod
    def of(cell: Cell) -> Work:
        """Raises ValueError for a cell whose context is too short."""
        layout, heads = cell.layout(), cell.heads
        size = getattr(torch, cell.dtype).itemsize
        return Work(
            2 * layout.seen_tokens() * heads.kv_heads * heads.head_dim * size,
            2 * layout.visible_pairs() * heads.num_heads * heads.head_dim,
        )


@dataclass(frozen=True)
class Rates:
    """What the machine reaches."""

    bytes_per_second: float
    fmas_per_second: float
    read_spread: float = 0.0
    multiply_spread: float = 0.0

    def least_seconds(self, work: Work) -> float:
        """The roofline: reading and multiplying at the same time, each as fast as it goes."""
        return max(work.bytes / self.bytes_per_second, work.fmas / self.fmas_per_second)

    def limit(self, work: Work) -> str:
        reading = work.bytes / self.bytes_per_second
        return "memory" if reading >= work.fmas / self.fmas_per_second else "arithmetic"

    def spread(self, work: Work) -> float:
        """Of the rate that is the limit."""
        return self.read_spread if self.limit(work) == "memory" else self.multiply_spread


class Ceilings:
    """Passes over memory and registers, with as many threads as torch uses now."""

    def __init__(self, buffer_bytes: int = BUFFER_BYTES, pass_bytes: int = PASS_BYTES) -> None:
        self.threads = torch.get_num_threads()
        self._pass_bytes = min(pass_bytes, buffer_bytes)
        # As a cache's memory is; written, so that every page is one of its own.
        self._buffer = CPU.reserve((buffer_bytes,), torch.uint8).fill_(1)
        self._next = 0
        self._fmas: dict[str, int] = {}  # of a pass, by dtype

    def functions(self, dtype: str) -> dict[str, Function]:
        """The passes, to be timed together with what they are to be compared with."""
        code = checks.DTYPE_CODES[getattr(torch, dtype)]
        iterations = self._iterations(code)
        self._fmas[dtype] = _C.fma_pass(code, iterations, self.threads)
        return {
            READ: self._read,
            MULTIPLY_ADD: lambda: _C.fma_pass(code, iterations, self.threads),
        }

    def rates(self, dtype: str, timings: Mapping[str, Timing]) -> Rates:
        """From the times of `functions(dtype)`."""
        read, multiply = timings[READ], timings[MULTIPLY_ADD]
        return Rates(
            self._pass_bytes / read.median,
            self._fmas[dtype] / multiply.median,
            read.spread,
            multiply.spread,
        )

    def _read(self) -> None:
        # The next part of the buffer each time, so that it comes from memory and not from a cache.
        if self._next + self._pass_bytes > self._buffer.numel():
            self._next = 0
        address = self._buffer.data_ptr() + self._next
        _C.read_bandwidth_pass(address, self._pass_bytes, self.threads)
        self._next += self._pass_bytes

    def _iterations(self, code: int) -> int:
        """As many as all threads together take about PASS_SECONDS for."""
        iterations = 1000
        while True:
            taken = min(self._alone(code, iterations) for _ in range(5))
            if taken > PASS_SECONDS / 16:
                return max(1, int(iterations * self.threads * PASS_SECONDS / taken))
            iterations *= 2

    @staticmethod
    def _alone(code: int, iterations: int) -> float:
        """Seconds that one thread takes; no other one can keep it waiting."""
        start = time.perf_counter()
        _C.fma_pass(code, iterations, 1)
        return time.perf_counter() - start


def measure(dtype: str, rounds: int = 15) -> Rates:
    """The rates at this moment."""
    ceilings = Ceilings()
    return ceilings.rates(dtype, ClockTimer()(ceilings.functions(dtype), rounds))
