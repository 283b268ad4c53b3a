"""Models of every supported family: the plug-in gives the logits of the unpatched model.

Limits are absolute, for float32 models whose logits have a standard deviation of about 1. Beside
the promise (PROMISED, at positions up to 4,096) stands a closer limit (ROUNDING) against the same
model with angles in float64: see `exact_angles`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

import hogwild_ext as hx
from eager import exact_angles
from hogwild_ext.model_support import FAMILIES, read_model
from models import ROPE, SPECIFIC, plain_logits, random_tokens, tiny_config, tiny_model
from teams import PROMISED, ROUNDING, Both, assert_logits, play, random_split

LENGTH = 4096  # positions

# transformers makes longrope of yarn in phi3.
YARN = [family for family in SPECIFIC if family != "phi3"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """These models are so small that a second thread only waits."""
    torch.set_num_threads(1)


def test_every_family_is_tested() -> None:
    assert set(SPECIFIC) == set(FAMILIES)


# ---- one worker ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "rope"),
    [(family, "default") for family in SPECIFIC]
    + [(family, "yarn") for family in YARN]
    + [(family, rope) for family in ("llama", "qwen3") for rope in ("linear", "llama3")],
)
def test_any_split_of_a_text_equals_the_unpatched_model(family: str, rope: str, seed: int) -> None:
    rng = random.Random(seed)
    model = tiny_model(family, rope=rope)
    tokens = random_tokens(LENGTH, seed=1)
    plain = plain_logits(model, tokens)
    with exact_angles(model):
        exact = plain_logits(model, tokens)

    cache = hx.SegmentCache.for_model(model, max_tokens=LENGTH)
    view, logits, done = [], [], 0
    for i, length in enumerate(random_split(LENGTH, rng.randint(1, 5), rng)):
        view.append(cache.segment(f"part {i}"))
        for new in random_split(length, min(length, rng.randint(1, 3)), rng):
            logits += hx.forward(model, cache, [view], [tokens[done : done + new]], logits="all")
            done += new
    assert [t for segment in view for t in segment.tokens] == tokens
    assert_logits(torch.cat(logits), plain, PROMISED)
    assert_logits(torch.cat(logits), exact, ROUNDING)


@pytest.mark.parametrize("head_dim", [16, 24, 40, 64, 72, 80, 96, 128])
@pytest.mark.parametrize("heads", [(4, 4), (3, 1), (10, 2)], ids=lambda h: f"{h[0]}over{h[1]}")
def test_head_dims_and_groups(head_dim: int, heads: tuple[int, int]) -> None:
    model = tiny_model("llama", head_dim=head_dim, num_heads=heads[0], num_kv_heads=heads[1])
    tokens = random_tokens(300, seed=head_dim)
    with exact_angles(model):
        exact = plain_logits(model, tokens)
    cache = hx.SegmentCache.for_model(model, max_tokens=1024)
    assert (cache.head_dim, cache.num_kv_heads) == (head_dim, heads[1])
    a, b, c = (cache.segment(name) for name in "abc")
    logits = []
    for view, start, end in (([a], 0, 129), ([a, b], 129, 130), ([a, b, c], 130, 300)):
        logits += hx.forward(model, cache, [view], [tokens[start:end]], logits="all")
    assert_logits(torch.cat(logits), exact, ROUNDING)


# ---- several workers that share a prompt only ----------------------------------------------------


@pytest.mark.parametrize("family", SPECIFIC)
def test_workers_that_share_a_prompt_equal_plain_runs(family: str, seed: int) -> None:
    rng = random.Random(seed)
    model = tiny_model(family)
    prompt = random_tokens(150, seed=2)
    texts = [random_tokens(rng.randint(20, 80), seed=10 + w) for w in range(4)]
    with exact_angles(model):
        exact = [plain_logits(model, prompt + text)[len(prompt) :] for text in texts]

    cache = hx.SegmentCache.for_model(model, max_tokens=1024)
    common = cache.segment("prompt")
    hx.forward(model, cache, [[common]], [prompt])
    own = [cache.segment(f"worker {w}") for w in range(4)]
    got: list[list[torch.Tensor]] = [[], [], [], []]
    done = [0, 0, 0, 0]
    while any(d < len(text) for d, text in zip(done, texts, strict=True)):
        speakers = [w for w in range(4) if done[w] < len(texts[w])]
        speakers = rng.sample(speakers, rng.randint(1, len(speakers)))
        new = [texts[w][done[w] : done[w] + rng.randint(1, 9)] for w in speakers]
        rows = hx.forward(model, cache, [[common, own[w]] for w in speakers], new, logits="all")
        for w, tokens, logits in zip(speakers, new, rows, strict=True):
            got[w].append(logits)
            done[w] += len(tokens)
    for w in range(4):
        assert_logits(torch.cat(got[w]), exact[w], ROUNDING)


# ---- several workers that see each other ---------------------------------------------------------


@pytest.mark.parametrize("family", SPECIFIC)
def test_workers_that_see_each_other_equal_the_eager_implementation(family: str, seed: int) -> None:
    team = Both(tiny_model(family))
    play(team, random.Random(seed), rounds=10, prompt_length=100)
    assert team.steps > 10


@pytest.mark.parametrize("rope", ["linear", "llama3", "yarn"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_scaled_rope_between_workers(family: str, rope: str, seed: int) -> None:
    # A scaling applied a second time at a commit would show here.
    team = Both(tiny_model(family, rope=rope))
    play(team, random.Random(seed), rounds=12, prompt_length=70)
    team.step([["prompt"]], [random_tokens(3, 1)])
    team.commit("prompt", "history")
    team.step([["prompt", "history"]], [random_tokens(3, 2)])


@pytest.mark.parametrize(("family", "rope"), [("llama", "default"), ("qwen2", "yarn")])
def test_workers_far_into_a_text(family: str, rope: str, seed: int) -> None:
    team = Both(tiny_model(family, rope=rope))
    play(team, random.Random(seed), rounds=8, prompt_length=3600)


# ---- sliding windows -----------------------------------------------------------------------------

WINDOW = 50
SLIDING: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"sliding_window": WINDOW},
    "phi3": {"sliding_window": WINDOW},
    "qwen2": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 0},
    "qwen2_moe": {
        "sliding_window": WINDOW,
        "use_sliding_window": True,
        "layer_types": ["sliding_attention"] * 2,
    },
    "qwen3": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 0},
    "qwen3_moe": {"sliding_window": WINDOW, "use_sliding_window": True},
    "starcoder2": {"sliding_window": WINDOW},
}


@pytest.mark.parametrize("family", SLIDING)
def test_one_sliding_window_in_all_layers(family: str, seed: int) -> None:
    model = tiny_model(family, **SLIDING[family])
    assert read_model(model).window == WINDOW
    tokens = random_tokens(3 * WINDOW, seed=4)
    with exact_angles(model):
        exact = plain_logits(model, tokens)
    cache = hx.SegmentCache.for_model(model, max_tokens=1024)
    a, b = cache.segment("a"), cache.segment("b")
    logits = hx.forward(model, cache, [[a]], [tokens[:60]], logits="all")
    logits += hx.forward(model, cache, [[a, b]], [tokens[60:61]], logits="all")
    logits += hx.forward(model, cache, [[a, b]], [tokens[61:]], logits="all")
    assert_logits(torch.cat(logits), exact, ROUNDING)

    play(Both(model, WINDOW), random.Random(seed), rounds=6, prompt_length=70)


@pytest.mark.parametrize("family", ["qwen2", "qwen2_moe", "qwen3", "qwen3_moe"])
def test_a_window_that_is_not_used_is_no_window(family: str) -> None:
    assert read_model(tiny_model(family, sliding_window=8, use_sliding_window=False)).window is None


# ---- half precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("family", SPECIFIC)
def test_half_precision_is_as_near_as_the_plain_model(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family)
    tokens = random_tokens(400, seed=5)
    exact = plain_logits(model, tokens)
    model = model.to(dtype)
    # Casting a model casts its frequencies too. Loading one in half precision leaves them exact.
    fresh = tiny_model(family)
    model.base_model.rotary_emb.inv_freq = fresh.base_model.rotary_emb.inv_freq
    plain = plain_logits(model, tokens)

    cache = hx.SegmentCache.for_model(model, max_tokens=1024)
    assert cache.dtype == dtype
    a, b = cache.segment("a"), cache.segment("b")
    logits = hx.forward(model, cache, [[a]], [tokens[:333]], logits="all")
    logits += hx.forward(model, cache, [[a, b]], [tokens[333:]], logits="all")
    ours = torch.cat(logits)
    assert ours.dtype == dtype
    assert token_error(ours, exact) <= 1.3 * token_error(plain, exact)


def token_error(logits: torch.Tensor, exact: torch.Tensor) -> float:
    """Median over the tokens of ||logits - exact|| / ||exact||.

    The median, because rounding sends a few tokens of a mixture of experts to other experts.
    """
    difference = logits.double() - exact.double()
    return (difference.norm(dim=-1) / exact.double().norm(dim=-1)).median().item()


def test_frequencies_are_those_that_the_model_uses() -> None:
    # model.bfloat16() rounds them, for the plain model and so for us.
    model = tiny_model("llama").bfloat16()
    frequencies = model.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.bfloat16
    cache = hx.SegmentCache.for_model(model, max_tokens=64)
    assert torch.equal(torch.tensor(cache.inv_freq), frequencies.float())
    hx.forward(model, cache, [[cache.segment("a")]], [[5, 6]])


# ---- what is read, what is refused ---------------------------------------------------------------


def test_read_model() -> None:
    shape = read_model(tiny_model("glm", rope="yarn", num_layers=3, head_dim=64))
    assert (shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.head_dim) == (3, 4, 2, 64)
    assert shape.inv_freq.shape == (16,)  # half of the dimensions turn
    assert shape.inv_freq.dtype == torch.float32
    assert shape.interleaved
    assert shape.rope_scale == pytest.approx(1.1386294)
    assert (shape.scale, shape.window, shape.max_position) == (0.125, None, LENGTH)
    assert (shape.dtype, shape.device) == (torch.float32, torch.device("cpu"))
    assert read_model(tiny_model("granite")).scale == SPECIFIC["granite"]["attention_multiplier"]
    assert not read_model(tiny_model("llama")).interleaved


def small(config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_config(config)


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "dynamic rope": (lambda: tiny_model("llama", rope="dynamic"), ValueError, "'dynamic'"),
    "longrope": (lambda: tiny_model("llama", rope="longrope"), ValueError, "'longrope'"),
    "phi3 longrope": (lambda: tiny_model("phi3", rope="longrope"), ValueError, "'longrope'"),
    "sliding mix": (
        lambda: tiny_model("qwen2", sliding_window=8, use_sliding_window=True, max_window_layers=1),
        ValueError,
        "full_attention, sliding_attention",
    ),
    "gpt2": (
        lambda: small(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32)),
        ValueError,
        "'gpt2'",
    ),
    "layers without rope": (
        lambda: small(
            transformers.SmolLM3Config(
                vocab_size=32,
                hidden_size=32,
                num_hidden_layers=4,
                num_attention_heads=2,
                num_key_value_heads=1,
                intermediate_size=16,
                pad_token_id=0,
            )
        ),
        ValueError,
        "'smollm3'",
    ),
    "softcap and a sliding mix": (
        lambda: small(
            transformers.Gemma2Config(
                vocab_size=32,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
                intermediate_size=16,
            )
        ),
        ValueError,
        "'gemma2'",
    ),
    "no language model head": (
        lambda: transformers.AutoModelForSequenceClassification.from_config(tiny_config("llama")),
        ValueError,
        "LlamaForSequenceClassification",
    ),
    "base model": (
        lambda: transformers.AutoModel.from_config(tiny_config("llama")),
        ValueError,
        "LlamaModel",
    ),
    "any module": (lambda: torch.nn.Linear(2, 2), TypeError, "Linear"),
    "a name": (lambda: "SmolLM2", TypeError, "str"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name(case: str) -> None:
    make, error, word = REFUSED[case]
    model = make()
    with pytest.raises(error, match="^model: expected .*" + word):
        hx.patch(model)
    with pytest.raises(error, match="^model: expected .*" + word):
        hx.SegmentCache.for_model(model, max_tokens=64)
    if isinstance(model, torch.nn.Module):
        for module in model.modules():
            assert type(getattr(module, "config", None)).__module__ != "hogwild_ext.patching"
            assert not module._forward_hooks
    assert set(ROPE) - {"dynamic", "longrope"} == set(hx.model_support.ROPE_TYPES)
