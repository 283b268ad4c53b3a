"""What every test gets: fresh but repeatable random numbers, torch's thread count put back."""

from __future__ import annotations

import os
import random
import signal
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import numpy as np
import pytest
import torch

import real_gpu
from emulator import session as emulated_gpu

if TYPE_CHECKING:
    import transformers

# HOGWILD_EMULATE=1: what else runs on the CPU runs on the emulated GPU; see emulator/README.md.
# HOGWILD_TEST_GPU=1: it runs on a real one.
EMULATED = emulated_gpu.start() if emulated_gpu.wanted() else None
if real_gpu.wanted():
    real_gpu.start()

# Examples a property: HYPOTHESIS_PROFILE=thorough looks ten times as long as CI does.
# No deadline: an example's time depends on what else the machine does.
for profile, examples in (("quick", 25), ("ci", 150), ("thorough", 1500)):
    hypothesis.settings.register_profile(
        profile, max_examples=examples, deadline=None, print_blob=True
    )
usual = "quick" if EMULATED else "ci"
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", usual))


def pytest_configure(config: pytest.Config) -> None:
    chosen = os.environ.get("HOGWILD_TEST_SEED")
    config.stash[SESSION_SEED] = int(chosen) if chosen else random.SystemRandom().getrandbits(32)


def pytest_report_header(config: pytest.Config) -> str:
    return f"random data: HOGWILD_TEST_SEED={config.stash[SESSION_SEED]} repeats this run"


SESSION_SEED = pytest.StashKey[int]()


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Fresh in every run, another one in every test, and the same again with HOGWILD_TEST_SEED."""
    return zlib.crc32(f"{request.config.stash[SESSION_SEED]} {request.node.nodeid}".encode())


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    """A torch generator that starts from `seed`."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def _global_seeds(seed: int) -> None:
    """The global generators too, for code under test that draws from them."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(scope="session", autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Child processes look for modules in the folder they start in: not in the source tree, where
    the package has no compiled module."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(before)


@pytest.fixture(scope="session", autouse=True)
def _signals_heard() -> Iterator[None]:
    """As on a terminal, also where the tests run under nohup or in the background of a script:
    these ignore some, for all their children."""
    heard = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    heard[signal.SIGHUP] = signal.SIG_DFL
    before = {number: signal.signal(number, handler) for number, handler in heard.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _threads_restored() -> Iterator[None]:
    """A test may call torch.set_num_threads; the next one finds what this one found."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_mode_left() -> Iterator[None]:
    """Whatever was raised, no mode of torch's stays behind, for all tests that follow."""
    yield
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.fixture
def one_thread(_threads_restored: None) -> None:
    """For tests of many small calls: threads that wait for each other would take all the time."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> transformers.PreTrainedModel:
    """A tiny model that speaks bytes, for tests of runs; modules with models of their own have
    another fixture of this name."""
    from models import tiny_model
    from scripted import VOCABULARY

    return tiny_model("llama", vocab_size=VOCABULARY, head_dim=16)


# What runs on a GPU that stands in for the CPU. Other modules never get to a backend, or say of it
# what these do.
OF_A_BACKEND = {
    "test_cache",
    "test_emulated_graphs",
    "test_emulated_launches",
    "test_emulated_layouts",
    "test_kernel_details",
    "test_op_bits",
    "test_op_nonfinite",
    "test_op_numbers",
    "test_op_oracle",
    "test_op_registration",
    "test_small_model",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if EMULATED or real_gpu.wanted():
        cpu = pytest.mark.skip(reason="is about the CPU, or too slow on the emulated GPU")
        other = pytest.mark.skip(reason="never gets to a backend, or says nothing new about one")
        for item in items:
            if item.get_closest_marker("cpu"):
                item.add_marker(cpu)
            elif item.path.stem not in OF_A_BACKEND:
                item.add_marker(other)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and torch.cuda.is_available() is false")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def default_model_folder() -> Path:
    """SmolLM2, fetched if it is not in the user's cache yet."""
    from hogwild_ext import default_model

    try:
        return default_model.ensure()
    except (default_model.DefaultModelError, ImportError) as error:
        pytest.skip(f"SmolLM2 is not here; `hogwild run` fetches it once (93 MB): {error}")
