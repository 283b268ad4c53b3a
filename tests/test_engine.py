"""The engine: what is drawn, how a run ends, and what it tells."""

from __future__ import annotations

import copy
import gc
import json
import random
import sys
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerFast

import hogwild_ext as hx
from hogwild_ext import run as runs
from hogwild_ext import trace
from hogwild_ext.answers import boxed_answer
from hogwild_ext.events import EVENT_KINDS, Event, Result
from hogwild_ext.layouts import LAYOUTS, Combined, Layout
from hogwild_ext.sampling import Sampler
from hogwild_ext.text_decoder import TextDecoder
from models import tiny_model
from scripted import (
    EOS,
    PROMPTS,
    STOP,
    TOKENIZER,
    VOCABULARY,
    A,
    B,
    C,
    Script,
    byte_tokenizer,
    decode,
    random_lines,
    sampled,
    say,
    team,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- a run whose tokens are written beforehand ---------------------------------------------------


def test_finished_paragraphs_join_the_history_in_the_order_of_the_workers(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [A, STOP]
    Script(monkeypatch, {"A": both * 2, "B": both * 2})
    run = team(model, ["A", "B"]).stream("p", 5)
    commits = [(e.step, e.worker, e.paragraph, e.text) for e in run if e.kind == "commit"]
    expected = [(3, "A", 1), (3, "B", 1), (5, "A", 2), (5, "B", 2)]
    assert commits == [(*who, "a.\n\n") for who in expected]
    assert run.result().text == "#A1: a.\n\n#B1: a.\n\n#A2: a.\n\n#B2: a.\n\n#A3: z\n\n#B3: z"


def test_a_lone_worker_equals_the_plain_model(model: Any) -> None:
    """Through headings and commits, every token is the plain model's choice for the same text."""
    plain = copy.deepcopy(model)
    counter = {"n": 0}

    def every_third(text: str) -> bool:  # a random model seldom finishes a sentence
        counter["n"] += 1
        return counter["n"] % 3 == 0

    alone = team(model, ["A"], paragraph_ends=every_third)
    run = alone.stream("Say something.", 40)
    text = TOKENIZER.encode(PROMPTS.opening(TOKENIZER, ["A"], "Say something.", Combined()))
    worst = commits = 0
    for event in run:
        if event.kind == "start":
            text += TOKENIZER.encode(event.text)
        commits += event.kind == "commit"
        if event.kind == "token":
            with torch.no_grad():
                logits = plain(input_ids=torch.tensor([text])).logits[0, -1]
            assert event.token is not None
            worst = max(worst, float(logits.max() - logits[event.token]))
            text.append(event.token)
    assert run.result().steps == 40 and commits >= 5
    assert worst < 1e-4


def test_workers_read_what_the_others_just_wrote(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What B says changes what the model would say for A, one step later and not before."""
    seen: list[list[torch.Tensor]] = []
    for word in (A, B):
        script = Script(monkeypatch, {"B": [word]})
        real = script._forward
        logits: list[torch.Tensor] = []

        def record(*args: Any, real: Any = real, logits: Any = logits) -> Any:
            logits.append(real(*args))
            return logits[-1]

        script._forward = record
        for _ in team(model, ["A", "B"]).stream("p", 3):
            pass
        monkeypatch.undo()
        seen.append([step[-2] for step in logits])  # A's
    assert torch.equal(seen[0][0], seen[1][0])
    assert not torch.allclose(seen[0][1], seen[1][1], atol=1e-3)


# ---- drawing -------------------------------------------------------------------------------------


def texts(result: Result) -> list[str]:
    return [worker.text for worker in result.workers]


def test_a_seed_repeats_a_run(model: Any) -> None:
    first = list(team(model, generation_config=sampled()).stream("p", 25))
    again = list(team(model, generation_config=sampled()).stream("p", 25))
    other = list(team(model, generation_config=sampled(), seed=2).stream("p", 25))
    assert first == again
    assert [e.token for e in first] != [e.token for e in other]


def test_without_a_seed_every_run_is_new_and_can_be_repeated(model: Any) -> None:
    free = team(model, generation_config=sampled(), seed=None)
    first, second = free.run("p", 12), free.run("p", 12)
    assert first.seed != second.seed and texts(first) != texts(second)
    assert texts(team(model, generation_config=sampled(), seed=first.seed).run("p", 12)) == texts(
        first
    )


def test_draws_of_a_worker_do_not_depend_on_the_others(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = torch.linspace(-1, 1, VOCABULARY)
    scores[EOS] = -torch.inf
    monkeypatch.setattr(
        runs, "forward", lambda model, cache, views, tokens: scores.expand(len(views), -1)
    )
    tokens = {
        count: [
            w.tokens for w in team(model, count, generation_config=sampled()).run("p", 30).workers
        ]
        for count in (1, 2, 5)
    }
    assert tokens[1][0] == tokens[2][0] == tokens[5][0]
    assert tokens[2][1] == tokens[5][1]
    assert len({tuple(one) for one in tokens[5]}) == 5


@pytest.mark.parametrize(
    "settings_",
    [
        {"top_k": 7},
        {"temperature": 0.5, "top_p": 0.6},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "top_k": 0},
        {"typical_p": 0.7, "top_k": 0},
        {"suppress_tokens": [3, 4, 5], "bad_words_ids": [[9], [7, 8]], "top_k": 0},
    ],
    ids=lambda settings: ",".join(settings),
)
def test_draws_have_the_probabilities_of_generate(
    model: Any, monkeypatch: pytest.MonkeyPatch, settings_: dict[str, Any], seed: int
) -> None:
    config = GenerationConfig(do_sample=True, **settings_)
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(200, generator=generator)
    written = [7, 9, 7, 50, 51, 7]
    expected_config = copy.deepcopy(config)
    if expected_config.top_k is None:
        expected_config.top_k = 50
    expected_config._eos_token_tensor = None
    processors: LogitsProcessorList = model._get_logits_processor(
        expected_config, input_ids_seq_length=len(written), device="cpu"
    )
    scores = processors(torch.tensor([written]), logits[None].clone())
    expected = scores.softmax(-1)[0]

    drawn_from = torch.zeros(200)

    def draw(probabilities: torch.Tensor, n: int, *, generator: torch.Generator) -> torch.Tensor:
        # One token after another, so that the index drawn maps to the token it stands for.
        nonlocal drawn_from
        drawn_from = probabilities[0]
        return torch.tensor([[position]])

    monkeypatch.setattr(torch, "multinomial", draw)
    sampler = Sampler(config)
    position, got = 0, torch.zeros(200)
    while True:
        token = sampler(logits, written, generator)
        got[token] = drawn_from[position]
        position += 1
        if position == len(drawn_from):
            break
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_greedy_is_what_an_unset_config_means(model: Any) -> None:
    sampler = Sampler(GenerationConfig())
    logits = torch.tensor([0.0, 3.0, 2.0])
    generator = torch.Generator()
    assert [sampler(logits, [], generator) for _ in range(5)] == [1] * 5
    assert sampler(logits, [], generator, forbidden=[1]) == 2
    assert Sampler(GenerationConfig(do_sample=True, temperature=0.0)).greedy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_beams": 4}, "num_beams"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"do_sample": True, "temperature": -1.0}, "temperature"),
        ({"do_sample": True, "top_p": 1.5}, "top_p"),
        ({"do_sample": True, "top_k": -3}, "top_k"),
    ],
)
def test_a_config_that_is_not_followed_is_refused(change: dict[str, Any], message: str) -> None:
    config = GenerationConfig()
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=rf"generation_config.*{message}"):
        Sampler(config)


def test_more_processors_are_called(model: Any) -> None:
    def only(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = 60 + tokens.shape[1] % 3  # it is given the worker's own tokens
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([chosen]), 0.0)

    result = team(model, 2, logits_processors=[only]).run("p", 6)
    assert [worker.tokens for worker in result.workers] == [[60, 61, 62, 60, 61, 62]] * 2


# ---- how a run ends ------------------------------------------------------------------------------


def test_the_final_answer_ends_the_run(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Script(
        monkeypatch,
        {"A": say("so \\boxed{...}, \\boxed{} "), "B": say("it is \\boxed{\\frac{1}{2}} so")},
    )
    run = team(model, ["A", "B", "C"]).stream("p")
    *_, last = run
    result = run.result()
    assert (result.answer, result.stopped_by) == ("\\frac{1}{2}", "answer")
    assert last == Event("stop", len("it is \\boxed{\\frac{1}{2}}"), "B", text="answer")
    assert result.workers[1].text == "it is \\boxed{\\frac{1}{2}}"
    assert result.steps == last.step


def test_what_an_answer_is_can_be_told(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Script(monkeypatch, {"B": say("the answer is 7!")})
    found = team(
        model, ["A", "B"], final_answer=lambda text: text[-2] if text.endswith("!") else None
    ).run("p", 50)
    assert (found.answer, found.stopped_by) == ("7", "answer")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{42}", "42"),
        ("\\boxed{ a, b }.", "a, b"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{1} or \\boxed{2}", "2"),
        ("\\boxed{1} or \\boxed{2", "1"),
        ("\\boxed{1} or \\boxed{}", "1"),
        ("in \\boxed{}", None),
        ("in \\boxed{...}", None),
        ("boxed{4}", None),
        ("{4}", None),
    ],
)
def test_boxed_answer(text: str, answer: str | None) -> None:
    assert boxed_answer(text) == answer


def test_a_run_ends_when_all_workers_have(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Script(monkeypatch, {"A": [A, EOS], "B": [B, STOP, C, EOS], "C": [A, STOP, EOS]})
    run = team(model, ["A", "B", "C"]).stream("p")
    events = list(run)
    result = run.result()
    assert (result.stopped_by, result.steps) == ("end", 4)
    assert texts(result) == ["a", "b.\n\nc", "a.\n\n"]
    assert [w.tokens for w in result.workers] == [[A], [B, STOP, C], [A, STOP]]
    assert all(worker.ended for worker in result.workers)
    ends = [(e.worker, e.step, e.token) for e in events if e.kind == "end"]
    assert ends == [("A", 2, EOS), ("C", 3, EOS), ("B", 4, EOS)]
    # A's unfinished paragraph was ended for it, C's third heading had nothing under it.
    assert result.text == "#A1: a\n\n#B1: b.\n\n#C1: a.\n\n#B2: c"
    assert events[-1] == Event("stop", 4, text="end")


def test_nobody_ends_without_having_written(model: Any) -> None:
    eager_to_end = {
        "logits_processors": [
            lambda tokens, scores: scores.index_fill(1, torch.tensor([EOS]), 1e4).where(
                scores != -torch.inf, scores
            )
        ]
    }
    result = team(model, 2, **eager_to_end).run("p", 20)
    assert result.stopped_by == "end"
    assert [len(worker.tokens) for worker in result.workers] == [1, 1]


def test_the_number_of_steps_is_kept(model: Any) -> None:
    result = team(model, 2).run("p", max_steps=7)
    assert (result.steps, result.stopped_by, result.answer) == (7, "max_steps", None)
    assert [len(worker.tokens) for worker in result.workers] == [7, 7]
    assert result.stats.generated_tokens == 14


@pytest.mark.parametrize("limit", ["positions", "room"])
def test_a_full_context_ends_the_run_with_what_there_is(
    monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    Script(monkeypatch, {})
    positions = 256 if limit == "positions" else 4096
    small = tiny_model("llama", vocab_size=VOCABULARY, max_position_embeddings=positions)
    result = team(small, 2, max_tokens=4096 if limit == "positions" else 256).run("p", 4000)
    assert result.stopped_by == "context"
    assert 20 < result.steps < 300
    assert all(len(worker.tokens) == result.steps for worker in result.workers)
    assert texts(result) == ["z" * result.steps] * 2
    if limit == "positions":
        assert 250 <= result.stats.encoded_tokens <= 256 + len("~\n")
    else:
        assert 250 <= result.stats.encoded_tokens <= 256


def test_who_has_ended_needs_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A's view would be longer than B's, which is all that is read."""
    Script(monkeypatch, {"A": [A, EOS]})
    small = tiny_model("llama", vocab_size=VOCABULARY, max_position_embeddings=300)
    result = team(small, ["A", "B"]).run("p", 4000)
    assert result.stopped_by == "context"
    prompt = PROMPTS.opening(TOKENIZER, ["A", "B"], "p", Combined())
    seen = TOKENIZER.encode(prompt + "#A1:a\n\n#B1:" + result.workers[1].text[:-1])
    assert 298 <= len(seen) <= 300


def test_tokens_without_logits_end_nothing(model: Any) -> None:
    config = GenerationConfig(eos_token_id=[EOS, VOCABULARY + 3], do_sample=False)
    assert team(model, 2, generation_config=config).run("p", 3).steps == 3


def test_a_tokenizer_of_another_model_is_named(model: Any) -> None:
    other = byte_tokenizer("{{ '<more>' + messages[0].content }}")
    other.add_tokens(["<more>"])
    message = f"tokenizer: expected the model's own, which has {VOCABULARY} tokens, got .*'<more>'"
    with pytest.raises(ValueError, match=message):
        hx.Hogwild(model, other, 1, prompts=PROMPTS).run("p", 3)


def test_no_space_is_put_into_the_middle_of_a_page(model: Any) -> None:
    """Tokenizers like Llama 2's put one before every text, and so before every heading."""
    letters = [chr(code) for code in range(33, 127)]
    words = ["<pad>", "<bos>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(128)), "▁", *letters]
    tokenizer = Tokenizer(BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    assert fast.convert_ids_to_tokens(fast.encode("\n")) == ["▁", "<0x0A>"]
    prompts = replace(PROMPTS, not_first=("\n", "x"), never=("B:",))
    spaced = hx.Hogwild(model, fast, ["A", "B"], prompts=prompts, seed=1)
    for text in ("\n\nA:", "**A [1]:**", " ...\n", "x"):
        tokens = spaced.encode(text)
        plain = "".join(fast.convert_ids_to_tokens(tokens))
        assert plain.replace("▁", " ").replace("<0x0A>", "\n") == text
    assert spaced.encode("") == []
    run = spaced.stream("p", 12)
    assert [words[token] for token in run._not_first] == ["<0x0A>", "x"]
    events = list(run)
    for worker in run.result().workers:
        told = "".join(e.text for e in events if e.worker == worker.name and e.kind == "token")
        assert worker.text == told
    # With other tokenizers nothing changes.
    assert team(model).encode("\n\nA:") == TOKENIZER.encode("\n\nA:")


@pytest.mark.parametrize("closing", ["", "\nNow: "])
@pytest.mark.parametrize("limit", ["positions", "room"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_context_may_be_full_at_any_moment(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    layout: str,
    limit: str,
    closing: str,
    seed: int,
) -> None:
    """Wherever that is, the run ends between two steps, with all told that was encoded."""
    rng = random.Random(seed)
    steps = set()
    for variant in range(8):
        count = rng.randint(1, 5)
        names = ["A", "B", "C", "D", "E"][:count]
        positions = rng.randint(220, 420) if limit == "positions" else 4096
        small = tiny_model("llama", vocab_size=VOCABULARY, max_position_embeddings=positions)
        one = team(
            small, names, layout=layout, prompts=replace(PROMPTS, closing=closing),
            question_every=20, answer_tokens=5, paragraph_ends=lambda text: text[-1] == "e",
            max_tokens=4096 if limit == "positions" else rng.randint(330, 600),
        )  # fmt: skip
        path = tmp_path / f"{variant}.jsonl"
        ends = variant % 2 == 1
        lines = random_lines(rng, names, 200)
        lines = {n: [t for t in line if ends or t != EOS] for n, line in lines.items()}
        with monkeypatch.context() as patched:
            script = Script(patched, lines)
            result = one.run("p", 4000, trace=path)
        assert result.stopped_by == "context" or ends
        steps.add(result.steps)
        read = trace.read(path)
        assert read.is_complete
        replay = trace.Replay(read.header)
        for line in read.lines:
            replay.apply(line)
        stats = result.stats
        assert stats.encoded_tokens == replay.encoded_tokens
        assert stats.encoded_tokens + stats.concluding_tokens == len(script.brought)
        assert stats.committed_tokens == replay.committed_tokens
        assert sum(line["kind"] == "step" for line in read.lines) == result.steps
        if not closing:
            assert stats.concluding_tokens == 0
        elif ends:
            assert stats.concluding_tokens > len(closing)
        else:  # the last word, the closing text and the answer but for its last token
            assert stats.concluding_tokens == 1 + len(closing) + 5 - 1
    assert len(steps) > 2


def test_a_paragraph_too_long_to_move_ends_the_run(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit needs room for a copy, and a full page has none."""
    script = Script(monkeypatch, {"A": [A, STOP, *[B] * 900, STOP, C]})
    result = team(model, ["A"], max_tokens=1200).run("p", 2000)
    assert (result.stopped_by, result.steps) == ("context", 903)
    assert result.stats.committed_tokens == len("#A1:") + 2
    assert result.stats.encoded_tokens == len(script.brought)
    assert result.text == "#A1: a.\n\n#A2: " + "b" * 900 + "."


def test_more_workers_than_spare_pages_are_usual(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each brings segments, and each segment may leave a page nearly empty."""
    Script(monkeypatch, {})
    prompts = replace(PROMPTS, system="Go.")
    result = team(model, 90, prompts=prompts, max_tokens=2048).run("p", 5)
    assert (result.stopped_by, result.steps) == ("max_steps", 5)


def test_a_problem_that_leaves_no_room_is_refused() -> None:
    small = tiny_model("llama", vocab_size=VOCABULARY, max_position_embeddings=128)
    with pytest.raises(ValueError, match=r"problem: .* leaves room .* 128 positions"):
        team(small).run("long " * 40)
    with pytest.raises(ValueError, match=r"problem: .* max_tokens is 64"):
        team(small, max_tokens=64).run("p" * 40)


def test_ctrl_c_ends_a_run_with_what_there_is(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(monkeypatch, {})
    script.raises[9] = KeyboardInterrupt()
    result = team(model, 2).run("p", 50)
    assert (result.stopped_by, result.steps) == ("interrupted", 9)
    assert texts(result) == ["z" * 9] * 2
    monkeypatch.undo()
    assert team(model, 2).run("p", 3).steps == 3  # the next run is as if nothing had happened


def test_ctrl_c_while_a_paragraph_is_on_its_way(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(monkeypatch, {"A": [A, STOP]})
    script.raises[2] = KeyboardInterrupt()
    result = team(model, ["A", "B"]).run("p", 50)
    assert result.text.startswith("#A1: a.\n\n#B1: ")
    assert result.workers[0].text == "a.\n\n"


def test_a_stream_can_be_stopped(model: Any) -> None:
    run = team(model, 2).stream("p", 50)
    for event in run:
        if event.step == 5:
            run.stop()
    result = run.result()
    assert (result.stopped_by, result.steps) == ("interrupted", 5)
    assert next(run, None) is None


def test_a_run_that_never_began_was_interrupted_too(
    model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = team(model).stream("p", trace=tmp_path / "run.jsonl")
    with monkeypatch.context() as patched:
        patched.setattr(runs.time, "perf_counter", lambda: 1e6)
        with run:
            pass
    assert (run.result().stopped_by, run.result().stats.seconds) == ("interrupted", 0)
    (stop,) = trace.read(tmp_path / "run.jsonl").lines
    assert (stop["kind"], stop["reason"], stop["time"]) == ("stop", "interrupted", 0)


def test_an_answer_stays_the_reason_if_nobody_waits_for_the_end(
    model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Script(monkeypatch, {"A": say("\\boxed{3}")})
    with team(model, ["A", "B"]).stream("p", trace=tmp_path / "run.jsonl") as run:
        for _ in run:
            if run.result().answer:
                break
    assert (run.result().answer, run.result().stopped_by) == ("3", "answer")
    stop = trace.read(tmp_path / "run.jsonl").lines[-1]
    assert (stop["kind"], stop["reason"], stop["worker"]) == ("stop", "answer", "A")


def test_a_dropped_run_says_nothing(
    model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Python closes its trace, and then ends it."""
    said: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    for number in range(5):
        for event in team(model, 2).stream("p", trace=tmp_path / f"{number}.jsonl"):
            if event.step == 2:
                break
        del event
        gc.collect()
    assert said == []


def test_an_error_of_the_model_is_not_swallowed(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Script(monkeypatch, {}).raises[3] = RuntimeError("out of everything")
    with pytest.raises(RuntimeError, match="out of everything"):
        team(model).run("p")


# ---- streams -------------------------------------------------------------------------------------


def test_events_tell_the_whole_run(model: Any) -> None:
    run = team(model, 3, generation_config=sampled(), seed=3).stream("p", 30)
    told: dict[str, str] = {"Alice": "", "Bob": "", "Carol": ""}
    tokens: dict[str, list[int]] = {name: [] for name in told}
    for event in run:
        assert event.kind in EVENT_KINDS
        if event.kind in ("token", "end"):
            assert event.worker is not None and event.token is not None
            told[event.worker] += event.text
            tokens[event.worker] += [event.token] * (event.kind == "token")
        # At any time the result agrees with what was told.
        if event.kind == "stop" or event.step == 11:
            steps = run.result().steps
            assert steps == event.step
    result = run.result()
    assert [told[w.name] for w in result.workers] == texts(result)
    assert [tokens[w.name] for w in result.workers] == [w.tokens for w in result.workers]


def test_streams_side_by_side_do_not_disturb_each_other(model: Any) -> None:
    one = team(model, 2, generation_config=sampled())
    alone = [list(one.stream(problem, 12)) for problem in ("p", "quite another")]
    together = [one.stream(problem, 12) for problem in ("p", "quite another")]
    mixed: list[list[Event]] = [[], []]
    done = 0
    while done < 2:
        done = 0
        for stream, events in zip(together, mixed, strict=True):
            event = next(stream, None)
            if event is None:
                done += 1
            else:
                events.append(event)
    assert mixed == alone


@pytest.mark.parametrize("how", ["to the end", "left", "dropped"])
def test_the_memory_of_the_page_is_given_back(model: Any, how: str) -> None:
    run = team(model, 2).stream("p", 4)
    next(run)
    cache = weakref.ref(run._cache)
    assert cache() is not None
    if how == "to the end":
        list(run)
    elif how == "left":
        with run:
            next(run)
        assert run.result().steps >= 1
        assert next(run, None) is None
    else:
        del run
    gc.collect()
    assert cache() is None


def test_time_is_accounted_for(model: Any) -> None:
    run = team(model, 2).stream("p", 20)
    import time

    for event in run:
        if event.kind == "start":
            time.sleep(0.2)  # the caller's time is not the engine's
    stats = run.result().stats
    assert 0 < stats.attention_seconds < stats.forward_seconds < stats.seconds
    assert 0 < stats.first_token_seconds <= stats.seconds
    parts = stats.forward_seconds + stats.sampling_seconds + stats.engine_seconds
    assert parts == pytest.approx(stats.seconds)
    assert stats.engine_seconds < 0.2
    assert stats.tokens_per_second == pytest.approx(40 / stats.seconds)


# ---- text ----------------------------------------------------------------------------------------


@given(text=st.text(max_size=40), before=st.text(max_size=5))
@settings(max_examples=200)
def test_text_comes_token_by_token_and_is_never_taken_back(text: str, before: str) -> None:
    decoder = TextDecoder(TOKENIZER, TOKENIZER.encode(before))
    tokens = TOKENIZER.encode(text)
    pieces = [decoder.add(token) for token in tokens]
    assert "".join(pieces) + decoder.flush() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_broken_characters_are_shown_in_the_end() -> None:
    start = TOKENIZER.encode("\u20ac")[0]  # the first of three bytes
    decoder = TextDecoder(TOKENIZER)
    assert [decoder.add(start) for _ in range(3)] == ["", "", ""]
    assert decoder.add(start) == "\ufffd" * 4  # no character is that long
    decoder.add(start)
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""


def test_spaces_that_a_tokenizer_drops_at_the_beginning_are_kept() -> None:
    words = {"<unk>": 0, "\u2581so": 1, "\u2581it": 2, "\u2581is": 3}
    tokenizer = Tokenizer(BPE(words, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()  # strips the first space, as Llama 2's does
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert fast.decode([2, 3]) == "it is"
    decoder = TextDecoder(fast, [1])
    assert [decoder.add(2), decoder.add(3)] == [" it", " is"]


def test_text_is_decoded_as_what_follows_its_heading(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Script(monkeypatch, {"A": [A, STOP, B]})
    before = []

    class Decoder(TextDecoder):
        def __init__(self, tokenizer: Any, tokens: Sequence[int] = ()) -> None:
            before.append(decode(tokens))
            super().__init__(tokenizer, tokens)

    monkeypatch.setattr(runs, "TextDecoder", Decoder)
    team(model, ["A"]).run("p", 4)
    assert [text for text in before if text] == ["#A1:", "#A2:"]


# ---- arguments -----------------------------------------------------------------------------------


class Nameless(Layout):
    def view(self, page: Any, worker: int) -> list[Any]:
        return [page.prompt, page.live[worker]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "gpt"}, TypeError, "model: expected a transformers model"),
        ({"tokenizer": None}, TypeError, "tokenizer: expected a tokenizer"),
        ({"workers": 0}, ValueError, "workers: expected an integer from 1"),
        ({"workers": "Alice"}, TypeError, "workers: expected a number or a list"),
        ({"workers": []}, ValueError, "workers: expected at least one name"),
        ({"workers": ["A", 3]}, TypeError, "workers: expected names"),
        ({"workers": ["A", "A"]}, ValueError, "workers: expected different names"),
        ({"workers": ["A", "B\n"]}, ValueError, "workers: expected names of printable"),
        ({"layout": "circle"}, ValueError, "layout: expected one of combined.* got 'circle'"),
        ({"layout": 3}, TypeError, "layout: expected a name"),
        ({"layout": Nameless()}, TypeError, "layout: expected a Layout with a name, a string"),
        ({"max_tokens": 0}, ValueError, "max_tokens: expected an integer from 1"),
        ({"seed": -1}, ValueError, "seed: expected an integer from 0"),
        ({"seed": 1.5}, TypeError, "seed: expected an integer"),
        ({"generation_config": {}}, TypeError, "generation_config: expected a GenerationConfig"),
        ({"prompts": "be nice"}, TypeError, "prompts: expected Prompts"),
        ({"final_answer": "42"}, TypeError, "final_answer: expected a function"),
        ({"paragraph_ends": "."}, TypeError, "paragraph_ends: expected a function"),
    ],
)
def test_bad_arguments_are_named(
    model: Any, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"model": model, "tokenizer": TOKENIZER, "workers": 2, **change}
    with pytest.raises(error, match=message):
        hx.Hogwild(**arguments)


@pytest.mark.parametrize(
    ("problem", "max_steps", "error", "message"),
    [
        (3, 5, TypeError, "problem: expected a string"),
        (" \n", 5, ValueError, "problem: expected some text"),
        ("p", 0, ValueError, "max_steps: expected an integer from 1"),
        ("p", None, TypeError, "max_steps: expected an integer"),
    ],
)
def test_bad_arguments_of_a_run_are_named_at_once(
    model: Any, problem: Any, max_steps: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        team(model).stream(problem, max_steps)


def test_many_workers_have_names(model: Any) -> None:
    names = team(model, 40).names
    assert len(set(names)) == 40 and names[0] == "Alice" and names[39] == "Worker 40"
    assert team(model, ("Zoe", "Yan")).names == ("Zoe", "Yan")


def test_the_result_can_be_written_as_json(model: Any) -> None:
    import dataclasses

    result = team(model, 2).run("p", 3)
    again = json.loads(json.dumps(dataclasses.asdict(result)))
    assert again["workers"][1]["name"] == "Bob"
