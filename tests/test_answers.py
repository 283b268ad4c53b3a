"""The answer in what a worker writes: what counts as one, and what looking for it costs."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from hogwild_ext.answers import BoxedAnswer, boxed_answer
from hogwild_ext.text_decoder import TextDecoder
from scripted import EOS, PROMPTS, TOKENIZER, Script, say, team

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{x : x > 0\right\}} so", r"\left\{x : x > 0\right\}"),
        (r"\boxed{\}}", r"\}"),
        (r"\boxed{\{}", r"\{"),
        (r"\boxed{a \\ b}", r"a \\ b"),
        (r"\boxed{a \\}", r"a \\"),
        (r"\boxed{a \\\}}", r"a \\\}"),
        (r"\boxed{a \\\\} b}", r"a \\\\"),
        (r"\boxed {4}", "4"),
        ("\\boxed\n {4}", "4"),
        (r"\\boxed{4}", "4"),  # as in a string
        (r"\\\boxed{4}", "4"),  # behind a new line
        (r"\boxed{\text{a {b} c}}", r"\text{a {b} c}"),
        (r"\boxed{\boxed{4}}", "4"),
        (r"\boxed{1, \boxed{}}", r"1, \boxed{}"),
        (r"\boxed{1 \boxed{...} \boxed{2} 3}", "2"),
        (r"\boxed{1} \boxed{ \boxed{2", "1"),
        (r"{ \boxed{1}", "1"),
        (r"} } \boxed{1}", "1"),
        (r"\boxed{1} } } \boxed{2}", "2"),
        ("\\boxed{\n4\n}", "4"),
        ("\\boxed{\n.\n}", None),
        ("\\boxed{ \u2026 }", None),
        (r"\boxed\{4\}", None),
        (r"\boxedx{4}", None),
        (r"\box{4} \boxe d{4} \boxed[4]", None),
        (r"\boxed \boxed", None),
        (r"\boxed 4", None),
        (r"\boxed{4\}", None),
        (r"\boxed{{4}", None),
        (r"\unboxed{4}", None),
        ("\\boxed{\u4e2d\U0001f389}", "\u4e2d\U0001f389"),
    ],
)
def test_what_is_an_answer(text: str, answer: str | None) -> None:
    assert boxed_answer(text) == answer


def slow(text: str) -> str | None:
    """The same, so that one sees it: for each box, from its brace to the one that closes it."""
    found = None
    for start in range(len(text)):
        head = text[:start].rstrip()
        if not (text[start] == "{" and head.endswith("\\boxed")):
            continue
        depth, i = 0, start
        while i < len(text):
            if text[i] == "\\":
                i += 2
                continue
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                content = text[start + 1 : i].strip()
                found = content if content.strip(". ") else found
                break
            i += 1
    return found


def test_in_whatever_pieces_a_text_comes(seed: int) -> None:
    rng = random.Random(seed)
    words = [
        "\\boxed{",
        "\\boxed",
        "{",
        "}",
        "}",
        "\\{",
        "\\}",
        "\\\\ ",
        " ",
        "\n",
        ".",
        "4",
        "d",
        "x}",
    ]
    for _ in range(3000):
        text = "".join(rng.choices(words, k=rng.randint(1, 14)))
        expected = slow(text)
        assert boxed_answer(text) == expected, text
        finder, at = BoxedAnswer(), 0
        while at < len(text):
            size = rng.randint(0, 4)
            got = finder.add(text[at : at + size])
            at += size
            assert got == slow(text[:at]), text[:at]
        assert got == expected


# ---- what it costs -------------------------------------------------------------------------------


def lines_run(work: Callable[[], Any], *modules: str) -> int:
    """How many lines of these modules are run."""
    count = 0
    names = tuple(f"hogwild_ext/{module}.py" for module in modules)

    def look(frame: FrameType, kind: str, argument: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.endswith(names):
            return None
        count += kind == "line"
        return look

    before = sys.gettrace()
    sys.settrace(look)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


LOOPS = [
    "\\boxed{",
    "\\boxed{}",
    "}",
    "{",
    "\\",
    "\\boxed ",
    "\\boxed{1",
    "\\boxed{.} {",
    "\\boxed{\\boxed{}}",
]


@pytest.mark.parametrize("loop", LOOPS)
def test_the_cost_of_a_text_grows_with_its_length(loop: str) -> None:
    def in_pieces(count: int) -> None:
        finder = BoxedAnswer()
        for _ in range(count):
            finder.add(loop)

    costs = [lines_run(lambda n=n: in_pieces(n), "answers") for n in (100, 400)]  # type: ignore[misc]
    assert costs[1] < 4.2 * costs[0]
    costs = [lines_run(lambda n=n: boxed_answer(loop * n), "answers") for n in (100, 400)]  # type: ignore[misc]
    assert costs[1] < 4.2 * costs[0]


class Measured(str):
    """A text that says how much of it is cut out."""

    cut = 0

    def __getitem__(self, key: Any) -> str:
        part = super().__getitem__(key)
        Measured.cut += len(part)
        return part


@pytest.mark.parametrize("loop", LOOPS)
def test_little_is_cut_out_of_a_text(loop: str) -> None:
    """Boxes within boxes close one after the other: each with all that is in it, would be much."""
    Measured.cut = 0
    text = loop * 300 + "}" * 600

    class Growing(BoxedAnswer):
        def _close(self, start: int, end: int) -> None:
            self._text = Measured(self._text)
            super()._close(start, end)

    Growing().add(text)
    assert Measured.cut < 8 * len(text)


def test_a_run_costs_the_same_at_every_token(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that loops in an open box, in one paragraph that never ends."""
    modules = ("run", "answers", "sampling", "text_decoder", "prompts", "engine")
    Script(monkeypatch, {"A": say("\\boxed{" * 60)})
    run = team(model, ["A"]).stream("p", 400)
    steps = iter(run)
    costs = []
    for _ in range(400):
        costs.append(lines_run(lambda: next(steps), *modules))
    # Letters differ a little; the first steps open the page.
    assert max(costs[300:390]) <= max(costs[10:100])


# ---- being asked for it --------------------------------------------------------------------------


def test_a_conclusion_goes_by_all_that_its_worker_wrote(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processors see the worker's own tokens before those of the conclusion, as on the page."""
    Script(monkeypatch, {"A": say("abc"), "B": say("xyz")})
    seen: list[list[int]] = []

    def look(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(tokens[0].tolist())
        return scores

    prompts = replace(PROMPTS, closing="\nNow: \\boxed{")
    one = team(model, ["A", "B"], prompts=prompts, logits_processors=[look], answer_tokens=4)
    result = one.run("p", 3)
    assert result.workers[0].tokens == say("abc")
    concluding = seen[6:]
    assert len(concluding) == 4
    assert [tokens[:3] for tokens in concluding] == [say("abc")] * 4
    assert [len(tokens) for tokens in concluding] == [3, 4, 5, 6]


def test_a_function_of_ones_own_sees_the_whole_text(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Script(monkeypatch, {"A": [*say("ab.\n\ncd"), EOS], "B": say("xy")})
    texts: list[str] = []
    prompts = replace(PROMPTS, closing="\nNow:")
    one = team(model, ["A", "B"], prompts=prompts, final_answer=texts.append, answer_tokens=3)
    one.run("p", 6)
    assert texts[:8:2] == ["a", "ab", "ab.\n\n", "c"]
    assert texts[1:4:2] == ["x", "xy"]
    assert texts[-3:] == ["\nNow:zzz"[:n] for n in (6, 7, 8)]


# ---- text ----------------------------------------------------------------------------------------


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: a character without a token is written in bytes, which are read together."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581so"]
    tokenizer = Tokenizer(BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    "heading", ["\u20ac", "a", "\u4e2d", "\U0001f389", "\u4e2d" * 9, "\u20aca" * 30]
)
@pytest.mark.parametrize("text", ["\n", "a", "\u20ac", " so\n", "\U0001f389\n\u4e2d"])
def test_bytes_are_read_with_all_those_before_them(heading: str, text: str) -> None:
    """A line end behind the last byte of a character alone would be no line end."""
    tokenizer = byte_fallback()
    before, tokens = ([byte + 1 for byte in part.encode()] for part in (heading, text))
    decoder = TextDecoder(tokenizer, before)
    pieces = [decoder.add(token) for token in tokens]
    assert "".join(pieces) + decoder.flush() == text


def test_a_token_is_decoded_with_few_others(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Counting:
        def decode(self, tokens: list[int], **options: Any) -> str:
            sizes.append(len(tokens))
            return str(TOKENIZER.decode(tokens, **options))

    decoder = TextDecoder(Counting(), say("heading"))
    for token in say("words \u20ac " * 200):
        decoder.add(token)
    assert max(sizes[8:]) <= 8
