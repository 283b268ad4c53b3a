"""HOGWILD_SANITIZE builds the module with a compiler's sanitizers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("value", ["adress", "thread,address", "undefined,address", "1"])
def test_a_wrong_value_ends_the_build(value: str, tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="setuptools is not installed in this environment")
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-temp", str(tmp_path)],
        cwd=ROOT, env={**os.environ, "HOGWILD_SANITIZE": value}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode
    assert (
        "HOGWILD_SANITIZE: expected address, undefined, address,undefined or thread, got "
        f"'{value}'" in done.stderr
    )


def configure(folder: Path, value: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("cmake") is None:
        pytest.skip("there is no cmake")
    import pybind11

    options = [
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    return subprocess.run(
        ["cmake", str(ROOT), *options, f"-DHOGWILD_SANITIZE={value}",
         "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip


def test_cmake_refuses_a_wrong_value(tmp_path: Path) -> None:
    done = configure(tmp_path, "memory")
    assert done.returncode and "got 'memory'" in " ".join(done.stderr.split())


@pytest.mark.parametrize("value", ["", "address,undefined", "thread"])
def test_every_source_is_instrumented(value: str, tmp_path: Path) -> None:
    assert configure(tmp_path, value).returncode == 0
    units = json.loads((tmp_path / "compile_commands.json").read_text())
    names = {Path(unit["file"]).name for unit in units}
    assert {"kernels.cpp", "plan.cpp", "backend.cpp", "binding.cpp"} <= names
    for unit in units:
        words = unit["command"].split()
        assert (f"-fsanitize={value}" in words) == bool(value)
        assert ("-fno-omit-frame-pointer" in words) == bool(value)
        if unit["file"].endswith("kernels.cpp"):  # the last one counts
            optimized = [word for word in words if word.startswith("-O")][-1]
            assert optimized == ("-O1" if value else "-O3")
