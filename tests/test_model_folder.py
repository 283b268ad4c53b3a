"""A model's folder that is broken, incomplete or has code of its own: what is said, what is run."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from command_line import error_of, run, saved_model
from hogwild_ext.bench import generate

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(saved_model(tmp_path_factory.mktemp("models")))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "m"))


def cut(file: Path, part: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * part)])


def into_shards(folder: Path) -> None:
    """The weights as two files with an index; the second one is not there."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    save_file({name: weights[name] for name in names[:3]}, folder / "one.safetensors")
    index = {
        name: "one.safetensors" if i < 3 else "two.safetensors" for i, name in enumerate(names)
    }
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    )


def without_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def pickled(folder: Path) -> None:
    """Older weights, cut off."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    cut(folder / "pytorch_model.bin", 0.7)


BREAKS: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "weights are a pointer": (
        lambda f: (f / "model.safetensors").write_bytes(POINTER),
        "model.safetensors", "is a pointer of Git LFS, not the file itself: type git lfs pull",
    ),
    "tokenizer is a pointer": (
        lambda f: (f / "tokenizer.json").write_bytes(POINTER), "tokenizer.json", "Git LFS",
    ),
    "config is a pointer": (
        lambda f: (f / "config.json").write_bytes(POINTER), "config.json", "Git LFS",
    ),
    "weights are cut": (
        lambda f: cut(f / "model.safetensors", 0.8), "model.safetensors", "is cut off or damaged",
    ),
    "weights are cut in the header": (
        lambda f: cut(f / "model.safetensors", 0.01), "model.safetensors", "is cut off",
    ),
    "weights are empty": (
        lambda f: cut(f / "model.safetensors", 0), "model.safetensors", "0 bytes long",
    ),
    "weights are zeros": (
        lambda f: (f / "model.safetensors").write_bytes(bytes(5000)),
        "model.safetensors", "is cut off or no safetensors file",
    ),
    "the header is no JSON": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x40" + bytes(7) + b"x" * 64),
        "model.safetensors", "its header cannot be read",
    ),
    "pickled weights are cut": (pickled, "pytorch_model.bin", "is cut off"),
    "a shard is missing": (into_shards, "two.safetensors", "is not there, but model.safetensors."),
    "weights are missing": (
        lambda f: (f / "model.safetensors").unlink(), "", " has no weights: expected model.safete",
    ),
    "a tensor is missing": (
        without_a_tensor, "", "1 of the model's tensors are in none of the files",
    ),
    "the tokenizer is missing": (
        lambda f: [(f / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
        "", " has no tokenizer: expected tokenizer.json",
    ),
    "the tokenizer is cut": (lambda f: cut(f / "tokenizer.json", 0.5), "tokenizer.json", "no JSON"),
    "the config is cut": (lambda f: cut(f / "config.json", 0.5), "config.json", "is no JSON"),
    "the config is no object": (lambda f: (f / "config.json").write_text("[]"), "", "cannot be"),
    "the dtype is none": (
        lambda f: (f / "config.json").write_text(
            (f / "config.json").read_text().replace("bfloat16", "float33")
        ),
        "", "cannot be loaded",
    ),
}  # fmt: skip


@pytest.mark.parametrize("break_it, file, message", BREAKS.values(), ids=BREAKS)
def test_what_is_wrong_is_said_of_which_file(
    break_it: Callable[[Path], Any],
    file: str,
    message: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    break_it(folder)
    assert run(str(folder), "What?") == 2
    said = error_of(capsys)
    assert str(folder / file) in said and message in said
    assert not said.endswith(":")


def test_a_whole_folder_is_loaded(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert run(str(folder), "What?") == 0


# ---- code that comes with a model ----------------------------------------------------------------


def with_code(folder: Path, file: str, kind: str, name: str) -> Path:
    """Makes the folder ask for a class of its own; importing that leaves a file behind."""
    ran = folder.parent / "ran"
    path = folder / file
    content = json.loads(path.read_text())
    value: Any = f"evil.{name}" if kind != "AutoTokenizer" else [None, f"evil.{name}"]
    content["auto_map"] = {kind: value}
    if kind == "AutoConfig":
        content["model_type"] = "evil"
    if kind == "AutoTokenizer":
        content["tokenizer_class"] = "Evil"
    path.write_text(json.dumps(content))
    base = {"AutoConfig": "PretrainedConfig", "AutoTokenizer": "PreTrainedTokenizerFast"}[kind]
    (folder / "evil.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom transformers import {base}\n"
        f"class {name}({base}):\n    model_type = 'evil'\n"
    )
    return ran


@pytest.mark.parametrize(
    ("file", "kind"), [("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")]
)
def test_it_is_not_run_whatever_stdin_says(
    folder: Path,
    file: str,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder.parent))
    ran = with_code(folder, file, kind, "Evil")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 99))
    assert run(str(folder), "What?") in (0, 2)
    said = capsys.readouterr().err
    assert not ran.exists()
    if kind == "AutoConfig":
        assert "needs code of its own, which is not run unasked: --trust-remote-code" in said
    assert sys.stdin.read(2) == "y\n"  # nobody asked

    with pytest.raises(ValueError) if kind == "AutoConfig" else contextlib.nullcontext():
        generate.model_from(str(folder)).load(torch.float32)
    assert not ran.exists()

    run(str(folder), "What?", "--trust-remote-code")
    assert ran.exists()  # so the code above would have been run
    assert "--trust-remote-code" not in capsys.readouterr().err


def test_nothing_loads_a_model_without_saying_whether_its_code_is_run() -> None:
    root = Path(__file__).parent.parent
    loads = 0
    for path in [*(root / "hogwild_ext").rglob("*.py"), *(root / "bench").glob("*.py")]:
        text = path.read_text()
        for part in text.split(".from_pretrained(")[1:]:
            loads += 1
            arguments = part.partition("\n    )")[0][:200]
            assert "trust" in arguments, path
    assert loads >= 5


def test_templates_cannot_reach_python() -> None:
    from scripted import byte_tokenizer

    tokenizer = byte_tokenizer("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(Exception, match="unsafe"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)


def test_pickled_weights_cannot_run_code(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"x": _Evil()}, folder / "pytorch_model.bin")
    assert run(str(folder), "What?") == 2
    assert not _Evil.ran
    assert "cannot be loaded" in error_of(capsys)


class _Evil:
    ran = False

    def __reduce__(self) -> Any:
        return _run, ()


def _run() -> None:
    _Evil.ran = True
