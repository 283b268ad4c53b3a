"""Builds the emulated GPU: PTX of every kernel, and `hogwild_ext._C` linked with it.

Each `.cu` file is compiled once by nvcc, as a real build does it, except that its PTX is kept
beside the object instead of being assembled for a GPU. The module is linked with `runtime.cpp`
and `engine.cpp` in place of libcudart. Nothing here needs a GPU or a driver.

What was built is kept under $HOGWILD_EMULATOR_CACHE, by default ~/.cache/hogwild_ext/emulator, by
a hash of everything that went into it.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = Path(os.environ.get("HOGWILD_EMULATE_CSRC") or ROOT / "csrc")  # or a copy of it
ARCHITECTURES = (80, 90, 100)  # one for each kind of PTX: before Hopper, Hopper, and the front end
#                                that nvcc uses from Blackwell on
UNUSED_SECONDS = 30 * 24 * 3600  # what nobody needed for that long is deleted

KERNEL_FLAGS = ("-O3", "-lineinfo", "-std=c++17", "--expt-relaxed-constexpr")
HOST_FLAGS = ("-fPIC", "-fvisibility=hidden")
# The engine is the only part whose speed matters.
ENGINE_FLAGS = ("-std=c++20", "-O3", "-march=native", "-ffp-contract=off")
# Only CPU kernels of the baseline: a plan needs their angles.
CPU_KERNEL_FLAGS = (
    "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-DHOGWILD_ISA=baseline",
)  # fmt: skip

NVCC_WHEELS = "nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl"


class BuildError(RuntimeError):
    """The emulated GPU cannot be built; the message says why and what to do."""


@dataclass(frozen=True)
class Unit:
    """One compiled source: its object and, of a `.cu` file, its PTX."""

    source: Path
    object: Path
    ptx: Path | None


@dataclass(frozen=True)
class Emulator:
    """What `build` made."""

    architecture: int
    module: Path
    ptx: tuple[Path, ...]


def build(architecture: int, say: Callable[[str], None] = lambda line: None) -> Emulator:
    """The module and the PTX for sm_`architecture`; from the cache what is there already."""
    module = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    units = compile_all([*_library_sources(), *_emulator_sources()], architecture, say)
    return Emulator(
        architecture, link(units, module), tuple(unit.ptx for unit in units if unit.ptx)
    )


def build_library(
    sources: Sequence[Path], architecture: int, say: Callable[[str], None] = lambda line: None
) -> Emulator:
    """A plain shared library of `sources` and the emulated GPU, for tests of the two."""
    units = compile_all(
        [*((source, ()) for source in sources), *_emulator_sources()], architecture, say
    )
    return Emulator(
        architecture, link(units, "library.so"), tuple(unit.ptx for unit in units if unit.ptx)
    )


def build_engine(say: Callable[[str], None] = lambda line: None) -> Path:
    """A shared library of the engine alone, which runs PTX that is given as text. Needs no nvcc."""
    return link(compile_all([(HERE / "engine.cpp", ENGINE_FLAGS)], 0, say), "engine.so")


def _library_sources() -> list[tuple[Path, tuple[str, ...]]]:
    """What `_C` is made of, each with its own flags."""
    kernels = CSRC / "cpu" / "kernels.cpp"
    sources = [
        path
        for folder in (CSRC, CSRC / "cpu", CSRC / "cuda")
        for path in sorted(folder.glob("*.cpp"))
        if path != kernels
    ]
    plain = tuple(_module_flags())
    return [
        *((path, ()) for path in sorted((CSRC / "cuda").glob("*.cu"))),
        *((path, plain) for path in sources),
        (kernels, CPU_KERNEL_FLAGS),
    ]


def _emulator_sources() -> list[tuple[Path, tuple[str, ...]]]:
    runtime_flags = ("-O2", *_cuda_headers())
    return [(HERE / "engine.cpp", ENGINE_FLAGS), (HERE / "runtime.cpp", runtime_flags)]


@cache
def _module_flags() -> list[str]:
    import pybind11

    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert version
    return [
        "-O2",
        "-DHOGWILD_CUDA",
        f'-DHOGWILD_VERSION="{version[1]}"',
        "-isystem",
        pybind11.get_include(),
        "-isystem",
        sysconfig.get_path("include"),
        *_cuda_headers(),
    ]


# ---- compiling ----------------------------------------------------------------------------------


def compile_all(
    sources: Sequence[tuple[Path, Sequence[str]]],
    architecture: int,
    say: Callable[[str], None] = lambda line: None,
) -> list[Unit]:
    """Objects of all sources, two compilers side by side at most."""
    jobs = int(os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or min(2, os.cpu_count() or 1))
    with _only_one_builds():
        _delete_unused()
        with ThreadPoolExecutor(jobs) as pool:
            return list(
                pool.map(lambda job: compile_unit(job[0], architecture, job[1], say), sources)
            )


def compile_unit(
    source: Path,
    architecture: int,
    flags: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> Unit:
    """The object of one source and, if it is a `.cu` file, its PTX for sm_`architecture`."""
    is_kernels = source.suffix == ".cu"
    if is_kernels:
        virtual = f"compute_{architecture}"
        command = [*_nvcc(), "-c", *KERNEL_FLAGS, f"-Xcompiler={','.join(HOST_FLAGS)}"]
        command += ["-gencode", f"arch={virtual},code={virtual}", *flags]
    else:
        command = [*_host_compiler(), "-c", "-std=c++17", *HOST_FLAGS, *flags]
    folder = _folder_of(command, with_includes(source))
    unit = Unit(source, folder / "object.o", folder / "kernels.ptx" if is_kernels else None)
    if not folder.exists():
        say(f"compiling {source.name}" + (f" for sm_{architecture}" if is_kernels else ""))
        with _filled(folder) as new:
            keep = ["--keep", "--keep-dir", str(new)] if is_kernels else []
            _run([*command, *keep, str(source), "-o", str(new / "object.o")])
            if is_kernels:
                (ptx,) = new.glob("*.ptx")
                ptx.rename(new / "kernels.ptx")
            for path in new.iterdir():
                if path.name not in ("object.o", "kernels.ptx"):
                    path.unlink()
    os.utime(folder)
    return unit


def link(units: Sequence[Unit], name: str) -> Path:
    """A shared library of all units in which nothing but its entry points is visible."""
    objects = [str(unit.object) for unit in units]
    exports = "{ global: PyInit__C; emu_*; emulated_*; test_*; local: *; };"
    command = [*_host_compiler(), "-shared", "-pthread"]
    folder = _folder_of([*command, exports, name, *objects], [])
    if not folder.exists():
        with _only_one_builds(), _filled(folder) as new:
            (new / "exports").write_text(exports)
            version = f"-Wl,--version-script={new / 'exports'}"
            _run([*command, version, *objects, "-ldl", "-o", str(new / name)])
    os.utime(folder)
    return folder / name


def link_program(units: Sequence[Unit], name: str, flags: Sequence[str]) -> Path:
    """A program of all units."""
    objects = [str(unit.object) for unit in units]
    command = [*_host_compiler(), "-pthread", *flags]
    folder = _folder_of([*command, name, *objects], [])
    if not folder.exists():
        with _only_one_builds(), _filled(folder) as new:
            _run([*command, *objects, "-ldl", "-o", str(new / name)])
    os.utime(folder)
    return folder / name


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


# ---- compilers ----------------------------------------------------------------------------------


def find_nvcc() -> Path:
    """nvcc of a CUDA toolkit or of NVIDIA's wheels. Raises BuildError if there is none."""
    places = [
        os.environ.get("CUDACXX"),
        shutil.which("nvcc"),
        *(f"{os.environ[h]}/bin/nvcc" for h in ("CUDA_HOME", "CUDA_PATH") if h in os.environ),
        "/usr/local/cuda/bin/nvcc",
        *(str(path) for path in Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/nvcc")),
    ]
    for place in places:
        if place and os.access(place, os.X_OK):
            return Path(place)
    raise BuildError(
        "nvcc was not found: the emulated GPU runs the PTX that it emits. Looked at $CUDACXX, "
        "PATH, $CUDA_HOME, /usr/local/cuda and this Python's packages. Install the CUDA toolkit "
        "13 (https://developer.nvidia.com/cuda-downloads; no GPU and no driver are needed), or "
        f"its compiler alone:\n\n    pip install {NVCC_WHEELS}\n"
    )


@cache
def _nvcc() -> tuple[str, ...]:
    host = os.environ.get("CXX")
    return (str(find_nvcc()), *(("-ccbin", host) if host else ()))


@cache
def _cuda_headers() -> tuple[str, ...]:
    """Flags for a source that is not nvcc's but includes CUDA's headers."""
    dry = subprocess.run([*_nvcc(), "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
    include = re.search(r'^#\$ INCLUDES="-I(.*?)"', dry.stderr, re.M)
    if not include:
        raise BuildError(f"nvcc --dryrun did not say where its headers are:\n{dry.stderr}")
    return "-isystem", str(Path(include[1]).resolve())


@cache
def _host_compiler() -> tuple[str, ...]:
    return tuple(os.environ.get("CXX", "").split()) or ("c++",)


@cache
def _compilers(uses_cuda: bool) -> str:
    """What the compilers say of themselves; a new version builds everything anew."""
    commands = [_host_compiler(), *([_nvcc()] if uses_cuda else [])]
    versions = [
        subprocess.run([*c, "--version"], capture_output=True, text=True).stdout for c in commands
    ]
    pybind = importlib.metadata.version("pybind11")
    return "\n".join([*versions, pybind, sys.version, _cpu_flags()])


def _cpu_flags() -> str:
    """The engine is compiled for this very CPU; a cache may be shared with another one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


# ---- cache --------------------------------------------------------------------------------------


@cache
def cache_folder() -> Path:
    chosen = os.environ.get("HOGWILD_EMULATOR_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(chosen) if chosen else Path(base) / "hogwild_ext" / "emulator"
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


def _folder_of(command: Sequence[str], sources: Sequence[Path]) -> Path:
    """Where the result of `command` on `sources` (all that it reads) belongs."""
    uses_cuda = "nvcc" in Path(command[0]).name or "-isystem" in command
    digest = hashlib.sha256("\0".join([_compilers(uses_cuda), *command]).encode())
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return cache_folder() / digest.hexdigest()[:32]


def with_includes(source: Path) -> list[Path]:
    """`source` and all headers beside it that it includes, directly or not."""
    found, waiting = [source], [source]
    while waiting:
        path = waiting.pop()
        for name in re.findall(r'^\s*#\s*include\s+"(.+)"', path.read_text(), re.M):
            header = (path.parent / name).resolve()
            if header.exists() and header not in found:
                found.append(header)
                waiting.append(header)
    return found


@contextmanager
def _filled(folder: Path) -> Iterator[Path]:
    """A fresh folder that becomes `folder` if all goes well."""
    new = Path(tempfile.mkdtemp(dir=cache_folder(), prefix="new-"))
    try:
        yield new
        with suppress(OSError):  # another process was faster
            new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


@contextmanager
def _only_one_builds() -> Iterator[None]:
    """Another session that wants the same waits, and finds it built."""
    with (cache_folder() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _delete_unused() -> None:
    for folder in cache_folder().iterdir():
        if folder.is_dir() and time.time() - folder.stat().st_mtime > UNUSED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
