"""Where the time of a step goes, by watches around its parts. They slow it down a little, so what
they see is told as parts of the whole, and the step's time is taken without them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from .. import cpu_backend
from .streams import Workers, choose

PARTS = ("linear", "attention", "append", "plan", "sampling", "rest")


def measure_parts(workers: Workers, rounds: int) -> dict[str, float]:
    """Seconds of each of `PARTS`, medians over so many steps. "rest" is Python, norms, activations
    and everything else; "plan" is the C++ planner."""
    watch = _Watch()
    taken: dict[str, list[float]] = {name: [] for name in PARTS}
    with _watched(workers.model, watch):
        for _ in range(rounds):
            watch.seconds.clear()
            start = time.perf_counter()
            logits = workers.logits()
            chosen = time.perf_counter()
            choose(workers, logits)
            end = time.perf_counter()
            known = {**watch.seconds, "sampling": end - chosen}
            known["rest"] = end - start - sum(known.values())
            for name in PARTS:
                taken[name].append(known.get(name, 0.0))
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


class _Watch:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                taken = time.perf_counter() - start
                self.seconds[part] = self.seconds.get(part, 0.0) + taken

        return timed


class _WatchedKernels:
    """The compiled module as the CPU's backend sees it, with watches around three functions."""

    def __init__(self, compiled: Any, watch: _Watch) -> None:
        self._compiled = compiled
        self.append = watch.around("append", compiled.append)
        self.attend_paged = watch.around("attention", compiled.attend_paged)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled, name)


@contextmanager
def _watched(model: nn.Module, watch: _Watch) -> Iterator[None]:
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                timed = watch.around("linear", module.forward)
                stack.enter_context(_replaced(module, "forward", timed))
        kernels = _WatchedKernels(cpu_backend._C, watch)
        stack.enter_context(_replaced(cpu_backend, "_C", kernels))
        plan = watch.around("plan", cpu_backend.CPU.plan_step)
        stack.enter_context(_replaced(cpu_backend.CPU, "plan_step", plan))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of the object itself, put back or taken away at the end."""
    own = vars(owner)
    had, before = name in own, own.get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
