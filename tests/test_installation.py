"""What a user meets before any attention is computed: importing, building, `info`."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

import hogwild_ext as hx
from hogwild_ext import backends, cuda_backend, installation

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


# ---- GPUs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "sentence"),
    [
        # runtime, driver, devices, gpu, built
        ((13000, 0, 0, 0, [90]), r"there is no NVIDIA driver: install one that runs CUDA 13\.0 "),
        (
            (13000, 12080, 1, 90, [90]),
            r"the NVIDIA driver runs CUDA 12\.8 at most and this build needs 13\.0: update the "
            r"driver, or install hogwild_ext again with nvcc of CUDA 12$",
        ),
        ((12080, 12020, 1, 90, [90]), None),  # of the same major version
        ((12080, 13000, 1, 90, [90]), None),
        ((13000, 13000, 0, 0, [90]), "the NVIDIA driver shows no GPU: see nvidia-smi"),
        ((13000, 13000, 1, 75, [80]), r"capability 7\.5 and the kernels need 8\.0 \(Ampere\)"),
        ((13000, 13000, 1, 86, [80, 90]), None),  # machine code of the same major version
        (
            (13000, 13000, 1, 80, [86, 90]),
            r"capability 8\.0 and this build is for sm_86, sm_90: .* HOGWILD_CUDA_ARCHS=80$",
        ),
        ((13000, 13000, 1, 120, [80, 90]), None),  # the newest as PTX
        ((13000, 13010, 1, 120, [80, 90]), None),
        ((13010, 13000, 1, 120, [80, 90]), r"12\.0 and this build is for sm_80, sm_90: install"),
        ((13010, 13000, 1, 90, [80, 90]), None),
        ((13000, 13000, 1, 110, [80, 120]), r"11\.0 and this build is for sm_80, sm_120"),
    ],
)
def test_why_a_gpu_cannot_be_used(machine, sentence):
    words = hx._C.cuda.why_not(*machine)
    if sentence is None:
        assert words == ""
    else:
        assert re.search(sentence, words) and "\n" not in words, words


H100, T4 = ("NVIDIA H100", (9, 0)), ("Tesla T4", (7, 5))


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A function that makes up a machine: its GPUs, what the build says of each (None: it has no
    CUDA kernels), whether torch and a driver are there for them."""

    def make(*gpus, states=None, torch_cuda="13.0", torch_sees=True, driver=True):
        # states: why not, one a GPU; the last two figures are the driver's and the runtime's
        module = {name: getattr(hx._C, name) for name in dir(hx._C)}
        module["backends"] = ["cpu"] if states is None else ["cpu", "cuda"]
        cuda = SimpleNamespace(why_not=hx._C.cuda.why_not)
        if states is not None:
            cuda.built_architectures = lambda: [80, 90]
            cuda.device_state = lambda i: (not states[i], states[i], 0, 0, 12040, 13000)
        module["cuda"] = cuda
        for user in (installation, backends):
            monkeypatch.setattr(user, "_C", SimpleNamespace(**module))
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus) and torch_sees)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: gpus[i][0])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: gpus[i][1])
        monkeypatch.setattr(installation, "DRIVER_FILES", (str(tmp_path),) if driver else ())

    return make


def last_line():
    return str(hx.info()).split("\n")[-1]


def test_info_of_a_gpu_that_can_be_used(machine):
    machine(T4, H100, states=["it is too old", ""])
    report = str(hx.info())
    assert "  backends   cpu, cuda\n" in report
    assert "  CUDA       kernels for sm_80, sm_90 and, as PTX, for newer GPUs\n" in report
    assert "  GPU        cuda:0 Tesla T4, compute capability 7.5, cannot be used: it is" in report
    assert "  GPU        cuda:1 NVIDIA H100, compute capability 9.0\n" in report
    assert "CUDA runtime 13.0, CUDA driver 12.4" in report
    assert f"up to {hx._C.MAX_DIM} (64, 96, 128, 256 fast); on a GPU 64, 96, 128, 256" in report
    assert "GPU is not used" not in report


def test_info_of_a_machine_without_gpus(machine):
    machine(states=["there is no NVIDIA driver: install one"], driver=False)
    report = str(hx.info())
    assert "  GPU        none visible\n" in report
    assert "is not used" not in report and "install one" not in report


def test_info_of_a_gpu_of_another_make(machine):
    """torch for ROCm shows it under the same names."""
    machine(("AMD Instinct MI300X", (9, 4)), states=None, torch_cuda=None, driver=False)
    report = str(hx.info())
    assert "  GPU        none visible\n" in report and "is not used" not in report


@pytest.mark.parametrize(
    ("gpus", "options", "last"),
    [
        ([H100], {"states": ["its driver is too old"]}, "its driver is too old"),
        ([H100], {"states": None}, "this build has no CUDA kernels: .*HOGWILD_CUDA=1 pip install"),
        ([T4], {"states": None}, r"capability 7\.5 and the kernels need 8\.0"),
        (
            [H100],
            {"states": [""], "torch_cuda": None, "torch_sees": False},
            r"torch .* is built without CUDA: type pip install --force-reinstall torch$",
        ),
        ([H100], {"states": ["update the driver"], "torch_sees": False}, "update the driver$"),
        ([H100], {"states": None, "torch_sees": False}, "see nvidia-smi and CUDA_VISIBLE_DEVICES$"),
        ([H100], {"states": [""], "torch_sees": False}, r"torch .* finds no GPU that it can use"),
    ],
)
def test_info_ends_with_what_a_gpu_needs(machine, gpus, options, last):
    machine(*gpus, **options)
    assert re.match(f"The GPU is not used: .*{last}", last_line())


def test_a_cuda_tensor_without_cuda_kernels(machine):
    machine(H100, states=None)
    with pytest.raises(ValueError) as raised:
        backends.backend_for("query", torch.device("cuda:0"))
    assert str(raised.value) == (
        "query: expected a device that this build has a backend for (cpu), got cuda:0; "
        "this build has no CUDA kernels: in the source folder of hogwild_ext, type "
        "HOGWILD_CUDA=1 pip install ."
    )


def test_a_cuda_tensor_of_a_gpu_that_cannot_be_used(machine, monkeypatch):
    machine(H100, states=["its driver is too old"])
    monkeypatch.setattr(cuda_backend, "_C", installation._C)
    with pytest.raises(
        ValueError, match=r"^query: expected a GPU .* cuda:0: its driver is too old"
    ):
        backends.backend_for("query", torch.device("cuda:0"))


# ---- building ------------------------------------------------------------------------------------


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
