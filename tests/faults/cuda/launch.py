"""Faults of csrc/cuda/launch.cu."""

from __future__ import annotations

from ..fault import Fault

FAULTS = [
    # Tiles and where their elements lie
    Fault(
        "a query at multiples of 4 bytes counts as aligned to 8",
        "csrc/cuda/launch.cu",
        "is_multiple(args.query, 4, 8)",
        "is_multiple(args.query, 2, 4)",
    ),
    Fault(
        "an output at any address counts as aligned to 4",
        "csrc/cuda/launch.cu",
        "is_multiple(args.out, 2, 4)",
        "is_multiple(args.out, 1, 2)",
    ),
    # Softmax and sums
    Fault(
        "float16: queries are not halved",
        "csrc/cuda/launch.cu",
        "args.heads.dtype == DType::Float16 ? Float16::QUERY_FACTOR : BFloat16::QUERY_FACTOR",
        "BFloat16::QUERY_FACTOR",
    ),
    Fault(
        "a negative scale counts as positive",
        "csrc/cuda/launch.cu",
        "std::copysign(query_factor, args.scoring.scale)",
        "query_factor",
    ),
    Fault(
        "a scale of 0 makes nan of masked scores",
        "csrc/cuda/launch.cu",
        "if (args.scoring.scale == 0.f) {",
        "if (false) {",
    ),
]
