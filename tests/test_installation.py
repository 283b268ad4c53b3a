"""What a user meets before any attention is computed: importing, building, `info`."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

import hogwild_ext as hx

PACKAGE = Path(hx.__file__).parent
ROOT = Path(__file__).parent.parent
EXTRAS = ("transformers", "accelerate", "gguf", "safetensors", "rich", "matplotlib", "filelock")


def run_python(
    code: str, cwd: Path, flags: list[str] | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *(flags or []), "-c", code],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_import_loads_no_extra(tmp_path):
    code = (
        "import torch, sys; before = set(sys.modules); import hogwild_ext; "
        f"print([m for m in {EXTRAS} if m in sys.modules and m not in before])"
    )
    result = run_python(code, tmp_path)
    assert result.stdout.strip() == "[]", result.stderr


def test_the_source_folder_says_what_to_type(tmp_path):
    """A clone's folder on the path, without the compiled module."""
    copy = tmp_path / "clone" / "hogwild_ext"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    libraries = [str(Path(m.__file__).parent.parent) for m in (torch, numpy)]
    code = f"import sys; sys.path[:0] = {[str(copy.parent), *libraries]}; import hogwild_ext"
    result = run_python(code, tmp_path, flags=["-S"])  # no editable install may lend its module
    last = result.stderr.strip()
    assert "ImportError" in last
    assert f"imported from {copy}" in last
    assert f"pip install -e {copy.parent}" in last


def test_a_broken_compiled_module_is_not_called_missing(tmp_path):
    copy = tmp_path / "hogwild_ext"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (copy / f"_C{suffix}").write_bytes(b"not a library")
    result = run_python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import hogwild_ext", tmp_path
    )
    assert "ImportError" in result.stderr and "pip install -e" not in result.stderr


def test_an_unknown_isa_is_refused(tmp_path):
    result = run_python("import hogwild_ext", tmp_path, HOGWILD_ISA="mmx")
    assert "HOGWILD_ISA: expected one of" in result.stderr and "'mmx'" in result.stderr


def test_info_names_what_is_there():
    report = str(hx.info())
    for text in (hx.__version__, hx._C.isa(), "cpu", "float16", "threads"):
        assert text in report


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"CXX": "no-such-compiler"}, "no C++ compiler found (looked for no-such-compiler)"),
        (
            {"HOGWILD_CUDA": "1", "CUDACXX": "/nowhere/nvcc"},
            "hogwild_ext: the CUDA backend cannot be built: /nowhere/nvcc does not run",
        ),
        ({"HOGWILD_CUDA": "yes"}, "hogwild_ext: HOGWILD_CUDA: expected auto, 0 or 1, got 'yes'."),
    ],
)
def test_the_build_stops_with_clear_words(tmp_path, env, message):
    if not (ROOT / "setup.py").exists():
        pytest.skip("the tests do not lie in a source tree")
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed in this environment")
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path),
         "--build-temp", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    assert result.returncode != 0
    assert message in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
