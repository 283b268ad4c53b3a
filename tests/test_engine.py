"""The engine: who sees what and when, what is encoded, what is drawn, and how a run ends."""

from __future__ import annotations

import copy
import gc
import json
import random
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerFast

import hogwild_ext as hx
from hogwild_ext import engine
from hogwild_ext.engine import Event, Result, Sampler, TextDecoder, boxed_answer
from hogwild_ext.layouts import Layout, Page
from hogwild_ext.prompts import REASONING, SHORT, Prompts, prompts_for
from models import tiny_model

EOS = 2
CHAT = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROMPTS = Prompts(
    system="{names}: {count}.",
    alone="alone.",
    user="{problem}",
    history_heading="H:\n",
    heading="#{name}{number}:",
    others_heading="[others]\n",
    unfinished="~\n",
    own_heading="[own]\n",
    not_first=(),
)


def byte_tokenizer(chat_template: str | None = CHAT) -> PreTrainedTokenizerFast:
    """Every byte is a token; so is the empty line, and a full stop before one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<bos>", "<eos>", *alphabet, "ĊĊ", ".ĊĊ"]
    tokenizer = Tokenizer(BPE({word: i for i, word in enumerate(words)}, [("Ċ", "Ċ"), (".", "ĊĊ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    fast.chat_template = chat_template
    return fast


TOKENIZER = byte_tokenizer()
VOCABULARY = len(TOKENIZER)
STOP = TOKENIZER.encode(".\n\n")[0]  # ends a paragraph
A, B, C, Z = TOKENIZER.encode("abcz")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # these models are too small for two


@pytest.fixture(scope="module")
def model() -> transformers.PreTrainedModel:
    return tiny_model("llama", vocab_size=VOCABULARY, head_dim=16)


def team(model: transformers.PreTrainedModel, workers: Any = 3, **changes: Any) -> hx.Hogwild:
    return hx.Hogwild(
        model, TOKENIZER, workers, **{"prompts": PROMPTS, "seed": 1, "max_tokens": 4096, **changes}
    )


def sampled(**changes: Any) -> GenerationConfig:
    return GenerationConfig(do_sample=True, top_k=0, eos_token_id=EOS, **changes)


def say(text: str) -> list[int]:
    tokens: list[int] = TOKENIZER.encode(text)
    return tokens


def decode(tokens: Sequence[int]) -> str:
    text: str = TOKENIZER.decode(list(tokens))
    return text


# ---- a run whose tokens are written beforehand ---------------------------------------------------


class Script:
    """Stands in for `forward`: the real one runs, but what each worker says is written down.

    `lines[name]` are the tokens that a worker will say; then it says "z" for ever. `passes` are,
    for each forward pass, the rows: the text that a row sees, as tokens, and how many it brought.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lines: dict[str, list[int]]) -> None:
        self.lines = {name: list(tokens) for name, tokens in lines.items()}
        self.passes: list[list[tuple[list[int], int]]] = []
        self.brought: list[int] = []
        self.raises: dict[int, BaseException] = {}  # at which pass
        self._forward = engine.forward
        monkeypatch.setattr(engine, "forward", self.forward)

    def forward(self, model: Any, cache: Any, views: Any, tokens: Any) -> torch.Tensor:
        if error := self.raises.get(len(self.passes)):
            raise error
        logits = self._forward(model, cache, views, tokens)
        assert isinstance(logits, torch.Tensor)
        rows = []
        for view, new in zip(views, tokens, strict=True):
            rows.append(([token for part in view for token in part.tokens], len(new)))
            self.brought += new
        self.passes.append(rows)
        forced = torch.full_like(logits, -50.0)
        # A worker's last row is where it speaks; others write the end of its paragraph.
        speaks = {view[-1].name.partition(":")[0]: row for row, view in enumerate(views)}
        for name, row in speaks.items():
            forced[row, self.lines[name].pop(0) if self.lines.get(name) else Z] = 50.0
        return forced


def random_lines(rng: random.Random, names: Sequence[str], length: int) -> dict[str, list[int]]:
    """Words, finished paragraphs, line breaks that finish nothing, and now and then the end."""
    lines = {}
    for name in names:
        tokens: list[int] = []
        for _ in range(length):
            word = say("".join(rng.choices("abcdefgh ,\n\u20ac", k=rng.randint(1, 4))))
            breaks = rng.choice(["", "", "", "\n\n", ".\n\n", ".\n\n", '!"\n\n', ".\n"])
            tokens += word + TOKENIZER.encode(breaks)
            if rng.random() < 0.03:
                tokens.append(EOS)
        lines[name] = tokens
    return lines


class PlainPage:
    """The page as nothing but lists of tokens: what the engine must show, said as simply as can
    be. Everything is joined anew for every reader, in every pass."""

    def __init__(self, names: Sequence[str], prompt: str, lines: dict[str, list[int]]) -> None:
        self.prompt = say(prompt)
        self.lines = {name: list(tokens) for name, tokens in lines.items()}
        self.history: list[int] = []
        self.number = dict.fromkeys(names, 1)
        self.live = {name: say(f"#{name}1:") for name in names}
        self.said: dict[str, list[int]] = {name: [] for name in names}  # in the live paragraph
        self.last: dict[str, list[int]] = {name: [] for name in names}  # in the pass before
        self.writing = list(names)

    def view(
        self, name: str, history: list[int], live: dict[str, list[int]], writing: list[str]
    ) -> list[int]:
        text = self.prompt + history
        if others := [other for other in writing if other != name]:
            text = text + say("[others]\n")
            for other in others:
                text = text + live[other] + say("~\n")
            text = text + say("[own]\n")
        return text + live[name]

    def is_finished(self, name: str) -> bool:
        text = decode(self.said[name])
        gap = text[len(text.rstrip()) :]
        return text.rstrip().endswith((".", '!"')) and gap[-1:] == "\n" and gap.count("\n") > 1

    def next_pass(self) -> list[list[int]]:
        """What is seen in the next pass: by those who close a paragraph, then by the writers."""
        ended = [name for name in self.writing if self.last[name] == [EOS]]
        # Who has ended under an empty heading is gone.
        self.writing = [name for name in self.writing if self.said[name] or name not in ended]
        still = [name for name in self.writing if name not in ended]
        closing = [name for name in self.writing if name in ended or self.is_finished(name)]
        # As it stands when they read: the words of this pass are all there already.
        before = {
            name: self.live[name] + (say("\n\n") if name in ended else self.last[name])
            for name in self.writing
        }
        # Who closes a paragraph reads the page as it was. All others, and the same one where it
        # begins the next paragraph, see it in the history.
        seen = [self.view(name, self.history, before, self.writing) for name in closing]
        for name in closing:
            self.history = self.history + before[name]
            self.number[name] += 1
            before[name], self.said[name] = say(f"#{name}{self.number[name]}:"), []
        seen += [self.view(name, self.history, before, still) for name in still]
        self.live, self.writing = before, still

        for name in still:
            token = self.lines[name].pop(0) if self.lines[name] else Z
            self.last[name] = [token]
            if token != EOS:
                self.said[name].append(token)
        return seen


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("variant", range(4))
def test_everybody_sees_the_page_token_by_token(
    model: Any, monkeypatch: pytest.MonkeyPatch, count: int, variant: int, seed: int
) -> None:
    names = ["A", "B", "C", "D", "E"][:count]
    lines = random_lines(random.Random(seed + variant), names, 12)
    script = Script(monkeypatch, lines)
    run = team(model, names).stream("p", 45)
    events = list(run)
    prompt = PROMPTS.opening(TOKENIZER, names, "p")
    plain = PlainPage(names, prompt, lines)
    assert len(script.passes) == run.result().steps >= 2
    for number, rows in enumerate(script.passes):
        shown = [tokens for tokens, _ in rows]
        expected = plain.next_pass()
        # The first rows of the first pass are the fixed texts.
        assert shown[-len(expected) :] == expected, f"pass {number + 1}"
        assert number == 0 or len(shown) == len(expected)
    # Once is enough for each: every token of the page was brought exactly once.
    result = run.result()
    assert result.stats.encoded_tokens == len(script.brought)
    fixed = 0 if count == 1 else len("[others]\n[own]\n") + count * len("~\n")
    headings = sum(event.text == f"#{event.worker}{event.paragraph}:" for event in events)
    assert headings == sum(event.kind == "start" for event in events)
    ends = sum(event.kind == "end" for event in events)
    generated = sum(len(worker.tokens) for worker in result.workers)
    pending = sum(not worker.ended for worker in result.workers)
    page = len(prompt) + fixed + sum(len(e.text) for e in events if e.kind == "start")
    assert page + generated - pending <= len(script.brought) <= page + generated + ends


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
    text = TOKENIZER.encode(PROMPTS.opening(TOKENIZER, ["A"], "Say something."))
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
        engine, "forward", lambda model, cache, views, tokens: scores.expand(len(views), -1)
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
    assert result.stopped_by == "interrupted" and result.steps in (5, 6)
    assert next(run, None) is None


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
        assert event.kind in engine.EVENT_KINDS
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


# ---- layouts -------------------------------------------------------------------------------------


class OnlyHistory(Layout):
    name = "only-history"

    def view(self, page: Page, worker: int) -> list[Any]:
        return [page.prompt, page.history, *page.finishing, page.live[worker]]


class OwnPiece(Layout):
    name = "own-piece"
    commits = False

    def view(self, page: Page, worker: int) -> list[Any]:
        others = [page.live[other] for other in page.others(worker)]
        return [page.prompt, *others, page.live[worker]]


def test_a_layout_of_ones_own(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(monkeypatch, {"A": [A, STOP, B], "B": [C, C, C]})
    team(model, ["A", "B"], layout=OnlyHistory()).run("p", 4)
    prompt = PROMPTS.opening(TOKENIZER, ["A", "B"], "p")
    shown = [[decode(tokens) for tokens, _ in rows] for rows in script.passes]
    assert shown[1] == [prompt + "#A1:a", prompt + "#B1:c"]
    assert shown[2] == [
        prompt + "#A1:a.\n\n",
        prompt + "#A1:a.\n\n#A2:",
        prompt + "#A1:a.\n\n#B1:cc",
    ]


def test_a_layout_without_commits(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(monkeypatch, {"A": [A, STOP, B], "B": [C, C, C]})
    result = team(model, ["A", "B"], layout=OwnPiece()).run("p", 4)
    prompt = PROMPTS.opening(TOKENIZER, ["A", "B"], "p")
    assert decode(script.passes[3][1][0]) == prompt + "#A1:a.\n\nb#B1:ccc"
    assert result.stats.committed_tokens == 0


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

    monkeypatch.setattr(engine, "TextDecoder", Decoder)
    team(model, ["A"]).run("p", 4)
    assert [text for text in before if text] == ["#A1:", "#A2:"]


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


# ---- prompts -------------------------------------------------------------------------------------


def test_the_prompt_in_every_kind_of_chat_format() -> None:
    names, problem = ["A", "B", "{names}"], "{x} and {names} in \\boxed{y}"
    told = "A, B and {names}: 3."
    assert PROMPTS.opening(TOKENIZER, names, problem) == (
        f"<system>{told}</><user>{problem}</><assistant>H:\n"
    )
    no_system = byte_tokenizer(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHAT
    )
    assert PROMPTS.opening(no_system, names, problem) == (
        f"<user>{told}\n\n{problem}</><assistant>H:\n"
    )
    assert PROMPTS.opening(byte_tokenizer(None), names, problem) == f"{told}\n\n{problem}\n\nH:\n"
    assert PROMPTS.opening(TOKENIZER, ["A"], "p") == "<system>alone.</><user>p</><assistant>H:\n"
    silent = replace(PROMPTS, alone="")
    assert silent.opening(TOKENIZER, ["A"], "p") == "<user>p</><assistant>H:\n"
    assert silent.opening(byte_tokenizer(None), ["A"], "p") == "p\n\nH:\n"


def test_our_own_prompts_have_no_gaps() -> None:
    for prompts in (REASONING, SHORT):
        for names in (["Alice"], ["Alice", "Bob"], ["Alice", "Bob", "Carol"]):
            text = prompts.opening(TOKENIZER, names, "What?")
            assert "What?" in text
            for gap in ("{name", "{first}", "{count}", "{problem}", "{number}"):
                assert gap not in text
        assert prompts.paragraph_heading("Alice", 2).startswith(("Alice", "**Alice [2]"))
    assert "Alice, Bob and Carol" in REASONING.opening(TOKENIZER, ["Alice", "Bob", "Carol"], "x")
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
    assert texts(first) == ["baa", "baa"]
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
        ({"never": "x"}, TypeError, "never: expected a tuple of strings"),
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


# ---- arguments -----------------------------------------------------------------------------------


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
