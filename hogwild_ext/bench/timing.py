"""How long functions take: on a GPU between events of its stream, elsewhere on the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Function = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Seconds of several calls."""

    median: float
    spread: float  # half the distance between the quartiles, as a part of the median

    @staticmethod
    def of(seconds: list[float]) -> Timing:
        low, median, high = statistics.quantiles(seconds, n=4)
        return Timing(median, (high - low) / 2 / median if median else 0.0)


class Timer(Protocol):
    """Times functions on one device."""

    def __call__(self, functions: Mapping[str, Function], rounds: int) -> dict[str, Timing]:
        """Calls the functions in turn, round after round, once before anything is timed."""

    def captured(self, function: Function) -> Function | None:
        """The function as a graph to be replayed, if the device has such a thing."""


class CudaTimer:
    """GPU time between two events. `cold`: before each call something larger than the L2 cache is
    written, which also keeps the GPU busy while the call is being launched."""

    def __init__(self, device: torch.device, cold: bool) -> None:
        self._device = device
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        size = max(4 * cache, 1 << 28)
        self._flush = torch.empty(size, dtype=torch.uint8, device=device) if cold else None

    def __call__(self, functions: Mapping[str, Function], rounds: int) -> dict[str, Timing]:
        seconds: dict[str, list[float]] = {name: [] for name in functions}
        with torch.cuda.device(self._device):
            for function in functions.values():
                function()
            for _ in range(rounds):
                events = {}
                for name, function in functions.items():
                    if self._flush is not None:
                        self._flush.zero_()
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    start.record()
                    function()
                    end.record()
                    events[name] = start, end
                torch.cuda.synchronize()
                for name, (start, end) in events.items():
                    seconds[name].append(start.elapsed_time(end) / 1e3)
        return {name: Timing.of(taken) for name, taken in seconds.items()}

    def captured(self, function: Function) -> Function:
        with torch.cuda.device(self._device):
            function()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                function()
        return graph.replay


class ClockTimer:
    """Time on the clock, for devices that the caller waits for. Caches are as they are."""

    def __call__(self, functions: Mapping[str, Function], rounds: int) -> dict[str, Timing]:
        for function in functions.values():
            function()
        seconds: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(rounds):
            for name, function in functions.items():
                start = time.perf_counter()
                function()
                seconds[name].append(time.perf_counter() - start)
        return {name: Timing.of(taken) for name, taken in seconds.items()}

    def captured(self, function: Function) -> None:
        return None
