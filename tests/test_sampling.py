"""What can be drawn, with which settings; and from what nothing can be."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from hogwild_ext import run as runs
from hogwild_ext import sampling
from hogwild_ext.sampling import (
    FOLLOWED,
    HARMLESS,
    REFUSED,
    Sampler,
    Written,
    config_for,
    generator_of,
)
from models import tiny_model
from scripted import TOKENIZER, team

VOCABULARY = 160
ENDS = [2, 9]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", vocab_size=VOCABULARY).eval()


def drawable(sampler: Sampler, logits: torch.Tensor, written: list[int]) -> torch.Tensor:
    """The probability of each token, [vocab]: what `multinomial` is given, drawn one by one."""
    seen, given = torch.zeros(len(logits)), torch.ones(1, 1)
    position = -1

    def draw(probabilities: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        nonlocal given
        given = probabilities
        return torch.tensor([[position]])

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "multinomial", draw)
        while position + 1 < given.shape[-1]:
            position += 1
            token = sampler(logits, written, torch.Generator())
            seen[token] += given[0, position]
    return seen


# ---- as in generate ------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    ("own", "given"),
    [
        ({}, {}),  # top_k unset: 50
        ({}, {"top_k": 0}),
        ({}, {"top_k": 7}),
        ({}, {"top_k": 7, "temperature": 3.0, "min_p": 0.2}),
        ({}, {"top_k": 10**6}),
        ({"top_k": 20, "temperature": 0.6, "top_p": 0.95}, {}),  # as the model's makers say
        ({"top_k": 20, "temperature": 0.6, "top_p": 0.95}, {"top_k": 3}),
        ({"top_k": 20, "suppress_tokens": [4, 5]}, {"temperature": 9.0}),
        ({}, {"epsilon_cutoff": 0.01}),
        ({}, {"eta_cutoff": 0.02, "top_k": 0}),
        ({}, {"top_h": 0.4, "temperature": 2.0}),
        ({}, {"top_h": 0.9, "top_k": 0, "top_p": 0.9}),
        ({}, {"sequence_bias": [[[5], 9.0], [[7, 6], -4.0]]}),
        ({}, {"min_new_tokens": 3, "sequence_bias": [[[2], 20.0], [[9], 20.0]]}),
        ({}, {"begin_suppress_tokens": [5, 6, 7], "sequence_bias": [[[5], 20.0]]}),
        ({}, {"bad_words_ids": [[2], [5], [6, 7]], "sequence_bias": [[[2], 9.0], [[5], 9.0]]}),
        ({}, {"renormalize_logits": True, "typical_p": 0.5}),
        ({"do_sample": False}, {"typical_p": 0.9, "top_k": 0}),
    ],
    ids=str,
)
def test_what_can_be_drawn_is_what_generate_would_draw(
    model: Any, own: dict[str, Any], given: dict[str, Any], half: bool
) -> None:
    """Its own processors, its own defaults: the first token behind a prompt."""
    logits = 3 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(5))
    if half:  # so coarse that many are equal
        logits = (logits * 2).round() / 2
    model.generation_config = GenerationConfig(eos_token_id=ENDS, pad_token_id=0, **own)
    config = GenerationConfig(**{"do_sample": True, **given})

    real = type(model).forward
    try:

        def forward(self: Any, *arguments: Any, **more: Any) -> Any:
            out = real(self, *arguments, **more)
            out.logits = logits.expand_as(out.logits[:, -1:]).clone()
            return out

        type(model).forward = forward
        generated = model.generate(
            torch.tensor([[30, 31, 32]]),
            generation_config=config,
            max_new_tokens=1,
            output_scores=True,
            return_dict_in_generate=True,
        )
    finally:
        type(model).forward = real
    expected = generated.scores[0].softmax(-1)[0]
    sampler = Sampler(config_for(model, config), ends=ENDS)
    got = drawable(sampler, logits.bfloat16() if half else logits, [])
    assert set(got.nonzero().flatten().tolist()) == set(expected.nonzero().flatten().tolist())
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_the_models_own_settings_are_not_changed(model: Any) -> None:
    model.generation_config = GenerationConfig(top_k=4, eos_token_id=ENDS)
    given = GenerationConfig(temperature=0.5)
    merged = config_for(model, given)
    assert (merged.top_k, merged.temperature, merged.eos_token_id) == (4, 0.5, ENDS)
    assert given.top_k is None and model.generation_config.temperature is None
    assert config_for(model, None) is model.generation_config


# ---- every setting -------------------------------------------------------------------------------


def test_every_setting_of_transformers_has_its_place() -> None:
    """A new one has to be looked at before it can be ignored."""
    settings = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert settings - FOLLOWED - HARMLESS - REFUSED.keys() == set()
    assert not FOLLOWED & HARMLESS and not (FOLLOWED | HARMLESS) & REFUSED.keys()


EXAMPLES: dict[str, Any] = {
    "num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5, "num_return_sequences": 2,
    "guidance_scale": 1.5, "penalty_alpha": 0.6, "dola_layers": "high",
    "prompt_lookup_num_tokens": 3, "assistant_early_exit": 4, "assistant_ensemble_weight": 0.5,
    "speculation_type": "dflash", "constraints": ["x"], "force_words_ids": [[3]],
    "watermarking_config": {"bias": 2.0}, "token_healing": True, "min_length": 10, "max_time": 3.0,
    "stop_strings": ["x"], "forced_bos_token_id": 5, "forced_eos_token_id": 5,
    "encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 2,
    "remove_invalid_values": True,
}  # fmt: skip


def test_each_setting_that_is_not_followed_is_refused() -> None:
    assert EXAMPLES.keys() == REFUSED.keys()
    for name, value in EXAMPLES.items():
        config = GenerationConfig()
        setattr(config, name, value)
        message = f"generation_config: expected {name} not to be set, got {name}="
        with pytest.raises(ValueError, match=message):
            Sampler(config)
        for off in (None, *REFUSED[name]):
            setattr(config, name, off)
            Sampler(config)


def test_what_transformers_itself_fills_in_is_not_refused() -> None:
    config = GenerationConfig()
    config.update(**config._get_default_generation_params())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Sampler(config)
        Sampler(GenerationConfig.from_model_config(tiny_model("llama").config))


def test_what_makers_of_models_write_is_not_refused() -> None:
    config = GenerationConfig(
        max_length=4096, max_new_tokens=512, transformers_version="4.40.0", pad_token_id=0,
        bos_token_id=1, eos_token_id=[2, 3], do_sample=True, temperature=0.6, top_p=0.95, top_k=20,
        repetition_penalty=1.05, use_cache=True, cache_implementation="dynamic",
        output_scores=True, return_dict_in_generate=True, length_penalty=1.0, early_stopping=False,
        num_assistant_tokens=5, _from_model_config=True, stop_strings=None, min_length=0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Sampler(config)


def test_a_setting_that_nobody_knows_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    config = GenerationConfig()
    config.chat_format = "chatml"  # as the first Qwen's
    with pytest.warns(
        UserWarning, match="generation_config: chat_format='chatml' is not a setting"
    ):
        Sampler(config)
    config.chat_format = None
    Sampler(config)

    class Newer(GenerationConfig):  # transformers of tomorrow
        def __init__(self, **more: Any) -> None:
            super().__init__(**more)
            self.top_z = None

    monkeypatch.setattr(sampling, "GenerationConfig", Newer)
    newer = Newer()
    Sampler(newer)
    newer.top_z = 3
    with pytest.raises(ValueError, match="generation_config: expected top_z not to be set"):
        Sampler(newer)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"top_h": 1.5}, "top_h"),
        ({"sequence_bias": 3}, "sequence_bias"),
        ({"top_k": 2.5}, "top_k"),
        ({"epsilon_cutoff": 3.0}, "epsilon"),
        ({"begin_suppress_tokens": 3}, "generation_config"),
    ],
)
def test_a_setting_out_of_its_range_is_named(setting: dict[str, Any], message: str) -> None:
    config = GenerationConfig(do_sample=True)
    for name, value in setting.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=f"generation_config: .*{message}|{message}"):
        Sampler(config)


def test_settings_that_count_tokens_count_the_workers_own() -> None:
    logits = torch.zeros(12)
    logits[2] = 9.0
    few = Sampler(GenerationConfig(min_new_tokens=3), ends=[2])
    assert [few(logits, [7] * n, generator_of(1, 0)) == 2 for n in range(5)] == [0, 0, 0, 1, 1]
    first = Sampler(GenerationConfig(begin_suppress_tokens=[2]))
    assert [first(logits, [7] * n, generator_of(1, 0)) == 2 for n in range(3)] == [0, 1, 1]
    late = Sampler(GenerationConfig(exponential_decay_length_penalty=(2, 3.0)), ends=[3])
    logits[2], logits[3] = 8.5, 1.0
    assert [late(logits, [7] * n, generator_of(1, 0)) == 3 for n in range(6)] == [0, 0, 0, 0, 1, 1]


# ---- numbers that are none -----------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True},
    "all": {"do_sample": True, "top_k": 0},
    "few": {"do_sample": True, "top_k": 3, "temperature": 0.5, "min_p": 0.1, "typical_p": 0.9},
    "penalties": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "do_sample": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("bad", "got"),
    [
        (lambda scores: scores.fill_(NAN), "100 NaN and 0 infinite of 100"),
        (lambda scores: scores[57:58].fill_(NAN), "1 NaN and 0 infinite of 100"),
        (lambda scores: scores[57:59].fill_(INF), "0 NaN and 2 infinite of 100"),
        (lambda scores: scores.fill_(-INF), "-inf alone of 100"),
        (lambda scores: scores[3:9].copy_(torch.tensor([NAN, INF, -INF] * 2)), "2 NaN and 2 inf"),
    ],
    ids=["all NaN", "one NaN", "inf", "all -inf", "mixed"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_model_that_overflows_is_named(way: str, bad: Any, got: str, dtype: torch.dtype) -> None:
    scores = torch.randn(100).to(dtype)
    bad(scores)
    sampler = Sampler(GenerationConfig(**WAYS[way]), never=[[0], [1, 5]], ends=[2])
    message = f"logits: expected finite numbers from the model, got {got}.*bfloat16"
    for forbidden in ((), (2,)):
        with pytest.raises(RuntimeError, match=message) as caught:
            sampler(scores, [3, 1], generator_of(1, 0), forbidden)
    assert str(dtype).removeprefix("torch.") in str(caught.value)


def test_a_run_of_such_a_model_keeps_what_was_written(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next run is as if nothing had happened."""
    tokens = tiny_model("llama", vocab_size=len(TOKENIZER))
    real, passes = runs.forward, 0

    def overflows(*arguments: Any) -> Any:
        nonlocal passes
        passes += 1
        logits = real(*arguments)
        return torch.full_like(logits, NAN) if passes == 4 else logits

    monkeypatch.setattr(runs, "forward", overflows)
    one = team(tokens, 2, generation_config=GenerationConfig(do_sample=True))
    run = one.stream("p", 9)
    with pytest.raises(RuntimeError, match="logits: expected finite numbers from the model"):
        list(run)
    assert [len(worker.tokens) for worker in run.result().workers] == [3, 3]
    assert one.run("p", 2).steps == 2


@pytest.mark.parametrize("way", WAYS)
def test_tokens_that_a_model_rules_out_are_not_an_overflow(way: str) -> None:
    scores = torch.full((100,), -INF)
    scores[40] = -3.0
    sampler = Sampler(GenerationConfig(**WAYS[way]), never=[[0]])
    assert sampler(scores, [], generator_of(1, 0)) == 40
    scores[0] = 5.0  # forbidden
    assert sampler(scores, [], generator_of(1, 0)) == 40
    with pytest.raises(RuntimeError, match=r"expected them to leave a token .*are finite"):
        Sampler(GenerationConfig(**WAYS[way]))(torch.zeros(4), [], generator_of(1, 0), [0, 1, 2, 3])


def test_equal_scores_are_all_kept() -> None:
    scores = torch.tensor([1.0, 3.0, 1.0, 1.0, 2.0, -INF])
    for count, kept in ((1, [1]), (2, [1, 4]), (3, [0, 1, 2, 3, 4]), (5, [0, 1, 2, 3, 4])):
        sampler = Sampler(GenerationConfig(do_sample=True, top_k=count))
        assert drawable(sampler, scores, []).nonzero().flatten().tolist() == kept


# ---- random streams ------------------------------------------------------------------------------


def test_no_two_workers_of_any_seeds_draw_the_same() -> None:
    """As those of seed 1, worker 2 and of seed 2, worker 1 would, were the two but added."""
    seeds = [*range(24), 2**32 - 1, 2**32, 2**62, 2**63 - 1]
    first = {
        (seed, worker): int(torch.randint(2**62, (), generator=generator_of(seed, worker)))
        for seed in seeds
        for worker in range(24)
    }
    assert len(set(first.values())) == len(first)
    again = generator_of(3, 4)
    assert int(torch.randint(2**62, (), generator=again)) == first[3, 4]


# ---- growth --------------------------------------------------------------------------------------


def test_what_was_written_is_not_copied_for_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = 0
    real = torch.tensor

    def counted(data: Any, *arguments: Any, **more: Any) -> torch.Tensor:
        nonlocal copied
        copied += len(data) if isinstance(data, list) else 1
        return real(data, *arguments, **more)

    seen = []

    def look(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append((tokens.shape, int(tokens[0, -1]) if tokens.shape[1] else None))
        return scores

    sampler = Sampler(GenerationConfig(), [look], never=[[0], [1, 5, 6]])
    scores, written = torch.randn(30), Written()
    sampler(scores, written, generator_of(1, 0))
    empty = torch.empty

    def allocated(size: int, **more: Any) -> torch.Tensor:
        nonlocal copied
        copied += size
        return empty(size, **more)

    monkeypatch.setattr(torch, "tensor", counted)
    monkeypatch.setattr(torch, "empty", allocated)
    for token in range(2000):
        written.append(token % 30)
        sampler(scores, written, generator_of(1, 0))
    assert copied < 8 * 2000
    assert seen == [((1, 0), None), *(((1, n + 1), n % 30) for n in range(2000))]


def test_tokens_that_become_more_are_what_a_list_is() -> None:
    tokens, cpu = Written([3, 4]), torch.device("cpu")
    assert tokens.tensor(cpu).tolist() == [3, 4] and tokens == [3, 4]
    for n in range(200):
        tokens.append(n)
        if n % 7 == 0:
            assert tokens.tensor(cpu).tolist() == list(tokens)
    early = tokens.tensor(cpu)
    tokens += [1] * 500
    assert tokens.tensor(cpu).tolist() == list(tokens)
    assert early.tolist() == list(tokens)[: len(early)]
    assert tokens.tensor(torch.device("meta")).shape == (len(tokens),)
    assert Written().tensor(cpu).shape == (0,) and tokens.tensor(cpu).dtype == torch.int64
