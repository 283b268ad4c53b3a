"""Which tests see a fault in a file of the package or of the CPU's kernels, the quickest first."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from .fault import TESTS

KERNELS = (
    "test_zero_strides.py",
    "test_op_unseen_values.py",
    "test_op_numbers.py",
    "test_op_bits.py",
    "test_op_nonfinite.py",
    "test_kernel_details.py",
    "test_op_oracle.py",
    "test_cache.py",
)

# Globs of test files, of which there need not be any; a file that no glob names but that imports
# the module comes behind.
SELECTIONS: dict[str, tuple[str, ...]] = {
    "csrc/cpu/attend.h": KERNELS,
    "csrc/cpu/multiply.h": KERNELS,
    "csrc/cpu/vec.h": (*KERNELS, "test_packed_linear.py"),
    "csrc/cpu/pages.h": ("test_cache.py",),
    "csrc/cpu/angles.h": ("test_op_numbers.py", "test_op_oracle.py", "test_op_bits.py"),
    "csrc/cpu/linear.h": ("test_packed_linear.py",),
    "csrc/cpu/kernels.cpp": (*KERNELS, "test_packed_linear.py"),
    "csrc/cpu/backend.cpp": ("test_op_bits.py", "test_cache.py", "test_kernel_details.py",
                             "test_installation.py"),
    "csrc/cpu/parallel.cpp": ("test_op_bits.py", "test_installation.py"),
    "csrc/plan.cpp": ("test_plan.py", *KERNELS),
    "answers": ("test_answers*.py", "test_engine.py", "test_conclusions.py"),
    "backends": ("test_installation.py", "test_errors.py", "test_op_registration.py"),
    "cache": ("test_cache*.py",),
    "changes": ("test_interrupt*.py", "test_cache*.py"),
    "chat_format": ("test_chat*.py", "test_prompts.py"),
    "checks": ("test_errors.py", "test_tensor*.py", "test_cache.py", "test_op_registration.py"),
    "cli": ("test_cli*.py",),
    "cpu_backend": ("test_cache.py", "test_op_bits.py"),
    "default_model": ("test_default_model*.py",),
    "engine": ("test_engine*.py", "test_conclusions.py", "test_trace.py"),
    "events": ("test_engine*.py", "test_cli.py", "test_trace.py"),
    "installation": ("test_installation.py", "test_cli.py"),
    "layouts": ("test_layouts.py", "test_engine.py"),
    "live": ("test_live*.py", "test_cli.py"),
    "model_support": ("test_models*.py", "test_patching.py"),
    "ops": ("test_errors.py", "test_op_registration.py", "test_op_bits.py", "test_plan.py"),
    "packed_linear": ("test_packed*.py",),
    "pages": ("test_cache.py",),
    "patching": ("test_patching*.py", "test_interrupt*.py", "test_model_kinds.py",
                 "test_models.py"),
    "prompts": ("test_prompts*.py", "test_paragraph*.py", "test_conclusions.py", "test_engine.py"),
    "run": ("test_run*.py", "test_answers.py", "test_sampling.py", "test_engine.py",
            "test_conclusions.py", "test_trace.py", "test_baselines.py"),
    "sampling": ("test_sampling*.py", "test_engine.py", "test_conclusions.py"),
    "step": ("test_cache.py", "test_errors.py"),
    "text_decoder": ("test_answers.py", "test_text*.py", "test_engine.py", "test_conclusions.py"),
    "token_log": ("test_cache.py", "test_token_log.py"),
    "trace": ("test_trace*.py",),
    "trace_lines": ("test_trace*.py",),
    "viewer": ("test_viewer.py",),
}  # fmt: skip

NEVER = {  # of themselves, of builds, of benchmarks
    "test_faults.py", "test_fuzz.py", "test_readme.py", "test_build.py", "test_sanitize.py",
    "test_bench.py", "test_bench_generate.py",
}  # fmt: skip


@cache
def tests_of(file: str) -> tuple[str, ...]:
    """Names of test files for a file named from the root."""
    module = Path(file).stem if file.startswith("hogwild_ext/") else file
    found = [path.name for glob in SELECTIONS.get(module, ()) for path in sorted(TESTS.glob(glob))]
    if file.startswith("hogwild_ext/"):
        imports = re.compile(rf"hogwild_ext\.{module}\b|from hogwild_ext import .*\b{module}\b")
        found += [
            path.name
            for path in sorted(TESTS.glob("test_*.py"))
            if imports.search(path.read_text())
        ]
    names = tuple(name for name in dict.fromkeys(found) if name not in NEVER)
    return names or ("test_cache.py", "test_engine.py")
