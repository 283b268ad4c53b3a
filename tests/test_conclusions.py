"""Being asked: whether the work is redundant, and for the answer when the time is up."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from hogwild_ext.events import Event, Snapshot
from hogwild_ext.layouts import LAYOUTS
from models import tiny_model
from scripted import (
    EOS,
    PROMPTS,
    STOP,
    TOKENIZER,
    VOCABULARY,
    A,
    B,
    Script,
    Z,
    decode,
    sampled,
    say,
    team,
)

CLOSING = replace(PROMPTS, closing="\nNow: \\boxed{")


pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the question --------------------------------------------------------------------------------


def test_a_worker_is_asked_after_so_many_tokens_of_its_own(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = {"A": [A, STOP] * 6, "B": [B] * 3 + [STOP] + [B] * 30}
    script = Script(monkeypatch, lines)
    prompts = replace(PROMPTS, question=" {name}{number}?")
    run = team(model, ["A", "B"], prompts=prompts, question_every=4).stream("p", 13)
    asked = [event for event in run if event.kind == "question"]
    assert [(e.step, e.worker, e.paragraph, e.text) for e in asked] == [
        (5, "A", 3, " A3?"),
        (5, "B", 2, " B2?"),
        (9, "A", 5, " A5?"),
        (13, "A", 7, " A7?"),
    ]
    result = run.result()
    # The question stands in the worker's own text, for all to read; it is not the worker's.
    assert "#A3: A3? a.\n\n" in result.text
    assert result.workers[0].text == "a.\n\n" * 6 + "z"
    assert "#A3: A3?" in decode(script.passes[5][-1][0])
    assert "#A1:a.\n\n#A2:a.\n\n" in decode(script.passes[5][-1][0])


def test_paragraphs_that_do_not_end_are_not_interrupted(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Script(monkeypatch, {})
    events = list(team(model, 2, question_every=2).stream("p", 12))
    assert not any(event.kind == "question" for event in events)


@pytest.mark.parametrize(
    "change",
    [
        {"workers": ["A"]},
        {"question_every": None},
        {"prompts": replace(PROMPTS, question="")},
        {"question_every": 10},
    ],
)
def test_who_is_not_asked(
    model: Any, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    Script(monkeypatch, {"A": [A, STOP] * 5})
    run = team(model, **{"workers": ["A", "B"], "question_every": 2, **change}).stream("p", 10)
    assert not any(event.kind == "question" for event in run)


def test_nothing_but_words_follows_a_question(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no paragraph may begin with is not the answer to the question either."""
    wishes = torch.full((VOCABULARY,), -9.0)
    wishes[Z], wishes[B] = 9.0, 8.0

    def fixed(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return wishes.where(scores != -torch.inf, scores)

    options = {"logits_processors": [fixed], "paragraph_ends": lambda text: True}
    for not_first, text in (((), "zzz"), (("z",), "bbb")):
        prompts = replace(PROMPTS, not_first=not_first)
        run = team(model, ["A", "B"], prompts=prompts, question_every=1, **options).stream("p", 3)
        assert sum(event.kind == "question" for event in run) == 4
        assert run.result().workers[0].text == text


# ---- conclusions ---------------------------------------------------------------------------------


class Concludes(Script):
    """A script in which conclusions have lines of their own."""

    def __init__(self, monkeypatch: Any, lines: dict[str, list[int]], said: list[str]) -> None:
        super().__init__(monkeypatch, lines)
        self.said = [say(text) for text in said]  # one for each conclusion, in their order
        self.concluding: list[str] = []  # what was visible at the beginning of each

    def forward(self, model: Any, cache: Any, views: Any, tokens: Any) -> torch.Tensor:
        if not views[-1][-1].name.endswith(".1"):  # not on a fork
            return super().forward(model, cache, views, tokens)
        logits = self._forward(model, cache, views, tokens)
        assert isinstance(logits, torch.Tensor)
        if len(tokens[0]) > 1:
            seen = [token for part in views[0] for token in part.tokens]
            self.concluding.append(decode(seen))
            self._now = list(self.said.pop(0))
        forced = torch.full_like(logits, -50.0)
        forced[0, self._now.pop(0)] = 50.0
        return forced


def test_when_the_steps_are_over_the_team_answers(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Concludes(monkeypatch, {"A": say("so"), "B": say("um")}, ["4 2} and more"])
    run = team(model, ["A", "B"], prompts=CLOSING).stream("p", 2)
    *_, conclusion, stop = run
    text = "\nNow: \\boxed{4 2}"
    assert conclusion == Event("conclusion", 2, "A", text=text)
    assert stop == Event("stop", 2, "A", text="max_steps")
    result = run.result()
    assert (result.answer, result.stopped_by, result.steps) == ("4 2", "max_steps", 2)
    assert result.snapshots == []
    # It is not on the page, and is not counted with what is.
    assert result.text == "#A1: so\n\n#B1: um"
    # A's last word was not encoded yet: it comes with the closing text.
    seen = script.concluding[0]
    assert seen.endswith("#B1:u~\n[own]\n#A1:so" + CLOSING.closing)
    assert result.stats.concluding_tokens == 1 + len(say(text)) - 1
    assert result.stats.encoded_tokens == len(script.brought)
    assert result.stats.generated_tokens == 4


@pytest.mark.parametrize(
    ("said", "written"), [("4" * 50, "4" * 6), ("4" + chr(0), "4"), ("\u20ac}", "\u20ac}")]
)
def test_how_conclusions_end(
    model: Any, monkeypatch: pytest.MonkeyPatch, said: str, written: str
) -> None:
    script = Concludes(monkeypatch, {}, [""])
    script.said = [[EOS if token == say(chr(0))[0] else token for token in say(said)]]
    run = team(model, 2, prompts=CLOSING, answer_tokens=6).stream("p", 3)
    conclusion = [event for event in run if event.kind == "conclusion"]
    assert [event.text for event in conclusion] == [CLOSING.closing + written]
    assert run.result().answer == (written[:-1] if "}" in said else None)


def test_the_time_of_conclusions_is_counted(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Concludes(monkeypatch, {}, ["4" * 64])
    one = team(model, 2, prompts=CLOSING)
    run, counted = one.stream("p", 2), []
    real, greedy = script._forward, one.greedy

    def forward(model: Any, cache: Any, views: Any, tokens: Any) -> Any:
        counted.append(cache.stats)
        return real(model, cache, views, tokens)

    def slow(*arguments: Any) -> int:
        time.sleep(0.01)
        return greedy(*arguments)

    script._forward = forward
    one.greedy = slow
    for _ in run:
        pass
    stats = run.result().stats
    assert stats.attention_seconds == counted[-1].attention_seconds
    assert stats.sampling_seconds > 64 * 0.01


def test_a_run_with_an_answer_is_not_asked_for_another(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Concludes(monkeypatch, {"A": say("\\boxed{1}")}, [])
    events = list(team(model, ["A", "B"], prompts=CLOSING).stream("p", 20))
    assert not any(event.kind == "conclusion" for event in events)


@pytest.mark.parametrize("change", [{"prompts": PROMPTS}, {"answer_tokens": 0}])
def test_without_closing_text_or_room_there_is_no_conclusion(
    model: Any, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    Concludes(monkeypatch, {}, [])
    result = team(model, 2, **{"prompts": CLOSING, **change}).run("p", 3)
    assert (result.answer, result.stopped_by) == (None, "max_steps")


@pytest.mark.parametrize("layout", ["combined", "contiguous", "interleaved"])
def test_when_all_have_ended_without_an_answer_one_is_asked(
    model: Any, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    script = Concludes(monkeypatch, {"A": [A, EOS], "B": [B, STOP, B, EOS]}, ["7}"])
    result = team(model, ["A", "B"], prompts=CLOSING, layout=layout).run("p", 20)
    assert (result.answer, result.stopped_by) == ("7", "end")
    assert "#B1:b.\n\n#B2:b\n\n" + CLOSING.closing in script.concluding[0].replace("[own]\n", "")
    assert "#A1:a\n\n" in script.concluding[0]


def test_ctrl_c_asks_nobody(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Concludes(monkeypatch, {}, [])
    script.raises[3] = KeyboardInterrupt()
    result = team(model, 2, prompts=CLOSING).run("p", 20)
    assert (result.answer, result.stopped_by) == (None, "interrupted")


@pytest.mark.parametrize("limit", ["positions", "room"])
@pytest.mark.parametrize("layout", ["combined", "contiguous"])
def test_a_full_context_leaves_room_for_the_answer(
    monkeypatch: pytest.MonkeyPatch, limit: str, layout: str
) -> None:
    script = Concludes(monkeypatch, {"Alice": ([A] * 5 + [STOP]) * 60}, ["x" * 20 + "}"])
    positions = 320 if limit == "positions" else 4096
    small = tiny_model("llama", vocab_size=VOCABULARY, max_position_embeddings=positions)
    one = team(
        small, 2, prompts=CLOSING, answer_tokens=30, layout=layout,
        max_tokens=4096 if limit == "positions" else 512,
    )  # fmt: skip
    result = one.run("p", 4000)
    assert (result.stopped_by, result.answer) == ("context", "x" * 20)
    assert len(script.concluding) == 1
    assert result.steps > 40
    with pytest.raises(ValueError, match="leaves room for an answer"):
        one.stream("p" * (230 if limit == "positions" else 430)).__next__()


# ---- snapshots -----------------------------------------------------------------------------------


def test_snapshots_tell_what_smaller_budgets_would_have_given(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = {"A": [A, STOP, *say("hm. \\boxed{9}")], "B": [B] * 30}
    script = Concludes(monkeypatch, lines, ["1}", "no", "3}"])
    script.said[1].append(EOS)
    run = team(model, ["A", "B"], prompts=CLOSING).stream("p", 40, snapshots=[9, 2, 4, 4, 40])
    events = [(event.kind, event.step) for event in run if event.kind in ("conclusion", "stop")]
    expected = [("conclusion", step) for step in (2, 4, 9)]
    assert events == [*expected, ("stop", 2 + len("hm. \\boxed{9}"))]
    closing = CLOSING.closing
    assert run.result().snapshots == [
        Snapshot(2, "1", "A", closing + "1}"),
        Snapshot(4, None, "A", closing + "no"),
        Snapshot(9, "3", "A", closing + "3}"),
        Snapshot(40, "9", "A", ""),  # the run did not need that many
    ]
    assert run.result().answer == "9"
    assert script.concluding[0].endswith("#A1:a.\n\n" + closing)
    assert script.concluding[1].endswith("#A1:a.\n\n[others]\n#B1:bbb~\n[own]\n#A2:hm" + closing)


def test_a_snapshot_at_the_end_is_the_conclusion(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Concludes(monkeypatch, {}, ["5}"])
    result = team(model, 2, prompts=CLOSING).run("p", 3, snapshots=[3])
    assert result.answer == "5" and result.snapshots[0].answer == "5"


@pytest.mark.parametrize("layout", ["combined", "contiguous", "interleaved"])
def test_a_run_goes_on_as_if_there_had_been_no_snapshot(model: Any, layout: str) -> None:
    def ends(text: str) -> bool:
        return len(text) % 3 == 0

    one = team(
        model, 3, prompts=CLOSING, layout=layout, generation_config=sampled(), paragraph_ends=ends
    )
    plain = one.stream("p", 25)
    asked = one.stream("p", 25, snapshots=list(range(1, 26, 2)))
    events = [list(plain), list(asked)]
    kept = [[event for event in told if event.kind != "conclusion"] for told in events]
    assert kept[0] == kept[1]
    assert sum(event.kind == "conclusion" for event in events[1]) == 13
    first, second = plain.result().stats, asked.result().stats
    assert first.encoded_tokens == second.encoded_tokens
    assert first.committed_tokens == second.committed_tokens
    assert 0 < first.concluding_tokens < second.concluding_tokens


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"snapshots": [0]}, ValueError, "snapshots: expected an integer from 1 to 9"),
        ({"snapshots": [10]}, ValueError, "snapshots: expected an integer from 1 to 9"),
        ({"snapshots": [1.5]}, TypeError, "snapshots: expected an integer"),
        ({"snapshots": 3}, TypeError, "snapshots: expected"),
    ],
)
def test_bad_snapshots_are_refused(
    model: Any, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        team(model, prompts=CLOSING).stream("p", 9, **change)


@pytest.mark.parametrize("change", [{"prompts": PROMPTS}, {"answer_tokens": 0}])
def test_snapshots_need_a_closing_text(model: Any, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="snapshots: expected prompts with a closing text"):
        team(model, **{"prompts": CLOSING, **change}).stream("p", 9, snapshots=[3])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"question_every": 0}, ValueError, "question_every: expected an integer from 1"),
        ({"question_every": "often"}, TypeError, "question_every: expected an integer"),
        ({"answer_tokens": -1}, ValueError, "answer_tokens: expected an integer from 0"),
    ],
)
def test_bad_arguments_are_named(
    model: Any, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        team(model, **change)


def test_a_conclusion_can_be_stopped(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Concludes(monkeypatch, {}, ["x" * 60])
    run = team(model, 2, prompts=CLOSING).stream("p", 3)
    real = script._forward

    def forward(model: Any, cache: Any, views: Any, tokens: Any) -> Any:
        if script.concluding and len(script._now) == 50:
            run.stop()
        return real(model, cache, views, tokens)

    script._forward = forward
    (conclusion,) = [event for event in run if event.kind == "conclusion"]
    assert conclusion.text == CLOSING.closing + "x" * 11
    assert run.result().stopped_by == "max_steps"


@pytest.mark.parametrize("phase", range(8))
@pytest.mark.parametrize("layout", ["combined", "contiguous", "interleaved"])
def test_the_last_conclusion_sees_all_that_was_written(
    monkeypatch: pytest.MonkeyPatch, phase: int, layout: str
) -> None:
    lines = {"A": ([A] * 5 + [STOP]) * 60, "B": [B] * phase + ([B] * 5 + [STOP]) * 60}
    script = Concludes(monkeypatch, lines, ["x}"])
    small = tiny_model("llama", vocab_size=VOCABULARY, max_position_embeddings=300)
    one = team(small, ["A", "B"], prompts=CLOSING, answer_tokens=9, layout=layout)
    result = one.run("p", 4000)
    assert (result.stopped_by, result.answer) == ("context", "x")
    prompt = CLOSING.opening(TOKENIZER, ["A", "B"], "p", LAYOUTS[layout]())
    (seen,) = script.concluding
    seen = seen.removeprefix(prompt)
    written = result.workers[0].text
    assert seen.count("a") == written.count("a")
    assert seen.count("a.\n\n") == written.count("a.\n\n")


def test_ctrl_c_in_a_conclusion_loses_nothing_of_the_step(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Concludes(monkeypatch, {"A": say("so it"), "B": say("um, a")}, [""])
    run = team(model, ["A", "B"], prompts=CLOSING).stream("p", 3)
    real = script._forward

    def forward(model: Any, cache: Any, views: Any, tokens: Any) -> Any:
        if views[0][-1].name.endswith(".1"):
            time.sleep(0.05)
            raise KeyboardInterrupt
        return real(model, cache, views, tokens)

    script._forward = forward
    events = []
    with pytest.raises(KeyboardInterrupt):
        for event in run:
            events.append(event)
    told = "".join(event.text for event in events if event.kind == "token" and event.worker == "A")
    result = run.result()
    assert told == result.workers[0].text == "so "
    assert result.stopped_by == "interrupted"
    assert result.stats.seconds > 0.05 + result.stats.forward_seconds


def test_a_stopped_run_guesses_no_snapshots(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Concludes(monkeypatch, {"A": [A, EOS], "B": [B, EOS]}, [])
    run = team(model, ["A", "B"], prompts=CLOSING).stream("p", 20, snapshots=[10])
    for event in run:
        if event.kind == "end":
            run.stop()
    assert (run.result().stopped_by, run.result().answer) == ("end", None)
    assert run.result().snapshots == []


def test_a_snapshot_that_was_cut_short_is_none(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Concludes(monkeypatch, {}, [])
    run = team(model, 2, prompts=CLOSING).stream("p", 9, snapshots=[2])
    real = script._forward

    def forward(*arguments: Any) -> Any:
        if len(script.passes) == 1:
            run.stop()
        return real(*arguments)

    script._forward = forward
    events = list(run)
    assert run.result().snapshots == [] and events[-1].text == "interrupted"
    assert not any(event.kind == "conclusion" for event in events)
