"""Faults of csrc/cuda/types.cuh."""

from __future__ import annotations

from ..fault import Fault

FAULTS = [
    # Softmax and sums
    Fault(
        "float16: sums of probabilities before they are rounded",
        "csrc/cuda/types.cuh",
        "static constexpr bool SUMS_ROUNDED = true;",
        "static constexpr bool SUMS_ROUNDED = false;",
    ),
    Fault(
        "bfloat16: sums of rounded probabilities",
        "csrc/cuda/types.cuh",
        "static constexpr bool SUMS_ROUNDED = false;",
        "static constexpr bool SUMS_ROUNDED = true;",
        compiled="attention_bf16.cu",
    ),
    Fault(
        "lse to base 2",
        "csrc/cuda/types.cuh",
        "(max + (log2f(sum) - T::SUM_BIAS)) * LN_2",
        "(max + (log2f(sum) - T::SUM_BIAS))",
    ),
    # Partial results
    Fault(
        "the merge folds partial results that saw nothing",
        "csrc/cuda/types.cuh",
        "if (sum_b == 0.f) return {Fold::Keep, 1.f, 0.f};",
        "",
        compiled="launch.cu",
    ),
    Fault(
        "float32: the weights of a fold are swapped",
        "csrc/cuda/types.cuh",
        ": __fmaf_rn(a, w.kept, __fmul_rn(b, w.added));",
        ": __fmaf_rn(a, w.added, __fmul_rn(b, w.kept));",
        compiled="attention_f32.cu",
    ),
    Fault(
        "the merge swaps the weights of a fold",
        "csrc/cuda/types.cuh",
        ": __fmaf_rn(a, w.kept, __fmul_rn(b, w.added));",
        ": __fmaf_rn(a, w.added, __fmul_rn(b, w.kept));",
        compiled="launch.cu",
    ),
    Fault(
        "a fold's sum forgets the smaller maximum",
        "csrc/cuda/types.cuh",
        "sum_a = __fmaf_rn(sum_a, w.kept, __fmul_rn(sum_b, w.added));",
        "sum_a = __fmaf_rn(sum_a, w.kept, sum_b);",
    ),
]
