"""`HOGWILD_EMULATE=1`: hogwild_ext with a compiled module whose GPU is the emulated one.

To be started before hogwild_ext is imported. From then on tensors of the CPU go to the CUDA
backend, as if they were the GPU's. HOGWILD_EMULATE_ARCH chooses the PTX: 80, 90 (default), 100.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .build import build
from .engine import Engine
from .runtime import Runtime, device

if TYPE_CHECKING:
    from .backend import EmulatedBackend


@dataclass(frozen=True)
class Session:
    engine: Engine
    runtime: Runtime
    backend: EmulatedBackend


def wanted() -> bool:
    return os.environ.get("HOGWILD_EMULATE", "0") not in ("", "0")


def start(architecture: int | None = None) -> Session:
    """Builds what is missing and puts the emulated GPU in place of the CPU."""
    if "hogwild_ext" in sys.modules:
        raise RuntimeError("the emulated GPU has to come before hogwild_ext is imported")
    if architecture is None:
        architecture = int(os.environ.get("HOGWILD_EMULATE_ARCH", "90"))
    built = build(architecture, say=lambda line: print(line, file=sys.stderr, flush=True))

    import torch  # libtorch first, as when hogwild_ext is imported

    spec = importlib.util.spec_from_file_location(
        "hogwild_ext._C",
        built.module,
        loader=importlib.machinery.ExtensionFileLoader("hogwild_ext._C", str(built.module)),
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["hogwild_ext._C"] = module
    spec.loader.exec_module(module)

    library = ctypes.CDLL(str(built.module))
    engine, runtime = Engine(library), Runtime(library)
    for path in built.ptx:
        text = path.read_text()
        if ".entry" in text:
            engine.know(text)
    runtime.set_loader(engine.load_known)
    runtime.set_device(device(architecture))
    engine.set_checks(1)

    import hogwild_ext
    from hogwild_ext import backends

    from .backend import EmulatedBackend

    hogwild_ext._C = module  # type: ignore[misc]
    emulated = EmulatedBackend(engine, runtime)

    def backend_for(name: str, where: torch.device) -> backends.Backend:
        if where.type != "cpu":
            raise ValueError(f"{name}: expected a CPU tensor for the emulated GPU, got {where}")
        return emulated

    for name in ("backends", "ops", "cache"):
        __import__(f"hogwild_ext.{name}")
        sys.modules[f"hogwild_ext.{name}"].backend_for = backend_for
    return Session(engine, runtime, emulated)
