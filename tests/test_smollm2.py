"""The default model, SmolLM2-135M-Instruct: real weights, a real text, real generation.

Its logits reach 39, where float32 is coarse. At position 2,000 transformers' angles in float32 move
them by 5e-4, so all limits but the loose one of 1e-3 are drawn around the same model with angles in
float64 (see `exact_angles`). And reading a text token by token instead of at once, which gives the
linear layers other shapes, moves the unpatched model's own logits by up to 1.7e-4 on some CPUs. So
over the long text the patched model's distance from float64 is held against the unpatched one's.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
import transformers

import hogwild_ext as hx
from eager import exact_angles
from models import plain_logits
from teams import PROMISED, Both, assert_logits, play

AS_IT_IS = 1e-3
TEXT = Path(__file__).parent / "data" / "text.txt"


@pytest.fixture(scope="module")
def folder(default_model_folder: Path) -> Path:
    return default_model_folder


@pytest.fixture(scope="module")
def tokens(folder: Path) -> list[int]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids: list[int] = tokenizer(TEXT.read_text(encoding="utf-8")).input_ids
    assert len(ids) >= 2000
    return ids


def load(folder: Path, dtype: torch.dtype) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.fixture(scope="module")
def model(folder: Path) -> transformers.PreTrainedModel:
    """Patched by the first test that runs it."""
    return load(folder, torch.float32)


@pytest.fixture(scope="module")
def plain(model: transformers.PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """The unpatched model's logits over the text."""
    hx.unpatch(model)
    return plain_logits(model, tokens)


@pytest.fixture(scope="module")
def exact(folder: Path, tokens: list[int]) -> torch.Tensor:
    """The same with everything in float64."""
    model = load(folder, torch.float64)
    with exact_angles(model):
        return plain_logits(model, tokens)


@pytest.fixture(scope="module")
def rounding(model: transformers.PreTrainedModel, tokens: list[int], exact: torch.Tensor) -> float:
    """How far float32 alone, angles in float64, takes the unpatched model's logits from `exact`."""
    hx.unpatch(model)
    with exact_angles(model):
        return (plain_logits(model, tokens) - exact).abs().max().item()


def perplexity(logits: torch.Tensor, tokens: list[int]) -> float:
    """Of tokens[1:], logits [n, vocab] being those of tokens."""
    targets = torch.tensor(tokens[1:])
    losses = [  # in pieces, for the memory's sake
        torch.nn.functional.cross_entropy(part.float(), target, reduction="sum")
        for part, target in zip(logits[:-1].split(256), targets.split(256), strict=True)
    ]
    return math.exp(torch.stack(losses).double().sum().item() / len(targets))


@pytest.mark.parametrize(("chunk", "segments"), [(1, 4), (17, 1), (256, 3)])
def test_perplexity_of_a_text_read_in_chunks(
    model: transformers.PreTrainedModel,
    tokens: list[int],
    plain: torch.Tensor,
    exact: torch.Tensor,
    rounding: float,
    chunk: int,
    segments: int,
) -> None:
    cache = hx.SegmentCache.for_model(model, max_tokens=len(tokens))
    view = [cache.segment("0")]
    logits = torch.empty_like(plain)
    for start in range(0, len(tokens), chunk):
        if start >= len(view) * len(tokens) / segments:
            view.append(cache.segment(str(len(view))))
        new = tokens[start : start + chunk]
        logits[start : start + len(new)] = hx.forward(model, cache, [view], [new], logits="all")[0]
    assert len(view) == segments
    expected = perplexity(plain, tokens)
    assert 5 < expected < 50  # it knows English
    assert abs(perplexity(logits, tokens) - expected) < 1e-3
    assert_logits(logits, exact, max(PROMISED, 2 * rounding))
    assert_logits(logits, plain, AS_IT_IS)


def test_greedy_loop_gives_the_tokens_of_generate(
    model: transformers.PreTrainedModel, tokens: list[int]
) -> None:
    prompts = [tokens[start : start + 256] for start in (0, 700, 1400)]
    hx.unpatch(model)
    settings = {"max_new_tokens": 256, "min_new_tokens": 256, "do_sample": False}
    generated = model.generate(torch.tensor(prompts), pad_token_id=0, **settings)
    expected = generated[:, 256:].tolist()
    short = {**settings, "max_new_tokens": 16, "min_new_tokens": 16}
    hx.patch(model)
    assert torch.equal(
        model.generate(torch.tensor(prompts), pad_token_id=0, **short), generated[:, :272]
    )

    cache = hx.SegmentCache.for_model(model, max_tokens=2048)
    views = [[cache.segment(str(w))] for w in range(3)]
    new = torch.tensor(prompts)
    for _ in range(256):
        logits = hx.forward(model, cache, views, new)
        # min_new_tokens keeps generate from ending
        logits = logits.index_fill(1, torch.tensor(model.generation_config.eos_token_id), -math.inf)
        new = logits.argmax(dim=-1, keepdim=True)
    written = [[*view[0].tokens[256:], int(token)] for view, token in zip(views, new, strict=True)]
    assert written == expected


def test_workers_that_share_a_prompt_equal_plain_runs(
    model: transformers.PreTrainedModel, tokens: list[int]
) -> None:
    prompt, texts = tokens[:300], [tokens[300:340], tokens[900:907], tokens[1500:1533]]
    hx.unpatch(model)
    with exact_angles(model):
        expected = [plain_logits(model, prompt + text)[300:] for text in texts]
    cache = hx.SegmentCache.for_model(model, max_tokens=1024)
    common = cache.segment("prompt")
    hx.forward(model, cache, [[common]], [prompt])
    views = [[common, cache.segment(str(w))] for w in range(3)]
    got = hx.forward(model, cache, views, texts, logits="all")
    for mine, theirs in zip(got, expected, strict=True):
        assert_logits(mine, theirs, PROMISED)


def test_workers_that_see_each_other_equal_the_eager_implementation(
    model: transformers.PreTrainedModel, tokens: list[int], seed: int
) -> None:
    rng = random.Random(seed)

    def draw(count: int) -> list[int]:
        start = rng.randrange(len(tokens) - count)
        return tokens[start : start + count]

    hx.unpatch(model)
    play(Both(model, limit=PROMISED), rng, rounds=6, prompt_length=200, draw=draw)


def test_bfloat16(folder: Path, tokens: list[int]) -> None:
    tokens = tokens[:600]
    model = load(folder, torch.bfloat16)
    expected = perplexity(plain_logits(model, tokens), tokens)
    cache = hx.SegmentCache.for_model(model, max_tokens=1024)
    assert cache.dtype == torch.bfloat16
    view = [cache.segment("first"), cache.segment("second")]
    logits = hx.forward(model, cache, [view[:1]], [tokens[:350]], logits="all")
    logits += hx.forward(model, cache, [view], [tokens[350:]], logits="all")
    assert perplexity(torch.cat(logits), tokens) == pytest.approx(expected, rel=0.01)
