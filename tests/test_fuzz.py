"""Drawn calls, in numbers that take about half a minute each: the native fuzzer with sanitizers
(fuzz/README.md), which is built first, and lives of a cache (cache_lives.py). By hand they go on as
long as one likes.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

import cache_lives
from emulator.build import BuildError
from fuzz.build import build

pytestmark = pytest.mark.cpu

EXECUTIONS = 3000  # half a minute of the fuzzer under AddressSanitizer, on an idle machine
OPERATIONS = 6000  # on a cache


@pytest.fixture(scope="module")
def sanitized() -> Path:
    try:
        return build("address,undefined")
    except BuildError as error:
        if "cannot find" in str(error) or "unrecognized" in str(error):
            pytest.skip("this compiler has no libraries of the sanitizers (libasan, libubsan)")
        raise


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True)


def assert_nothing_found(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, f"{done.stderr[-4000:]}\n{done.stdout}"
    assert "0 findings" in done.stdout


def test_native_calls_under_sanitizers(sanitized: Path, seed: int) -> None:
    assert_nothing_found(run(sanitized, "--seed", str(seed), "--count", str(EXECUTIONS)))


def test_lives_of_a_cache(seed: int, one_thread: None) -> None:
    for number in range(OPERATIONS // cache_lives.OPERATIONS):
        wrong = cache_lives.live(seed, number)
        assert wrong is None, f"{wrong}\npython tests/cache_lives.py --seed {seed} --start {number}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--isa", "mmx"], "--isa: this CPU or build has no 'mmx'"),
        (["--count", "many"], "--count: expected a number, got 'many'"),
        (["--seed"], "--seed: expected a value behind it"),
        (["--seeds", "1"], "--seeds: not known"),
    ],
)
def test_bad_arguments(sanitized: Path, arguments: Sequence[str], words: str) -> None:
    done = run(sanitized, *arguments)
    assert done.returncode == 2 and words in done.stderr


def test_one_execution_is_the_same_alone(sanitized: Path) -> None:
    """A finding is repeated by its number: it does not depend on what ran before it."""
    arguments = ["--seed", "7", "--isa", "baseline", "--print", "1"]
    whole = run(sanitized, *arguments, "--count", "40")
    alone = run(sanitized, *arguments, "--start", "23", "--count", "1")
    assert_nothing_found(whole)
    assert len(lines := whole.stderr.splitlines()) == 40
    assert alone.stderr.splitlines() == lines[23:24]
