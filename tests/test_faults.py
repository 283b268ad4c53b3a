"""The faults that faults.py plants keep up with the kernels and the tests."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from emulator.build import CSRC
from faults import FAULTS, TESTS, StaleFault, planted, stale_faults


def test_every_fault_can_be_planted() -> None:
    assert stale_faults() == []


def test_a_fault_changes_one_line_or_few(tmp_path: Path) -> None:
    fault = FAULTS[0]
    path = tmp_path / "cuda" / fault.file
    path.parent.mkdir()
    shutil.copy(CSRC / "cuda" / fault.file, path)
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


@pytest.mark.parametrize("test", sorted({test for fault in FAULTS for test in fault.tests}))
def test_the_tests_are_there(test: str) -> None:
    file, function = re.fullmatch(r"(\w+\.py)::(\w+)(?:\[.*\])?", test).groups()
    assert f"\ndef {function}(" in (TESTS / file).read_text()
