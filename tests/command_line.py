"""Command lines in tests: a small model to name, and what was said."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from hogwild_ext import cli
from models import tiny_model
from scripted import VOCABULARY, byte_tokenizer


def saved_model(parent: Path) -> str:
    """The folder of a tiny model with random weights and its tokenizer, saved as bfloat16."""
    path = parent / "tiny"
    model = tiny_model("llama", vocab_size=VOCABULARY, head_dim=16).to(torch.bfloat16)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return str(path)


class Terminal(io.StringIO):
    """Takes what is printed, and says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def hogwild(*words: str) -> int:
    """Runs a command line; argparse's own exit is an exit code too."""
    try:
        return cli.main(list(words))
    except SystemExit as exit:
        return int(exit.code or 0)


def run(folder: str, *words: str) -> int:
    """A short run in float32, which every CPU does the same way."""
    common = ("--model", folder, "--threads", "1", "--dtype", "float32", "--max-steps", "6")
    return hogwild("run", *common, *words)


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that an error is, without what was said before it."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    last = captured.err.rstrip("\n").split("\n")[-1]
    assert last.startswith("hogwild: error: ")
    return last.removeprefix("hogwild: error: ")
