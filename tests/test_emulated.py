"""The tests of the op and of the cache once more, on the emulated GPU.

Each module runs in a process of its own, because hogwild_ext is then another one: the compiled
module with the CUDA backend, linked with a GPU that runs nvcc's PTX.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from emulator import build, session

TESTS = Path(__file__).parent

# PTX of both of nvcc's front ends: up to sm_90, and from sm_100 on.
RUNS = [
    ("90", "test_op_oracle.py", "not 1134"),
    ("90", "test_op_bits.py", ""),
    ("90", "test_op_nonfinite.py", ""),
    ("100", "test_op_oracle.py", "not 1134 and not plain_causal"),
    ("80", "test_op_bits.py", "split or thread or company or beside"),
]


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> None:
    if session.wanted():
        pytest.skip("the GPU is emulated already")
    try:
        build.find_nvcc()
    except build.BuildError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("architecture", "module", "chosen"), RUNS)
def test_on_the_emulated_gpu(architecture: str, module: str, chosen: str, seed: int) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", module, "-k", chosen],
        cwd=TESTS,
        env={
            **os.environ,
            "HOGWILD_EMULATE": "1",
            "HOGWILD_EMULATE_ARCH": architecture,
            "HYPOTHESIS_PROFILE": "quick",
            "HOGWILD_TEST_SEED": str(seed),
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    assert "passed" in result.stdout.strip().splitlines()[-1], result.stdout
