"""Where paragraphs end, in the scripts and with the marks that people and models write."""

# ruff: noqa: RUF001 (these marks look like others: that is what they are here for)

from __future__ import annotations

import re
import unicodedata
from dataclasses import replace

import pytest
import regex  # transformers brings it; Python's own knows no properties

from hogwild_ext.prompts import REASONING, SHORT, Prompts

FINISHED = {
    "Japanese, in brackets": "「これが答えです。」\n\n",
    "Japanese, in double brackets": "『終わり。』\n\n",
    "in full-width parentheses": "（証明終わり。）\n\n",
    "full-width question mark": "対ですか？！\n\n",
    "Chinese quotation in a quotation": "他說：「她說：『好！』」\n\n",
    "Chinese, simplified": "他说：“好。”\n\n",
    "Chinese ellipsis": "等等……\n\n",
    "half-width full stop": "end｡\n\n",
    "half-width bracket": "ｵﾜﾘ｡｣\n\n",
    "danda": "यह उत्तर है।\n\n",
    "double danda": "॥ इति ॥\n\n",
    "Arabic question mark": "هل هذا صحيح؟\n\n",
    "Urdu full stop": "یہ جواب ہے۔\n\n",
    "Armenian full stop": "Արդյունքը։\n\n",
    "Ethiopic full stop": "ይህ ነው።\n\n",
    "Khmer khan": "នេះជាចម្លើយ។\n\n",
    "Myanmar section": "ဒါပါပဲ။\n\n",
    "Tibetan shad": "རྫོགས་སོ།\n\n",
    "Thai, which has no marks": "นี่คือคำตอบ\n\n",
    "Greek question mark": "Γιατί\u037e\n\n",
    "French quotation": "« Fini. »\n\n",
    "French quotation, no-break spaces": "«\u00a0Fini\u202f!\u00a0»\n\n",
    "French question": "Vraiment ?\n\n",
    "Spanish": "¿De verdad?\n\n",
    "German quotation": "„Fertig.“\n\n",
    "Danish quotation": "»Færdig.«\n\n",
    "single quotation": "‚Ende.‘\n\n",
    "nested quotation": "“He said ‘no.’”\n\n",
    "bold": "**Done.**\n\n",
    "bold, and the full stop outside": "**Done**.\n\n",
    "only the full stop is bold": "Done**.**\n\n",
    "italic": "_Done._\n\n",
    "struck out": "~~Done.~~\n\n",
    "in parentheses, in brackets": "[(Done.)]\n\n",
    "inline formula": "so $x = 3.$\n\n",
    "inline formula, in LaTeX's way": "so \\(x = 3.\\)\n\n",
    "display formula": "\\[x = 3.\\]\n\n",
    "display formula on lines of its own": "$$\nx = 3.\n$$\n\n",
    "the same in LaTeX's way": "\\[\n  x = 3.\n\\]\n\n",
    "aligned": "x &= 3.\n\\end{align*}\n\n",
    "footnote": "So they say.[1]\n\n",
    "footnote of Markdown": "So they say.[^12]\n\n",
    "raised footnote": "So they say.²\n\n",
    "end of a proof": "This is it. ∎\n\n",
    "picture": "Great! \U0001f389\n\n",
    "picture of two characters": "Great!❤\ufe0f\n\n",
    "interrobang": "What\u203d\n\n",
    "Windows": "Done.\r\n\r\n",
    "an old Mac": "Done.\r\r",
    "no-break space": "Done.\u00a0\n\n",
    "full-width space": "終。\u3000\n\u3000\n",
    "next line": "Done.\x85\x85",
    "line separators": "Done.\u2028\u2028",
    "form feed": "Done.\n\x0c",
    "zero-width space": "Done.\u200b\n\n",
    "blanks in the empty line": "Done. \t\n \t \n  ",
    "many line ends": "Done." + "\n" * 20,
}
UNFINISHED = [
    "Therefore:\n\n", "因此：\n\n", "Heading\n\n", "## Heading\n\n", "**Heading**\n\n", "3.14",
    "e.g. ", "2 < 3.5\n\n",
    "e.g. this\n\n", "1. First\n\n", "so $x = 3$\n\n", "x = 3;\n\n", "f(x)\n\n", "def f(x):\n\n",
    "#include <a.h>\n\n", "| 3. |\n\n", "- one,\n\n", "also,\n\n", "一、\n\n", "so x = 3. +\n\n",
    "A sentence.", "A sentence. ", "A sentence.\n", "A sentence.\r\n", "A sentence.\r\n ",
    "A sentence.\n- and", "$$\nx = 3.\n$$\n", "```\nx = 3.\n```\n\n", "", "\n\n",
]  # fmt: skip


@pytest.mark.parametrize("text", FINISHED.values(), ids=FINISHED.keys())
def test_a_finished_paragraph(text: str) -> None:
    assert REASONING.ends_paragraph(text)
    assert REASONING.ends_paragraph("Something before.\n\nAnd " * 9 + text)
    # Not before its end has come, however it comes.
    ends = [n for n in range(len(text) + 1) if REASONING.ends_paragraph(text[:n])]
    assert min(ends) > len(text.rstrip("\n\r\x0c\x85\u2028 \t\u3000"))
    assert SHORT.ends_paragraph(text)


@pytest.mark.parametrize("text", UNFINISHED)
def test_no_paragraph_ends_here(text: str) -> None:
    assert not REASONING.ends_paragraph(text)


def test_every_mark_that_unicode_says_ends_a_sentence() -> None:
    """But for scripts that nobody writes any more, beyond the basic plane or in this list."""
    past = set("\u0837\u0839\u083d\u083e\u1735\u1736\u1aa8\u1aa9\u1aaa\u1aab\u1b7d\u1b7e\u1b7f")
    past |= set(
        "\u2cf9\u2cfa\u2cfb\u2e2e\u2e3c\u2e53\u2e54\ua6f3\ua6f7\ua92f\u2e60\u2e61\ufe12\ufe15\ufe16"
    )
    past |= {"\u2024"}  # a single dot that leads to a page number
    marks = [c for c in map(chr, range(0x10000)) if regex.match(r"\p{Sentence_Terminal}", c)]
    assert len(marks) > 60
    missed = [f"{ord(c):04x}" for c in marks if not REASONING.ends_paragraph(f"x{c}\n\n")]
    assert [c for c in missed if chr(int(c, 16)) not in past] == []


def test_every_mark_that_closes_may_follow() -> None:
    closing = [c for c in map(chr, range(0x10000)) if unicodedata.category(c) in ("Pe", "Pf", "Pi")]
    assert len(closing) > 90
    assert [c for c in closing if not REASONING.ends_paragraph(f"Done.{c}\n\n")] == []


@pytest.mark.parametrize(
    "mark", ["$", "\\", "\\]", "$$", "\n$$", " *", "[1]", "_", "\n", "\r\n", "\u00b2"]
)
@pytest.mark.parametrize("prompts", [REASONING, SHORT])
def test_no_text_takes_long(prompts: Prompts, mark: str) -> None:
    """A pattern that fits in many ways would be tried in all of them: 2 to the 60 here."""
    assert not prompts.ends_paragraph("." + (mark * 64)[-62:] + "x")


def test_only_the_end_is_looked_at() -> None:
    sizes = []

    class Recorded(str):
        def __getitem__(self, key):  # type: ignore[no-untyped-def]
            part = str.__getitem__(self, key)
            sizes.append(len(part))
            return part

    assert REASONING.ends_paragraph(Recorded("word " * 10**5 + "end.\n\n"))
    assert sizes and max(sizes) <= 64


def test_it_is_a_regular_expression_of_python_that_can_be_typed() -> None:
    for prompts in (REASONING, SHORT):
        re.compile(prompts.paragraph_end)
        assert prompts.paragraph_end.isascii()


def test_ends_of_ones_own() -> None:
    mine = replace(REASONING, paragraph_end=r"(?:{sentence_end}|;){line_end}")
    assert mine.ends_paragraph("one;\n") and mine.ends_paragraph("\u597d\u3002\n")
    assert not mine.ends_paragraph("one:\n")
    braces = replace(REASONING, paragraph_end=r"a{2}{other}")
    assert braces.ends_paragraph("aa{other}") and not braces.ends_paragraph("a{other}")


def test_a_separator_of_paragraphs_is_an_empty_line() -> None:
    assert REASONING.ends_paragraph("Done.\u2029")
    assert not REASONING.ends_paragraph("Done.\u2028")
