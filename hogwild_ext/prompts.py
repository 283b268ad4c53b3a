"""Every word that the engine says to the model: what the workers are told, and the page's headings.

The page is one text. Wherever a worker stands in it, it must be able to tell who wrote what, what
is finished and what is still being written. So every paragraph begins with its writer's heading,
and two short headings separate the history, the others' paragraphs and one's own:

    prompt             instructions, the problem, and the heading of the history
    history            **Alice [1]:** ... finished. **Bob [1]:** ... finished.
    others_heading
    another's live     **Bob [2]:** words so f
    unfinished         marks that it breaks off here
    own_heading
    one's own live     **Alice [2]:** the words that come

A heading belongs to the paragraph that it opens, and moves into the history with it. That is the
combined layout; in the others some of it is missing, and `how_to_read` tells the workers how.

Texts of one's own are written in TOML, one key a text: `hogwild prompts` prints ours to start from,
`Prompts.read` takes a file with those that shall be different.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from . import checks
from .chat_format import in_chat_format
from .layouts import Layout

# What ends a sentence: Unicode's Sentence_Terminal, without scripts of the past; ellipses; the
# shads of Tibetan, the question mark of Greek. Thai and Lao have nothing of the kind: any letter.
_SENTENCE_END = (
    r"[.!?\u037e\u0589\u061d-\u061f\u06d4\u0700-\u0702\u07f9\u0964\u0965\u0e01-\u0eff"
    r"\u0f0d-\u0f12\u104a\u104b\u1362\u1367\u1368\u166e\u17d4-\u17d6\u1803\u1809\u1944\u1945"
    r"\u1b4e\u1b4f\u1b5a-\u1b5f\u1c3b\u1c3c\u1c7e\u1c7f\u2026\u203c\u203d\u2047-\u2049\u22ef\u3002\ua4ff"
    r"\ua60e\ua60f\ua876\ua877\ua8ce\ua8cf\ua9c8\ua9c9\uaa5d-\uaa5f\uaaf0\uaaf1\uabeb"
    r"\ufe52\ufe56\ufe57\uff01\uff0e\uff1f\uff61]"
)
# What may stand behind it: marks that close (quotes, brackets, emphasis, a formula), pictures, the
# number of a footnote. All but letters, and marks behind which something must come; on a line of
# their own, the ends of formulas. No text fits in two ways, or a long one would take for ever.
_CLOSING = (
    r"(?:\[\^?\w{1,3}\]|[\u00b2\u00b3\u00b9\u2070-\u2079]"
    r"|[^\S\n]*\n\s*(?:\$\$|\\[\])]|\\end\{\w+\*?\})"
    r"|[^\S\n\r]*(?:_|[^\w\s.,:;+=<>/&#%@|^({\[\u2010-\u2015\u060c\u061b\u3001\uff0c\uff1a\uff1b-]))*"
)
# Of any system, and any white space before it.
_LINE_END = r"\s*(?:\n|\r(?!\n)|[\x0b\x0c\x85\u2028\u2029])"
# The names that stand for them in `paragraph_end`.
_ENDS = {
    "sentence_end": _SENTENCE_END + _CLOSING,
    "line_end": _LINE_END + r"\s*",
    "empty_line": rf"(?:{_LINE_END}{_LINE_END}|\s*\u2029)\s*",
}


@dataclass(frozen=True)
class Prompts:
    """The texts.

    `{names}`, `{first}`, `{count}` and `{problem}` are filled in where they occur in `system`,
    `alone`, `user` and `how_to_read`, and `{how_to_read}` in `system`; `{name}` and `{number}` in
    `heading` and `question`; `{name}` in `not_first` and `never`, once for each worker;
    `{sentence_end}`, `{line_end}` and `{empty_line}`, which know all scripts and systems, in
    `paragraph_end`. Other braces stay as they are: LaTeX needs no escapes.

    Headings should not end in a space: most tokenizers put the space before a word into the word.

    Raises TypeError and ValueError for a text that is missing or not a string, by its name.
    """

    system: str  # for several workers
    alone: str  # instead of `system`, where there is only one
    user: str
    history_heading: str  # opens the answer: the finished paragraphs follow
    heading: str  # opens every paragraph
    others_heading: str
    unfinished: str
    own_heading: str
    how_to_read: Mapping[str, str] = field(default_factory=dict)  # the page, by a layout's name
    # Opens the answer of a model that thinks first, so that the page is its thinking. Left out
    # for a chat template that knows no thinking, or opens it itself.
    think: str = ""
    paragraph_break: str = "\n\n"  # written for a worker that stops in the middle of a paragraph
    # Stands in front of a paragraph now and then, for its writer to answer to itself.
    question: str = ""
    # Makes a worker give its final answer when there is no time left. Without, there is none.
    closing: str = ""

    # A regular expression: what a finished paragraph ends with, in its last 64 characters.
    paragraph_end: str = "{sentence_end}{empty_line}"
    # What no paragraph may begin with: the first token of each is forbidden there. Left to
    # themselves, small models would rather go on with the list of headings.
    not_first: tuple[str, ...] = ("\n", "\n\n", "\n\n\n")
    # What nobody may write at all: the last token of each is forbidden behind the others of it.
    never: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in _NAMES:
            _check(name, getattr(self, name))
        try:
            self.ends_paragraph("")
        except re.error as error:
            raise ValueError(
                f"paragraph_end: expected a regular expression, got {self.paragraph_end!r}: {error}"
            ) from None
        for name in ("heading", "paragraph_break", "paragraph_end"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected some text, got none")
        if "{problem}" not in self.user:
            raise ValueError(f"user: expected {{problem}} in it, got {self.user!r}")

    # ---- files ------------------------------------------------------------------------------

    @classmethod
    def read(cls, path: str | Path, base: Prompts) -> Prompts:
        """`base`, with the texts that a TOML file has instead of its own.

        Raises OSError for a file that cannot be read and ValueError for one that is not TOML, or
        has a key that is no text of ours or not of its type; both name the file.
        """
        import tomlkit
        from tomlkit.exceptions import TOMLKitError

        try:
            given = tomlkit.parse(_text_of(Path(path))).unwrap()
            for name in given:
                if name not in _NAMES:
                    raise ValueError(f"{name}: expected one of {', '.join(_NAMES)}")
            for name in _LISTS & given.keys():
                if isinstance(given[name], list):
                    given[name] = tuple(given[name])
            for name in given:  # before it is joined with the base's
                _check(name, given[name])
            if "how_to_read" in given:
                given["how_to_read"] = {**base.how_to_read, **given["how_to_read"]}
            return replace(base, **given)
        except (TOMLKitError, ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from None

    def as_toml(self) -> str:
        """All texts, as a file that `read` takes."""
        import tomlkit

        def item(text: str) -> Any:
            # Over several lines, a file would lose a \r before the end of a line.
            return tomlkit.string(text, multiline="\n" in text and "\r" not in text)

        document = tomlkit.document()
        for name in _NAMES:
            value = getattr(self, name)
            if name in _LISTS:
                document.add(name, list(value))
            elif name == "how_to_read":
                table = tomlkit.table()
                for layout, text in value.items():
                    table.add(layout, item(text))
                document.add(name, table)
            else:
                document.add(name, item(value))
        return tomlkit.dumps(document)

    # ---- what is said -----------------------------------------------------------------------

    def opening(self, tokenizer: Any, names: Sequence[str], problem: str, layout: Layout) -> str:
        """All that stands before the history, in the chat format of `tokenizer`.

        A tokenizer without a chat template gets plain paragraphs, behind the token that it begins
        every text with, if it has one.

        Raises ValueError for a chat template that does not write instructions and problem whole.
        """
        values = {
            "names": _listed(names),
            "first": names[0],
            "count": str(len(names)),
            "problem": problem,
        }
        how_to_read = _filled(self.how_to_read.get(layout.name, ""), **values)
        system = self.system if len(names) > 1 else self.alone
        chat = in_chat_format(
            tokenizer,
            _filled(system, how_to_read=how_to_read, **values),
            _filled(self.user, **values),
            self.think,
        )
        return chat + self.history_heading if layout.commits else chat

    def paragraph_heading(self, name: str, number: int) -> str:
        """The heading of a worker's paragraph; numbers count from 1."""
        return _filled(self.heading, name=name, number=str(number))

    def paragraph_question(self, name: str, number: int) -> str:
        """The question behind the heading of a worker's paragraph."""
        return _filled(self.question, name=name, number=str(number))

    def forbidden_first(self, names: Sequence[str]) -> list[str]:
        """What no paragraph may begin with."""
        return [_filled(text, name=name) for text in self.not_first for name in names]

    def forbidden(self, names: Sequence[str]) -> list[str]:
        """What nobody may write."""
        return [_filled(text, name=name) for text in self.never for name in names]

    def ends_paragraph(self, text: str) -> bool:
        """Whether a paragraph that reads like this so far is finished."""
        end = _filled(self.paragraph_end, **_ENDS)
        return bool(re.search(f"(?:{end})\\Z", text[-64:]))


_NAMES = tuple(text.name for text in fields(Prompts))
_LISTS = {"not_first", "never"}


def _text_of(path: Path) -> str:
    """What a file says; a byte order mark means nothing. Raises ValueError if it is not UTF-8."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = " (it looks like UTF-16)" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise ValueError(f"expected text in utf-8{kind}: {error}; save it as UTF-8") from None
    if "\0" in text:
        raise ValueError("expected text in utf-8, got zeros as in UTF-16; save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _check(name: str, value: Any) -> None:
    """Raises TypeError for a value that is not of the type of this text."""
    if name in _LISTS:
        ok, expected = isinstance(value, tuple), "a tuple of strings (a list, in a file)"
        texts = value
    elif name == "how_to_read":
        ok, expected = isinstance(value, Mapping), "a string for each layout's name"
        texts = [*value, *value.values()] if ok else ()
    else:
        ok, expected, texts = True, "a string", (value,)
    if not ok or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name}: expected {expected}, got {checks.describe(value)}")


def _filled(text: str, **values: str) -> str:
    """Puts in all values at once, so that braces within a value mean nothing."""
    return re.sub(r"\{(" + "|".join(values) + r")\}", lambda found: values[found[1]], text)


def _listed(names: Sequence[str]) -> str:
    """Alice; Alice and Bob; Alice, Bob and Carol."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


REASONING = Prompts(
    system="""\
{names} solve a problem together. They are {count} copies of you, and they write at the same time, \
all on one page.

How to read the page:
{how_to_read}
- At the end stands your own paragraph. The name that opens it is yours. You only ever continue \
this paragraph; the others write theirs.

How to work together:
- Read what the others write, all the time, and let it change what you do. When somebody has found \
a result that you need, use it. When somebody has made a mistake, say so and say where.
- Share out the work early. Propose who takes which part, or take a part that nobody has. There is \
no leader: if two proposals clash, the one that was finished first counts.
- Never do what another is already doing, unless you mean to check it in another way. If you \
notice it, stop at once, say so in a word, and turn to something useful.
- Keep paragraphs short: one thought, one result. You end a paragraph with a full stop and an \
empty line.
- Speak to the others by name. Do not write in their names.

As soon as the solution is certain, whoever is first writes the final answer in \\boxed{}; this \
ends the work for all.""",
    alone="Reason step by step. Once the solution is certain, write the final answer in \\boxed{}.",
    user="{problem}",
    history_heading="## Finished paragraphs\n\n",
    heading="**{name} [{number}]:**",
    others_heading="## The others are writing this right now\n\n",
    unfinished=" ... (still writing)\n\n",
    own_heading="## Your own paragraph: go on from here\n\n",
    how_to_read={
        "combined": """\
- First come the finished paragraphs of all of them, in the order in which they were finished. \
Each opens with the name of its writer and a number, as in "**{first} [2]:**". Yours joins them as \
soon as you end it.
- Then come the paragraphs that the others are writing at this very moment, word for word as they \
are written. They break off, because more words are on their way.""",
        "contiguous": """\
- First comes all that the others have written, one writer after the other. Each paragraph opens \
with the name of its writer and a number, as in "**{first} [2]:**". You read it word for word as \
it is written; where it breaks off, more words are on their way.
- Then comes what you have written yourself.""",
        "interleaved": """\
- First come the finished paragraphs of all of them, in the order in which they were finished. \
Each opens with the name of its writer and a number, as in "**{first} [2]:**". Yours joins them as \
soon as you end it, and so do theirs: what they are writing right now you see once it is finished. \
The others are all at work, even if you see nothing of it.""",
    },
    think="<think>\n",
    question=" Before I go on: is somebody else already doing this? Yes or no:",
    closing=(
        "\n\nTime is up. From all that stands on the page, finished or not, the most likely final "
        "answer is \\boxed{"
    ),
    never=("</think>", "<think>"),
)

# For models of up to about a billion parameters. They do not follow a description of the page; but
# all of them know how a discussion reads, and this one is simply written by several at once.
SHORT = Prompts(
    system="You write discussions between experts.",
    alone="You answer in short paragraphs.",
    user=(
        "{names} discuss this question: {problem}\n"
        "Each of them makes practical suggestions, one in each paragraph, and builds on what the "
        "others have said."
    ),
    history_heading="",
    heading="{name}:",
    others_heading="",
    unfinished="\n",
    own_heading="",
    paragraph_break="\n",
    question=" Has nobody said this yet? Then here it is:",
    paragraph_end=r"\S{line_end}",
    not_first=(
        *("\n", "\n\n", "\n\n\n", " \n", " "),
        *("{name}", " {name}", '"', ' "', "*", " *", "[", " [", "(", " (", "-", " -"),
    ),
    never=("{name}:", " {name}:"),
)

SMALL_MODEL_PARAMETERS = 1_500_000_000


def prompts_for(num_parameters: int) -> Prompts:
    """The texts that suit a model of this size."""
    return SHORT if num_parameters < SMALL_MODEL_PARAMETERS else REASONING


def example_for(num_parameters: int) -> str:
    """What `hogwild run` lets a model of this size work on if it is not told."""
    return EXAMPLE_FOR_SMALL_MODELS if num_parameters < SMALL_MODEL_PARAMETERS else EXAMPLE


EXAMPLE = (
    "How many of the integers from 1 to 500 are divisible by exactly one of the numbers 3, 5 and 7?"
)
EXAMPLE_FOR_SMALL_MODELS = (
    "How can a small town save energy? Give ideas for homes, for traffic and for public buildings."
)
