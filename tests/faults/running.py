"""Runs tests on code with a fault in it: on an emulated GPU, on CPU kernels built anew, or on a
changed module of the package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from emulator.build import BuildError, cache_folder

from . import native
from .fault import ROOT, TESTS, Fault, Outcome, StaleFault, planted
from .selections import tests_of

SECONDS = 900  # for the tests of one fault, on however busy a machine

COMPILED = {
    "attention.cuh": "attention_f16.cu",
    "attention_f32.cuh": "attention_f32.cu",
    "item.cuh": "attention_f16.cu",
    "ptx.cuh": "attention_f16.cu",
    "types.cuh": "attention_f16.cu",
    "small.cuh": "launch.cu",
    "launch.cu": "launch.cu",
}


def try_fault(fault: Fault) -> Outcome:
    """The tests' verdict on a copy of the sources with the fault in it."""
    try:
        _, line = planted(fault)
        if fault.file.startswith("csrc/cuda/"):
            outcome = _on_emulated_gpu(fault)
        elif fault.file.startswith("csrc/"):
            outcome = _on_cpu_kernels(fault)
        else:
            outcome = _on_package(fault)
    except (StaleFault, BuildError) as error:
        return Outcome("broken", str(error))
    return replace(outcome, words=f"{fault.file}:{line}: {outcome.words}")


def run_pytest(
    tests: Sequence[str], environment: Mapping[str, str], seconds: int = SECONDS
) -> Outcome:
    """Up to the first test that fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    variables = {
        **os.environ,
        "HOGWILD_TEST_SEED": "1",
        "COLUMNS": "1000",  # where pytest cuts off the lines of its summary
        **environment,
    }
    try:
        done = subprocess.run(
            [*command, "-p", "faults.plugin", *tests], cwd=TESTS, env=variables,
            capture_output=True, text=True, errors="replace", timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Outcome("failed", f"no end after {seconds} s")
    if done.returncode < 0:
        return Outcome("failed", f"the process died of signal {-done.returncode}")
    if done.returncode == pytest.ExitCode.OK:
        return Outcome("passed", done.stdout.strip().splitlines()[-1])
    test = re.search(r"^(?:FAILED|ERROR) (\S+)(?: - (.*))?$", done.stdout, re.M)
    if not test or done.returncode not in (
        pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED
    ):  # fmt: skip
        return Outcome("broken", f"the tests did not run\n{done.stdout}{done.stderr}")
    finding = re.search(r"SanitizerError: (.*?) \(PTX", done.stdout)
    words = f"sanitizer: {finding[1]}" if finding else (test[2] or "no message")
    return Outcome("failed", f"{test[1]}: {words}")


# ---- CUDA kernels, on an emulated GPU ------------------------------------------------------------


@contextmanager
def passing_cache() -> Iterator[Path]:
    """A cache of builds that knows what is built already, and takes what is built of faults with
    it when it goes."""
    with tempfile.TemporaryDirectory() as folder:
        for built in cache_folder().iterdir():
            if built.is_dir():
                (Path(folder) / built.name).symlink_to(built)
        yield Path(folder)


def run_emulated(tests: Sequence[str], csrc: Path) -> Outcome:
    """The tests on an emulated GPU built from `csrc`."""
    with passing_cache() as cache:
        return run_pytest(
            tests,
            {
                "HOGWILD_EMULATE": "1",
                "HOGWILD_EMULATE_CSRC": str(csrc),
                "HOGWILD_EMULATOR_CACHE": str(cache),
            },
        )


def _on_emulated_gpu(fault: Fault) -> Outcome:
    from .cuda.tests import OP, PAGES

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "csrc"
        shutil.copytree(ROOT / "csrc", copy)
        file = Path(fault.file)
        (Path(folder) / file).write_text(planted(fault)[0])
        for unit in copy.glob("cuda/*.cu"):
            if unit.name != (fault.compiled or COMPILED.get(file.name)):
                unit.write_text(f'#include "{ROOT / "csrc/cuda" / unit.name}"\n')
        return run_emulated(fault.tests or (*OP, *PAGES), copy)


# ---- kernels of the CPU --------------------------------------------------------------------------


def _on_cpu_kernels(fault: Fault) -> Outcome:
    """The fuzzer first, which says most in a few seconds; then tests on the module."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "csrc"
        shutil.copytree(ROOT / "csrc", copy)
        (Path(folder) / fault.file).write_text(planted(fault)[0])
        changed = native.changed_objects(fault.file, copy, Path(folder))
        if not changed:
            return Outcome("passed", native.SAME_CODE)
        isas = [isa for isa in native.runnable() if any(isa == of for of, _ in changed)]
        isa = isas[0] if isas else ""
        if not fault.tests:
            found = native.fuzz(changed, isa, Path(folder))
            if found.verdict != "passed":
                return found
        package = Path(folder) / "package"
        native.link_module(changed, _copied_package(package))
        return run_pytest(
            fault.tests or tests_of(fault.file),
            {"PYTHONPATH": str(package), **({"HOGWILD_ISA": isa} if isa else {})},
        )


def _copied_package(folder: Path) -> Path:
    """A copy of the package, to be imported instead of the tree's."""
    shutil.copytree(
        ROOT / "hogwild_ext", folder / "hogwild_ext", ignore=shutil.ignore_patterns("__pycache__")
    )
    return folder / "hogwild_ext"


# ---- modules of the package ----------------------------------------------------------------------


def _on_package(fault: Fault) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        package = _copied_package(Path(folder))
        if not any(package.glob("_C.*")):
            native.take_module(package)
        (Path(folder) / fault.file).write_text(planted(fault)[0])
        tests = fault.tests or tests_of(fault.file)
        outcome = run_pytest(tests, {"PYTHONPATH": folder})
    test = re.match(r"([\w./]+\.py(?:::\S+)?):", outcome.words)
    if outcome.verdict == "failed" and test and not _passes(test[1]):
        return Outcome("broken", f"fails without the fault as well: {outcome.words}")
    return outcome


@cache
def _passes(test: str) -> bool:
    """Whether a test passes on the package as it is."""
    with tempfile.TemporaryDirectory() as folder:
        package = _copied_package(Path(folder))
        if not any(package.glob("_C.*")):
            native.take_module(package)
        return run_pytest([test], {"PYTHONPATH": folder}).verdict == "passed"
