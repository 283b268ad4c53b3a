"""Faults that mutate.py drew: those that a new test had to be written for, and those that change
nothing, with the reason."""

from __future__ import annotations

from .fault import Fault

FAULTS: list[Fault] = []

# (file, what the changed lines become) -> why no test can see it.
CHANGES_NOTHING: dict[tuple[str, str], str] = {
    (
        "csrc/cpu/backend.cpp",
        '            __builtin_cpu_supports("avx512dq");',
    ): "every CPU that has AVX-512 DQ and BW has VL",
}
