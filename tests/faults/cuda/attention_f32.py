"""Faults of csrc/cuda/attention_f32.cuh."""

from __future__ import annotations

from ..fault import Fault

FAULTS = [
    # Barriers, copies in the background
    Fault(
        "float32: no barrier after the wait for a tile",
        "csrc/cuda/attention_f32.cuh",
        "wait_copies<0>();\n    __syncthreads();",
        "wait_copies<0>();",
    ),
    Fault(
        "float32: no wait for a tile",
        "csrc/cuda/attention_f32.cuh",
        "wait_copies<0>();\n    __syncthreads();",
        "__syncthreads();",
    ),
    Fault(
        "float32: no barrier between writing maxima and reading them",
        "csrc/cuda/attention_f32.cuh",
        "= top;\n    }\n    __syncthreads();",
        "= top;\n    }",
    ),
    Fault(
        "float32: no barrier between loading rows and reading them",
        "csrc/cuda/attention_f32.cuh",
        "from[r], head);\n    __syncthreads();",
        "from[r], head);",
    ),
    Fault(
        "float32: no barrier between accumulating and loading keys over the values",
        "csrc/cuda/attention_f32.cuh",
        "accumulate(key);\n      __syncthreads();",
        "accumulate(key);",
    ),
    Fault(
        "float32: no barrier between writing sums and reading them",
        "csrc/cuda/attention_f32.cuh",
        "totals[row] = row_max[i] * scale;\n    }\n    __syncthreads();",
        "totals[row] = row_max[i] * scale;\n    }",
    ),
    # Tiles and where their elements lie
    Fault(
        "float32: rows past a segment's end are copied too",
        "csrc/cuda/attention_f32.cuh",
        "const bool there = r < present;",
        "const bool there = true;",
    ),
    Fault(
        "float32: 16 bytes at once whatever the stride",
        "csrc/cuda/attention_f32.cuh",
        "((reinterpret_cast<uintptr_t>(base) | (stride * 4)) & 15) == 0",
        "(reinterpret_cast<uintptr_t>(base) & 15) == 0",
    ),
    # What a row sees
    Fault(
        "float32: the last key that is seen is masked",
        "csrc/cuda/attention_f32.cuh",
        "key + l > seen.high",
        "key + l >= seen.high",
    ),
    Fault(
        "float32: softcap of masked scores",
        "csrc/cuda/attention_f32.cuh",
        "score[i] = -INFINITE;",
        "score[i] = params.softcap != 0.f ? cap_score(params, -INFINITE) : -INFINITE;",
    ),
    Fault(
        "float32: the last tile before 2^31 is behind everybody",
        "csrc/cuda/attention_f32.cuh",
        "seen.low - TILE < key",
        "seen.low < int32_t(uint32_t(key) + TILE)",
    ),
    Fault(
        "float32: 0 times a value reaches rows that see no key of the tile",
        "csrc/cuda/attention_f32.cuh",
        "sees[i] = seen.low - TILE < key && seen.high >= key;",
        "sees[i] = seen.any();",
    ),
    # Rotation
    Fault(
        "float32: queries are rotated for the first segment only",
        "csrc/cuda/attention_f32.cuh",
        "if (pass.segment != segment)",
        "if (segment < 0)",
    ),
    # Softmax and sums
    Fault(
        "float32: rows that have seen nothing yet subtract an infinite maximum",
        "csrc/cuda/attention_f32.cuh",
        "row_max[i] = -FLT_MAX;",
        "row_max[i] = -INFINITE;",
    ),
    Fault(
        "float32: outputs do not shrink when the maximum rises",
        "csrc/cuda/attention_f32.cuh",
        "out[i][e] *= shrink;",
        "out[i][e] *= 1.f;",
    ),
    # Partial results
    Fault(
        "float32: a block takes one item only",
        "csrc/cuda/attention_f32.cuh",
        "i < work; i += gridDim.x",
        "i < work; i += work",
    ),
]
