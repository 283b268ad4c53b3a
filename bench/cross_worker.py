"""Do workers read each other's live text? `python bench/cross_worker.py`

Every worker of a page writes down a fact, "The password of Captain Baker is tiger.", with text that
means nothing before or after it. All write at the same time, in ragged steps of 1 to 8 tokens, each
in its own view: the prompt, the others' texts so far, its own. One of them, the reader, then goes
on with "The password of Captain Baker is". Baker's password stands in another's text only, and all
other passwords are there to be confused with it. What does the model give for the right word?

    live      the reader's view: the others' texts, as they were written, then its own
    plain     the same tokens in the same order as one text, read by the plain model of transformers
    hidden    as live, but the text with the fact was never in the reader's view

Live and plain are not the same numbers. A live text's keys and values were computed when it was
written, in its writer's view: behind the others' texts as far as they had come, not where the
reader's order has it. Encoded in the reader's order they must be the same up to rounding:

    in order  as live, but the texts are written one after another, each behind the ones that the
              reader has before it

    alone     as live, but nobody had another's text in its view when it wrote

A hidden text may reach its reader at second hand: the others, whom it reads, have read it. So some
pages are read once more with another word there. How much more does the reader like the word that
it cannot see?

The facts of some pages are all written at the same moment, with nothing else: in a plain text they
stand side by side, and what a fact has right before it is another thing then. These pages are told
apart.

Passwords are drawn independently of each other, so whoever cannot see the fact is right once in as
many times as there are words to choose from. Intervals are of 95%, by bootstrap: pages that
begin with the same text are drawn together.

Prints tables of Markdown, and PASS or FAIL for what must hold; ends in 1 if something failed.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import hogwild_ext as hx
from hogwild_ext import default_model
from hogwild_ext.bench.attention import cpu_name

WORKERS = (2, 3, 4, 6)
FILLER = {96: 16, 384: 4, 2048: 1}  # tokens a page, shared out: how many pages of the kind
ONLY_FACTS = 3  # how many pages without any, where all facts are written at the same moment
MOST_AT_ONCE = 8  # tokens of a worker in a step
EXPLAINED = 4  # one of so many groups of pages is also read in other ways, to explain
DRAWS = 10_000  # of the bootstrap

WIDEST = 0.1  # nat: the interval of live - plain
MOST_ROUNDING = 2e-3  # nat, float32: plain angles alone move logits by 5e-4 at position 2,000

TITLE = "Notes of people who work on one riddle."
# Finished notes that all have before them, like the history of a run, with facts that nobody asks
# for.
HISTORY = (
    ("Smith", "stone"), ("Wright", "clock"), ("Jones", "sugar"), ("Taylor", "window"),
    ("Walker", "rabbit"), ("Harris", "paper"),
)  # fmt: skip
HISTORY_FILLER = 40  # tokens for each of them
STEM = "The password of Captain {} is"
NAMES = ("Alice", "Bob", "Carol", "Dave", "Erin", "Frank")
CAPTAINS = (
    "Miller", "Baker", "Cooper", "Fischer", "Turner", "Carter", "Hughes", "Murphy", "Bennett",
    "Collins", "Parker", "Morgan",
)  # fmt: skip
WORDS = (
    "apple", "river", "horse", "garden", "winter", "candle", "tiger", "bridge", "forest", "rocket",
    "hammer", "castle", "basket", "island", "piano", "lemon",
)  # fmt: skip
SENTENCE = (
    ("farmer", "teacher", "doctor", "sailor", "painter", "visitor", "child", "driver"),
    (
        "walked past",
        "looked at",
        "talked about",
        "waited near",
        "came back to",
        "cleaned",
        "forgot",
    ),
    ("the old mill", "the long road", "the market", "the quiet lake", "the stone wall", "the shop"),
    ("in the morning", "after lunch", "before dark", "on Monday", "for an hour", "twice"),
)


# ---- pages ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vocabulary:
    """What pages are made of, in tokens."""

    headings: list[list[int]]  # one a worker
    stems: list[list[int]]  # "The password of Captain Baker is": how a fact begins, and a question
    words: list[int]  # one token each
    full_stop: int
    sentence: Callable[[random.Random], list[int]]  # one that means nothing
    title: list[int]
    history: list[list[int]]  # facts, for the prompt

    @classmethod
    def of(cls, tokenizer: Any) -> Vocabulary:
        """Raises ValueError if a word is not one token of the tokenizer's."""

        def encode(text: str) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=False))

        def only(text: str) -> int:
            tokens = encode(text)
            if len(tokens) != 1:
                raise ValueError(f"model: expected {text!r} to be one token, got {len(tokens)}")
            return tokens[0]

        def sentence(rng: random.Random) -> list[int]:
            return encode(f" The {' '.join(rng.choice(part) for part in SENTENCE)}.")

        return cls(
            headings=[encode(f"\n\n{name}:") for name in NAMES],
            stems=[encode(f" {STEM.format(name)}") for name in CAPTAINS],
            words=[only(f" {word}") for word in WORDS],
            full_stop=only("."),
            sentence=sentence,
            title=encode(TITLE),
            history=[encode(f" {STEM.format(name)} {word}.") for name, word in HISTORY],
        )

    def filler(self, count: int, rng: random.Random) -> list[int]:
        """`count` tokens of text that means nothing."""
        tokens: list[int] = []
        while len(tokens) < count:
            tokens += self.sentence(rng)
        return [*tokens[: count - 1], self.full_stop] if count else []

    def prompt(self, rng: random.Random) -> list[int]:
        """A title and finished notes, each by another worker."""
        tokens = list(self.title)
        for i, fact in enumerate(self.history):
            tokens += self.headings[i % len(self.headings)]
            tokens += [*self.filler(HISTORY_FILLER, rng), *fact]
        return tokens


@dataclass(frozen=True)
class Fact:
    """What a worker knows: `stem`, then `answer`. It ends at token `end` of the worker's text."""

    stem: list[int]
    answer: int
    end: int
    place: float  # 0: at the beginning of the text, 1: at its end


@dataclass(frozen=True)
class Page:
    """Who writes what. Lists go by worker."""

    prompt: list[int]
    texts: list[list[int]]
    facts: list[Fact]
    reader: int
    filler: int  # tokens, all workers together
    reader_filler: int  # of these, the reader's own

    @property
    def others(self) -> list[int]:
        """The other workers, in the reader's order. The reader is asked for the fact of each."""
        return [worker for worker in range(len(self.texts)) if worker != self.reader]

    def prefix(self) -> list[int]:
        """All that the reader has before a question, in its order."""
        tokens = list(self.prompt)
        for worker in [*self.others, self.reader]:
            tokens += self.texts[worker]
        return tokens

    def distance(self, worker: int) -> int:
        """Tokens between this worker's fact and the question, in the reader's order."""
        after = self.others[self.others.index(worker) + 1 :]
        rest = len(self.texts[worker]) - self.facts[worker].end
        return rest + sum(len(self.texts[w]) for w in [*after, self.reader])


def make_page(
    vocabulary: Vocabulary, prompt: list[int], workers: int, filler: int, rng: random.Random
) -> Page:
    """A page at random; `filler` tokens mean nothing, as many in each worker's text.

    Each fact stands anywhere in them. Half of the readers have none.
    """
    stems = rng.sample(vocabulary.stems, workers)
    reader = rng.randrange(workers)
    texts, facts, reader_filler = [], [], 0
    for worker, stem in enumerate(stems):
        answer = rng.choice(vocabulary.words)
        fact = [*stem, answer, vocabulary.full_stop]
        count = filler // workers
        if worker == reader and rng.random() < 0.5:
            count = 0  # for short distances
        reader_filler += count * (worker == reader)
        place = rng.random()
        first = round(count * place)
        before = [*vocabulary.headings[worker], *vocabulary.filler(first, rng)]
        texts.append([*before, *fact, *vocabulary.filler(count - first, rng)])
        facts.append(Fact(stem, answer, len(before) + len(fact), place))
    return Page(prompt, texts, facts, reader, filler, reader_filler)


# ---- three ways of reading, and a fourth ---------------------------------------------------------
# Each returns a page's logits for the answers, [others, vocab], in the order of `Page.others`.


def read_plain(model: Any, pages: Sequence[Page]) -> list[torch.Tensor]:
    """Each page as one text, by an unpatched model. What pages begin with is read once."""
    past = transformers.DynamicCache(config=model.config)

    def read(tokens: list[int]) -> torch.Tensor:
        ids = torch.tensor([tokens])
        # By position: newer versions of transformers have another name for the cache.
        return model(ids, None, None, past, logits_to_keep=1).logits[0, -1].clone()

    with torch.inference_mode():
        read(pages[0].prompt)
        return [_read_plain(read, past, page) for page in pages]


def _read_plain(
    read: Callable[[list[int]], torch.Tensor], past: transformers.DynamicCache, page: Page
) -> torch.Tensor:
    rest = page.prefix()[len(page.prompt) :]
    read(rest)
    answers = []
    for worker in page.others:
        answers.append(read(page.facts[worker].stem))
        past.crop(-len(page.facts[worker].stem))
    past.crop(-len(rest))
    return torch.stack(answers)


def _begin(model: Any, pages: Sequence[Page], copies: int) -> tuple[hx.SegmentCache, hx.Segment]:
    """The prompt, read once, in a cache with room for so many copies of all texts."""
    tokens = segments = 0
    for page in pages:
        questions = sum(len(page.facts[worker].stem) for worker in page.others)
        tokens += copies * (len(page.prefix()) + questions)
        segments += copies * 2 * len(page.texts)
    cache = hx.SegmentCache.for_model(model, max_tokens=tokens + 64 * segments)
    prompt = cache.segment("prompt")
    hx.forward(model, cache, [[prompt]], [pages[0].prompt])
    return cache, prompt


def _texts(cache: hx.SegmentCache, pages: Sequence[Page]) -> list[list[hx.Segment]]:
    """Empty segments for the texts of each page."""
    return [
        [cache.segment(f"page {p}, worker {w}") for w in range(len(page.texts))]
        for p, page in enumerate(pages)
    ]


def _ask(
    model: Any, cache: hx.SegmentCache, pages: Sequence[Page], views: list[list[list[hx.Segment]]]
) -> list[torch.Tensor]:
    """Asks each page's questions, each at the end of its view."""
    logits = hx.forward(
        model,
        cache,
        [view for of_page in views for view in of_page],
        [page.facts[worker].stem for page in pages for worker in page.others],
    )
    return list(logits.split([len(of_page) for of_page in views]))


def ragged(count: int, rng: random.Random) -> list[int]:
    """`count` tokens as steps of 1 to `MOST_AT_ONCE`."""
    sizes: list[int] = []
    while (left := count - sum(sizes)) > 0:
        sizes.append(min(left, rng.randint(1, MOST_AT_ONCE)))
    return sizes


@dataclass
class Writing:
    """A worker at work: its view, and what it brings to the end of it, step by step."""

    view: list[hx.Segment]
    steps: Iterator[list[int]]

    @classmethod
    def of(cls, view: list[hx.Segment], tokens: list[int], sizes: list[int]) -> Writing:
        text = iter(tokens)
        return cls(view, iter([[next(text) for _ in range(size)] for size in sizes]))


def write_together(model: Any, cache: hx.SegmentCache, writers: Sequence[Writing]) -> None:
    """All at the same time; whoever is done drops out."""
    while step := [
        (writer.view, tokens) for writer in writers if (tokens := next(writer.steps, None))
    ]:
        hx.forward(model, cache, [view for view, _ in step], [tokens for _, tokens in step])


def read_live(
    model: Any, pages: Sequence[Page], rng: random.Random
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What readers give that see the others' live texts, and, second, such as do not see the one.

    For each question there is a reader that has never had the text with the answer in its view, and
    else does what the reader does, in the same steps. Nobody sees these.
    """
    cache, prompt = _begin(model, pages, copies=2)
    segments = _texts(cache, pages)

    writers, hidden = [], []
    for p, (page, texts) in enumerate(zip(pages, segments, strict=True)):
        sizes = [ragged(len(text), rng) for text in page.texts]
        for worker, text in enumerate(page.texts):
            others = [texts[other] for other in range(len(texts)) if other != worker]
            view = [prompt, *others, texts[worker]]
            writers.append(Writing.of(view, text, sizes[worker]))
        blind = []
        for unseen in page.others:
            seen = [texts[other] for other in page.others if other != unseen]
            own = cache.segment(f"page {p}, {unseen} hidden")
            blind.append([prompt, *seen, own])
            writers.append(Writing.of(blind[-1], page.texts[page.reader], sizes[page.reader]))
        hidden.append(blind)
    write_together(model, cache, writers)

    live = [_forks(cache, page, prompt, texts) for page, texts in zip(pages, segments, strict=True)]
    return _ask(model, cache, pages, live), _ask(model, cache, pages, hidden)


def read_in_turn(
    model: Any, pages: Sequence[Page], writers_see: Callable[[list[int], int], list[int]]
) -> list[torch.Tensor]:
    """What readers give if texts were written one after another, in the reader's order.

    `writers_see(before, worker)`: which of the texts in front of its own a worker has in its view
    when it writes. All have them all when they are asked.
    """
    cache, prompt = _begin(model, pages, copies=1)
    segments = _texts(cache, pages)
    for turn in range(max(len(page.texts) for page in pages)):
        views, tokens = [], []
        for page, texts in zip(pages, segments, strict=True):
            order = [*page.others, page.reader]
            if turn < len(order):
                worker = order[turn]
                seen = writers_see(order[:turn], worker)
                views.append([prompt, *(texts[other] for other in seen), texts[worker]])
                tokens.append(page.texts[worker])
        hx.forward(model, cache, views, tokens)
    asked = [
        _forks(cache, page, prompt, texts) for page, texts in zip(pages, segments, strict=True)
    ]
    return _ask(model, cache, pages, asked)


def read_in_order(model: Any, pages: Sequence[Page]) -> list[torch.Tensor]:
    """What readers give if each text was written behind those that the reader has before it."""
    return read_in_turn(model, pages, lambda before, worker: before)


def read_alone(model: Any, pages: Sequence[Page]) -> list[torch.Tensor]:
    """What readers give if each text was written with no other in its writer's view."""
    return read_in_turn(model, pages, lambda before, worker: [])


def _forks(
    cache: hx.SegmentCache, page: Page, prompt: hx.Segment, texts: list[hx.Segment]
) -> list[list[hx.Segment]]:
    """The reader's view, once for each question: all begin with the same text of its own."""
    before = [prompt, *(texts[worker] for worker in page.others)]
    return [[*before, cache.fork(texts[page.reader])] for _ in page.others]


def with_another_word(
    page: Page, words: Sequence[int], rng: random.Random
) -> tuple[Page, int, int]:
    """A page in which one of the reader's questions has another answer; which, and the answer."""
    worker = rng.choice(page.others)
    fact = page.facts[worker]
    word = rng.choice([word for word in words if word != fact.answer])
    texts = [list(text) for text in page.texts]
    texts[worker][fact.end - 2] = word
    return replace(page, texts=texts), worker, word


def preference(before: torch.Tensor, after: torch.Tensor, old: int, new: int) -> float:
    """How much more the word that stands in the text is liked for standing there, in nats.

    `before` and `after` are logits [vocab] with the `old` and the `new` word in the text: the
    change of log-probability, the mean of both words.
    """
    change = before.double().log_softmax(-1) - after.double().log_softmax(-1)
    return float(change[old] - change[new]) / 2


# ---- figures -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """What a model makes of a question."""

    log_probability: float  # nats, of the right word, over the whole vocabulary
    chosen: bool  # the likeliest of the words to choose from is the right one
    said: bool  # the likeliest of all tokens is


def score(logits: torch.Tensor, answer: int, words: Sequence[int]) -> Score:
    """Of logits [vocab]."""
    log_probabilities = logits.double().log_softmax(-1)
    best = words[int(log_probabilities[list(words)].argmax())]
    said = int(log_probabilities.argmax())
    return Score(float(log_probabilities[answer]), best == answer, said == answer)


WAYS = ("live", "plain", "hidden", "in_order", "alone")


@dataclass(frozen=True)
class Trial:
    """One question."""

    group: int  # of pages that begin with the same prompt
    workers: int
    filler: int
    distance: int  # tokens between fact and question, in the reader's order
    place: float  # of the fact in its text, 0 to 1
    nearest: bool  # the text with the fact is the last of the others' in the reader's view
    reader_filler: int  # tokens that the reader wrote beside its own fact
    live: Score
    plain: Score
    hidden: Score
    in_order: Score | None
    alone: Score | None
    # How much more a word is liked for standing in the text, nats, if that was tried.
    first_hand: float | None = None
    second_hand: float | None = None  # by a reader that does not see the text

    @classmethod
    def of(
        cls,
        group: int,
        page: Page,
        worker: int,
        scores: Sequence[Score],
        preferences: tuple[float, float] | None,
    ) -> Trial:
        """`scores` of live, plain, hidden, and maybe in order and alone."""
        first_hand, second_hand = preferences or (None, None)
        return cls(
            group=group,
            workers=len(page.texts),
            filler=page.filler,
            distance=page.distance(worker),
            place=page.facts[worker].place,
            nearest=worker == page.others[-1],
            reader_filler=page.reader_filler,
            live=scores[0],
            plain=scores[1],
            hidden=scores[2],
            in_order=scores[3] if len(scores) > 3 else None,
            alone=scores[4] if len(scores) > 4 else None,
            first_hand=first_hand,
            second_hand=second_hand,
        )

    @property
    def difference(self) -> float:
        """Live less plain, nats."""
        return self.live.log_probability - self.plain.log_probability


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval."""

    mean: float
    low: float
    high: float

    @property
    def width(self) -> float:
        return self.high - self.low

    def __format__(self, form: str) -> str:
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


def bootstrap(values: Sequence[float], groups: Sequence[int], seed: int = 0) -> Interval:
    """The mean of all values; values of one group are drawn together. Percentile bootstrap."""
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(index, np.asarray(values, float)), np.bincount(index)
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(DRAWS // 100):  # in parts, for the memory's sake
        drawn = rng.integers(len(sums), size=(100, len(sums)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return Interval(float(np.mean(np.asarray(values, float))), float(low), float(high))


def interval(trials: Sequence[Trial], value: Callable[[Trial], float]) -> Interval:
    """Of a value over trials."""
    return bootstrap([value(trial) for trial in trials], [trial.group for trial in trials])


# ---- the run -------------------------------------------------------------------------------------


def measure(
    model: Any, plain: Any, vocabulary: Vocabulary, pages: Sequence[Page], rng: random.Random
) -> list[Trial]:
    """All questions of all pages; `plain` is the same model, never patched."""
    trials: list[Trial] = []
    for g, (_, alike) in enumerate(groupby(pages, key=lambda page: page.prompt)):
        group = list(alike)
        same = copy.copy(rng)
        live, hidden = read_live(model, group, rng)
        ways = [live, read_plain(plain, group), hidden]
        preferences: dict[tuple[int, int], tuple[float, float]] = {}  # by page and worker
        if g % EXPLAINED == 0:
            ways += [read_in_order(model, group), read_alone(model, group)]
            preferences = _preferences(model, group, vocabulary, (live, hidden), same)
        for p, page in enumerate(group):
            for q, worker in enumerate(page.others):
                answer = page.facts[worker].answer
                scores = [score(way[p][q], answer, vocabulary.words) for way in ways]
                trials.append(Trial.of(g, page, worker, scores, preferences.get((p, worker))))
        print(f"{len(trials)} questions", end="\r", file=sys.stderr, flush=True)
    return trials


def _preferences(
    model: Any,
    pages: Sequence[Page],
    vocabulary: Vocabulary,
    before: tuple[list[torch.Tensor], list[torch.Tensor]],
    rng: random.Random,
) -> dict[tuple[int, int], tuple[float, float]]:
    """The pages once more, each with one other word: `preference` of live and hidden readers.

    `before` is what `read_live` gave with `rng` as it is now.
    """
    chosen = random.Random(copy.copy(rng).random())  # `rng` is for the steps, the same again
    changed = [with_another_word(page, vocabulary.words, chosen) for page in pages]
    after = read_live(model, [page for page, _, _ in changed], rng)
    found = {}
    for p, (page, (_, worker, word)) in enumerate(zip(pages, changed, strict=True)):
        q, answer = page.others.index(worker), page.facts[worker].answer
        first, second = (
            preference(old[p][q], new[p][q], answer, word)
            for old, new in zip(before, after, strict=True)
        )
        found[p, worker] = first, second
    return found


def make_pages(
    vocabulary: Vocabulary,
    questions: int,
    rng: random.Random,
    filler: Mapping[int, int] = FILLER,
) -> list[Page]:
    """Pages with about so many questions, and on top of that those without filler.

    They come in groups: pages of 2, 3, ... workers that begin with the same prompt.
    """
    a_round = sum(filler.values()) * sum(count - 1 for count in WORKERS)
    pages = []
    for tokens, share in [(0, ONLY_FACTS), *filler.items()]:
        for _ in range(max(1, round(share * questions / a_round))):
            prompt = vocabulary.prompt(rng)
            pages += [make_page(vocabulary, prompt, count, tokens, rng) for count in WORKERS]
    return pages


def groups(trials: Sequence[Trial]) -> Iterator[tuple[str, list[Trial]]]:
    """Names and trials, for the rows of the table."""
    only_facts = [t for t in trials if t.filler == 0]
    trials = [t for t in trials if t.filler]
    yield "**all but the last row**", trials
    for count in sorted({trial.workers for trial in trials}):
        yield f"{count} workers", [t for t in trials if t.workers == count]
    edges = (0, 64, 256, 1024, 1 << 30)
    for low, high in zip(edges, edges[1:], strict=False):
        name = f"{low:,} to {high - 1:,} tokens between" if high < 1 << 30 else f"{low:,} and more"
        yield name, [t for t in trials if low <= t.distance < high]
    for third, name in enumerate(("first", "second", "last")):
        yield f"{name} third of its text", [t for t in trials if int(t.place * 3) == third]
    for nearest in (False, True):
        several = [t for t in trials if t.workers > 2 and t.nearest == nearest]
        yield "in the last of several texts" if nearest else "in one before that", several
    for has_text in (True, False):
        name = "a text" if has_text else "its fact only"
        yield (
            f"meanwhile the reader writes {name}",
            [t for t in trials if bool(t.reader_filler) == has_text],
        )
    yield "facts only, all at the same moment", only_facts


def print_table(trials: Sequence[Trial]) -> None:
    head = (
        "questions", "n", "right of all words: live", "plain", "hidden",
        "right of all tokens: live", "plain", "hidden",
        "log-probability: live", "plain", "hidden", "live - plain [95%]",
    )  # fmt: skip
    print("| " + " | ".join(head) + " |")
    print("| --- |" + " ---: |" * (len(head) - 1))
    for name, some in groups(trials):
        if not some:
            continue
        cells = [name, str(len(some))]
        for part, form in (("chosen", "{:.1%}"), ("said", "{:.1%}"), ("log_probability", "{:.2f}")):
            for way in ("live", "plain", "hidden"):
                values = [float(getattr(getattr(trial, way), part)) for trial in some]
                cells.append(form.format(np.mean(values)))
        d = interval(some, lambda trial: trial.difference)
        cells.append(f"{d:+.3f}")
        print("| " + " | ".join(cells) + " |")


def largest_rounding(trials: Sequence[Trial]) -> float:
    """In order against plain, nats; infinite if no page was read so."""
    differences = [
        abs(trial.in_order.log_probability - trial.plain.log_probability)
        for trial in trials
        if trial.in_order
    ]
    return max(differences, default=float("inf"))


def verdicts(trials: Sequence[Trial], chance: float, dtype: str) -> list[tuple[bool, str]]:
    """What must hold, pages of facts only apart: whether it does, and the figures."""
    rounding = largest_rounding(trials)
    trials = [trial for trial in trials if trial.filler]
    difference = interval(trials, lambda trial: trial.difference)
    hidden = interval(trials, lambda trial: trial.hidden.chosen)
    plain = interval(trials, lambda trial: trial.plain.chosen)
    live = interval(trials, lambda trial: trial.live.chosen)
    found = [
        (
            plain.low > 2 * chance,
            f"the question can be answered: plain is right in {plain:.1%}, chance is {chance:.2%}; "
            f"live in {live:.1%}",
        ),
        (
            difference.holds(0) and difference.width < WIDEST,
            f"live - plain: {difference:+.3f} nat, {difference.width:.3f} wide; must hold 0 and "
            f"be narrower than {WIDEST}",
        ),
        (
            hidden.holds(chance),
            f"hidden: right in {hidden:.1%}; must hold chance, {chance:.2%}",
        ),
    ]
    if dtype == "float32":
        text = f"in order - plain: at most {rounding:.1e} nat; must be below {MOST_ROUNDING}"
        found.append((rounding < MOST_ROUNDING, text))
    return found


def print_explanation(trials: Sequence[Trial]) -> None:
    """What the writers' views do: the same texts, written in other views."""
    print(
        "| questions | n | in order - plain, at most | alone - plain [95%] | live - alone [95%] |"
    )
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, has_filler in (("with filler", True), ("facts only", False)):
        some = [t for t in trials if t.in_order and t.alone and (t.filler > 0) == has_filler]
        if not some:
            continue
        rounding = largest_rounding(some)
        alone = interval(some, lambda t: t.alone.log_probability - t.plain.log_probability)
        live = interval(some, lambda t: t.live.log_probability - t.alone.log_probability)
        print(f"| {name} | {len(some)} | {rounding:.1e} | {alone:+.3f} | {live:+.3f} |")


def print_second_hand(trials: Sequence[Trial]) -> None:
    """Whether a word that a reader cannot see reaches it through what others wrote.

    Of pages with filler: where all facts are written at the same moment, nobody could tell.
    """
    tried = [t for t in trials if t.second_hand is not None and t.filler]
    for name, some in (
        ("2 workers", [t for t in tried if t.workers == 2]),
        ("more", [t for t in tried if t.workers > 2]),
    ):
        if some:
            seen = interval(some, lambda t: t.first_hand)
            hidden = interval(some, lambda t: t.second_hand)
            print(
                f"A word is liked more if it stands in the text, {name} ({len(some)} questions): "
                f"live {seen:+.3f} nat, hidden {hidden:+.3f}  "
            )


def write_record(path: Path, trials: Sequence[Trial], seed: int, dtype: str) -> None:
    """Keeps a run for `read_records`."""
    record = {"seed": seed, "dtype": dtype, "trials": [asdict(trial) for trial in trials]}
    path.write_text(json.dumps(record))


def read_records(paths: Sequence[Path]) -> tuple[list[Trial], str, list[str]]:
    """The trials of several runs as of one, their dtype, and what each run was.

    Raises ValueError for files that are not of runs with different seeds and one dtype.
    """
    trials: list[Trial] = []
    seeds, dtypes, runs = set(), set(), []
    for path in paths:
        record = json.loads(path.read_text())
        try:
            seed, dtype, found = record["seed"], record["dtype"], record["trials"]
            seeds.add(seed)
            dtypes.add(dtype)
            shift = 1 + max((trial.group for trial in trials), default=-1)
            for trial in found:
                scores = {way: trial[way] and Score(**trial[way]) for way in WAYS}
                trials.append(Trial(**{**trial, **scores, "group": trial["group"] + shift}))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected what --json wrote: {error!r}") from None
        runs.append(f"seed {seed}, {dtype}: {len(found)} questions")
    if len(seeds) < len(paths) or len(dtypes) > 1:
        raise ValueError(f"--pool: expected runs with different seeds and one dtype, got {runs}")
    return trials, dtypes.pop(), runs


def report(trials: Sequence[Trial], dtype: str, words: int) -> int:
    """Prints all tables, and what must hold; the exit code."""
    found = verdicts(trials, 1 / words, dtype)
    print()
    print_table(trials)
    print()
    print_explanation(trials)
    print()
    print_second_hand(trials)
    print()
    for good, text in found:
        print(f"{'PASS' if good else 'FAIL'}  {text}  ")
    return 0 if all(good for good, _ in found) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trials", type=int, help="questions, about (default 1100; quick 121)")
    parser.add_argument("--seed", type=int, default=1, help="of all that is random (default 1)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="few and short pages, too few for so narrow an interval",
    )
    parser.add_argument("--threads", type=int, help="of torch (default: one a core)")
    parser.add_argument("--json", type=Path, help="a file for all trials, for --pool")
    parser.add_argument(
        "--pool", type=Path, nargs="+", metavar="FILE",
        help="measure nothing: the tables of these files of --json together",
    )  # fmt: skip
    options = parser.parse_args()
    if options.pool:
        trials, dtype, runs = read_records(options.pool)
        print(*(f"- {run}" for run in runs), sep="\n")
        return report(trials, dtype, len(WORDS))
    if options.threads:
        torch.set_num_threads(options.threads)

    started = time.perf_counter()
    folder = default_model.ensure()
    transformers.logging.disable_progress_bar()
    vocabulary = Vocabulary.of(
        transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    )
    dtype = getattr(torch, options.dtype)
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False
    ).eval()
    model = hx.patch(copy.deepcopy(plain))
    rng = random.Random(options.seed)
    questions = options.trials or (121 if options.quick else 1100)
    filler = {96: 10, 384: 1} if options.quick else FILLER
    pages = make_pages(vocabulary, questions, rng, filler)
    trials = measure(model, plain, vocabulary, pages, rng)
    seconds = time.perf_counter() - started

    print(f"- {time.strftime('%Y-%m-%d')}: python {' '.join(sys.argv)}")
    print(
        f"- {cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; hogwild_ext "
        f"{hx.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    print(
        f"- SmolLM2-135M-Instruct, {options.dtype}; {seconds:.0f} s, "
        f"{time.process_time():.0f} s of all cores together"
    )
    print(
        f"- {len(trials)} questions on {len(pages)} pages, {min(t.distance for t in trials)} to "
        f"{max(t.distance for t in trials):,} tokens between fact and question; "
        f"{len(vocabulary.words)} words to choose from"
    )
    if options.json:
        write_record(options.json, trials, options.seed, options.dtype)
    return report(trials, options.dtype, len(vocabulary.words))


if __name__ == "__main__":
    sys.exit(main())
