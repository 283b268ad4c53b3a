"""Traces: they replay to the same page, and count what the cache did."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import hogwild_ext as hx
from hogwild_ext import trace
from hogwild_ext.events import EVENT_KINDS
from hogwild_ext.layouts import LAYOUTS
from scripted import (
    EOS,
    PROMPTS,
    STOP,
    A,
    B,
    Script,
    decode,
    random_lines,
    sampled,
    team,
)

CLOSING = replace(PROMPTS, closing="\nNow: \\boxed{")


pytestmark = pytest.mark.usefixtures("one_thread")


def replayed(read: trace.Trace) -> trace.Replay:
    replay = trace.Replay(read.header)
    for line in read.lines:
        replay.apply(line)
    return replay


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_trace_replays_to_what_everybody_saw(
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    layout: str,
    count: int,
    seed: int,
) -> None:
    names = ["A", "B", "C", "D"][:count]
    script = Script(monkeypatch, random_lines(random.Random(seed), names, 12))
    path = tmp_path / "run.jsonl"
    one = team(model, names, layout=layout, question_every=8)
    run = one.stream("p", 60, trace=path)
    events = list(run)
    read = trace.read(path)
    assert read.is_complete and read.header["layout"] == layout

    # What a token's writer saw, as tokens and as text, is what the model was given.
    replay = trace.Replay(read.header)
    rows: list[list[int]] = []
    for line in read.lines:
        replay.apply(line)
        if line["kind"] == "step":
            rows = [tokens for tokens, _ in script.passes[line["step"] - 1]]
        elif line["kind"] in ("token", "end"):
            sees = replay.sees(line["worker"])
            tokens = replay.tokens(sees)
            assert tokens in rows
            assert sees[-1][0] == line["segment"]
            assert replay.segments[line["segment"]][-1][0][-1] == tokens[-1]
            # A character that is not complete yet has no text.
            assert replay.text(sees) == decode(tokens).replace("\ufffd", "")
            assert f"#{line['worker']}" in decode(tokens)[-200:]

    # All that happened is told, in the order of the run but for the commits.
    told = [line for line in read.lines if line["kind"] in EVENT_KINDS]
    assert len(told) == len(events)
    for event, line in zip(
        sorted(events, key=lambda e: (e.step, e.kind == "stop", e.kind == "commit")),
        told,
        strict=True,
    ):
        assert (event.kind, event.step, event.worker) == (
            line["kind"],
            line["step"],
            line["worker"],
        )
        if event.kind != "stop":
            assert (event.text, event.paragraph) == (line["text"], line["paragraph"])
        if event.kind in ("token", "end"):
            assert event.token == line["token"]

    # And the history at the end is what was committed.
    asked = {(e.worker, e.paragraph) for e in events if e.kind == "question"}
    ended = {(e.worker, e.paragraph) for e in events if e.kind == "end"}
    history = ""
    for event in events:
        if event.kind == "commit":
            which = event.worker, event.paragraph
            assert event.text.startswith("?") == (which in asked)
            history += f"#{event.worker}{event.paragraph}:{event.text}"
            history += "\n\n" * (which in ended)
    assert "".join(text for _, text in replay.segments[1]) == history
    assert run.result().stats.encoded_tokens == replay.encoded_tokens == len(script.brought)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_token_is_encoded_twice_and_only_commits_copy(
    model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, layout: str, seed: int
) -> None:
    names = ["A", "B", "C"]
    Script(monkeypatch, random_lines(random.Random(seed), names, 12))
    result = team(model, names, layout=layout).run("p", 60, trace=tmp_path / "run.jsonl")
    read = trace.read(tmp_path / "run.jsonl")
    replay = replayed(read)  # which checks the tokens of every step and commit
    steps = [line for line in read.lines if line["kind"] == "step"]
    assert steps[-1]["encoded_tokens"] == replay.encoded_tokens == result.stats.encoded_tokens
    assert steps[-1]["committed_tokens"] == replay.committed_tokens
    assert steps[-1]["copied_bytes"] == replay.copied_tokens * read.header["bytes_per_token"]
    assert (replay.copied_tokens > 0) == (layout != "contiguous")
    # Bytes are those of the cache: 2 layers, 2 KV heads, 16 dimensions, keys and values, float32.
    assert read.header["bytes_per_token"] == 2 * 2 * 16 * 2 * 4


def test_a_trace_changes_nothing(model: Any, tmp_path: Path) -> None:
    one = team(model, 3, generation_config=sampled())
    assert list(one.stream("p", 25)) == list(one.stream("p", 25, trace=tmp_path / "run.jsonl"))


def test_a_run_and_its_trace_repeat(model: Any, tmp_path: Path) -> None:
    lines = []
    for name in ("one", "two"):
        team(model, 3, generation_config=sampled()).run("p", 25, trace=tmp_path / name)
        timeless = ("time", "forward_seconds", "sampling_seconds")
        lines.append(
            [
                {key: value for key, value in line.items() if key not in timeless}
                for line in trace.read(tmp_path / name).lines
            ]
        )
    assert lines[0] == lines[1]


def test_conclusions_are_told(model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one = team(model, 2, prompts=CLOSING, answer_tokens=5, generation_config=sampled())
    one.run("p", 7, snapshots=[3], trace=tmp_path / "run.jsonl")
    read = trace.read(tmp_path / "run.jsonl")
    told = [line for line in read.lines if line["kind"] == "conclusion"]
    assert [line["step"] for line in told] == [3, 7]
    assert all(line["text"].startswith(CLOSING.closing) for line in told)
    assert {line["worker"] for line in told} == {"Alice"}
    assert read.lines[-1]["reason"] == "max_steps"
    replayed(read)  # nothing of it is on the page


def test_times_go_up(model: Any, tmp_path: Path) -> None:
    result = team(model, 2).run("p", 9, trace=tmp_path / "run.jsonl")
    times = [line["time"] for line in trace.read(tmp_path / "run.jsonl").lines]
    assert times == sorted(times) and 0 < times[0] <= times[-1] <= result.stats.seconds + 1e-3


def test_what_was_interrupted_is_there(
    model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = Script(monkeypatch, {})
    script.raises[4] = KeyboardInterrupt()
    team(model, 2).run("p", 9, trace=tmp_path / "run.jsonl")
    read = trace.read(tmp_path / "run.jsonl")
    assert read.lines[-1] == {
        **read.lines[-1], "kind": "stop", "step": 4, "reason": "interrupted", "answer": None,
    }  # fmt: skip
    script.raises = {}
    run = team(model, 2).stream("p", 9, trace=tmp_path / "closed.jsonl")
    with run:
        while next(run).step < 3:
            pass
    assert run.result().stopped_by == "interrupted"
    closed = trace.read(tmp_path / "closed.jsonl")
    assert (closed.lines[-1]["kind"], closed.lines[-1]["reason"]) == ("stop", "interrupted")

    script.raises = {len(script.passes) + 4: RuntimeError("out of everything")}
    with pytest.raises(RuntimeError):
        team(model, 2).run("p", 9, trace=tmp_path / "broken.jsonl")
    cut = trace.read(tmp_path / "broken.jsonl")
    assert not cut.is_complete and cut.lines[-1]["kind"] == "token"


def test_a_run_that_is_broken_off_within_a_step_has_a_readable_trace(
    model: Any, tmp_path: Path
) -> None:
    """Before and behind what is told of the step: while tokens are drawn, and between two lines."""
    for calls in range(1, 9):
        one = team(model, 2, generation_config=sampled())
        draw, count = one.sampler, 0

        def stopping(*values: Any, draw: Any = draw, last: int = calls) -> Any:
            nonlocal count
            if (count := count + 1) == last:
                raise KeyboardInterrupt
            return draw(*values)

        one.sampler = stopping  # type: ignore[assignment]
        result = one.run("p", 9, trace=tmp_path / "run.jsonl")
        assert result.stopped_by == "interrupted" and result.steps == (calls + 1) // 2
        read = trace.read(tmp_path / "run.jsonl")
        assert (read.lines[-1]["reason"], read.lines[-1]["step"]) == ("interrupted", result.steps)
        assert sum(line["kind"] == "step" for line in read.lines) == result.steps - 1


def test_a_heading_that_goes_away_is_told(
    model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Script(monkeypatch, {"A": [A, STOP, EOS], "B": [B] * 9})
    team(model, ["A", "B"], layout="contiguous").run("p", 5, trace=tmp_path / "run.jsonl")
    read = trace.read(tmp_path / "run.jsonl")
    (cut,) = (line for line in read.lines if line["kind"] == "truncate")
    name = read.header["segments"][cut["segment"]]
    assert (name, cut["length"]) == ("A: live, one", len("#A1:a") + 1)
    assert replayed(read).text([[cut["segment"], cut["length"]]]) == "#A1:a.\n\n"


def test_a_file_that_cannot_be_written_is_said_at_once(model: Any, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="none"):
        team(model, 2).stream("p", 9, trace=tmp_path / "none" / "run.jsonl")
    with pytest.raises(TypeError, match="trace: expected a path, got"):
        team(model, 2).stream("p", 9, trace=3)


def test_bytes_that_forks_copy_are_counted(model: Any) -> None:
    cache = hx.SegmentCache.for_model(model, max_tokens=512)
    first = cache.segment("first")
    hx.forward(model, cache, [[first]], [list(range(3, 73))])
    fork = cache.fork(first)
    assert cache.stats.copied_bytes == 0
    hx.forward(model, cache, [[fork]], [[3]])
    assert cache.stats.copied_bytes == 6 * cache.bytes_per_token
    empty = cache.segment("empty")
    cache.commit(first, empty)
    assert cache.stats.copied_bytes == 6 * cache.bytes_per_token  # pages change hands
    cache.commit(fork, empty)
    assert cache.stats.copied_bytes == (6 + 71) * cache.bytes_per_token
