"""The README's and the documentation's Python runs as it stands, from top to bottom."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from hogwild_ext import cli
from readme_commands import readme_command

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", ["README.md", "docs/how-it-works.md"])
def test_the_snippets_run(page: str, default_model_folder: Path) -> None:
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert snippets
    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(compile(snippet, page, "exec"), names)


def test_the_readme_has_its_commands() -> None:
    assert "hogwild run" in readme_command("run")
    assert "pytest" in readme_command("test")
    assert "torch" in readme_command("torch")


def test_the_benchmarks_commands_are_understood() -> None:
    commands = re.findall(
        r"^\.venv/bin/hogwild (bench .*)$", (ROOT / "README.md").read_text(), re.M
    )
    assert len(commands) >= 4
    for command in commands:
        options = cli._parser().parse_args(shlex.split(command, comments=True))
        assert options.command in (cli._bench_attention, cli._bench_generate)


@pytest.mark.parametrize("page", ["README.md", "docs/how-it-works.md"])
def test_links_lead_to_files(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target
