"""stdin, stdout and stderr in any encoding, closed, full; files that a command must not touch."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

import hogwild_ext as hx
from command_line import Terminal, error_of, hogwild, run, saved_model
from hogwild_ext import cli, live, streams, trace, viewer
from hogwild_ext.events import Event, Result, Stats
from scripted import team


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_model(tmp_path_factory.mktemp("models"))


def encoded(encoding: str, kind: type[io.BytesIO] = io.BytesIO) -> io.TextIOWrapper:
    return io.TextIOWrapper(kind(), encoding, line_buffering=True)


class EncodedTerminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


class Full(io.BytesIO):
    """Takes so many bytes, like a disk."""

    room = 0

    def write(self, content: Any) -> int:
        if self.tell() + len(content) > self.room:
            raise OSError(28, "No space left on device")
        return super().write(content)


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command of a shell in which `hogwild` is this one."""
    return subprocess.run(
        ["sh", "-c", f'hogwild() {{ "{sys.executable}" -m hogwild_ext "$@"; }}; {command}'],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )


# ---- encodings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "gbk", "cp1252", "utf-16"])
def test_an_encoding_ends_no_run_and_loses_no_text(
    folder: str, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", out := encoded(encoding))
    monkeypatch.setattr(sys, "stderr", err := encoded(encoding))
    words = (
        "W\u00e4s \u4f60?",
        "--workers",
        "Zo\u00eb,\u017dofie,\u4f60",
        "--plain",
        "--seed",
        "3",
    )
    assert run(folder, *words) == 0
    shown = out.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    for name in ("Zo\u00eb", "\u017dofie", "\u4f60"):
        assert name.encode(encoding, "backslashreplace").decode(encoding) + " 6" in shown
    assert b"\x00" in err.buffer.getvalue() or b"loading" in err.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "gbk", "utf-8"])
def test_columns_are_as_wide_as_they_seem(encoding: str) -> None:
    out = EncodedTerminal(io.BytesIO(), encoding)
    console = Console(file=out, force_terminal=True, width=60, height=20, color_system=None)
    out.reconfigure(errors="backslashreplace")
    names = ["Zo\u00eb", "\u4f60\u597d", "A name that is far too long for its column"]
    view = live.LiveView(console, "W\u00e4s \u4f60? " * 40, names, 9, clock=lambda: 0.0)
    for name in names:
        view.show(
            Event("token", 1, name, 1, 5, "na\u00efve \u2014 \u4f60\u597d \U0001f600 e\u0301 " * 9)
        )
    console.print(view.frame())
    lines = out.buffer.getvalue().decode(encoding).split("\n")  # type: ignore[attr-defined]
    assert len(lines) > 15 and max(map(cell_len, lines)) <= 60
    rules = [line for line in lines if line.count("\u2500") + line.count("-") > 20]
    assert len(rules) == 2
    if encoding != "utf-8":
        assert not {"\u2500", "\u2026", "\u00b7"} & set("".join(lines))


def test_the_locale_of_a_cluster(folder: str) -> None:
    """A real process: the interpreter's own streams."""
    done = shell(
        f"hogwild run 'W\u00e4s?' --model {folder} --max-steps 3 --workers 'Zo\u00eb,Yan'",
        LC_ALL="C",
        PYTHONIOENCODING="ascii",
        PYTHONUTF8="0",
        PYTHONCOERCECLOCALE="0",
    )
    assert done.returncode in (0, 2), done.stderr
    assert "Traceback" not in done.stderr
    assert "Zo\\xeb 3" in done.stdout or "problem: expected text" in done.stderr


# ---- closed, full, left --------------------------------------------------------------------------


def test_closed_streams(folder: str, tmp_path: Path) -> None:
    command = f"hogwild run What --model {folder} --threads 1 --max-steps 3 --json"
    done = shell(f"{command} 2>&-")
    assert done.returncode == 0
    assert json.loads(done.stdout.rstrip("\n").split("\n")[-1])["kind"] == "result"
    # The trace must not get a closed stream's number, and with it what is printed there.
    done = shell(f"{command} --trace {tmp_path}/t.jsonl >&- 2>&- <&-")
    assert done.returncode == 0
    assert trace.read(tmp_path / "t.jsonl").is_complete
    done = shell("hogwild info >&-")
    assert (done.returncode, done.stderr) == (
        0, "hogwild: stdout is closed: what is printed is lost\n",
    )  # fmt: skip
    done = shell("hogwild run - <&-")
    assert done.returncode == 2
    assert done.stderr.endswith("problem: - reads it from stdin, and that is closed\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_stdout_is_an_error_that_loses_nothing(folder: str) -> None:
    command = f"hogwild run What --model {folder} --threads 1 --max-steps 9"
    done = shell(f"{command} > /dev/full")
    assert done.returncode == 2
    assert "\nended by  " in done.stderr and "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    done = shell(f"{command} --json > /dev/full")
    assert done.returncode == 2
    told = [line for line in done.stderr.split("\n") if line.startswith("{")]
    assert json.loads(told[-1])["kind"] == "result"
    for other in ("info", "prompts"):
        done = shell(f"hogwild {other} > /dev/full")
        assert done.returncode == 2, other
        assert done.stderr.startswith("hogwild: error: ") and done.stderr.count("\n") == 1
        assert "No space left on device" in done.stderr
    done = shell(f"{command} 2> /dev/full")  # nobody to tell, and the run goes on
    assert done.returncode == 0 and "ended by  the limit of 9 steps" in done.stdout


@pytest.mark.parametrize("words", [(), ("--json",)])
@pytest.mark.parametrize("room", [0, 300])
def test_what_was_written_is_told_on_stderr(
    folder: str, words: tuple[str, ...], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Full, "room", room)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(Full(), "utf-8"))
    monkeypatch.setattr(sys, "stderr", err := io.StringIO())
    assert run(folder, "What?", "--max-steps", "30", "--workers", "2", *words) == 2
    said = err.getvalue()
    if words:
        result = json.loads(next(line for line in said.split("\n") if line.startswith("{")))
        assert result["kind"] == "result" and result["workers"][1]["tokens"]
    else:
        assert "\nended by  " in said and "\nBob" in said
    assert "No space left on device" in said.split("\n")[-2]


def test_a_reader_of_stderr_may_leave(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Left(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", out := io.StringIO())
    monkeypatch.setattr(sys, "stderr", Left())
    assert run(folder, "What?") == 0
    assert "ended by  the limit" in out.getvalue()


# ---- the problem ---------------------------------------------------------------------------------


def from_stdin(content: bytes, monkeypatch: pytest.MonkeyPatch, encoding: str = "utf-8") -> str:
    stdin = io.TextIOWrapper(io.BytesIO(content), encoding, errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", stdin)
    text = cli._problem("-")
    assert text is not None
    return text


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"]
)  # the last three begin with a mark
def test_a_byte_order_mark_tells_the_encoding(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "Caf\u00e9 \u4f60\r\nau \U0001f600\rlait\n"
    expected = "Caf\u00e9 \u4f60\nau \U0001f600\nlait\n"
    assert from_stdin(text.encode(encoding), monkeypatch) == expected
    big = b"\xfe\xff" + text.encode("utf-16-be")
    assert from_stdin(big, monkeypatch) == expected
    assert from_stdin("caf\u00e9".encode("latin-1"), monkeypatch, "latin-1") == "caf\u00e9"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"caf\xe9 au lait", "problem: expected text in UTF-8 on stdin, got byte 0xe9 at 3"),
        (b"\xed\xa0\x80", "problem: expected text in UTF-8 on stdin, got byte 0xed at 0"),
        (b"\xff\xfea", "problem: expected text in UTF-16 on stdin"),
        (b"", "problem: expected some text, got none"),
        (b"\xef\xbb\xbf \n", "problem: expected some text, got none"),
        (b"a\0b", "problem: expected text, got the byte 0 at 1"),
        (b"W\0h\0a\0t\0", "problem: expected text, got the byte 0 at 1"),
        (b"a" * (streams.LONGEST_PROBLEM + 1), "problem: expected at most 16 MB on stdin"),
    ],
)
def test_what_is_no_text_is_refused(
    content: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises((ValueError, cli.CommandError)) as caught:
        from_stdin(content, monkeypatch)
    assert str(caught.value).startswith(message)


def test_an_argument_that_is_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert hogwild("run", os.fsdecode(b"caf\xe9 au lait")) == 2
    assert error_of(capsys) == "problem: expected text in UTF-8, got byte 0xe9 at 3"
    assert hogwild("run", "half \ud800") == 2
    assert error_of(capsys).startswith("problem: expected text")
    assert hogwild("run", "What?", "--model", os.fsdecode(b"/caf\xe9")) == 2
    assert error_of(capsys) == "--model: there is no folder /caf\ufffd"


@pytest.mark.parametrize("problem", ["\ud800", "a\udfff", "\udce9 b", "\ud83d\ude00"])
def test_half_characters_in_python(model: Any, problem: str) -> None:
    for method in ("run", "stream"):
        with pytest.raises(ValueError, match=r"^problem: expected text, got '\\ud"):
            getattr(team(model), method)(problem)
    with pytest.raises(ValueError, match="^workers: "):
        hx.Hogwild(model, team(model).tokenizer, workers=["A", problem])


# ---- files ---------------------------------------------------------------------------------------


def test_a_trace_replaces_nothing_that_the_run_reads(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (prompts := tmp_path / "mine.toml").write_text("question = ''")
    (wheel := tmp_path / "some.whl").write_text("wheel")
    (link := tmp_path / "link").symlink_to(Path(folder) / "model.safetensors")
    model = ["--model", folder]
    for words, path in (
        (model, Path(folder) / "config.json"),
        (model, link),
        ([*model, "--prompts", str(prompts)], prompts),
        (["--model-file", str(wheel)], wheel),
    ):
        before = path.read_bytes()
        assert hogwild("run", "What?", *words, "--trace", str(path)) == 2
        assert error_of(capsys) == f"--trace: expected a file of its own, got {path}, which is read"
        assert path.read_bytes() == before


def test_a_trace_replaces_neither_the_problem_nor_what_is_printed(
    folder: str, tmp_path: Path
) -> None:
    (problem := tmp_path / "problem.txt").write_text("What?")
    command = f"hogwild run - --model {folder} --trace"
    for rest in (f"{problem} < {problem}", f"{tmp_path}/out < {problem} > {tmp_path}/out"):
        done = shell(f"{command} {rest}")
        assert done.returncode == 2
        assert "which is stdin, stdout or stderr" in done.stderr
    assert problem.read_text() == "What?"


def test_a_page_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (page := tmp_path / "p.html").write_text("old")
    page.chmod(0o600)
    (link := tmp_path / "link.html").symlink_to(page)
    viewer.write(link, "new \u4f60\n")
    assert page.read_bytes() == "new \u4f60\n".encode() and link.is_symlink()
    assert page.stat().st_mode & 0o777 == 0o600

    def half(path: Path, text: str, **others: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError):
        viewer.write(page, "newer")
    assert page.read_bytes() == "new \u4f60\n".encode()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link.html", "p.html"]


# ---- what a model writes -------------------------------------------------------------------------

NASTY = (
    "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c"  # directions
    "\u200b\u200c\u200d\u2060\ufeff\u00ad\u180e"  # drawn as nothing
    "\ufe0f\ufe0e\U000e0100\U000e0041\U000e007f\u034f\u3164\u115f"  # selectors, tags, fillers
    "\x1b\x9b\x07\x08\r\x00\x7f\x85"
)


def test_nothing_turns_a_line_around_or_upsets_columns() -> None:
    assert live.printable(f"a{NASTY}b") == "ab"
    assert live.printable("a\u2028b\u2029c") == "a\nb\nc"
    assert live.printable("Zo\u00eb \u4f60\u597d \u05d0\u05d1 e\u0301 \U0001f600\n") == (
        "Zo\u00eb \u4f60\u597d \u05d0\u05d1 e\u0301 \U0001f600\n"
    )
    flood = "".join(f"{mark}\u200d" for mark in "\u0301\u0302\u20dd" * 99)
    assert len(live.printable("a" + flood + "b")) <= 6
    assert live.printable("\ud800") == "\ufffd"


@given(st.text(st.characters()))
def test_whatever_is_written_is_printable(text: str) -> None:
    shown = live.printable(text)
    assert not {unicodedata.category(c) for c in shown if c != "\n"} & {
        "Cc", "Cf", "Cs", "Zl", "Zp",
    }  # fmt: skip
    assert live.printable(shown) == shown
    letters = [c for c in text if c.isalnum() and c not in "\u3164\uffa0\u115f\u1160"]
    assert [c for c in shown if c.isalnum()] == letters


@pytest.mark.parametrize("kind", ["live", "plain"])
def test_views_show_only_that(kind: str) -> None:
    out = Terminal()
    names = ["Ann\ufe0f", "Ben"]
    view: Any = live.PlainView(out, names)
    if kind == "live":
        console = Console(file=out, force_terminal=True, width=60, height=20, color_system=None)
        view = live.LiveView(console, f"p{NASTY}", names, 9, clock=lambda: 0.0)
    with view:
        for name in names:
            view.show(Event("token", 1, name, 1, 5, f"one{NASTY} two\n"))
        view.end(Result(f"x{NASTY}", "", [], 1, Stats(), "answer", 1), [("answer", f"x{NASTY}")])
    shown = out.getvalue()
    assert not set(NASTY) - set("\x1b\r") & set(shown)
    assert "one two" in shown


def test_json_is_exact() -> None:
    out = io.StringIO()
    live.JsonView(out).show(Event("token", 1, "Ann", 1, 5, NASTY + "\u2028"))
    assert json.loads(out.getvalue())["text"] == NASTY + "\u2028"
    assert out.getvalue().isascii() and out.getvalue().count("\n") == 1


def test_messages_carry_no_escapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model := tmp_path / "m").mkdir()
    (model / "config.json").write_text('{"model_type": "evil\\u001b[2J\\u202e"}')
    assert hogwild("run", "What?", "--model", str(model)) == 2
    assert not set("\x1b\u202e") & set(error_of(capsys))
