"""Faults of csrc/cuda/item.cuh."""

from __future__ import annotations

from ..fault import Fault

FAULTS = [
    # What a row sees
    Fault(
        "a window one key too wide",
        "csrc/cuda/item.cuh",
        "place - header.window + 1",
        "place - header.window",
    ),
    Fault(
        "a key past the chunk's end is seen",
        "csrc/cuda/item.cuh",
        "min(place, int64_t(pass.end) - 1)",
        "min(place, int64_t(pass.end))",
    ),
    Fault(
        "positions in 32 bits",
        "csrc/cuda/item.cuh",
        "const int64_t place = int64_t(offset) + row.token;",
        "const int64_t place = int32_t(uint32_t(offset) + row.token);",
    ),
    Fault(
        "every worker sees what the first one sees",
        "csrc/cuda/item.cuh",
        "[row.worker * header.num_segments + pass.segment]",
        "[pass.segment]",
    ),
    # Rotation
    Fault(
        "angles are subtracted",
        "csrc/cuda/item.cuh",
        "__fmaf_rn(cos_a, cos_b, -__fmul_rn(sin_a, sin_b))",
        "__fmaf_rn(cos_a, cos_b, __fmul_rn(sin_a, sin_b))",
    ),
    Fault(
        "rope_scale on dimensions that do not rotate",
        "csrc/cuda/item.cuh",
        "return x * p.query_factor;",
        "return x * (p.query_factor * p.rope_scale);",
    ),
]
