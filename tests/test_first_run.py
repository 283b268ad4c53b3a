"""What somebody with a GPU runs first works on the day that there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import hogwild_ext
from emulator import build

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "bench" / "first_run.sh"


def run(results: Path, *, source: Path = ROOT, **more: str) -> subprocess.CompletedProcess[str]:
    python = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(SCRIPT), str(source), str(results)],
        env={**os.environ, "PATH": python, **more},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a dry run of the package under test."""
    try:
        build.find_nvcc()
    except build.BuildError as error:
        pytest.skip(f"the emulated GPU cannot be built: {error}")
    folder = tmp_path_factory.mktemp("first run")  # with a space, as folders have
    site = Path(hogwild_ext.__file__).parent.parent
    done = run(folder, FIRST_RUN_DRY="1", FIRST_RUN_SITE=str(site))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return folder


def test_every_step_ends_well(results: Path) -> None:
    summary = (results / "1-summary.txt").read_text()
    for step in (
        "kernels without torch, against float64: ok",
        "graphs and large scores: ok",
        "tests on a GPU: ok",
        "tests of op_nonfinite: ok",
        "speed of a layer: ok",
        "hogwild bench attention: ok",
        "end: 0 failed",
    ):
        assert step in summary, summary
    assert "WRONG" not in summary


def test_the_figures_stand_in_the_summary(results: Path) -> None:
    summary = (results / "1-summary.txt").read_text()
    for figure in ("bfloat16 D 128: attention", "0 wrong", "us +-", "TFLOP/s", "scores of about"):
        assert figure in summary, summary


def test_there_are_at_most_eight_files(results: Path) -> None:
    names = sorted(path.name for path in results.iterdir())
    assert 5 <= len(names) <= 8, names
    assert " passed" in (results / "5-tests.log").read_text()


def test_a_wrong_kernel_is_told_and_nothing_is_timed(tmp_path: Path) -> None:
    """The reference of a copy is wrong, which looks the same."""
    try:
        build.find_nvcc()
    except build.BuildError as error:
        pytest.skip(f"the emulated GPU cannot be built: {error}")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tests", "csrc", "hogwild_ext"):
        (source / name).symlink_to(ROOT / name)
    parts = source / "bench" / "first_run"
    parts.mkdir(parents=True)
    for part in (ROOT / "bench" / "first_run").glob("*.py"):
        text = part.read_text()
        if part.name == "kernels.py":
            assert text.count("weights /= ") == 1
            text = text.replace("weights /= ", "weights /= 1.01 * ")
        (parts / part.name).write_text(text)
    site = Path(hogwild_ext.__file__).parent.parent
    done = run(
        tmp_path / "results",
        source=source,
        FIRST_RUN_DRY="1",
        FIRST_RUN_SITE=str(site),
        FIRST_RUN_SUITES="plan",
    )
    summary = (tmp_path / "results" / "1-summary.txt").read_text()
    assert done.returncode == 1
    assert "against float64: FAILED with exit code 1" in summary
    assert "no times: the kernels do not compute the right thing" in summary
    assert "speed" not in summary


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if subprocess.run(["sh", "-c", "nvidia-smi -L"], capture_output=True).returncode == 0:
        pytest.skip("there is a GPU")
    done = run(tmp_path / "results", FIRST_RUN_DRY="")
    assert done.returncode == 1
    assert "nvidia-smi shows no GPU" in done.stdout
