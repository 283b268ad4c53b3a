"""What this installation can do."""

from __future__ import annotations

import importlib.util
import platform
from dataclasses import dataclass
from importlib import metadata

import numpy as np
import torch

from . import _C

RUN_EXTRA = ("transformers", "accelerate", "gguf", "safetensors", "rich", "filelock")


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
    gpus: tuple[str, ...]
    versions: dict[str, str | None]
    """Version of each library, None where it is not installed."""
    limits: dict[str, str]
    to_do: str | None
    """The one thing to do next, if there is any."""

    def __str__(self) -> str:
        versions = ", ".join(f"{k} {v or '(not installed)'}" for k, v in self.versions.items())
        lines = [
            f"hogwild_ext {self.version}",
            f"  backends   {', '.join(self.backends)}",
            f"  CPU        {self.isa} kernels (this CPU has {', '.join(self.available_isas)}); "
            f"{self.threads} threads, {self.thread_pool}",
            f"  GPU        {', '.join(self.gpus) or 'none visible'}",
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


def info() -> Installation:
    """Backends, instruction set, versions and limits; ends with the one thing to do, if any."""
    gpus: tuple[str, ...] = ()
    if torch.cuda.is_available():
        gpus = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    missing = [name for name in RUN_EXTRA if importlib.util.find_spec(name) is None]
    to_do = None
    if missing:
        to_do = (
            f"To use models and the command line ({', '.join(missing)} missing), type: "
            'pip install "hogwild_ext[run]"'
        )
    elif gpus and "cuda" not in _C.backends:
        to_do = "A GPU is visible, but this version computes on the CPU only: use device='cpu'."
    return Installation(
        version=_C.__version__,
        backends=tuple(_C.backends),
        isa=_C.isa(),
        available_isas=tuple(_C.available_isas()),
        thread_pool=_C.thread_pool(),
        threads=torch.get_num_threads(),
        gpus=gpus,
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "transformers": _version("transformers"),
        },
        limits={
            "dtypes": "float32, float16, bfloat16",
            "head dim": f"multiples of 8 up to {_C.MAX_DIM} (64, 96, 128, 256 fast)",
        },
        to_do=to_do,
    )
