"""What this machine can do at most: how fast it reads memory, how fast it multiplies."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

READ_BYTES = 1 << 28
MATRIX = 1024
ROUNDS = 5


@dataclass(frozen=True)
class Ceilings:
    """The limits of torch's threads together."""

    bytes_per_second: float  # read from memory
    fma_per_second: float  # fused multiply-adds


def measure(dtype: torch.dtype) -> Ceilings:
    """Measures both; takes about a second."""
    memory = torch.zeros(READ_BYTES // 4)
    # Half precision can be computed in float32 too, and has to where there is nothing faster.
    product = min(_product_seconds(each) for each in {dtype, torch.float32})
    return Ceilings(READ_BYTES / _fastest(lambda: memory.sum()), MATRIX**3 / product)


def _product_seconds(dtype: torch.dtype) -> float:
    a, b = (torch.randn(MATRIX, MATRIX).to(dtype) for _ in range(2))
    return _fastest(lambda: a @ b)


def _fastest(function: Callable[[], object]) -> float:
    function()
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
