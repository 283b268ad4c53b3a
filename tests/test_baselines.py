"""`bench/baselines.py`: votes, outlines, and who reads what, on a tiny model."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import hogwild_ext as hx
from models import VOCABULARY, tiny_model

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))
import baselines  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


class Letters:
    """A tokenizer whose tokens are characters."""

    eos_token_id = VOCABULARY - 1

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [min(ord(letter), VOCABULARY - 2) for letter in text]

    def decode(self, tokens: list[int], **options: Any) -> str:
        return "".join(chr(token) for token in tokens)


class Script:
    """Stands for `hx.forward`: each segment goes on with a text of its own, then ends.

    `starts`: at which token of a segment its text begins; unless given, behind what is written
    there first.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, texts: dict[str, str], starts: dict[str, int]
    ) -> None:
        self.texts, self.starts, self.forward = texts, starts, hx.forward
        self.calls: list[list[tuple[list[str], list[int]]]] = []  # names of the view, new tokens
        monkeypatch.setattr(hx, "forward", self)
        monkeypatch.setattr(baselines, "draw", lambda logits, generator: int(logits.argmax()))

    def __call__(self, model, cache, views, tokens, **options):  # type: ignore[no-untyped-def]
        logits = self.forward(model, cache, views, tokens, **options)
        self.calls.append(
            [([s.name for s in view], list(new)) for view, new in zip(views, tokens, strict=True)]
        )
        rows = torch.full_like(logits, -1.0)
        for row, view in zip(rows, views, strict=True):
            name, length = view[-1].name, len(view[-1])
            rest = self.texts.get(name, "?")[length - self.starts.setdefault(name, length) :]
            row[ord(rest[0]) if rest else Letters.eos_token_id] = 1.0
        return rows


@pytest.fixture
def model() -> transformers.PreTrainedModel:
    return tiny_model("llama")


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["7", "12", "12"], "12"),
        (["7", "12"], "7"),
        (["12", "7", "7", "12"], "12"),
        ([None, None, "3"], "3"),
        ([" 4.", "5", "4"], "4"),
        ([None], None),
        ([], None),
    ],
)
def test_votes_and_ties(answers: list[str | None], winner: str | None) -> None:
    assert baselines.vote(answers) == winner


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{12} it is, 7", "12"),
        ("first 3, then -1,234.5 in all.", "-1234.5"),
        ("nothing", None),
    ],
)
def test_answers(text: str, answer: str | None) -> None:
    assert baselines.answer_in(text) == answer


def test_points() -> None:
    outline = "1. Homes\n2) **Roads**\nwords\n3. Schools\n4. Shops"
    assert baselines.points_of(outline, 3) == ["Homes", "Roads", "Schools"]
    assert baselines.points_of("Homes\n\nRoads", 3) == ["Homes", "Roads"]
    assert len(baselines.points_of("", 3)) == 1


def test_drawing_follows_the_seed_and_the_logits() -> None:
    logits = torch.randn(100)
    draws = [baselines.draw(logits, torch.Generator().manual_seed(s)) for s in range(50)]
    again = [baselines.draw(logits, torch.Generator().manual_seed(s)) for s in range(50)]
    assert draws == again and len(set(draws)) > 5
    assert set(draws) <= set(logits.topk(baselines.TOP_K).indices.tolist())
    sure = torch.zeros(100).index_fill(0, torch.tensor([7]), 100.0)
    assert baselines.draw(sure, torch.Generator()) == 7


@pytest.mark.parametrize("method", baselines.METHODS)
def test_each_method_is_short(method: Callable[..., Any]) -> None:
    tree = ast.parse((BENCH / "baselines.py").read_text())
    [function] = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == method.__name__
    ]
    assert function.end_lineno is not None
    assert function.end_lineno - function.lineno + 1 < 80


@pytest.mark.parametrize("method", baselines.METHODS)
def test_budgets_and_counts(method: Callable[..., Any], model: Any, seed: int) -> None:
    out = method(model, Letters(), "What?", 3, 12, seed % 1000)
    again = method(model, Letters(), "What?", 3, 12, seed % 1000)
    assert out.passes <= 12
    assert 0 < out.generated <= 3 * 12
    assert (out.text, out.generated, out.encoded) == (again.text, again.generated, again.encoded)


def test_self_consistency_encodes_its_prompt_once_and_votes(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {"attempt 1": "it is 5", "attempt 2": "\\boxed{9} and more", "attempt 3": "9 it is, 9"}
    # Their first tokens all come from the prompt's logits.
    script = Script(monkeypatch, texts, dict.fromkeys(texts, 0))
    shared = iter("i\\9")

    def first(logits: torch.Tensor, generator: torch.Generator) -> int:
        letter = next(shared, None)
        return int(logits.argmax()) if letter is None else ord(letter)

    monkeypatch.setattr(baselines, "draw", first)
    out = baselines.self_consistency(model, Letters(), "What?", 3, 100, 0)

    prompts = [row for call in script.calls for row in call if row[0] == ["prompt"]]
    assert len(prompts) == 1
    others = [row for call in script.calls[1:] for row in call]
    assert all(row[0][0] == "prompt" and len(row[0]) == 2 and len(row[1]) == 1 for row in others)
    assert out.answer == "9"
    assert out.text.split("\n\n---\n\n") == ["it is 5", "\\boxed{9}", "9 it is, 9"]
    assert out.generated == len("it is 5") + len("\\boxed{9}") + len("9 it is, 9")
    # All but the last token of the one that stopped at its answer.
    assert out.encoded == len(prompts[0][1]) + out.generated - 1
    assert out.passes == len(script.calls)


def test_skeleton_of_thought_joins_points_in_order(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {
        "skeleton": " Homes\n2. Roads\n3. Shops\n4. More\n",
        "point 1": " " + "long " * 8,  # the last to be done
        "point 2": " short\n\nnot this",
        "point 3": " mid 7",
    }
    script = Script(monkeypatch, texts, {})
    out = baselines.skeleton_of_thought(model, Letters(), "What?", 3, 400, 0)

    assert out.text == (
        f"Point 1, Homes: {('long ' * 8).strip()}\n\nPoint 2, Roads: short\n\nPoint 3, Shops: mid 7"
    )
    rows = [row for call in script.calls for row in call]
    assert sum(row[0] == ["prompt"] for row in rows) == 1
    outline = [row for row in rows if row[0] == ["prompt", "skeleton"]]
    assert script.calls[1] == [(["prompt", "skeleton"], Letters().encode("1."))]
    assert "".join(chr(row[1][0]) for row in outline[1:]) == " Homes\n2. Roads\n3. Shops"
    points = [row for row in rows if len(row[0]) == 3]
    assert {tuple(row[0]) for row in points} == {
        ("prompt", "skeleton", f"point {i}") for i in (1, 2, 3)
    }
    opening = next(call for call in script.calls if len(call[0][0]) == 3)
    assert len(opening) == 3  # all at once
    assert out.passes == len(script.calls)
