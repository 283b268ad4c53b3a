"""What this installation can do."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass
from importlib import metadata

import numpy as np
import torch

from . import _C
from .backends import NO_CUDA_KERNELS
from .cuda_backend import HEAD_DIMS

RUN_EXTRA = ("transformers", "accelerate", "gguf", "safetensors", "rich", "filelock")
# Any of them is there wherever an NVIDIA driver is.
DRIVER_FILES = (
    "/proc/driver/nvidia/version", "/dev/nvidiactl", "/usr/lib/wsl/lib/libcuda.so.1",
)  # fmt: skip


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch shows as cuda:0, cuda:1, ..."""

    name: str
    compute_capability: str
    """Such as "9.0"."""
    why_not: str
    """Why this installation cannot use it, and what helps; empty if it can."""


@dataclass(frozen=True)
class Installation:
    """See :func:`info`. Printing it gives a short report."""

    version: str
    backends: tuple[str, ...]
    isa: str
    """Instruction set of the CPU kernels; the environment variable HOGWILD_ISA forces one."""
    available_isas: tuple[str, ...]
    thread_pool: str
    threads: int
    architectures: tuple[str, ...]
    """GPUs that the CUDA kernels were compiled for, such as "sm_90"; empty without the backend."""
    gpus: tuple[Gpu, ...]
    """In torch's order: cuda:0, cuda:1, ..."""
    versions: dict[str, str | None]
    """Version of each library, None where it is not installed. With the CUDA backend also "CUDA
    runtime", linked into it, and "CUDA driver": the newest CUDA that the driver runs."""
    limits: dict[str, str]
    to_do: str | None
    """The one thing to do next, if there is any."""

    def __str__(self) -> str:
        versions = ", ".join(f"{k} {v or '(not installed)'}" for k, v in self.versions.items())
        built = "no kernels in this build"
        if self.architectures:
            built = f"kernels for {', '.join(self.architectures)} and, as PTX, for newer GPUs"
        gpus = [
            f"cuda:{i} {gpu.name}, compute capability {gpu.compute_capability}"
            + (f", cannot be used: {gpu.why_not}" if gpu.why_not else "")
            for i, gpu in enumerate(self.gpus)
        ]
        lines = [
            f"hogwild_ext {self.version}",
            f"  backends   {', '.join(self.backends)}",
            f"  CPU        {self.isa} kernels (this CPU has {', '.join(self.available_isas)}); "
            f"{self.threads} threads, {self.thread_pool}",
            f"  CUDA       {built}",
            *(f"  GPU        {gpu}" for gpu in gpus or ["none visible"]),
            f"  libraries  {versions}",
            *(f"  {name:<10} {text}" for name, text in self.limits.items()),
        ]
        if self.to_do:
            lines += ["", self.to_do]
        return "\n".join(lines)

    __repr__ = __str__


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def gpus() -> tuple[Gpu, ...]:
    """The GPUs that torch shows, and whether this installation can use them."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return ()
    found = []
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        if "cuda" in _C.backends:
            why_not = _C.cuda.device_state(i)[1]
        else:  # whether another build could use it
            gpu = 10 * major + minor
            why_not = _C.cuda.why_not(0, 1, 1, gpu, [gpu]) or NO_CUDA_KERNELS
        found.append(Gpu(torch.cuda.get_device_name(i), f"{major}.{minor}", why_not))
    return tuple(found)


def hidden_gpu() -> str | None:
    """Why torch shows no GPU although there is an NVIDIA driver, and what helps."""
    if not any(map(os.path.exists, DRIVER_FILES)):
        return None
    if torch.version.cuda is None:
        return (
            f"there is an NVIDIA driver, but torch {torch.__version__} is built without CUDA: type "
            "pip install --force-reinstall torch"
        )
    if "cuda" in _C.backends and (why_not := _C.cuda.device_state(0)[1]):
        return str(why_not)
    return (
        f"torch {torch.__version__} finds no GPU that it can use (torch.cuda.is_available() is "
        "false): see nvidia-smi and CUDA_VISIBLE_DEVICES"
    )


def _to_do(found: tuple[Gpu, ...]) -> str | None:
    unused = hidden_gpu() if not found else None
    if found and all(gpu.why_not for gpu in found):
        unused = found[0].why_not
    if unused:
        return f"The GPU is not used: {unused}"
    missing = [name for name in RUN_EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        return (
            f"To use models and the command line ({', '.join(missing)} missing), type: "
            'pip install "hogwild_ext[run]"'
        )
    return None


def info() -> Installation:
    """Backends, GPUs, versions and limits; ends with the one thing to do, if there is any."""
    found = gpus()
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "transformers": _version("transformers"),
    }
    architectures: list[int] = []
    head_dims = f"multiples of 8 up to {_C.MAX_DIM} (64, 96, 128, 256 fast)"
    if "cuda" in _C.backends:
        architectures = _C.cuda.built_architectures()
        *_, driver, runtime = _C.cuda.device_state(0)
        versions["CUDA runtime"] = _cuda_version(runtime)
        versions["CUDA driver"] = _cuda_version(driver) if driver else None
        head_dims += f"; on a GPU {', '.join(map(str, HEAD_DIMS))}"
    return Installation(
        version=_C.__version__,
        backends=tuple(_C.backends),
        isa=_C.isa(),
        available_isas=tuple(_C.available_isas()),
        thread_pool=_C.thread_pool(),
        threads=torch.get_num_threads(),
        architectures=tuple(f"sm_{a}" for a in architectures),
        gpus=found,
        versions=versions,
        limits={"dtypes": "float32, float16, bfloat16", "head dim": head_dims},
        to_do=_to_do(found),
    )


def _cuda_version(number: int) -> str:
    """13000 -> 13.0"""
    return f"{number // 1000}.{number % 1000 // 10}"
