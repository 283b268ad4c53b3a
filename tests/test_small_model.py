"""One small model from end to end, of a shape that every backend has kernels for.

On the CPU it says little that test_models.py does not say; it is what runs on GPUs, real and
emulated.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import transformers

import hogwild_ext as hx
from hogwild_ext import run
from models import plain_logits, random_tokens, tiny_model
from scripted import VOCABULARY, team
from teams import PROMISED, Both, assert_logits, play


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def small_model(seed: int, **changes: Any) -> transformers.PreTrainedModel:
    settings = {"head_dim": 64, "num_heads": 6, "num_kv_heads": 2, "num_layers": 3, **changes}
    return tiny_model("llama", seed=seed, **settings)


def test_several_workers_equal_the_eager_implementation(device: str, seed: int) -> None:
    model = small_model(1)
    both = Both(copy.deepcopy(model).to(device), eager_model=model)
    play(both, random.Random(seed), rounds=6, prompt_length=90)
    assert both.steps > 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_as_near_as_the_plain_model(device: str, dtype: torch.dtype) -> None:
    model = small_model(2)
    tokens = random_tokens(150, seed=3)
    exact = plain_logits(model, tokens)
    frequencies = model.base_model.rotary_emb.inv_freq.clone()
    model = model.to(dtype)
    model.base_model.rotary_emb.inv_freq = frequencies  # stays exact, as when a model is loaded
    plain = plain_logits(model, tokens)

    model = model.to(device)
    cache = hx.SegmentCache.for_model(model, max_tokens=512)
    a, b = cache.segment("a"), cache.segment("b")
    rows = hx.forward(model, cache, [[a]], [tokens[:70]], logits="all")
    rows += hx.forward(model, cache, [[a, b]], [tokens[70:]], logits="all")
    ours, theirs = (
        (logits.cpu().double() - exact.double()).norm() / exact.double().norm()
        for logits in (torch.cat(rows), plain)
    )
    assert ours <= 1.5 * theirs, f"ours {ours:.3g}, the plain model's {theirs:.3g}"


def test_a_greedy_run_of_the_engine(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker reads plain text: each of its tokens is the likeliest after all that came before.

    Paragraphs that are finished on the way are committed to the history, which changes nothing.
    """
    model = small_model(4, vocab_size=VOCABULARY)
    plain = copy.deepcopy(model)
    passes: list[tuple[list[int], torch.Tensor]] = []

    def recording(model: Any, cache: Any, views: Any, tokens: Any, **options: Any) -> Any:
        logits = hx.forward(model, cache, views, tokens, **options)
        passes.append(([token for part in views[-1] for token in part.tokens], logits[-1].cpu()))
        return logits

    monkeypatch.setattr(run, "forward", recording)
    result = team(model.to(device), 1).run("ab", max_steps=16)
    assert len(result.workers[0].tokens) == result.steps == len(passes) == 16
    for (text, logits), token in zip(passes, result.workers[0].tokens, strict=True):
        expected = plain_logits(plain, text)[-1]
        assert_logits(logits, expected, PROMISED)
        assert token == int(expected.argmax())


def test_a_run_of_several_workers_is_repeatable(device: str) -> None:
    model = small_model(5, vocab_size=VOCABULARY).to(device)
    runs = [team(model, 3, seed=7).run("ab", max_steps=12) for _ in range(2)]
    assert [w.tokens for w in runs[0].workers] == [w.tokens for w in runs[1].workers]
    assert sum(len(w.tokens) for w in runs[0].workers) == runs[0].stats.generated_tokens > 12
