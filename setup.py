"""Builds the compiled module with CMake; everything else stands in pyproject.toml."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

import build_cuda
import build_python

build_python.check()
ROOT = Path(__file__).parent.resolve()
SANITIZERS = ("address", "undefined", "address,undefined", "thread")


def fail(message: str) -> NoReturn:
    """Ends the build with a message that stands out in pip's output."""
    raise SystemExit(f"\n\nhogwild_ext: {message}\n")


def say(message: str) -> None:
    print(f"hogwild_ext: {message}", flush=True)


def check_machine() -> None:
    if sys.platform == "win32":
        fail("Windows is not supported; install inside WSL2 (https://aka.ms/wsl).")
    compiler = os.environ.get("CXX", "").split() or ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in compiler):
        hint = (
            "xcode-select --install"
            if sys.platform == "darwin"
            else "apt-get install g++    (Debian, Ubuntu)   or   dnf install gcc-c++    (Fedora)"
        )
        fail(
            f"no C++ compiler found (looked for {', '.join(compiler)}). "
            f"Install one and try again:\n\n    {hint}"
        )


def choose_cuda() -> build_cuda.Choice:
    """Says in one line what is built."""
    try:
        choice = build_cuda.choose(os.environ, build_cuda.probe())
    except ValueError as error:
        fail(f"{error}.")
    except build_cuda.Unavailable as error:
        fail(f"the CUDA backend cannot be built: {error}.")
    say(f"building the CPU backend for {platform.machine()}, {choice}")
    return choice


def cuda_options(choice: build_cuda.Choice) -> tuple[list[str], dict[str, str]]:
    """CMake's options for the CUDA backend, and the environment that it runs in."""
    environment = dict(os.environ)
    if not choice.toolkit:
        return ["-DHOGWILD_CUDA=OFF"], environment
    options = [
        "-DHOGWILD_CUDA=ON",
        f"-DHOGWILD_CUDA_ARCHS={';'.join(map(str, choice.architectures))}",
        f"-DCMAKE_CUDA_COMPILER={choice.toolkit.nvcc}",
    ]
    if host := build_cuda.host_compiler(os.environ):
        options.append(f"-DCMAKE_CUDA_HOST_COMPILER={host}")
    if extra := choice.toolkit.library_path:
        environment["LIBRARY_PATH"] = os.pathsep.join(
            filter(None, [extra, environment.get("LIBRARY_PATH")])
        )
    return options, environment


def sanitize_options() -> list[str]:
    """CMake's options for HOGWILD_SANITIZE, which instruments the module."""
    wanted = os.environ.get("HOGWILD_SANITIZE", "")
    if wanted not in ("", *SANITIZERS):
        fail(f"HOGWILD_SANITIZE: expected {', '.join(SANITIZERS[:-1])} or {SANITIZERS[-1]}, "
             f"got {wanted!r}.")  # fmt: skip
    if wanted:
        say(f"instrumented by the sanitizers: {wanted}")
    return [f"-DHOGWILD_SANITIZE={wanted}"]


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        started = time.monotonic()
        check_machine()
        sanitize = sanitize_options()
        cuda = choose_cuda()
        target = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        # Always from scratch: what CMake remembers of an earlier build points into pip's isolated
        # environment of that time, which is gone.
        build = Path(self.build_temp).resolve() / "cmake"
        shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True)

        import pybind11

        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(min(os.cpu_count() or 1, 8))
        options, environment = cuda_options(cuda)
        self.run_cmake(
            ["cmake", str(ROOT), *generator],
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DHOGWILD_VERSION={self.distribution.get_version()}",
            "-DCMAKE_BUILD_TYPE=Release",
            *sanitize,
            *options,
            cwd=build,
            env=environment,
        )
        self.run_cmake(["cmake", "--build", ".", "--parallel", jobs], cwd=build, env=environment)
        size = sum(path.stat().st_size for path in target.glob("_C.*"))
        say(f"built in {time.monotonic() - started:.0f} s, {size / 1e6:.1f} MB")

    @staticmethod
    def run_cmake(command: list[str], *options: str, cwd: Path, env: dict[str, str]) -> None:
        try:
            subprocess.run([*command, *options], cwd=cwd, env=env, check=True)
        except FileNotFoundError:
            fail("cmake was not found. Install it with: pip install cmake ninja")
        except subprocess.CalledProcessError as error:
            fail(
                f"{' '.join(command[:2])} ended with status {error.returncode}; "
                "the compiler's or CMake's message stands above."
            )


setup(ext_modules=[Extension("hogwild_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
