"""The words said to the model: prompts, headings, files with one's own."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import hogwild_ext as hx
from hogwild_ext.layouts import LAYOUTS, Combined
from hogwild_ext.prompts import REASONING, SHORT, Prompts, prompts_for
from scripted import CHAT, PROMPTS, TOKENIZER, VOCABULARY, byte_tokenizer, say, team

LAYOUT = Combined()


# ---- texts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "full", "short"),
    [
        ("A sentence.\n\n", True, True),
        ("Really?!\n\n", True, True),
        ("**Bold.**\n\n", True, True),
        ('"Quoted."\n \n', True, True),
        ("\u597d\u3002\n\n", True, True),
        ("A sentence.\n", False, True),
        ("A sentence. ", False, False),
        ("First, this:\n\n", False, True),
        ("\n\n", False, False),
        ("", False, False),
    ],
)
def test_where_paragraphs_end(text: str, full: bool, short: bool) -> None:
    assert REASONING.ends_paragraph(text) is full
    assert SHORT.ends_paragraph(text) is short


def test_the_prompt_in_every_kind_of_chat_format() -> None:
    names, problem = ["A", "B", "{names}"], "{x} and {names} in \\boxed{y}"
    told = "A, B and {names}: 3."
    assert PROMPTS.opening(TOKENIZER, names, problem, LAYOUT) == (
        f"<system>{told}</><user>{problem}</><assistant>H:\n"
    )
    no_system = byte_tokenizer(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHAT
    )
    assert PROMPTS.opening(no_system, names, problem, LAYOUT) == (
        f"<user>{told}\n\n{problem}</><assistant>H:\n"
    )
    assert (
        PROMPTS.opening(byte_tokenizer(None), names, problem, LAYOUT)
        == f"{told}\n\n{problem}\n\nH:\n"
    )
    assert (
        PROMPTS.opening(TOKENIZER, ["A"], "p", LAYOUT)
        == "<system>alone.</><user>p</><assistant>H:\n"
    )
    silent = replace(PROMPTS, alone="")
    assert silent.opening(TOKENIZER, ["A"], "p", LAYOUT) == "<user>p</><assistant>H:\n"
    assert silent.opening(byte_tokenizer(None), ["A"], "p", LAYOUT) == "p\n\nH:\n"


def test_plain_text_begins_as_the_tokenizer_begins_a_text() -> None:
    """As a chat template would write it: some models know no text without this token."""
    tokenizer = byte_tokenizer(None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    text = PROMPTS.opening(tokenizer, ["A"], "p", LAYOUT)
    assert text == "<bos>alone.\n\np\n\nH:\n"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert tokens == tokenizer.encode("alone.\n\np\n\nH:\n")
    assert tokens[0] == tokenizer.bos_token_id


def test_our_own_prompts_have_no_gaps() -> None:
    for prompts in (REASONING, SHORT):
        for names in (["Alice"], ["Alice", "Bob"], ["Alice", "Bob", "Carol"]):
            text = prompts.opening(TOKENIZER, names, "What?", LAYOUT)
            assert "What?" in text
            for gap in ("{name", "{first}", "{count}", "{problem}", "{number}"):
                assert gap not in text
        assert prompts.paragraph_heading("Alice", 2).startswith(("Alice", "**Alice [2]"))
    assert "Alice, Bob and Carol" in REASONING.opening(
        TOKENIZER, ["Alice", "Bob", "Carol"], "x", LAYOUT
    )
    assert prompts_for(135_000_000) is SHORT
    assert prompts_for(8_000_000_000) is REASONING


def test_what_must_not_be_written_is_not(model: Any) -> None:
    strict = replace(PROMPTS, heading="{name}:", not_first=("a", " {name}"), never=("{name}:",))
    favourites = torch.zeros(VOCABULARY)
    # In this order the model would like: "a", " ", "b", "B", ":".
    for rank, letter in enumerate("a bB:"):
        favourites[say(letter)[0]] = 50.0 - rank

    def fixed(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wish = favourites.clone()
        if tokens.shape[1] and tokens[0, -1] == say("B")[0]:
            wish[say(":")[0]] = 99.0
        return wish.where(scores != -torch.inf, scores)

    first = team(model, ["B", "C"], prompts=strict, logits_processors=[fixed]).run("p", 3)
    assert [worker.text for worker in first.workers] == ["baa", "baa"]
    sampler = team(model, ["B", "C"], prompts=strict).sampler
    logits = torch.zeros(VOCABULARY)
    logits[say(":")[0]] = 9.0
    generator = torch.Generator()
    assert sampler(logits, say("xB"), generator) != say(":")[0]
    assert sampler(logits, say("xA"), generator) == say(":")[0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"system": 3}, TypeError, "system: expected a string"),
        ({"never": "x"}, TypeError, r"never: expected a tuple of strings \(a list, in a file\)"),
        ({"heading": ""}, ValueError, "heading: expected some text"),
        ({"user": "no place"}, ValueError, r"user: expected \{problem\}"),
        ({"paragraph_end": "("}, ValueError, "paragraph_end: expected a regular expression"),
    ],
)
def test_broken_prompts_are_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        replace(PROMPTS, **change)


# ---- models that think ---------------------------------------------------------------------------

THINKS_BY_CHOICE = (
    "{% for message in messages %}{{ message['content'] }};{% endfor %}assistant:"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (THINKS_BY_CHOICE, "p;assistant:<think>\n"),  # as Qwen3's
        ("{{ messages[0].content + ';assistant:<think>\n' }}", "p;assistant:<think>\n"),  # as QwQ's
        (THINKS_BY_CHOICE + "{{ '<think>\n' }}", "p;assistant:<think>\n"),
        ("{{ messages[0].content }};assistant:", "p;assistant:"),
    ],
)
def test_the_page_is_the_thinking_of_a_model_that_thinks(template: str, end: str) -> None:
    prompts = replace(PROMPTS, alone="", think="<think>\n", history_heading="")
    assert prompts.opening(byte_tokenizer(template), ["A"], "p", LAYOUT) == end


def test_thinking_does_not_end_on_the_page() -> None:
    assert "</think>" in REASONING.forbidden(["Alice"])
    assert REASONING.think == "<think>\n"


def test_special_tokens_are_never_written(model: Any) -> None:
    """No worker opens a turn of the chat on the page."""
    wishes = torch.full((VOCABULARY,), -9.0)
    wishes[TOKENIZER.pad_token_id], wishes[TOKENIZER.bos_token_id] = 9.0, 8.0
    wishes[say("a")[0]] = 7.0

    def fixed(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return wishes.where(scores != -torch.inf, scores)

    result = team(model, 2, logits_processors=[fixed]).run("p", 3)
    assert [worker.text for worker in result.workers] == ["aaa", "aaa"]


def test_tokens_that_the_model_does_not_know(model: Any) -> None:
    """A tokenizer may have more special tokens than the model has logits."""
    more = byte_tokenizer()
    more.add_special_tokens({"additional_special_tokens": ["<more>"]})
    assert more.convert_tokens_to_ids("<more>") == VOCABULARY
    prompts = replace(PROMPTS, never=("<more>",), not_first=("<more>",))
    one = hx.Hogwild(model, more, 2, prompts=prompts, max_tokens=1024)
    assert one.run("p", 3).steps == 3


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [REASONING, SHORT, PROMPTS])
def test_a_file_says_all_that_we_do(prompts: Prompts, tmp_path: Path) -> None:
    path = tmp_path / "prompts.toml"
    path.write_text(prompts.as_toml(), encoding="utf-8")
    other = SHORT if prompts is REASONING else REASONING
    again = Prompts.read(path, replace(other, how_to_read={}))
    assert again == prompts
    for text in fields(Prompts):
        assert text.name in prompts.as_toml()


def test_a_file_keeps_every_character(tmp_path: Path) -> None:
    odd = 'one\r\ntwo\rthree\n""" \\ \t\x07\u20ac'
    prompts = replace(REASONING, system=odd, how_to_read={"own": odd}, never=(odd, ""))
    path = tmp_path / "prompts.toml"
    path.write_text(prompts.as_toml(), encoding="utf-8")
    assert Prompts.read(path, replace(SHORT, how_to_read={})) == prompts


def test_a_file_changes_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'heading = "{name}, {number}:"\nnever = ["x", "y"]\n'
        'system = """\nOne\ntwo \u20ac\n"""\n[how_to_read]\nown = "upwards"\n',
        encoding="utf-8",
    )
    read = Prompts.read(path, REASONING)
    assert read.heading == "{name}, {number}:" and read.never == ("x", "y")
    assert read.system == "One\ntwo \u20ac\n"
    assert read.how_to_read == {**REASONING.how_to_read, "own": "upwards"}
    assert read.user == REASONING.user and read.closing == REASONING.closing


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('heading = "a', "mine.toml: .*line 1"),
        ('heading = "a"\nheading = "b"', "mine.toml: .*heading"),
        ('greeting = "a"', "mine.toml: greeting: expected one of system, alone, user"),
        ("heading = 3", "mine.toml: heading: expected a string, got"),
        ('never = "x"', "mine.toml: never: expected a tuple of strings"),
        ("never = [1]", "mine.toml: never: expected a tuple of strings"),
        ('how_to_read = "x"', "mine.toml: how_to_read: expected a string for each layout"),
        ("[how_to_read]\ncombined = 3", "mine.toml: how_to_read: expected a string for each"),
        ('user = "no place"', r"mine.toml: user: expected \{problem\}"),
        ('heading = ""', "mine.toml: heading: expected some text"),
        ('paragraph_end = "(?i)x"', "mine.toml: paragraph_end: expected a regular expression"),
        ('paragraph_end = "("', "mine.toml: paragraph_end: expected a regular expression"),
        (b"\xff\xfe", "mine.toml: .*utf-8"),
        ('heading = "a"'.encode("utf-16"), "mine.toml: expected text in utf-8 .*looks like UTF-16"),
        ('heading = "a"'.encode("utf-16-le"), "mine.toml: expected text in utf-8, got zeros"),
        (
            'heading = "\u00e9"'.encode("latin-1"),
            "mine.toml: expected text in utf-8: .*position 11",
        ),
    ],
)
def test_a_broken_file_is_refused(content: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        Prompts.read(path, REASONING)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_file_of_any_editor(mark: bytes, line_end: str, tmp_path: Path) -> None:
    """With a byte order mark, and the line ends of Windows."""
    path = tmp_path / "mine.toml"
    path.write_bytes(mark + REASONING.as_toml().replace("\n", line_end).encode())
    assert Prompts.read(path, replace(SHORT, how_to_read={})) == REASONING


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Prompts.read(tmp_path / "none.toml", REASONING)


def test_every_layout_is_explained_to_models_that_reason() -> None:
    assert REASONING.how_to_read.keys() == LAYOUTS.keys()
    for name, layout in LAYOUTS.items():
        text = REASONING.opening(TOKENIZER, ["Alice", "Bob"], "What?", layout())
        assert REASONING.how_to_read[name].replace("{first}", "Alice") in text
        assert "{" not in text.replace("\\boxed{}", "")
