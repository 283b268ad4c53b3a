"""The faults that are planted keep up with the sources and the tests, and so do drawn ones."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from faults import mutate, operators, selections
from faults.cuda import tests as emulated
from faults.fault import ROOT, TESTS, Fault, StaleFault, planted, stale_faults
from faults.run import FAULTS


def test_every_fault_can_be_planted() -> None:
    assert stale_faults(FAULTS) == []


@pytest.mark.parametrize("fault", [FAULTS[0], FAULTS[-1]], ids=lambda fault: fault.file)
def test_a_fault_changes_one_line_or_few(tmp_path: Path, fault: Fault) -> None:
    path = tmp_path / fault.file
    path.parent.mkdir(parents=True)
    shutil.copy(ROOT / fault.file, path)
    before = path.read_text()
    after, line = planted(fault, tmp_path)
    assert after != before == path.read_text()
    before_it = after.splitlines()[: line - 1]
    assert before_it == before.splitlines()[: line - 1]

    for text in (before.replace(fault.old, ""), before + fault.old):
        path.write_text(text)
        with pytest.raises(StaleFault, match=re.escape(fault.file)):
            planted(fault, tmp_path)


def test_names_tell_faults_apart() -> None:
    assert [name for name, n in Counter(fault.name for fault in FAULTS).items() if n > 1] == []
    assert all(fault.old != fault.new for fault in FAULTS)


NAMED = {test for fault in FAULTS for test in fault.tests}


@pytest.mark.parametrize("test", sorted({*emulated.OP, *emulated.PAGES, *NAMED}))
def test_the_tests_are_there(test: str) -> None:
    file, _, function = re.sub(r"\[.*\]$", "", test).partition("::")
    assert not function or f"\ndef {function}(" in (TESTS / file).read_text()
    assert (TESTS / file).exists()


@pytest.mark.parametrize("file", mutate.files())
def test_every_file_has_tests_and_changes(file: str) -> None:
    assert all((TESTS / test).exists() for test in selections.tests_of(file))
    text = (ROOT / file).read_text()
    for fault in operators.faults_of(file, text)[::25]:
        assert text.count(fault.old) == 1 and fault.old != fault.new
        if file.endswith(".py"):
            compile(text.replace(fault.old, fault.new), file, "exec")


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("x = a < b\n", {"x = a <= b"}),
        ("x = a + b\n", {"x = a"}),
        ("x = 7\n", {"x = 8"}),
        ("x = a and b\n", {"x = (a)", "x = (b)"}),
        ("x = not a\n", {"x = a"}),
        ("if x:\n    f(x)\n", {"    pass"}),
        ("x = min(a, b)\n", {"x = max(a, b)"}),
        ("def f(x: int = a < b) -> 3 + 4: ...\n", {"def f(x: int = a <= b) -> 3 + 4: ..."}),
        ("raise ValueError(a + b)\n", set()),
        ("x = f'{a + b}'\n", set()),
    ],
)
def test_changes_of_python(text: str, changed: set[str]) -> None:
    assert {fault.new for fault in operators.faults_of("x.py", text)} == changed


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("  if (a < b) f();\n", {"  if (a <= b) f();"}),
        ("  x = n + 1;\n", {"  x = n + 2;", "  x = n - 1;", "  x = n;"}),
        ("  x = a + b * c - d;\n", {"  x = a - d;", "  x = a + b - d;", "  x = a + b * c;"}),
        ("  x = a * b[i + j];\n", {"  x = a;", "  x = a * b[i];"}),
        ("  x = std::min(a, b);\n", {"  x = std::max(a, b);"}),
        ("  if (a && f(b, c)) return;\n", {"  if (a) return;"}),
        ("  x += y;\n", {"  x = y;"}),
        ("{\n  f(a, b);\n}\n", {"  ;"}),
        ("std::vector<int> x;  // a < b\n", set()),
    ],
)
def test_changes_of_cpp(text: str, changed: set[str]) -> None:
    assert {fault.new for fault in operators.faults_of("x.h", text)} == changed


def test_the_same_seed_draws_the_same_changes() -> None:
    some = mutate.draw(3, 20)
    assert some == mutate.draw(3, 30)[:20] != mutate.draw(4, 20)
    assert len({mutate.key(fault) for fault in some}) == 20
