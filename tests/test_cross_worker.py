"""`bench/cross_worker.py` on a tiny model: what it compares, and how it counts."""

from __future__ import annotations

import copy
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import hogwild_ext as hx
from models import plain_logits, random_tokens, tiny_model

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import cross_worker as cw

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDING = 2e-5
STOP = 5


@pytest.fixture
def vocabulary(seed: int) -> cw.Vocabulary:
    tokens = iter(random_tokens(1000, seed))

    def some(count: int) -> list[int]:
        return [next(tokens) for _ in range(count)]

    return cw.Vocabulary(
        headings=[some(2) for _ in range(6)],
        stems=[some(2 + i % 3) for i in range(8)],
        words=list(range(100, 116)),
        full_stop=STOP,
        sentence=lambda rng: [rng.randrange(20, 90) for _ in range(7)],
        title=some(3),
        history=[some(4) for _ in range(2)],
    )


@pytest.fixture
def rng(seed: int) -> random.Random:
    return random.Random(seed)


@pytest.fixture
def plain() -> transformers.PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def model(plain: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    return hx.patch(copy.deepcopy(plain))


def pages_of(vocabulary: cw.Vocabulary, rng: random.Random, filler: int = 40) -> list[cw.Page]:
    prompt = vocabulary.prompt(rng)
    return [cw.make_page(vocabulary, prompt, count, filler, rng) for count in (2, 3, 5)]


def test_a_page_holds_its_facts(vocabulary: cw.Vocabulary, rng: random.Random) -> None:
    for _ in range(20):
        for page in pages_of(vocabulary, rng, rng.choice([0, 41, 200])):
            assert page.reader not in page.others
            text = page.prefix()
            for worker in page.others:
                fact = page.facts[worker]
                end = len(text) - page.distance(worker)
                assert text[end - len(fact.stem) - 2 : end] == [*fact.stem, fact.answer, STOP]
                assert fact.answer in vocabulary.words


def test_filler_has_its_length(vocabulary: cw.Vocabulary, rng: random.Random) -> None:
    for count in (0, 1, 2, 40, 41):
        assert len(vocabulary.filler(count, rng)) == count


def test_ragged_steps_add_up(rng: random.Random) -> None:
    for count in (0, 1, 7, 100):
        sizes = cw.ragged(count, rng)
        assert sum(sizes) == count and all(1 <= size <= cw.MOST_AT_ONCE for size in sizes)
    assert len(set(cw.ragged(1000, rng))) == cw.MOST_AT_ONCE


def test_plain_reads_one_text(
    plain: transformers.PreTrainedModel, vocabulary: cw.Vocabulary, rng: random.Random
) -> None:
    pages = pages_of(vocabulary, rng)
    for page, answers in zip(pages, cw.read_plain(plain, pages), strict=True):
        for worker, logits in zip(page.others, answers, strict=True):
            whole = [*page.prefix(), *page.facts[worker].stem]
            assert (logits - plain_logits(plain, whole)[-1]).abs().max() < ROUNDING


def test_in_order_is_plain_up_to_rounding(
    plain: transformers.PreTrainedModel,
    model: transformers.PreTrainedModel,
    vocabulary: cw.Vocabulary,
    rng: random.Random,
) -> None:
    pages = pages_of(vocabulary, rng)
    one_text, alone = cw.read_plain(plain, pages), cw.read_alone(model, pages)
    for p, answers in enumerate(cw.read_in_order(model, pages)):
        assert (answers - one_text[p]).abs().max() < ROUNDING
        assert (
            alone[p] - one_text[p]
        ).abs().max() > 100 * ROUNDING  # or the line above says little


class Watch:
    """Stands for `hx.forward` and keeps what everybody has read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[tuple[list[int], list[int], torch.Tensor]] = []  # view, new, logits
        self.original = hx.forward
        monkeypatch.setattr(hx, "forward", self)

    def __call__(self, model, cache, views, tokens, **options):  # type: ignore[no-untyped-def]
        logits = self.original(model, cache, views, tokens, **options)
        for view, new, row in zip(views, tokens, logits, strict=True):
            seen = [token for segment in view for token in segment.tokens]
            self.read.append((seen, list(new), row))
        return logits

    def last(self, count: int) -> list[tuple[list[int], list[int], torch.Tensor]]:
        return self.read[-count:]


def test_live_reads_the_tokens_of_plain_and_hidden_all_but_one_text(
    model: transformers.PreTrainedModel,
    vocabulary: cw.Vocabulary,
    rng: random.Random,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pages = pages_of(vocabulary, rng)
    watch = Watch(monkeypatch)
    live, hidden = cw.read_live(model, pages, rng)
    count = sum(len(page.others) for page in pages)
    asked = iter(watch.last(2 * count))
    for page, answers in zip(pages, live, strict=True):
        for worker, answer in zip(page.others, answers, strict=True):
            seen, new, logits = next(asked)
            assert seen == [*page.prefix(), *page.facts[worker].stem]
            assert new == page.facts[worker].stem
            assert torch.equal(logits, answer)
    for page, answers in zip(pages, hidden, strict=True):
        for worker, answer in zip(page.others, answers, strict=True):
            seen, new, logits = next(asked)
            without = list(page.texts)
            without[worker] = []
            expected = replace(page, texts=without).prefix()
            assert seen == [*expected, *page.facts[worker].stem]
            assert torch.equal(logits, answer)


def test_hidden_text_changes_nothing_of_two_workers_answers(
    model: transformers.PreTrainedModel, vocabulary: cw.Vocabulary, seed: int
) -> None:
    """With two workers nobody else could tell the reader."""
    rng = random.Random(seed)
    page = cw.make_page(vocabulary, vocabulary.prompt(rng), 2, 30, rng)
    changed, other, word = cw.with_another_word(page, vocabulary.words, rng)
    fact = page.facts[other]
    differing = [
        (new, old)
        for w in range(2)
        for new, old in zip(changed.texts[w], page.texts[w], strict=True)
        if new != old
    ]
    assert [other] == page.others and differing == [(word, fact.answer)]
    (live,), (hidden,) = cw.read_live(model, [page], random.Random(1))
    (live_now,), (hidden_now,) = cw.read_live(model, [changed], random.Random(1))
    assert (hidden - hidden_now).abs().max() < ROUNDING
    assert (live - live_now).abs().max() > 100 * ROUNDING


def test_texts_are_written_at_the_same_time(
    model: transformers.PreTrainedModel,
    vocabulary: cw.Vocabulary,
    rng: random.Random,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompt = vocabulary.prompt(rng)
    page = next(  # in which the reader has a text like everybody else
        page
        for page in (cw.make_page(vocabulary, prompt, 3, 300, rng) for _ in range(100))
        if page.reader_filler
    )
    watch = Watch(monkeypatch)
    cw.read_live(model, [page], rng)
    first = page.others[0]
    view = [*page.prompt]
    writing = [seen for seen, new, _ in watch.read if seen[: len(view)] == view]
    # The reader has ever more of the first text in front of its own.
    start = page.texts[first]
    parts = {
        n
        for seen in writing
        for n in range(3, len(start))
        if seen[len(view) :][:n] == start[:n] and seen[len(view) :][n : n + 1] != start[n : n + 1]
    }
    assert len(parts) > 8


def test_a_preference() -> None:
    before, after = torch.tensor([3.0, 1.0, 0.0]), torch.tensor([1.0, 2.0, 0.0])
    assert cw.preference(before, after, 0, 1) == pytest.approx(1.5)
    assert cw.preference(before, before + 7, 0, 1) == pytest.approx(0, abs=1e-6)


def test_a_score() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, 5.0])
    right = float(logits.double().log_softmax(-1)[1])
    assert cw.score(logits, 1, [0, 1, 2]) == cw.Score(right, True, False)
    assert not cw.score(logits, 2, [0, 1, 2]).chosen
    assert cw.score(logits, 3, [3]).said


def test_the_bootstrap_agrees_with_the_normal_distribution() -> None:
    values = np.random.default_rng(0).normal(0.3, 1.0, 400)
    found = cw.bootstrap(values.tolist(), list(range(400)))
    error = 1.96 * values.std() / 20
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + error, abs=0.1 * error)


def test_the_bootstrap_draws_whole_groups() -> None:
    """Values that are the same within a group are worth no more than one."""
    one = np.random.default_rng(0).normal(0, 1.0, 100)
    alone = cw.bootstrap(one.tolist(), list(range(100)))
    four = cw.bootstrap(np.repeat(one, 4).tolist(), np.repeat(np.arange(100), 4).tolist())
    assert four.width == pytest.approx(alone.width, rel=0.05)


def trials(differences: list[float], hidden: list[bool]) -> list[cw.Trial]:
    made = []
    for i, (d, h) in enumerate(zip(differences, hidden, strict=True)):
        plain = cw.Score(-2.0, i % 4 > 0, True)
        made.append(
            cw.Trial(
                group=i,
                workers=2 + i % 2,
                filler=96,
                distance=20,
                place=0.5,
                nearest=True,
                reader_filler=0,
                live=cw.Score(-2.0 + d, True, True),
                plain=plain,
                hidden=cw.Score(-7, h, h),
                in_order=plain,
                alone=None,
                first_hand=None,
                second_hand=None,
            )
        )
    return made


def test_verdicts() -> None:
    noise = np.random.default_rng(0).normal(0, 0.2, 400)
    noise -= noise.mean()
    by_chance = [i % 16 == 0 for i in range(400)]

    def found(differences: np.ndarray, hidden: list[bool]) -> list[bool]:
        some = trials(differences.tolist(), hidden)
        return [good for good, _ in cw.verdicts(some, 1 / 16, "float32")]

    assert found(noise, by_chance) == [True, True, True, True]
    assert not cw.verdicts(trials([0.0] * 16, by_chance[:16]), 0.5, "float32")[0][
        0
    ]  # no better than chance
    assert found(noise + 0.1, by_chance) == [True, False, True, True]  # live is better
    assert found(5 * noise, by_chance) == [True, False, True, True]  # too wide
    assert found(noise, [i % 4 == 0 for i in range(400)]) == [True, True, False, True]
    assert len(cw.verdicts(trials(noise.tolist(), by_chance), 1 / 16, "bfloat16")) == 3


def test_runs_with_other_seeds_are_pooled(tmp_path: Path) -> None:
    first = trials([0.1, 0.2, 0.3], [False, True, False])
    second = [replace(first[0], alone=None, first_hand=1.0, second_hand=0.5)]
    paths = [tmp_path / "one.json", tmp_path / "two.json"]
    cw.write_record(paths[0], first, 1, "float32")
    cw.write_record(paths[1], second, 2, "float32")
    pooled, dtype, runs = cw.read_records(paths)
    # The groups of one run are not those of the other.
    assert pooled == [*first, replace(second[0], group=3)]
    assert dtype == "float32" and runs[1] == "seed 2, float32: 1 questions"

    for seed, other in ((1, "float32"), (2, "bfloat16")):
        cw.write_record(paths[1], second, seed, other)
        with pytest.raises(ValueError, match="expected runs with different seeds and one dtype"):
            cw.read_records(paths)
    paths[1].write_text("{}")
    with pytest.raises(ValueError, match=r"two\.json: expected what --json wrote"):
        cw.read_records(paths)


def test_only_the_word_is_another_one(
    model: transformers.PreTrainedModel,
    vocabulary: cw.Vocabulary,
    rng: random.Random,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The pages are written once more in the same steps: without another word, nothing changes."""

    def unchanged(page: cw.Page, words: list[int], rng: random.Random) -> tuple[cw.Page, int, int]:
        return (
            page,
            page.others[0],
            next(w for w in words if w != page.facts[page.others[0]].answer),
        )

    monkeypatch.setattr(cw, "with_another_word", unchanged)
    pages = pages_of(vocabulary, rng)
    before = cw.read_live(model, pages, copy.copy(rng))
    found = cw._preferences(model, pages, vocabulary, before, rng)
    assert set(found.values()) == {(0.0, 0.0)}


def test_a_run(
    plain: transformers.PreTrainedModel,
    model: transformers.PreTrainedModel,
    vocabulary: cw.Vocabulary,
    rng: random.Random,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pages = cw.make_pages(vocabulary, 22, rng, {12: 1, 48: 1})
    found = cw.measure(model, plain, vocabulary, pages, rng)
    assert len(found) == sum(len(page.others) for page in pages)
    assert {trial.workers for trial in found} == set(cw.WORKERS)
    assert {trial.filler for trial in found} == {0, 12, 48}
    explained = [trial for trial in found if trial.in_order]
    assert explained and len(explained) < len(found)
    for trial in explained:
        assert trial.in_order and trial.in_order.log_probability == pytest.approx(
            trial.plain.log_probability, abs=1e-4
        )
    tried = [trial for trial in found if trial.first_hand is not None]
    assert {trial.workers for trial in tried} == set(cw.WORKERS) and len(tried) < len(explained)
    for trial in tried:
        assert trial.second_hand is not None
        # With two workers there is nobody who could tell.
        assert trial.workers > 2 or abs(trial.second_hand) < 1e-5
    assert any(abs(trial.second_hand or 0) > 1e-4 for trial in tried)
    assert any(abs(trial.first_hand or 0) > 1e-3 for trial in tried)
    cw.print_second_hand(found)
    assert capsys.readouterr().out.count(" nat, hidden ") == 2
    cw.print_table(found)
    table = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in table}) == 1
    assert table[-1].startswith("| facts only")
    cw.print_explanation([trial for trial in found if trial.filler == 0])
    explanation = capsys.readouterr().out.splitlines()
    assert len(explanation) == 3 and explanation[-1].startswith("| facts only")
    assert len(cw.verdicts([trial for trial in found if trial.filler], 1 / 16, "float32")) == 4
    assert cw.largest_rounding([]) == float("inf")
