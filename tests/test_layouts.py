"""Layouts: what every worker sees in every pass, token by token, beside a plain simulation."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import transformers

import hogwild_ext as hx
from hogwild_ext.layouts import LAYOUTS, Combined, Layout, Page
from scripted import (
    EOS,
    PROMPTS,
    STOP,
    TOKENIZER,
    A,
    B,
    C,
    Script,
    Z,
    decode,
    random_lines,
    say,
    team,
)

pytestmark = pytest.mark.usefixtures("one_thread")


Tokens = list[int]


class PlainPage:
    """The page as nothing but lists of tokens: what the engine must show, said as simply as can
    be. Everything is joined anew for every reader, in every pass."""

    commits = True

    def __init__(
        self, names: Sequence[str], prompt: str, lines: dict[str, Tokens], every: int | None
    ) -> None:
        self.prompt = say(prompt)
        self.lines = {name: list(tokens) for name, tokens in lines.items()}
        self.every = every if len(names) > 1 else None
        self.history: Tokens = []
        self.live: dict[str, Tokens] = {name: [] for name in names}  # all of it, without commits
        self.before = dict.fromkeys(names, 0)  # the length of `live` before its last heading
        self.number = dict.fromkeys(names, 0)
        self.unasked = dict.fromkeys(names, 0)  # tokens said since the last question
        self.said: dict[str, Tokens] = {name: [] for name in names}  # in the last paragraph
        self.last: dict[str, Tokens] = {name: [] for name in names}  # in the pass before
        self.writing = list(names)
        self.questions = 0

    def view(self, name: str, writing: list[str]) -> Tokens:
        raise NotImplementedError

    def beside(self, name: str, others: list[str], writing: list[str]) -> Tokens:
        """The others' live texts, with the headings around them, and one's own."""
        text: Tokens = []
        for other in others:
            text = text + self.live[other] + (say("~\n") if other in writing else [])
        return (say("[others]\n") + text + say("[own]\n") if others else []) + self.live[name]

    def open(self, name: str) -> None:
        self.number[name] += 1
        self.before[name] = len(self.live[name])
        self.live[name] = self.live[name] + say(f"#{name}{self.number[name]}:")
        if self.every and self.unasked[name] >= self.every:
            self.live[name] = self.live[name] + say("?")
            self.unasked[name] = 0
            self.questions += 1
        self.said[name] = []

    def is_finished(self, name: str) -> bool:
        text = decode(self.said[name])
        gap = text[len(text.rstrip()) :]
        return text.rstrip().endswith((".", '!"')) and gap[-1:] == "\n" and gap.count("\n") > 1

    def next_pass(self) -> list[Tokens]:
        """What is seen in the next pass: by those who close a paragraph, then by the writers."""
        ended = [name for name in self.writing if self.last[name] == [EOS]]
        for name in ended:
            if not self.said[name]:  # a heading with nothing under it goes away
                self.live[name] = self.live[name][: self.before[name]]
                self.writing.remove(name)
        still = [name for name in self.writing if name not in ended]
        closing = [name for name in self.writing if name in ended or self.is_finished(name)]
        for name in self.writing:
            self.live[name] = self.live[name] + (say("\n\n") if name in ended else self.last[name])
        before = dict(self.live)
        for name in closing if not self.commits else ():
            if name in still:
                self.open(name)
        # Who closes a paragraph reads the page as it was. All others, and the same one where it
        # begins the next paragraph, see it in the history.
        rows = closing if self.commits else [name for name in closing if name in ended]
        seen = [self.view(name, self.writing) for name in rows]
        for name in closing if self.commits else ():
            self.history = self.history + before[name]
            self.live[name] = []
            if name in still:
                self.open(name)
        for name in still if not any(self.number.values()) else ():
            self.open(name)
        seen += [self.view(name, still) for name in still]
        self.writing = still

        for name in still:
            token = self.lines[name].pop(0) if self.lines[name] else Z
            self.last[name] = [token]
            if token != EOS:
                self.said[name].append(token)
                self.unasked[name] += 1
        return seen


class PlainCombined(PlainPage):
    def view(self, name: str, writing: list[str]) -> Tokens:
        others = [other for other in writing if other != name]
        return self.prompt + self.history + self.beside(name, others, writing)


class PlainContiguous(PlainPage):
    commits = False

    def view(self, name: str, writing: list[str]) -> Tokens:
        others = [other for other in self.live if other != name]
        return self.prompt + self.beside(name, others, writing)


class PlainInterleaved(PlainPage):
    def view(self, name: str, writing: list[str]) -> Tokens:
        return self.prompt + self.history + self.live[name]


PLAIN: dict[str, Callable[..., PlainPage]] = {
    "combined": PlainCombined,
    "contiguous": PlainContiguous,
    "interleaved": PlainInterleaved,
}


def test_every_layout_has_a_simulation() -> None:
    assert PLAIN.keys() == LAYOUTS.keys()


@pytest.mark.parametrize("every", [None, 9], ids=["", "questions"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_everybody_sees_the_page_token_by_token(
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
    count: int,
    every: int | None,
    seed: int,
) -> None:
    questions = 0
    for variant in range(3):
        names = ["A", "B", "C", "D", "E"][:count]
        lines = random_lines(random.Random(seed + variant), names, 14)
        with monkeypatch.context() as patched:
            script = Script(patched, lines)
            run = team(model, names, layout=layout, question_every=every).stream("p", 50)
            events = list(run)
        prompt = PROMPTS.opening(TOKENIZER, names, "p", LAYOUTS[layout]())
        plain = PLAIN[layout](names, prompt, lines, every)
        result = run.result()
        assert len(script.passes) == result.steps >= 2
        for number, rows in enumerate(script.passes):
            shown = [tokens for tokens, _ in rows]
            expected = plain.next_pass()
            # The first rows of the first pass are the fixed texts.
            assert shown[-len(expected) :] == expected, f"pass {number + 1}"
            assert number == 0 or len(shown) == len(expected)
        questions += plain.questions
        assert sum(event.kind == "question" for event in events) == plain.questions

        # Every token of the page was brought exactly once.
        assert result.stats.encoded_tokens == len(script.brought)
        fixed = 0
        if count > 1 and layout != "interleaved":
            fixed = len("[others]\n[own]\n") + count * len("~\n")
        page = len(prompt) + fixed + plain.questions
        page += sum(len(event.text) for event in events if event.kind == "start")
        page += sum(len(worker.tokens) for worker in result.workers)
        pending = sum(not worker.ended for worker in result.workers)
        ends = sum(event.kind == "end" for event in events)
        assert page - pending <= len(script.brought) <= page + ends
    assert bool(questions) == bool(every and count > 1)


def test_ends_under_an_empty_heading_leave_nothing(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a worker's piece too, where nothing is ever moved."""
    script = Script(monkeypatch, {"A": [A, STOP, EOS], "B": [B] * 9})
    team(model, ["A", "B"], layout="contiguous").run("p", 5)
    shown = [decode(tokens) for tokens, _ in script.passes[4]]
    assert len(shown) == 1
    assert "[others]\n#A1:a.\n\n[own]\n#B1:bbbb" in shown[0]


class HistoryOnly(Layout):
    name = "history-only"

    def view(self, page: Page, worker: int) -> list[Any]:
        return [page.prompt, page.history, *page.finishing, page.live[worker]]


class Backwards(Combined):
    """With a heading in front of the history: fixed texts may stand anywhere."""

    name = "backwards"

    def view(self, page: Page, worker: int) -> list[Any]:
        others = [page.live[other] for other in reversed(page.others(worker))]
        history = [page.history, *page.finishing]
        return [page.prompt, page.others_heading, *others, *history, page.live[worker]]


def test_a_layout_of_ones_own(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(monkeypatch, {"A": [A, STOP, B], "B": [C, C, C]})
    team(model, ["A", "B"], layout=HistoryOnly()).run("p", 4)
    prompt = PROMPTS.opening(TOKENIZER, ["A", "B"], "p", HistoryOnly())
    shown = [[decode(tokens) for tokens, _ in rows] for rows in script.passes]
    assert shown[1] == [prompt + "#A1:a", prompt + "#B1:c"]
    assert shown[2] == [
        prompt + "#A1:a.\n\n",
        prompt + "#A1:a.\n\n#A2:",
        prompt + "#A1:a.\n\n#B1:cc",
    ]


def test_fixed_texts_are_encoded_once_where_a_view_shows_them(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(monkeypatch, {"A": [A, STOP, B], "B": [C, C, C], "C": [Z]})
    team(model, ["A", "B", "C"], layout=Backwards()).run("p", 4)
    prompt = PROMPTS.opening(TOKENIZER, ["A", "B", "C"], "p", Backwards())
    fixed = [decode(tokens) for tokens, _ in script.passes[0]][:-3]
    assert fixed == [prompt, prompt + "[others]\n"]
    assert decode(script.passes[2][-2][0]) == prompt + "[others]\n#C1:zz#A2:#A1:a.\n\n#B1:cc"


@pytest.mark.parametrize(
    ("view", "got"),
    [
        (lambda page, worker: [page.prompt, page.live[1 - worker]], "prompt, B: live, one"),
        (lambda page, worker: [page.live[worker], page.prompt], "A: live, one, prompt"),
        (lambda page, worker: [page.live[worker]] * 2, "A: live, one, A: live, one"),
        (lambda page, worker: [], "none"),
    ],
)
def test_a_view_ends_with_ones_own_text(model: Any, view: Any, got: str) -> None:
    class Wrong(Layout):
        name = "wrong"

        def view(self, page: Page, worker: int) -> list[Any]:
            seen: list[Any] = view(page, worker)
            return seen

    message = f"layout: expected the view of wrong to end with .*, A: live, one, .* got {got}$"
    with pytest.raises(ValueError, match=message):
        team(model, ["A", "B"], layout=Wrong()).run("p", 4)


def test_what_workers_are_told_goes_by_the_layout(model: Any) -> None:
    told = {name: f"[{name} of {{count}}]" for name in LAYOUTS}
    prompts = replace(PROMPTS, system="{names}: {how_to_read}", how_to_read=told)
    for name, layout in LAYOUTS.items():
        text = prompts.opening(TOKENIZER, ["A", "B"], "p", layout())
        assert text.startswith(f"<system>A and B: [{name} of 2]</>")
        assert text.endswith("H:\n") == layout.commits
    assert "<system>A and B: </>" in prompts.opening(TOKENIZER, ["A", "B"], "p", HistoryOnly())


def test_contiguous_moves_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Script(monkeypatch, {"A": [A, STOP, B, STOP], "B": [C, STOP, C]})
    run = team(model, ["A", "B"], layout="contiguous").stream("p", 6)
    kinds = [(event.kind, event.worker, event.paragraph) for event in run if event.kind != "token"]
    stats = run.result().stats
    assert (stats.committed_tokens, stats.copied_bytes) == (0, 0)
    started = [("start", "A", 1), ("start", "B", 1), ("start", "A", 2), ("start", "B", 2)]
    assert kinds == [*started, ("start", "A", 3), ("stop", None, None)]
    assert run.result().text == "#A1: a.\n\n#A2: b.\n\n#A3: zz\n\n#B1: c.\n\n#B2: czzz"


def test_layouts_are_seen_by_the_model(model: Any) -> None:
    """The same tokens, the same seed: what is visible makes the difference."""
    texts = set()
    for layout in LAYOUTS:
        config = transformers.GenerationConfig(do_sample=True, top_k=0, eos_token_id=EOS)
        run: hx.Hogwild = team(model, 2, layout=layout, generation_config=config)
        texts.add("".join(worker.text for worker in run.run("p", 12).workers))
    assert len(texts) == len(LAYOUTS)
