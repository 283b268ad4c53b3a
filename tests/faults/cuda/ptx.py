"""Faults of csrc/cuda/ptx.cuh."""

from __future__ import annotations

from ..fault import Fault

FAULTS = [
    Fault(
        "values are not transposed",
        "csrc/cuda/ptx.cuh",
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16",
    ),
    Fault(
        "96 dimensions: the last tile of values is not transposed",
        "csrc/cuda/ptx.cuh",
        "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16",
        "ldmatrix.sync.aligned.m8n8.x2.shared.b16",
    ),
]
