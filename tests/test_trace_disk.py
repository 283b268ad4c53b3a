"""A trace whose file takes no more: the run goes on, and says so once."""

from __future__ import annotations

import errno
import io
import os
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from hogwild_ext import cli, trace
from models import tiny_model
from scripted import VOCABULARY, byte_tokenizer, sampled, team

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 12


class FullDisk(io.FileIO):
    """A file on a disk that has room for some bytes, and writes what fits."""

    room = 0
    code = errno.ENOSPC
    refuses_to_close = False

    def write(self, data: Any) -> int:
        fits = min(len(data), self.room)
        if fits == 0:
            raise OSError(self.code, os.strerror(self.code))
        type(self).room -= fits
        return super().write(data[:fits]) or 0

    def close(self) -> None:
        was_open = not self.closed
        super().close()
        if was_open and self.refuses_to_close:
            raise OSError(self.code, os.strerror(self.code))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> type[FullDisk]:
    """That of the traces to come."""

    class Disk(FullDisk):
        pass

    def opened(path: Any, mode: str, **others: Any) -> Any:
        return Disk(path, "w") if "w" in mode else open(path, mode, **others)

    monkeypatch.setattr(trace, "open", opened, raising=False)
    return Disk


def written(model: Any, path: Path) -> tuple[bytes, list[Any]]:
    one = team(model, 2, generation_config=sampled())
    events = list(one.stream("p", STEPS, trace=path))
    return path.read_bytes(), events


def test_a_full_disk_ends_the_trace_and_not_the_run(
    model: Any, disk: type[FullDisk], tmp_path: Path
) -> None:
    disk.room = 10**9
    whole, events = written(model, tmp_path / "whole.jsonl")
    kinds = {line["kind"]: line for line in trace.read(tmp_path / "whole.jsonl").lines}
    assert "stop" in kinds
    path = tmp_path / "run.jsonl"
    ends = [0, 1, 10, 200, *range(300, len(whole), len(whole) // 12), len(whole) - 60]
    for room in ends:
        disk.room = room
        run = team(model, 2, generation_config=sampled()).stream("p", STEPS, trace=path)
        assert list(run) == events
        result = run.result()
        assert result.trace_error == f"{path}: {os.strerror(errno.ENOSPC)}"
        assert result.stopped_by == "max_steps" and result.steps == STEPS
        assert len(path.read_bytes()) == room and disk.room == 0
        if b"\n" in path.read_bytes():
            found = trace.read(path)  # with its last line cut
            assert not found.is_complete
            assert len(found.lines) + 1 in (path.read_bytes().count(b"\n") + x for x in (0, 1))


def test_nothing_comes_behind_half_a_line(model: Any, disk: type[FullDisk], tmp_path: Path) -> None:
    """Where there is room again later."""
    path = tmp_path / "run.jsonl"
    disk.room = 1000
    with team(model, 2).stream("p", STEPS, trace=path) as run:
        for event in run:
            if event.step == 5:
                disk.room = 10**9
    assert len(path.read_bytes()) == 1000
    assert run.result().trace_error is not None and not trace.read(path).is_complete


def test_ctrl_c_within_a_line_is_its_end(
    model: Any, disk: type[FullDisk], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, calls = tmp_path / "run.jsonl", 0

    def write(self: FullDisk, data: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return io.FileIO.write(self, data[:100] if calls == 5 else data) or 0

    monkeypatch.setattr(disk, "write", write)
    result = team(model, 2).run("p", STEPS, trace=path)
    assert result.stopped_by == "interrupted" and result.trace_error is None
    found = trace.read(path)
    assert found.lines and not found.is_complete
    assert not path.read_bytes().endswith(b"\n")


def test_what_fails_on_closing_is_told(model: Any, disk: type[FullDisk], tmp_path: Path) -> None:
    disk.room, disk.refuses_to_close, disk.code = 10**9, True, errno.EDQUOT
    run = team(model, 2).stream("p", 3, trace=tmp_path / "run.jsonl")
    list(run)
    run.close()
    assert run.result().trace_error == f"{tmp_path / 'run.jsonl'}: {os.strerror(errno.EDQUOT)}"
    assert run.result().stopped_by == "max_steps"


def test_a_run_that_is_dropped_is_not_heard_of_again(
    model: Any, disk: type[FullDisk], tmp_path: Path
) -> None:
    disk.room = 700
    run = team(model, 2).stream("p", 9, trace=tmp_path / "run.jsonl")
    for _ in range(6):
        next(run)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del run
    assert len((tmp_path / "run.jsonl").read_bytes()) == 700


def test_a_device_that_is_always_full(model: Any) -> None:
    run = team(model, 2).stream("p", 3, trace="/dev/full")
    list(run)
    assert run.result().trace_error == f"/dev/full: {os.strerror(errno.ENOSPC)}"
    with pytest.warns(RuntimeWarning, match="the trace is incomplete: /dev/full: No space") as told:
        result = team(model, 2).run("p", 3, trace="/dev/full")
    assert sum("/dev/full" in str(warning.message) for warning in told) == 1
    assert result.stopped_by == "max_steps"


def test_a_reader_that_leaves_does_not_end_the_run(model: Any, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    first: list[bytes] = []

    def read_one_line() -> None:
        with open(fifo, "rb") as file:
            first.append(file.readline())

    reader = threading.Thread(target=read_one_line)
    reader.start()
    run = team(model, 2).stream("p", 5, trace=fifo)
    reader.join()
    list(run)
    assert first[0].startswith(b'{"kind": "run"')
    assert run.result().trace_error == f"{fifo}: {os.strerror(errno.EPIPE)}"


def test_a_whole_trace_has_no_error(model: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert team(model, 2).run("p", 3, trace=tmp_path / "run.jsonl").trace_error is None
        assert team(model, 2).run("p", 3).trace_error is None


def test_a_file_that_cannot_be_opened_is_said_before_the_run(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (tmp_path, tmp_path / "none" / "run.jsonl", tmp_path / ("x" * 300)):
        with pytest.raises(OSError) as error:
            team(model, 2).stream("p", 9, trace=path)
        assert error.value.filename == str(path) or error.value.filename == path

    def read_only(path: Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(trace, "open", read_only, raising=False)
    with pytest.raises(OSError, match=r"Read-only.*run\.jsonl"):
        team(model, 2).stream("p", 9, trace=tmp_path / "run.jsonl")


def test_the_command_shows_the_result_and_names_the_file_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tiny"
    tiny_model("llama", vocab_size=VOCABULARY, head_dim=16).to(torch.float32).save_pretrained(
        folder
    )
    byte_tokenizer().save_pretrained(folder)
    words = ["run", "What?", "--model", str(folder), "--max-steps", "4", "--trace", "/dev/full"]
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert "ended by" in said.out and "the limit of 4 steps" in said.out
    last = said.err.splitlines()[-1]
    assert last == f"hogwild: the trace is incomplete: /dev/full: {os.strerror(errno.ENOSPC)}"
    assert said.err.count("/dev/full") == 1
