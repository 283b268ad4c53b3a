"""The tests of the op, of the cache and of a small model once more, on the emulated GPU.

Each run is a process of its own, because hogwild_ext is then another one: the compiled module with
the CUDA backend, linked with a GPU that runs nvcc's PTX. It uses one core, so that two go on at a
time.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from conftest import SESSION_SEED
from emulator import build, session

TESTS = Path(__file__).parent


@dataclass(frozen=True)
class Run:
    """Some tests on one architecture."""

    architecture: int
    modules: str
    chosen: str = ""  # as after pytest's -k

    def __str__(self) -> str:
        return f"sm_{self.architecture} {self.modules} {self.chosen}".strip()


# PTX of both of nvcc's front ends: up to sm_90, and from sm_100 on. The longest ones come first.
RUNS = [
    Run(90, "emulated_layouts"),
    Run(90, "op_oracle", "not 1134"),
    Run(90, "cache", "not own_ways"),
    Run(100, "op_oracle emulated_layouts", "any_layout or sizes or ratio or prefill or float16"),
    Run(90, "op_bits op_nonfinite op_numbers kernel_details"),
    Run(
        80,
        "op_bits emulated_layouts kernel_details",
        "split or thread or company or beside or ratio or places",
    ),
    Run(90, "emulated_graphs emulated_launches small_model op_registration", "not inductor"),
]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[dict[Run, Future[tuple[int, str]]]]:
    """Exit code and output of every run that was asked for."""
    if session.wanted():
        pytest.skip("the GPU is emulated already")
    try:
        build.find_nvcc()
    except build.BuildError as error:
        pytest.skip(str(error))
    seed = request.config.stash[SESSION_SEED]
    asked = [
        item.callspec.params["run"] for item in request.session.items if item.path == Path(__file__)
    ]
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        yield {run: pool.submit(_outcome, run, seed) for run in asked}


def _outcome(run: Run, seed: int) -> tuple[int, str]:
    modules = [f"test_{module}.py" for module in run.modules.split()]
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            *modules,
            "-k",
            run.chosen,
        ],
        cwd=TESTS,
        env={
            **os.environ,
            "HOGWILD_EMULATE": "1",
            "HOGWILD_EMULATE_ARCH": str(run.architecture),
            "HYPOTHESIS_PROFILE": "quick",
            "HOGWILD_TEST_SEED": str(seed),
        },
        capture_output=True,
        text=True,
    )
    return result.returncode, f"{result.stdout}\n{result.stderr}"


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_on_the_emulated_gpu(run: Run, outcomes: dict[Run, Future[tuple[int, str]]]) -> None:
    code, output = outcomes[run].result()
    assert code == 0, output
    assert " passed" in output, output
