"""Builds the compiled module with CMake; everything else stands in pyproject.toml."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def fail(message: str) -> None:
    """Ends the build with a message that stands out in pip's output."""
    raise SystemExit(f"\n\nhogwild_ext: {message}\n")


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


def choose_backends() -> None:
    """Says in one line what is built. HOGWILD_CUDA: auto (default), 0 or 1."""
    wanted = os.environ.get("HOGWILD_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        fail(f"HOGWILD_CUDA: expected auto, 0 or 1, got {wanted!r}.")
    if wanted == "1":
        fail(
            "HOGWILD_CUDA=1 was asked for, but this version has no CUDA backend yet. "
            "Leave HOGWILD_CUDA unset to build the CPU backend."
        )
    print(f"hogwild_ext: building the CPU backend for {platform.machine()}", flush=True)


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        check_machine()
        choose_backends()
        target = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        # Always from scratch: what CMake remembers of an earlier build points into pip's isolated
        # environment of that time, which is gone.
        build = Path(self.build_temp).resolve() / "cmake"
        shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True)

        import pybind11

        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(min(os.cpu_count() or 1, 8))
        self.run_cmake(
            ["cmake", str(ROOT), *generator],
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DHOGWILD_VERSION={self.distribution.get_version()}",
            "-DCMAKE_BUILD_TYPE=Release",
            cwd=build,
        )
        self.run_cmake(["cmake", "--build", ".", "--parallel", jobs], cwd=build)

    @staticmethod
    def run_cmake(command: list[str], *options: str, cwd: Path) -> None:
        try:
            subprocess.run([*command, *options], cwd=cwd, check=True)
        except FileNotFoundError:
            fail("cmake was not found. Install it with: pip install cmake ninja")
        except subprocess.CalledProcessError as error:
            fail(
                f"{' '.join(command[:2])} ended with status {error.returncode}; "
                "the compiler's or CMake's message stands above."
            )


setup(ext_modules=[Extension("hogwild_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
