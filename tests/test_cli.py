"""The command line: what it shows, to whom, and what it says when something is wrong."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

import hogwild_ext
from command_line import Terminal, error_of, hogwild, run, saved_model
from hogwild_ext import cli, default_model, engine, installation, live, packed_linear, trace
from hogwild_ext import run as runs
from hogwild_ext.events import EVENT_KINDS, Event, Result, Stats
from hogwild_ext.prompts import REASONING, SHORT
from scripted import VOCABULARY, byte_tokenizer

ESCAPE = "\x1b"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    level = logging.getLogger("huggingface_hub").level
    verbosity = transformers.utils.logging.get_verbosity()
    yield
    transformers.utils.logging.set_verbosity(verbosity)
    logging.getLogger("huggingface_hub").setLevel(level)
    transformers.utils.logging.enable_progress_bar()


# ---- what a run shows ----------------------------------------------------------------------------


def test_plain_lines_in_a_pipe(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "What?", "--workers", "Ann,Ben", "--seed", "5") == 0
    captured = capsys.readouterr()
    *lines, empty, ended, tokens, speed, time, seed = captured.out.rstrip("\n").split("\n")
    assert empty == ""
    assert lines and all(line.startswith(("Ann: ", "Ben: ")) for line in lines)
    assert ended == "ended by  the limit of 6 steps (--max-steps)"
    assert tokens == "tokens    Ann 6, Ben 6"
    assert re.fullmatch(
        r"speed     [\d.]+ tokens/s: 12 tokens in 6 steps and [\d.]+ s, "
        r"the first after [\d.]+ s",
        speed,
    )
    shares = re.fullmatch(
        r"time      attention ([\d.]+)%, the rest of the model ([\d.]+)%, sampling ([\d.]+)%, "
        r"the engine's own Python ([\d.]+)%",
        time,
    )
    assert shares is not None and sum(map(float, shares.groups())) == pytest.approx(100, abs=0.3)
    assert seed == "seed      5 (--seed 5 repeats this run)"
    assert ESCAPE not in captured.out
    assert "in float32 (as asked), 1 thread\n" in captured.err


def test_whole_lines_come_behind_their_writers_name() -> None:
    out = io.StringIO()
    view = live.PlainView(out, ["Ann", "Ben"])

    def say(name: str, text: str, kind: str = "token") -> None:
        view.show(Event(kind, 1, name, 1, 9, text))

    say("Ann", "One")
    say("Ben", "Two \x1b[31mlines\n\tof text.\n\n")
    say("Ann", " line.\n\nAnd")
    assert out.getvalue() == "Ben: Two [31mlines\nBen: of text.\nAnn: One line.\n"
    view.show(Event("commit", 2, "Ann", 1, None, "One line.\n\n"))
    say("Ann", " its", "token")
    say("Ann", " end", "end")
    say("Ben", "Broken")
    run_result = Result(None, "", [], 2, Stats(), "end", 1)
    view.end(run_result, [("seed", "1")])
    assert out.getvalue().split("\n")[3:] == [
        "Ann: And its end", "Ben: Broken ...", "", "seed  1", "",
    ]  # fmt: skip


def test_json(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "What?", "--workers", "2", "--seed", "5", "--json") == 0
    captured = capsys.readouterr()
    lines = captured.out.rstrip("\n").split("\n")
    *events, result = [json.loads(line) for line in lines]
    for event in events:
        assert list(event) == ["kind", "step", "worker", "paragraph", "token", "text"]
        assert event["kind"] in EVENT_KINDS
        assert isinstance(event["step"], int) and isinstance(event["text"], str)
    tokens = [event for event in events if event["kind"] == "token"]
    assert [event["worker"] for event in tokens] == ["Alice", "Bob"] * 6
    assert events[-1] == {
        "kind": "stop", "step": 6, "worker": None, "paragraph": None, "token": None,
        "text": "max_steps",
    }  # fmt: skip
    assert list(result) == [
        "kind", "answer", "text", "workers", "steps", "stats", "stopped_by", "seed", "snapshots",
        "trace_error",
    ]  # fmt: skip
    assert result["kind"] == "result" and result["seed"] == 5
    assert [w["tokens"] for w in result["workers"]] == [
        [event["token"] for event in tokens if event["worker"] == name] for name in ("Alice", "Bob")
    ]
    assert result["stats"]["generated_tokens"] == 12
    assert result["stats"]["engine_seconds"] >= 0 and result["stats"]["tokens_per_second"] > 0


def test_a_trace_is_written_and_named(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.jsonl"
    assert (
        run(folder, "What?", "--workers", "2", "--layout", "contiguous", "--trace", str(path)) == 0
    )
    assert f"wrote {path}; to look at it: hogwild view {path}" in capsys.readouterr().err
    read = trace.read(path)
    assert read.is_complete
    header = {name: read.header[name] for name in ("problem", "layout", "workers", "model")}
    assert header == {
        "problem": "What?", "layout": "contiguous", "workers": ["Alice", "Bob"], "model": "tiny",
    }  # fmt: skip


def test_words_of_ones_own_and_snapshots(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hogwild("prompts", "short") == 0
    words = capsys.readouterr().out
    assert words == SHORT.as_toml()
    path = tmp_path / "mine.toml"
    path.write_text(
        words.replace('heading = "{name}:"', 'heading = "<{name}>"').replace(
            'closing = ""', 'closing = "Well: "'
        )
    )
    options = ("--prompts", str(path), "--snapshots", "2, 4", "--answer-tokens", "3")
    assert run(folder, "What?", "--workers", "2", "--seed", "1", "--json", *options) == 0
    *events, result = map(json.loads, capsys.readouterr().out.rstrip("\n").split("\n"))
    assert {e["text"] for e in events if e["kind"] == "start"} >= {"<Alice>", "<Bob>"}
    concluded = [e for e in events if e["kind"] == "conclusion"]
    assert [e["step"] for e in concluded] == [2, 4, 6]
    assert all(e["text"].startswith("Well: ") for e in concluded)
    assert [shot["steps"] for shot in result["snapshots"]] == [2, 4]

    assert run(folder, "What?", "--workers", "2", "--seed", "1", *options) == 0
    out = capsys.readouterr().out
    assert re.search(r"^after 2 steps +no answer$", out, re.MULTILINE)
    assert "Alice: (asked for the answer after step 2) Well:" in out


def test_the_words_for_models_that_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert hogwild("prompts") == 0
    assert capsys.readouterr().out == REASONING.as_toml()


def test_workers_are_asked_on_the_command_line(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('paragraph_end = "[^$]"\nquestion = " Again?"\n')
    options = ("--prompts", str(path), "--workers", "2", "--json")
    for every, asked in (("2", True), ("0", False)):
        assert run(folder, "What?", *options, "--question-every", every) == 0
        assert ('"kind": "question"' in capsys.readouterr().out) == asked


def test_a_model_without_a_chat_template_is_said(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, "What?") == 0
    assert "no chat template" not in capsys.readouterr().err
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    (plain / "chat_template.jinja").unlink()
    assert run(str(plain), "What?") == 0
    assert "no chat template: the model is given the problem as plain text" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trace", "{tmp}"], "--trace: expected a file, got the folder {tmp}"),
        (["--trace", "{tmp}/none/a.jsonl"], "--trace: there is no folder {tmp}/none"),
        (
            ["--prompts", "{tmp}/none.toml"],
            "--prompts: there is no file {tmp}/none.toml",
        ),
        (
            ["--prompts", "{tmp}/bad.toml"],
            "{tmp}/bad.toml: greeting: expected one of system, alone",
        ),
        (
            ["--snapshots", "3"],
            "--snapshots: expected prompts with a closing text, which makes a worker give its "
            "answer, and those for small models have none. `hogwild prompts short` prints them",
        ),
        (
            ["--snapshots", "3,7"],
            "--snapshots: expected at most 6, the number of steps (--max-steps), got 7",
        ),
        (
            ["--snapshots", "3", "--answer-tokens", "0"],
            "--snapshots: expected --answer-tokens above 0",
        ),
        (["--layout", "round"], "layout: expected one of combined, contiguous, interleaved, got"),
    ],
)
def test_mistakes_in_the_protocol_are_said(
    folder: str,
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bad.toml").write_text('greeting = "Hello"')
    assert run(folder, "What?", *(option.format(tmp=tmp_path) for option in options)) == 2
    assert error_of(capsys).startswith(message.format(tmp=tmp_path))


def test_snapshots_of_the_default_model_are_checked_before_it_is_fetched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_load", None)
    assert hogwild("run", "What?", "--snapshots", "9") == 2
    assert "--snapshots: expected prompts with a closing text" in error_of(capsys)
    assert hogwild("run", "What?", "--snapshots", "999") == 2
    assert f"expected at most {cli.DEMO_STEPS}, " in error_of(capsys)


def test_packed_linear_layers(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    pack = packed_linear.PackedWeight.__init__
    monkeypatch.setattr(
        packed_linear.PackedWeight, "__init__", lambda *args: made.append(pack(*args))
    )
    assert run(folder, "What?") == 0 and not made
    assert run(folder, "What?", "--linear", "packed") == 0 and made
    assert run(folder, "What?", "--linear", "fast") == 2


def test_a_seed_repeats_a_run(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    def shown(*words: str) -> str:
        assert run(folder, "What?", "--temperature", "1.5", "--json", *words) == 0
        return "".join(
            line
            for line in capsys.readouterr().out.splitlines(keepends=True)
            if '"kind": "result"' not in line
        )

    assert shown("--seed", "7") == shown("--seed", "7")
    assert shown("--seed", "7") != shown("--seed", "8")
    assert shown() != shown()  # a fresh one each time


def test_a_terminal_gets_columns(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    monkeypatch.setenv("LINES", "20")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    assert run(folder, "What?", "--workers", "3") == 0
    shown = terminal.getvalue()
    assert f"{ESCAPE}[1;36mAlice" in shown and f"{ESCAPE}[1;35mBob" in shown
    final = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", shown).rpartition("What?")[2].split("\n")
    assert all(cell_len(line.rstrip()) <= 90 for line in final)
    assert re.search(r"Alice +6   Bob +6   Carol +6", "\n".join(final))
    assert any(line.startswith("ended by") for line in final)

    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    assert run(folder, "What?") == 0
    assert not re.search(r"\x1b\[[\d;]*3\d[;m]", terminal.getvalue())

    for variable, value, words in (("TERM", "dumb", ()), ("TERM", "xterm", ("--plain",))):
        monkeypatch.setenv(variable, value)
        monkeypatch.setattr(sys, "stdout", terminal := Terminal())
        assert run(folder, "What?", *words) == 0
        assert ESCAPE not in terminal.getvalue() and "Alice: " in terminal.getvalue()


def test_ctrl_c_ends_cleanly_with_what_there_is(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = runs.forward, 0

    def press(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        logits = real(*args)
        if calls == 4:
            signal.raise_signal(signal.SIGINT)
        return logits

    monkeypatch.setattr(runs, "forward", press)
    before = signal.getsignal(signal.SIGINT)
    assert run(folder, "What?", "--max-steps", "99", "--json") == 130
    assert signal.getsignal(signal.SIGINT) is before
    captured = capsys.readouterr()
    result = json.loads(captured.out.rstrip("\n").split("\n")[-1])
    assert (result["stopped_by"], result["steps"]) == ("interrupted", 4)
    assert "Traceback" not in captured.err

    calls = 0
    assert run(folder, "What?", "--max-steps", "99") == 130
    assert "ended by  Ctrl-C\n" in capsys.readouterr().out


def test_a_second_ctrl_c_does_not_wait_for_the_step(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = runs.forward, 0

    def press(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(runs, "forward", press)
    assert run(folder, "What?", "--max-steps", "99", "--json") == 130
    result = json.loads(capsys.readouterr().out.rstrip("\n").split("\n")[-1])
    assert (result["stopped_by"], result["steps"]) == ("interrupted", 3)


def test_a_second_ctrl_c_while_an_event_is_shown(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = live.JsonView.show

    def show(view: Any, event: Event) -> None:
        if event.step == 3:
            raise KeyboardInterrupt
        real(view, event)

    monkeypatch.setattr(live.JsonView, "show", show)
    assert run(folder, "What?", "--max-steps", "99", "--json") == 130
    result = json.loads(capsys.readouterr().out.rstrip("\n").split("\n")[-1])
    assert (result["stopped_by"], result["steps"]) == ("interrupted", 3)


def test_ctrl_c_while_loading(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def press(*args: Any, **others: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", press)
    assert run(folder, "What?") == 130
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.endswith("hogwild: interrupted\n")


def test_a_full_context_ends_a_run_without_an_error(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("What?", "--workers", "1", "--max-tokens", "320", "--max-steps", "4000")
    assert run(folder, *words, "--temperature", "0") == 0
    assert "ended by  the end of the context" in capsys.readouterr().out


def test_the_problem_can_come_from_stdin(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    real = engine.Hogwild.stream

    def stream(self: Any, problem: str, max_steps: int, **options: Any) -> Any:
        asked.append((problem, max_steps, self.names))
        return real(self, problem, max_steps, **options)

    monkeypatch.setattr(engine.Hogwild, "stream", stream)
    monkeypatch.setattr(sys, "stdin", io.StringIO("From a pipe.\n"))
    assert run(folder, "-", "--workers", "1") == 0
    assert asked == [("From a pipe.\n", 6, ("Alice",))]
    assert run(folder, "--workers", "Zoe, Yan") == 0
    assert "town" in asked[1][0] and asked[1][2] == ("Zoe", "Yan")
    assert f"an example: {asked[1][0]}" in capsys.readouterr().err


def test_the_default_model_says_what_it_is(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {}

    def ensure(*, report: Any, progress: Any, model_file: Any) -> Path:
        given["model_file"] = model_file
        report("Fetching it.")
        for done in range(0, 101, 5):
            progress(done * 1_000_000, 100_000_000)
        return Path(folder)

    monkeypatch.setattr(default_model, "ensure", ensure)
    monkeypatch.setattr(cli, "DEMO_STEPS", 5)
    assert hogwild("run", "--threads", "1", "--model-file", "some.whl") == 0
    captured = capsys.readouterr()
    assert given == {"model_file": "some.whl"}
    assert "ended by  the limit of 5 steps" in captured.out
    assert "hogwild: Fetching it.\nhogwild: 0 of 100 MB\nhogwild: 25 of 100 MB\n" in captured.err
    remark = [line for line in captured.err.splitlines() if "demonstration model" in line]
    assert len(remark) == 1 and "--model Qwen/" in remark[0]


def test_sampling_comes_from_the_model_and_from_the_command_line() -> None:
    config = transformers.GenerationConfig(do_sample=True, temperature=0.6, top_p=0.95)

    def sampling(*words: str) -> Any:
        return cli._sampling(cli._parser().parse_args(["run", *words]), config)

    theirs = sampling("--model", "m")
    assert (theirs.do_sample, theirs.temperature, theirs.top_p) == (True, 0.6, 0.95)
    greedy = sampling("--model", "m", "--temperature", "0")
    assert greedy.do_sample is False
    ours = sampling("--model", "m", "--temperature", "1.5", "--top-k", "3", "--top-p", "0.5")
    assert (ours.temperature, ours.top_k, ours.top_p) == (1.5, 3, 0.5)
    assert sampling("--model", "m", "--repetition-penalty", "1.2").repetition_penalty == 1.2
    demo = sampling()
    assert {name: getattr(demo, name) for name in cli.DEMO_SAMPLING} == cli.DEMO_SAMPLING
    assert config.repetition_penalty in (None, 1.0)  # the model's own is left alone
    assert cli.DEMO_STEPS <= 256


# ---- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layout", "circle"], r"layout: expected one of combined.*, got 'circle'"),
        (["--dtype", "int8"], r"--dtype: expected auto, float32, .*, got 'int8'"),
        (["--device", "tpu"], r"--device: expected auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["--device", "cuda:x"], r"--device: expected auto, cpu, cuda or cuda:N, got 'cuda:x'"),
        (["--workers", "Alice"], r"--workers: expected a number or several names"),
        (["--workers", "A,A"], r"workers: expected different names"),
        (["--workers", "0"], r"workers: expected an integer from 1"),
        (["--temperature", "-1"], r"--temperature: expected at least 0"),
        (["--temperature", "1", "--top-p", "7"], r"generation_config: .*top_p"),
        (["--max-tokens", "9"], r"problem: expected one that leaves room"),
        (["--model-file", "x.whl"], r"--model-file: expected without --model"),
    ],
)
def test_errors_are_one_line(
    folder: str, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert run(folder, "What?", *words) == 2
    assert re.match(message, error_of(capsys))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--max-steps", "0"], "--max-steps.*at least 1, got 0"),
        (["run", "--seed", "x"], "--seed.*expected a whole number, got 'x'"),
        (["run", "--json", "--plain"], "not allowed with"),
        (["run", "two", "words"], "unrecognized arguments: words"),
        (["bench"], "required: WHAT"),
        ([], "COMMAND"),
    ],
)
def test_a_wrong_command_line_shows_the_usage(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert hogwild(*words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("usage: hogwild")
    assert re.search(message, captured.err)


def test_a_model_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, message in (
        ("./nowhere", "--model: there is no folder ./nowhere"),
        (str(tmp_path), f"--model: expected a model's folder, got {tmp_path}, which has no config"),
        (__file__, f"--model: expected a folder or a name on the hub, got the file {__file__}"),
        ("nobody/nothing-here", "--model: there is no folder nobody/nothing-here, and it could"),
    ):
        assert hogwild("run", "What?", "--model", name) == 2
        assert error_of(capsys).startswith(message)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 9}')
    assert hogwild("run", "What?", "--model", str(tmp_path)) == 2
    assert error_of(capsys).startswith(f"--model: {tmp_path} has no weights: expected ")


def test_a_model_that_is_not_supported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert hogwild("run", "What?", "--model", str(tmp_path)) == 2
    assert re.match(r"model: expected one of the model types .* got 'gpt2'", error_of(capsys))


def test_missing_libraries_are_named_with_what_to_type(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = cli.importlib.util.find_spec
    for missing, out in (("transformers", io.StringIO()), ("rich", Terminal())):
        monkeypatch.setattr(
            cli.importlib.util,
            "find_spec",
            lambda name, missing=missing: None if name == missing else real(name),
        )
        monkeypatch.setattr(sys, "stdout", out)
        assert run(folder, "What?") == 2
        expected = f'not installed: {missing}. Type: pip install "hogwild_ext[run]"'
        assert capsys.readouterr().err == f"hogwild: error: {expected}\n"
    # Without a terminal nothing is drawn, and rich is not needed.
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert run(folder, "What?") == 0


def test_errors_of_missing_libraries_deep_inside(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ensure(**others: Any) -> Path:
        raise ImportError("No module named 'gguf'", name="gguf")

    monkeypatch.setattr(default_model, "ensure", ensure)
    assert hogwild("run", "What?") == 2
    assert error_of(capsys) == "No module named 'gguf'. Type: pip install \"hogwild_ext[run]\""


def test_debug_shows_the_traceback(folder: str) -> None:
    with pytest.raises(ValueError, match="layout"):
        run(folder, "What?", "--layout", "circle", "--debug")


def test_a_bug_is_called_by_its_name(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stream(*args: Any, **options: Any) -> Any:
        return {}["nothing"]

    monkeypatch.setattr(engine.Hogwild, "stream", stream)
    assert run(folder, "What?") == 2
    assert error_of(capsys) == "KeyError: 'nothing' (--debug shows where)"


# ---- device and dtype ----------------------------------------------------------------------------


def test_the_device_is_chosen_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def machine(*why_not: str, hidden: str | None = None) -> None:
        gpus = tuple(installation.Gpu(f"Gpu {i}", "9.0", why) for i, why in enumerate(why_not))
        monkeypatch.setattr(installation, "gpus", lambda: gpus)
        monkeypatch.setattr(installation, "hidden_gpu", lambda: hidden)

    def refused(asked: str) -> str:
        with pytest.raises(cli.CommandError) as raised:
            cli.choose_device(asked)
        return str(raised.value)

    machine()
    assert cli.choose_device("auto") == ("cpu", "no NVIDIA GPU is visible")
    for asked in ("cuda", "cuda:0", "cuda:3"):
        assert refused(asked) == f"--device: {asked} cannot be used: no NVIDIA GPU is visible"
    machine(hidden="torch is built without CUDA")
    assert cli.choose_device("auto") == ("cpu", "torch is built without CUDA")
    assert refused("cuda:1") == "--device: cuda:1 cannot be used: torch is built without CUDA"
    machine("it is too old")
    assert cli.choose_device("auto") == ("cpu", "it is too old")
    assert refused("cuda") == "--device: cuda cannot be used: it is too old"
    machine("it is too old", "")
    for asked in ("auto", "cuda"):
        assert cli.choose_device(asked) == ("cuda:1", "Gpu 1, the first GPU that can be used")
    assert cli.choose_device("cuda:1") == ("cuda:1", "as asked")
    assert refused("cuda:0") == "--device: cuda:0 cannot be used: it is too old"
    assert refused("cuda:2").endswith(": the last visible GPU is cuda:1")
    assert cli.choose_device("cpu") == ("cpu", "as asked")


def test_the_dtype_is_chosen_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(asked: str, stored: Any, device: str, able: bool) -> Any:
        monkeypatch.setattr(cli, "_computes_in", lambda dtype: able)
        return cli.choose_dtype(asked, stored, device)[0]

    assert chosen("auto", torch.bfloat16, "cpu", able=True) is torch.bfloat16
    assert chosen("auto", "bfloat16", "cpu", able=False) is torch.float32
    assert chosen("auto", torch.float16, "cuda:0", able=False) is torch.float16
    assert chosen("auto", None, "cpu", able=True) is torch.float32
    assert chosen("auto", torch.float32, "cuda:0", able=True) is torch.float32
    assert chosen("float16", torch.bfloat16, "cpu", able=False) is torch.float16
    _, reason = cli.choose_dtype("auto", torch.bfloat16, "cpu")
    assert "bfloat16" in reason


# ---- the live view -------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(10, 250), st.integers(1, 70))
def test_the_grid_fits_and_wastes_nothing(workers: int, width: int, height: int) -> None:
    grid = live.arrange(workers, width, height)
    assert grid.rows * (grid.lines + 2) <= max(height, 3)
    assert grid.columns * (grid.width + 3) - 3 <= width
    assert grid.rows * grid.columns >= workers - grid.hidden
    assert (grid.rows - 1) * grid.columns < workers
    assert grid.lines >= 1 and grid.width >= 4
    if grid.hidden:  # only if there is really no room
        assert grid.rows == max(1, height // 3)


def play(view: live.LiveView, names: list[str]) -> None:
    for step in range(1, 40):
        for name in names:
            if step % 9 == 0:
                text = "It was finished by then, they said.\n\n"
                view.show(Event("commit", step, name, step // 9, None, f"{name} {step}. {text}"))
                view.show(Event("start", step, name, 1 + step // 9, None, f"{name}:"))
            view.show(Event("token", step, name, 1 + step // 9, 5, " w\u00f6rd \u4f60\u597d"))


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (40, 12), (30, 8), (200, 50)])
@pytest.mark.parametrize("count", [1, 3, 9])
def test_a_frame_fits_the_terminal(width: int, height: int, count: int) -> None:
    names = [*engine.NAMES[: count - 1], "A name that is longer than any column"]
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, height=height)
    view = live.LiveView(console, "A problem \x1b[2J " * 40, names, 99, clock=lambda: 0.0)
    play(view, names)
    console.print(view.frame())
    frame = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", out.getvalue()).rstrip("\n").split("\n")
    assert len(frame) < height  # the cursor needs a line
    assert max(cell_len(line) for line in frame) <= width
    assert "Alice" in "".join(frame) or count == 1


def test_finished_paragraphs_are_dim_and_the_newest_text_is_seen() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=40, height=14)
    view = live.LiveView(console, "p", ["Ann"], 9, clock=lambda: 0.0)
    for i in range(30):
        view.show(Event("token", i, "Ann", i + 1, 5, f"number {i}."))
        view.show(Event("commit", i, "Ann", i + 1, None, f"number {i}." + " and so on" * 8))
    view.show(Event("token", 31, "Ann", 31, 5, "still going"))
    console.print(view.frame())
    shown = out.getvalue()
    assert f"{ESCAPE}[2mnumber 29." in shown and "number 3." not in shown
    assert "still going" in shown and f"{ESCAPE}[2mstill" not in shown


# ---- as a process --------------------------------------------------------------------------------


def test_as_a_process(folder: str, tmp_path: Path) -> None:
    """Real signals and pipes; and what is imported before a command asks for it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    script = (
        "import sys, hogwild_ext\n"
        "before = set(sys.modules)\n"
        "from hogwild_ext.cli import main\n"
        "try: main(['run', '--help'])\n"
        "except SystemExit: pass\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "heavy = new & {'torch', 'transformers', 'rich', 'numpy', 'gguf', 'tokenizers'}\n"
        "assert not heavy, heavy\n"
        "assert not {'transformers', 'rich'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--max-steps" in done.stdout

    command = [
        sys.executable, "-m", "hogwild_ext", "run", "What?", "--model", folder, "--threads", "1",
        "--dtype", "float32", "--max-steps", "100000", "--json",
    ]  # fmt: skip
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest, errors = process.stdout.read(), process.stderr.read()
    assert process.returncode == 130, errors
    assert json.loads(first)["kind"] == "start"
    assert json.loads(rest.rstrip("\n").split("\n")[-1])["stopped_by"] == "interrupted"
    assert "Traceback" not in errors

    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()  # as `head -1` does
        errors = process.stderr.read()
    assert process.returncode == 0
    assert "Traceback" not in errors and "BrokenPipe" not in errors


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert hogwild("info") == 0
    assert capsys.readouterr().out.startswith(f"hogwild_ext {hogwild_ext.__version__}\n")
