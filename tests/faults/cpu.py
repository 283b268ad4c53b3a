"""Faults of the CPU's kernels, of the plan, and of the fuzzer's own kind of find."""

from __future__ import annotations

from .fault import Fault

NONFINITE = ("test_op_nonfinite.py", "test_kernel_details.py", "test_cache.py")

FAULTS: list[Fault] = [
    Fault(
        "the half word behind an odd last value is not masked",
        "csrc/cpu/attend.h",
        "store(to + d, load<vuint>(from + d) & splat(0xffffu));",
        "store(to + d, load<vuint>(from + d));",
    ),
    Fault(
        "values of chunks that a row of a shared tile does not see are not zeroed",
        "csrc/cpu/attend.h",
        "const int keys = seen >> c & 1 ? chunk.end : 0;",
        "const int keys = chunk.end;",
    ),
    Fault(
        "rows of a value that all lie in one place are read in place",
        "csrc/cpu/attend.h",
        "if (padded_dim == heads.value_dim && stride != 0)",
        "if (padded_dim == heads.value_dim)",
    ),
]
