"""Chat templates and tokenizers of others: what they make is looked at."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tokenizers import pre_tokenizers

import hogwild_ext as hx
from chat_templates import CHATML, ENDS, GEMMA, NEVER_OPENS, PHI_3, QWEN, THINKS_IF_ASKED, TOKENS
from hogwild_ext.chat_format import check_tokenizer, encode, in_chat_format, turn_end
from hogwild_ext.layouts import Combined
from hogwild_ext.prompts import REASONING
from models import tiny_model
from scripted import PROMPTS, byte_tokenizer

TOLD = """\
Work together.

- First: {{ braces }}, <b> & "quotes", \\boxed{}.
- Then: it's \u4e2d\u6587."""
ASKED = "Is 2 < 3 & 4 > 1?\n\n  Say `why`,\nin \u20ac: {% raw %} \\[x\\]"


def tokenizer_with(template: Any) -> Any:
    tokenizer = byte_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
    return tokenizer


@pytest.mark.parametrize("name", ENDS)
def test_both_are_said_whole_in_the_format_of_every_model(name: str) -> None:
    tokenizer = tokenizer_with(ENDS[name][0])
    for asked in (ASKED, ASKED + " \n", "3", "Work together."):
        text = in_chat_format(tokenizer, TOLD, asked, "")
        assert text.count(TOLD) == 1
        assert asked.strip() in text.partition(TOLD)[2]
        alone = in_chat_format(tokenizer, "", asked, "")
        assert asked.strip() in alone and "hogwild" not in text + alone
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert tokens.count(tokenizer.bos_token_id) == ("bos_token" in ENDS[name][0])


@pytest.mark.parametrize("name", ENDS)
def test_an_answer_is_opened_as_in_the_format_of_the_model(name: str) -> None:
    """What stands behind what is asked is what the template puts in front of an answer."""
    tokenizer = tokenizer_with(ENDS[name][0])
    for told in ("", TOLD):
        opened = in_chat_format(tokenizer, told, ASKED, "").rpartition(ASKED)[2].strip()
        both = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}]
        parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in both]
        for messages in (both, parts):
            try:
                turn = tokenizer.apply_chat_template(messages, tokenize=False)
            except Exception:  # this one takes parts only
                continue
            if "ask" in turn and "say" in turn:
                break
        expected = turn.rpartition("ask")[2].partition("say")[0].partition("<think>")[0].strip()
        assert opened.removesuffix("<think>").strip() == expected.partition("<|channel|>")[0]


@pytest.mark.parametrize("name", ENDS)
def test_the_token_with_which_a_turn_ends(name: str) -> None:
    template, end = ENDS[name]
    tokenizer = tokenizer_with(template)
    assert turn_end(tokenizer) == (None if end is None else tokenizer.convert_tokens_to_ids(end))


def test_an_end_may_be_a_token_that_is_added_but_not_special() -> None:
    tokenizer = byte_tokenizer(CHATML)
    assert turn_end(tokenizer) is None  # there it is words
    tokenizer.add_tokens(["<|im_end|>", "<|im_"])
    assert turn_end(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize(
    "template", [None, "{{ nonsense() }}", "{% for m in messages %}{{ m.content }}{% endfor %}", ""]
)
def test_no_end_is_guessed(template: str | None) -> None:
    assert turn_end(tokenizer_with(template)) is None


def test_who_ends_a_turn_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though no config names the token; before, it was forbidden."""
    tokenizer = tokenizer_with(CHATML)
    model = tiny_model("llama", vocab_size=len(tokenizer))
    end, other = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|return|>"])
    model.generation_config.eos_token_id = None
    assert hx.Hogwild(model, tokenizer, 2, prompts=PROMPTS).ends_of_sequence == {2, end}
    # All that is named anywhere is honoured.
    model.config.eos_token_id = [other]
    assert hx.Hogwild(model, tokenizer, 2, prompts=PROMPTS).ends_of_sequence == {2, end, other}
    model.config.eos_token_id, model.generation_config.eos_token_id = 5, [other, 7]  # 5: a letter
    assert hx.Hogwild(model, tokenizer, 2, prompts=PROMPTS).ends_of_sequence == {2, end, other, 7}


# ---- templates that do not say what they are given -----------------------------------------------


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ("m.content | upper", "leaves out the instructions"),
        (
            "m.content | tojson",
            "changes the instructions, or leaves them out, from '\\n\\n- First: {{",
        ),
        ("m.content | e", "changes the instructions, or leaves them out, from '<b>"),
        ("m.content | replace('\n', ' ')", "changes the instructions"),
        ("m.content[:40]", "changes the instructions, or leaves them out, from"),
        ("m.content | truncate(60)", "changes the instructions"),
        ("m.content | striptags", "changes the instructions"),
        ("m.content + m.content", "writes the instructions 2 times"),
        ("m.content.split('?')[0]", "changes the problem"),
        ("'x' if loop.last else m.content", "leaves out the problem"),
        ("m.words", "leaves out the instructions"),
        ("raise_exception('no\nnever')", "raises TemplateError: no"),
        ("m.content.nothing.at.all", "raises UndefinedError"),
        ("1 / 0", "raises ZeroDivisionError"),
    ],
)
def test_a_template_that_says_something_else_is_refused(changes: str, missing: str) -> None:
    template = CHATML.replace("{{ m.content }}", "{{ " + changes + " }}")
    message = (
        "tokenizer: expected a chat template that writes the instructions and the problem, whole"
    )
    with pytest.raises(ValueError, match=message) as caught:
        in_chat_format(tokenizer_with(template), TOLD, ASKED, "")
    assert missing in str(caught.value)
    assert "Give the tokenizer another chat_template" in str(caught.value)


def test_the_problem_alone_is_looked_for_too() -> None:
    for template in (
        "hello",
        "{{ messages[0].content[:9] }}",
        "{{ messages[0].content | lower }}!",
    ):
        with pytest.raises(ValueError, match="got one that .*the problem"):
            in_chat_format(tokenizer_with(template), "", ASKED, "")


def test_a_system_message_that_has_no_place_is_the_users() -> None:
    """Because it is dropped, refused, put behind the problem, or because nothing else follows."""
    upside_down = CHATML.replace("m.content", "messages[-1 - loop.index0].content")
    first_only = CHATML.replace("{{ m.content }}", "{{ m.content if loop.first else 'x' }}")
    for template in (PHI_3, GEMMA, upside_down, first_only):
        text = in_chat_format(tokenizer_with(template), TOLD, ASKED, "")
        assert f"{TOLD}\n\n{ASKED}" in text


def test_a_run_is_refused_before_it_begins() -> None:
    tokenizer = tokenizer_with(CHATML.replace("m.content", "m.content[:9]"))
    model = tiny_model("llama", vocab_size=len(tokenizer))
    team = hx.Hogwild(model, tokenizer, 2)
    with pytest.raises(ValueError, match="tokenizer: expected a chat template that writes"):
        team.run("What is 6 x 7?")


# ---- templates with names, thinking --------------------------------------------------------------


def test_templates_that_have_names() -> None:
    expected = in_chat_format(tokenizer_with(CHATML), TOLD, ASKED, "")
    named = {"tool_use": "tools!", "default": CHATML}
    for template in (
        named,
        {"chat": CHATML},
        [{"name": name, "template": template} for name, template in named.items()],
    ):
        tokenizer = tokenizer_with(template)
        assert in_chat_format(tokenizer, TOLD, ASKED, "") == expected
        assert turn_end(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    with pytest.raises(
        ValueError, match="tokenizer: expected one chat template.* got rag, tool_use"
    ):
        in_chat_format(tokenizer_with({"rag": CHATML, "tool_use": CHATML}), TOLD, ASKED, "")


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (QWEN, "<|im_start|>assistant\n<think>\n"),
        (THINKS_IF_ASKED, "<|im_start|>assistant\n<think>\n"),
        ({"default": QWEN}, "<|im_start|>assistant\n<think>\n"),
        ({"default": CHATML, "thinks": QWEN}, "<|im_start|>assistant\n"),
        (ENDS["deepseek"][0], "<|Assistant|><think>\n"),
        (NEVER_OPENS, "<|im_start|>assistant\n"),
    ],
)
def test_thinking_is_opened_once(template: Any, end: str) -> None:
    text = in_chat_format(tokenizer_with(template), TOLD, ASKED, "<think>\n")
    assert text.endswith(end)
    assert text.count("think>") == end.count("think>")


def test_names_and_problems_do_not_matter() -> None:
    """Our own words go through every format."""
    for name, (template, _) in ENDS.items():
        tokenizer = tokenizer_with(template)
        for names in (["Alice"], ["A{B}", "C"]):
            text = REASONING.opening(tokenizer, names, ASKED, Combined())
            assert ASKED in text, name
            if len(names) == 2:
                assert "A{B} and C solve a problem together" in text


# ---- tokenizers ----------------------------------------------------------------------------------


class Plain:
    """A tokenizer that has nothing but what is asked of one."""

    def __init__(self, **more: Any) -> None:
        self._real = byte_tokenizer()
        for name, value in more.items():
            setattr(self, name, value)

    def encode(self, text: str, add_special_tokens: bool = True) -> Any:
        return self._real.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, tokens: Any, **options: Any) -> Any:
        return self._real.decode(tokens, **options)


def test_a_tokenizer_with_little_is_enough() -> None:
    model = tiny_model("llama", vocab_size=len(byte_tokenizer()))
    assert hx.Hogwild(model, Plain(), 2, prompts=PROMPTS).run("p", 3).steps == 3


@pytest.mark.parametrize(
    "other",
    [
        byte_tokenizer().backend_tokenizer,  # of the package beneath: encode gives an object
        type("Bare", (), {"encode": lambda self, text: [5], "decode": lambda self, tokens: ""})(),
        type("Numbers", (), {"encode": lambda *_, **__: "5", "decode": lambda *_, **__: ""})(),
        type("Half", (), {"encode": lambda *_, **__: [5]})(),
        "gpt2",
        None,
    ],
    ids=lambda other: type(other).__name__,
)
def test_what_is_no_tokenizer_of_transformers_is_named(other: Any) -> None:
    model = tiny_model("llama", vocab_size=len(byte_tokenizer()))
    with pytest.raises(TypeError, match="tokenizer: expected a tokenizer of transformers"):
        hx.Hogwild(model, other, 2, prompts=PROMPTS)


@pytest.mark.parametrize("with_line_end", [False, True])
def test_no_space_before_a_text_in_the_middle_of_a_page(with_line_end: bool) -> None:
    """As GPT-2's tokenizer puts one there if it is told to: a token, or one with the line end."""
    tokenizer = byte_tokenizer()
    if with_line_end:
        tokenizer = byte_tokenizer(merges=[("\u0120", "\u010a")])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=True, use_regex=False
    )
    assert tokenizer.decode(tokenizer.encode("Alice:", add_special_tokens=False)) == " Alice:"
    model = tiny_model("llama", vocab_size=len(tokenizer))
    team = hx.Hogwild(model, tokenizer, 2, prompts=PROMPTS)
    for text in ("Alice:", "\n\nAlice", "x", "\u20ac"):
        assert tokenizer.decode(team.encode(text)) == text


def test_a_tokenizer_that_cannot_use_its_template_is_named() -> None:
    with pytest.raises(ValueError, match="tokenizer: .*AttributeError.*apply_chat_template"):
        PROMPTS.opening(Plain(chat_template=CHATML), ["A", "B"], "p", Combined())


class MistralCommonBackend(Plain):
    """As transformers wraps mistral-common's: no template, and control tokens are no text."""

    all_special_tokens = ("<pad>", "<bos>", "<eos>", "[INST]", "[/INST]", "[/INST]!")
    all_special_ids = (0, 1, 2, 261, 262, 263)
    eos_token_id = 2

    def added_tokens_decoder(self) -> Any:  # a method here
        raise NotImplementedError

    def get_chat_template(self) -> Any:
        raise NotImplementedError

    def apply_chat_template(self, messages: Any, tokenize: bool, return_dict: bool) -> list[int]:
        assert tokenize and not return_dict
        if messages[-1]["role"] == "assistant":
            raise ValueError("expected the user to be last")
        tokens = [1]
        for message in messages:
            tokens += [261, *self.encode(message["content"], False), 262]
        return tokens

    def decode(self, tokens: Any, skip_special_tokens: bool = False, **options: Any) -> Any:
        special = dict(zip(self.all_special_ids, self.all_special_tokens, strict=True))
        text, rest = "", []
        for token in [*tokens, None]:
            if token in special or token is None:
                text += self._real.decode(rest) + special.get(token, "")
                rest = []
            else:
                rest.append(token)
        return text


def test_mistral_commons_tokenizer_has_a_chat_format() -> None:
    tokenizer = MistralCommonBackend()
    model = tiny_model("llama", vocab_size=264)
    team = hx.Hogwild(model, tokenizer, ["A", "B"], prompts=PROMPTS)
    text = PROMPTS.opening(tokenizer, ["A", "B"], "p", Combined())
    assert text == "<bos>[INST]A and B: 2.[/INST][INST]p[/INST]H:\n"
    letters = tokenizer.encode
    assert team.encode_first(text) == (
        [1, 261, *letters("A and B: 2."), 262, 261, *letters("p"), 262, *letters("H:\n")]
    )
    assert team.run("p", 3).steps == 3
    with pytest.raises(ValueError, match="control tokens among the words"):
        team.run("what is [INST]?", 3)


def test_what_reads_pieces_of_words_back_is_refused() -> None:
    class Older(MistralCommonBackend):
        def decode(self, tokens: Any, **options: Any) -> Any:
            return super().decode(tokens).replace(" ", "\u2581").replace("\n", "<0x0A>")

    model = tiny_model("llama", vocab_size=264)
    with pytest.raises(ValueError, match="tokenizer: expected mistral-common's Tekken"):
        hx.Hogwild(model, Older(), 2, prompts=PROMPTS)


def test_the_real_one(tmp_path: Any) -> None:
    """With the package of Mistral's, on all the tokenizers that it brings and that are taken."""
    mistral_common = pytest.importorskip("mistral_common")
    from pathlib import Path

    import transformers

    sources = sorted((Path(mistral_common.__file__).parent / "data").glob("*tok*.*"))
    tried = 0
    for source in [*sources, *(Path(mistral_common.__file__).parent / "data").glob("tekken*")]:
        try:
            tokenizer = transformers.MistralCommonBackend(tokenizer_path=str(source))
        except Exception:  # of another kind
            continue
        try:
            check_tokenizer(tokenizer)
        except ValueError:
            continue
        messages = [{"role": "system", "content": TOLD}, {"role": "user", "content": ASKED}]
        tokens = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        text = in_chat_format(tokenizer, TOLD, ASKED, "")
        assert encode(tokenizer, text) == tokens
        tried += 1
    assert tried


def test_one_kind_of_prompts_has_no_system_message() -> None:
    alone = replace(PROMPTS, alone="")
    for template, _ in ENDS.values():
        assert "p" in alone.opening(tokenizer_with(template), ["A"], "p", Combined())
