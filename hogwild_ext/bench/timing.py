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
    """Seconds of several calls, or what was computed from each of them."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a part of the median; 0 for one call."""
        if len(self.seconds) == 1 or not self.median:
            return 0.0
        low, median, high = statistics.quantiles(self.seconds, n=4)
        return abs((high - low) / 2 / median)

    def over(self, other: Timing) -> Timing:
        """How many times as long as `other`, call by call of the same rounds."""
        return Timing(tuple(a / b for a, b in zip(self.seconds, other.seconds, strict=True)))


class Timer(Protocol):
    """Times functions on one device."""

    def __call__(self, functions: Mapping[str, Function], rounds: int) -> dict[str, Timing]:
        """Calls the functions in turn, `rounds` times or until the timer has had enough, and once
        before anything is timed."""

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
        return {name: Timing(tuple(taken)) for name, taken in seconds.items()}

    def captured(self, function: Function) -> Function:
        with torch.cuda.device(self._device):
            function()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                function()
        return graph.replay


class ClockTimer:
    """Time on the clock, for devices that the caller waits for. Caches are as they are.

    `budget`: seconds after which no further round begins, if there were at least LEAST_ROUNDS.
    """

    LEAST_ROUNDS = 5

    def __init__(
        self, budget: float | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._budget = budget
        self._clock = clock

    def __call__(self, functions: Mapping[str, Function], rounds: int) -> dict[str, Timing]:
        for function in functions.values():
            function()
        clock = self._clock
        seconds: dict[str, list[float]] = {name: [] for name in functions}
        began = clock()
        for done in range(rounds):
            enough = self._budget is not None and clock() - began > self._budget
            if enough and done >= self.LEAST_ROUNDS:
                break
            for name, function in functions.items():
                start = clock()
                function()
                seconds[name].append(clock() - start)
        return {name: Timing(tuple(taken)) for name, taken in seconds.items()}

    def captured(self, function: Function) -> None:
        return None
