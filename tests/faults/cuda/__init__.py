"""Faults of the CUDA kernels, a list for each file, seen by tests on the emulated GPU."""

from __future__ import annotations

from ..fault import Fault
from . import attention, attention_f32, item, launch, ptx, small, tables, types

FAULTS: list[Fault] = [
    *attention.FAULTS,
    *attention_f32.FAULTS,
    *item.FAULTS,
    *types.FAULTS,
    *ptx.FAULTS,
    *launch.FAULTS,
    *tables.FAULTS,
    *small.FAULTS,
]
