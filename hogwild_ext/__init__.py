"""Hogwild! Inference: several workers of one language model generate at the same time over one
shared, concurrently updated KV cache.

    concurrent_attention, rotate, view_offsets, HIDDEN    the op on plain tensors
    SegmentCache                                          the paged cache of segments
    patch, unpatch, forward                               the plug-in for transformers models
    Hogwild                                               the engine
    info                                                  what this installation can do
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  (its OpenMP runtime must be loaded before the compiled module looks)

try:
    from . import _C
except ImportError as error:
    from importlib.machinery import EXTENSION_SUFFIXES
    from pathlib import Path

    _folder = Path(__file__).parent
    if any((_folder / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        raise  # it is there, and says itself what is wrong with it
    raise ImportError(
        f"hogwild_ext was imported from {_folder}, which holds no compiled module for "
        "this Python. "
        "That is the source folder, not an installed package. Type\n\n"
        f"    pip install -e {_folder.parent}\n\n"
        "to build it there, or leave the folder so that the installed package is found."
    ) from error

from .ops import HIDDEN, concurrent_attention, rotate, view_offsets

__version__: str = _C.__version__

# Loaded on first use, so that the op alone costs no more than torch's own import.
_LAZY = {
    "SegmentCache": "cache",
    "Segment": "cache",
    "OutOfPages": "cache",
    "patch": "patching",
    "unpatch": "patching",
    "forward": "patching",
    "Hogwild": "engine",
    "info": "installation",
}

__all__ = [
    "HIDDEN",
    "Hogwild",
    "OutOfPages",
    "Segment",
    "SegmentCache",
    "concurrent_attention",
    "forward",
    "info",
    "patch",
    "rotate",
    "unpatch",
    "view_offsets",
]

if TYPE_CHECKING:
    from .cache import OutOfPages, Segment, SegmentCache
    from .engine import Hogwild
    from .installation import info
    from .patching import forward, patch, unpatch


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
