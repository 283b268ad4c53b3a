"""CPU kernels with a fault, compiled file by file: what did not change is built once."""

from __future__ import annotations

import importlib.machinery
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from emulator.build import BuildError, compile_all
from fuzz.build import common_flags, definitions, isa_flags

from .fault import ROOT, Outcome

CSRC = ROOT / "csrc"
FUZZER = ROOT / "tests" / "fuzz"
EXECUTIONS = 1500  # of the fuzzer; most faults show in the first hundred
SAME_CODE = "the compiler makes the same machine code of it"
ELSEWHERE = "only other CPUs run it"
OPTIMIZE = "-O1"  # half of the time to compile


class OnlyElsewhere(BuildError):
    """The change is in code of an instruction set that this CPU lacks."""


Object = tuple[str, Path]  # (instruction set, or source from csrc, and object file)


@cache
def runnable() -> tuple[str, ...]:
    """Instruction sets that this CPU has, those first that tell most apart."""
    known = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    order = ("amx", "avx512_bf16", "avx2", "baseline", "avx512")
    needs = {"avx512": "avx512bw", "baseline": ""}
    return tuple(isa for isa in order if isa in isa_flags() and needs.get(isa, isa) in known)


def _host_flags(source: str) -> tuple[str, ...]:
    flags = (OPTIMIZE, *definitions(tuple(isa_flags())))
    if not source.startswith(("binding", "cuda")):
        return flags
    import pybind11

    return (
        *flags, '-DHOGWILD_VERSION="0"', "-isystem", pybind11.get_include(), "-isystem",
        sysconfig.get_path("include"),
    )  # fmt: skip


def _kernel_flags(isa: str) -> tuple[str, ...]:
    return (OPTIMIZE, *common_flags(), *isa_flags()[isa], f"-DHOGWILD_ISA={isa}")


SOURCES = ("plan.cpp", "cpu/backend.cpp", "cpu/parallel.cpp")


@cache
def _sound() -> dict[str, Path]:
    """Objects of everything, without a fault."""
    module = [
        "binding.cpp", "binding_cuda.cpp", "binding_tensors.cpp", "cuda/tables.cpp",
        "cuda/why_not.cpp",
    ]  # fmt: skip
    jobs: dict[str, tuple[Path, Sequence[str]]] = {
        isa: (CSRC / "cpu/kernels.cpp", _kernel_flags(isa)) for isa in isa_flags()
    }
    jobs |= {name: (CSRC / name, _host_flags(name)) for name in (*SOURCES, *module)}
    jobs |= {path.name: (path, ("-O2",)) for path in sorted(FUZZER.glob("*.cpp"))}
    units = compile_all(list(jobs.values()), 0)
    return {name: unit.object for name, unit in zip(jobs, units, strict=True)}


def _compile(source: Path, flags: Sequence[str], to: Path) -> Path:
    command = ["c++", "-c", "-std=c++17", "-fPIC", "-fvisibility=hidden", *flags]
    _run([*command, str(source), "-o", str(to)])
    return to


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        error = re.search(r"^.*error: .*$", done.stderr, re.M)
        raise BuildError(error[0] if error else done.stderr)


def changed_objects(file: str, csrc: Path, folder: Path) -> list[Object]:
    """What comes out differently of a copy of csrc in which `file` was changed: of kernels the
    first instruction set that this CPU has and for which it does."""
    sound = _sound()
    name = file.removeprefix("csrc/")
    if name in SOURCES:
        made = _compile(csrc / name, _host_flags(name), folder / "changed.o")
        return [] if _same(made, sound[name]) else [(name, made)]
    for isa in runnable():
        made = _compile(csrc / "cpu/kernels.cpp", _kernel_flags(isa), folder / f"{isa}.o")
        if not _same(made, sound[isa]):
            return [(isa, made)]
    for isa, flags in isa_flags(all_of_them=True).items():
        if isa not in isa_flags():
            kernel = (OPTIMIZE, *common_flags(), *flags, f"-DHOGWILD_ISA={isa}")
            made = _compile(csrc / "cpu/kernels.cpp", kernel, folder / f"{isa}.o")
            plain = _compile(CSRC / "cpu/kernels.cpp", kernel, folder / f"{isa}, sound.o")
            if not _same(made, plain):
                raise OnlyElsewhere(f"{ELSEWHERE}: {isa}")
    return []


def _same(a: Path, b: Path) -> bool:
    return a.read_bytes() == b.read_bytes()


def fuzz(changed: Sequence[Object], isa: str, folder: Path) -> Outcome:
    objects = {**_sound(), **dict(changed)}
    outside = {name for name in objects if name.startswith(("binding", "cuda/"))}
    program = folder / "fuzz"
    linked = [str(path) for name, path in objects.items() if name not in outside]
    _run(["c++", "-pthread", *linked, "-ldl", "-o", str(program)])
    command = [str(program), "--seed", "1", "--count", str(EXECUTIONS)]
    done = subprocess.run(
        [*command, *(["--isa", isa] if isa else [])], capture_output=True, text=True
    )
    if done.returncode == 0:
        return Outcome("passed", done.stdout.strip())
    at = re.search(r"--start (\d+)", done.stdout)
    what = done.stderr.partition("\n")[0]
    return Outcome("failed", f"fuzzer, execution {at[1] if at else '?'}: {what}")


def link_module(changed: Sequence[Object], package: Path) -> None:
    """Puts `_C` into a copy of the package."""
    for old in package.glob("_C.*"):
        old.unlink()
    own = {path.name for path in FUZZER.glob("*.cpp")}
    objects = {**_sound(), **dict(changed)}
    linked = [str(path) for name, path in objects.items() if name not in own]
    name = f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    _run(["c++", "-shared", "-pthread", *linked, "-ldl", "-o", str(package / name)])


def take_module(package: Path) -> None:
    """The installed `_C`, for a tree that has none."""
    import hogwild_ext._C as module

    path = Path(str(module.__file__))
    shutil.copy(path, package / path.name)
