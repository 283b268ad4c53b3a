"""Each promise of docs/reliability.md names tests that there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "reliability.md"


def test_every_promise_names_tests_that_there_are() -> None:
    named = re.findall(r"`(test_\w+\.py)?(?:::(test_\w+))?`", PAGE.read_text())
    assert len(named) > 60
    file, missing = "", []
    for given, test in named:
        file = given or file
        if not (TESTS / file).is_file():
            missing.append(file)
            continue
        tree = ast.parse((TESTS / file).read_text())
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        if test and test not in names:
            missing.append(f"{file}::{test}")
    assert not missing, f"{PAGE.name} names what is not there: {', '.join(missing)}"


def test_every_promise_has_one() -> None:
    for promise in re.split(r"\n(?=- )", PAGE.read_text()):
        if promise.startswith("- "):
            assert "`test_" in promise, promise
