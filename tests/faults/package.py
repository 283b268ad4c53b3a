"""Faults of the Python modules."""

from __future__ import annotations

from .fault import Fault

FAULTS: list[Fault] = [
    Fault(
        "default model: files keep the rights that their writer gave them",
        "hogwild_ext/default_model.py",
        "file.chmod(0o644)",
        "file.stat()",
    ),
    Fault(
        "default model: the room needed leaves out the GGUF",
        "hogwild_ext/default_model.py",
        "return package.gguf_bytes + max(package.wheel_bytes, package.converted_bytes)",
        "return max(package.wheel_bytes, package.converted_bytes)",
    ),
    Fault(
        "replay: conclusions may copy any number of bytes",
        "hogwild_ext/trace.py",
        "if not 0 <= by_forks <= concluded * PAGE_SIZE * size:",
        "if not 0 <= by_forks:",
    ),
    Fault(
        "workers' random streams are one stream, a seed apart",
        "hogwild_ext/sampling.py",
        "words = [seed % 2**32, worker, seed // 2**32]",
        "words = [seed + worker]",
    ),
    Fault(
        "no top_k means no limit",
        "hogwild_ext/sampling.py",
        "50 if top_k is None",
        "0 if top_k is None",
    ),
    Fault(
        "a conclusion's processors do not see the worker's own tokens",
        "hogwild_ext/run.py",
        "Written(worker.tokens)",
        "Written()",
    ),
    Fault(
        "text is decoded behind one token of what stands before it",
        "hogwild_ext/text_decoder.py",
        "self._tokens = list(before)",
        "self._tokens = list(before)[-1:]",
    ),
]
