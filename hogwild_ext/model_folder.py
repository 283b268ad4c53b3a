"""What is wrong with a model's folder, said so that it can be put right.

The libraries that read models rarely name the file: a cut one is a failed parse to them. So once
they have failed, the files are looked at.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json",
    "vocab.txt", "tekken.json",
)  # fmt: skip
_POINTER = b"version https://git-lfs"
_AGAIN = "fetch it again from where the model comes from"


def explain(name: str, error: Exception, trusts_code: bool = False) -> str:
    """Why a model, a folder or a name on the hub, cannot be loaded, after an attempt that failed.

    `trusts_code`: whether code of its own was allowed.
    """
    folder = Path(name) if Path(name).is_dir() else _from_the_hub(name)
    flaw = None if folder is None else next(_flaws(folder, is_partial=folder != Path(name)), None)
    said = " ".join(str(error).split()) or type(error).__name__
    if "trust_remote_code" in said and not trusts_code:
        return (
            f"{name} needs code of its own, which is not run unasked: --trust-remote-code runs it, "
            "and with it whatever its makers want"
        )
    if flaw is not None:
        return flaw
    if Path(name).is_dir() or not isinstance(error, OSError):
        kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        return f"{name} cannot be loaded: {kind}{said}"
    return f"there is no folder {name}, and it could not be had from the hub either: {said}"


def check_complete(name: str, missing: set[str]) -> None:
    """Raises ValueError if tensors of the model were in no file; they would be random numbers."""
    if missing:
        first = ", ".join(sorted(missing)[:3])
        raise ValueError(
            f"{len(missing)} of the model's tensors are in none of the files in {name}: {first}"
            + (", ..." if len(missing) > 3 else "")
            + f"; {_AGAIN}"
        )


def _from_the_hub(name: str) -> Path | None:
    """The folder of a hub's model on this machine, if it is there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def _flaws(folder: Path, is_partial: bool) -> Iterator[str]:
    """One by one; `is_partial`: files that are not there are no flaw, they come when needed."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    for file in files:
        if flaw := _flaw(file):
            yield f"{file} {flaw}"
    names = {file.name for file in files}
    if is_partial:
        return
    indices = [name for weights in WEIGHTS if (name := f"{weights}.index.json") in names]
    shards = set[str]()
    if indices and not names.intersection(WEIGHTS):
        content = _read_json(folder / indices[0])
        index = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(index, dict) or not index:
            yield f"{folder / indices[0]} has no weight_map; {_AGAIN}"
        else:
            shards = {str(shard) for shard in index.values()}
    for shard in sorted(shards - names):
        yield f"{folder / shard} is not there, but {indices[0]} names it; {_AGAIN}"
    if not indices and not names.intersection(WEIGHTS):
        yield f"{folder} has no weights: expected {' or '.join(WEIGHTS)}"
    if not names.intersection(TOKENIZERS):
        yield (
            f"{folder} has no tokenizer: expected tokenizer.json or another of its files; copy "
            "them from where the model comes from"
        )


def _flaw(file: Path) -> str | None:
    """What is wrong with a file, if anything."""
    try:
        with file.open("rb") as content:
            start = content.read(len(_POINTER))
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if start == _POINTER:
        return "is a pointer of Git LFS, not the file itself: type git lfs pull in its folder"
    if file.suffix == ".safetensors":
        return _flaw_of_safetensors(file)
    if file.suffix == ".json":
        try:
            _read_json(file)
        except (ValueError, RecursionError) as error:
            return f"is no JSON ({error}); {_AGAIN}"
    if file.suffix == ".bin" and start[:2] == b"PK" and not zipfile.is_zipfile(file):
        return f"is cut off; {_AGAIN}"
    if file.suffix in (".bin", ".model") and not start:
        return f"is empty; {_AGAIN}"
    return None


def _flaw_of_safetensors(file: Path) -> str | None:
    """Whether the file is as long as its header says."""
    size = file.stat().st_size
    with file.open("rb") as content:
        start = content.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not length or 8 + length > size:
            return f"is cut off or no safetensors file, {size} bytes long; {_AGAIN}"
        try:
            header = json.loads(content.read(length))
            ends = [
                tensor["data_offsets"][1]
                for name, tensor in header.items()
                if name != "__metadata__"
            ]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            return f"is damaged: its header cannot be read; {_AGAIN}"
    if expected != size:
        return f"is cut off or damaged: expected {expected} bytes, got {size}; {_AGAIN}"
    return None


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
