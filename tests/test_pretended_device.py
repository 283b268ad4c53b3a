"""The suites that a GPU runs go through what takes them there, on a device that is not the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def in_process(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=TESTS,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("suite", ["cache", "emulated_layouts", "op_bits"])
def test_a_suite_of_the_cpu(suite: str, seed: int) -> None:
    done = in_process(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", f"test_{suite}.py"),
        HOGWILD_TEST_GPU="pretended",
        HOGWILD_TEST_SEED=str(seed),
        HYPOTHESIS_PROFILE="quick",
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert " passed" in done.stdout, done.stdout


DEVICE = """
import torch, pretended_device
pretended_device.start()
here = torch.arange(12.0)
there = here.to("pretended:0", copy=True)
"""


@pytest.mark.parametrize(
    "mixed",
    [
        "there + here",
        "there.add_(here)",
        "there + there.to('pretended:1')",
        "torch.cat([there, here])",
        "torch.stack([there, there.to('pretended:1')])",
    ],
)
def test_tensors_of_two_devices_do_not_mix(mixed: str) -> None:
    done = in_process("-c", f"{DEVICE}\n{mixed}")
    assert done.returncode != 0
    assert "expected tensors of one device" in done.stderr, done.stderr


def test_its_memory_is_its_own() -> None:
    done = in_process(
        "-c",
        f"""{DEVICE}
view = there.as_strided((3, 2), (4, 1), 1)
view.mul_(10)  # memory of the device, in place
assert here.tolist() == list(range(12)), here
assert view.device == there.device == torch.device("pretended", 0), view.device
back = torch.zeros(12)
back.copy_(there)
assert back.tolist() == [0, 10, 20, 3, 4, 50, 60, 7, 8, 90, 100, 11], back
assert there.cpu().tolist() == back.tolist() and there.cpu().device.type == "cpu"
assert torch.empty(2, device="pretended:1").device.index == 1
assert pretended_device.tensor_there(view).data_ptr() == view.data_ptr()
""",
    )
    assert done.returncode == 0, done.stderr
