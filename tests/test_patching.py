"""What patching does to a model: nothing, until `forward` runs a step, and then only there."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import hogwild_ext as hx
from hogwild_ext import patching
from models import VOCABULARY, plain_logits, random_tokens, tiny_model

TOKENS = random_tokens(40, seed=1)
SMALL = 2e-5


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """These models are so small that a second thread only waits."""
    torch.set_num_threads(1)


@pytest.fixture
def model() -> transformers.PreTrainedModel:
    return tiny_model("llama")


def new_cache(model: transformers.PreTrainedModel, **changes: Any) -> hx.SegmentCache:
    if not changes:
        return hx.SegmentCache.for_model(model, max_tokens=1024)
    shape = hx.model_support.read_model(model)
    settings = {
        "num_layers": shape.num_layers,
        "num_kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "inv_freq": shape.inv_freq,
        "max_tokens": 1024,
        **changes,
    }
    return hx.SegmentCache(**settings)


def run(model: Any, cache: hx.SegmentCache | None = None, **options: Any) -> Any:
    """The logits [n, vocab] of TOKENS in a segment of their own."""
    cache = new_cache(model) if cache is None else cache
    segment = cache.segment("all")
    try:
        return hx.forward(model, cache, [[segment]], [TOKENS], logits="all", **options)[0]
    finally:
        cache.free(segment)


def generate(model: Any, **options: Any) -> list[list[int]]:
    """Greedy tokens of a batch with padding on the left."""
    ids = torch.tensor([random_tokens(9, seed=2), random_tokens(9, seed=3)])
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    ids[0, :4] = 0
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(ids, attention_mask=mask, **{**settings, **options}).tolist()


def padded_logits(model: Any) -> torch.Tensor:
    """Logits of a batch, padded on the right and on the left."""
    ids = torch.tensor([random_tokens(11, seed=4), random_tokens(11, seed=5)])
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    mask[1, :3] = 0
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


# ---- without a step ------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3_moe", "phi3"])
def test_a_patched_model_outside_forward_is_unchanged(family: str, attention: str) -> None:
    options = {"sliding_window": 6} if family == "mistral" else {}
    model = tiny_model(family, **options)
    model.set_attn_implementation(attention)
    before = padded_logits(model), generate(model), plain_logits(model, TOKENS)

    assert hx.patch(model) is model
    run(model)
    after = padded_logits(model), generate(model), plain_logits(model, TOKENS)
    hx.unpatch(model)
    run_plain = padded_logits(model), generate(model), plain_logits(model, TOKENS)

    for now in (after, run_plain):
        assert torch.equal(now[0], before[0])
        assert now[1] == before[1]
        assert torch.equal(now[2], before[2])
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"do_sample": True, "temperature": 0.7},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_generate_in_other_ways(
    model: transformers.PreTrainedModel, options: dict[str, Any]
) -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(generate(model, **options))
        hx.patch(model)
    assert results[0] == results[1]


def test_generate_between_steps(model: transformers.PreTrainedModel) -> None:
    expected, whole = generate(model), plain_logits(model, TOKENS)
    cache = new_cache(model)
    segment = cache.segment("all")
    for i, token in enumerate(TOKENS[:6]):
        logits = hx.forward(model, cache, [[segment]], [[token]])
        assert (logits[0] - whole[i]).abs().max() < SMALL
        assert generate(model) == expected


def test_padding_matters_in_these_tests(model: transformers.PreTrainedModel) -> None:
    ids = torch.tensor([random_tokens(11, seed=4), random_tokens(11, seed=5)])
    with torch.no_grad():
        unpadded = model(input_ids=ids).logits
    assert (unpadded - padded_logits(model))[1].abs().max() > 0.1


def test_the_attention_can_be_changed_on_a_patched_model(
    model: transformers.PreTrainedModel,
) -> None:
    eager = tiny_model("llama")
    eager.set_attn_implementation("eager")
    expected = run(model)
    assert not torch.equal(padded_logits(model), padded_logits(eager))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(input_ids=torch.tensor([TOKENS]), output_attentions=True)
    assert output.attentions[0].shape == (1, 4, len(TOKENS), len(TOKENS))
    assert torch.equal(padded_logits(model), padded_logits(eager))
    assert torch.equal(run(model), expected)
    assert model.config._attn_implementation == "eager"


def test_saving_a_patched_model(model: transformers.PreTrainedModel, tmp_path: Path) -> None:
    expected = plain_logits(hx.patch(model), TOKENS)
    model.save_pretrained(tmp_path)
    assert "hogwild" not in (tmp_path / "config.json").read_text()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain_logits(loaded, TOKENS), expected)


# ---- patch and unpatch ---------------------------------------------------------------------------


def traces(model: transformers.PreTrainedModel) -> int:
    """How many things of ours a model carries."""
    modules = list(model.modules())
    configs = [module.config for module in modules if hasattr(module, "config")]
    hooks = [hook for module in modules for hook in module._forward_hooks.values()]
    return sum(type(thing).__module__ == patching.__name__ for thing in configs) + sum(
        getattr(hook, "__module__", "") == patching.__name__ for hook in hooks
    )


def test_patching_twice_and_unpatching_twice(model: transformers.PreTrainedModel) -> None:
    config = model.config
    hx.unpatch(model)
    assert traces(model) == 0
    hx.patch(model)
    once = traces(model)
    assert once == 3  # two layers and the rotary module
    hx.patch(model)
    run(model)
    assert traces(model) == once
    assert hx.unpatch(model) is model
    assert traces(model) == 0
    assert all(layer.self_attn.config is config for layer in model.model.layers)
    hx.unpatch(model)
    assert traces(model) == 0
    assert (run(model) - plain_logits(model, TOKENS)).abs().max() < SMALL
    assert traces(model) == once


def test_apply_rotary_is_wrapped_once() -> None:
    modelling = sys.modules["transformers.models.llama.modeling_llama"]
    hx.patch(tiny_model("llama"))
    wrapper = modelling.apply_rotary_pos_emb
    hx.patch(tiny_model("llama", seed=1))
    assert modelling.apply_rotary_pos_emb is wrapper
    assert wrapper.__doc__ == wrapper.__wrapped__.__doc__


def test_patched_and_plain_models_side_by_side(model: transformers.PreTrainedModel) -> None:
    # The second is made of the same config object, as its layers' configs are.
    other = transformers.LlamaForCausalLM(model.config).eval()
    expected = padded_logits(other), generate(other), run(tiny_model("llama"))
    hx.patch(model)
    assert traces(other) == 0
    assert torch.equal(padded_logits(other), expected[0])
    assert torch.equal(run(model), expected[2])
    assert generate(other) == expected[1]
    hx.patch(other)
    hx.unpatch(model)
    assert traces(other) == 3
    assert torch.equal(padded_logits(other), expected[0])


def test_other_models_inside_a_step(model: transformers.PreTrainedModel) -> None:
    """A plain and a patched model of the family that run within a step are not part of it."""
    plain, patched = tiny_model("llama", seed=1), hx.patch(tiny_model("llama", seed=2))
    expected = run(model)
    wanted = plain_logits(plain, TOKENS), plain_logits(patched, TOKENS)
    seen = []

    def use_others(*_: Any) -> None:
        seen.append((plain_logits(plain, TOKENS), plain_logits(patched, TOKENS)))

    handle = model.model.layers[1].register_forward_pre_hook(use_others)
    assert torch.equal(run(model), expected)
    handle.remove()
    assert len(seen) == 1
    assert torch.equal(seen[0][0], wanted[0])
    assert torch.equal(seen[0][1], wanted[1])


def test_a_copy_of_a_patched_model(model: transformers.PreTrainedModel) -> None:
    expected, plain = run(model), plain_logits(model, TOKENS)
    twin = copy.deepcopy(model)
    assert twin.model.layers[0].self_attn.config._config is twin.config
    with torch.no_grad():
        twin.lm_head.weight.mul_(2)
    assert torch.equal(run(twin), 2 * expected)
    assert torch.equal(plain_logits(twin, TOKENS), 2 * plain)
    hx.unpatch(twin)
    assert traces(twin) == 0
    assert traces(model) == 3
    assert torch.equal(run(model), expected)


def test_two_threads_with_one_model(model: transformers.PreTrainedModel) -> None:
    """One runs steps, others generate and run steps of other caches, all at the same time."""
    expected = run(model), generate(model), padded_logits(model)
    wrong: list[str] = []
    deadline = threading.Event()

    def repeat(name: str, right: Callable[[], bool]) -> None:
        try:
            for _ in range(12):
                if not right():
                    wrong.append(name)
        except BaseException as error:
            wrong.append(f"{name}: {error!r}")
            raise
        finally:
            deadline.set()

    jobs = {
        "steps": lambda: torch.equal(run(model), expected[0]),
        "more steps": lambda: torch.equal(run(model), expected[0]),
        "generate": lambda: generate(model) == expected[1],
        "logits": lambda: torch.equal(padded_logits(model), expected[2]),
    }
    threads = [threading.Thread(target=repeat, args=job) for job in jobs.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- compiled, offloaded, mixed precision --------------------------------------------------------


def test_compiled_models(model: transformers.PreTrainedModel) -> None:
    expected, plain = run(model), plain_logits(model, TOKENS)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert hx.patch(compiled) is compiled
    assert (plain_logits(compiled, TOKENS) - plain).abs().max() < SMALL
    assert torch.equal(run(compiled), expected)
    assert (plain_logits(compiled, TOKENS) - plain).abs().max() < SMALL

    model.compile(backend="eager", fullgraph=True)
    assert torch.equal(run(model), expected)
    assert (plain_logits(model, TOKENS) - plain).abs().max() < SMALL


def test_a_compiled_layer_is_an_error_not_a_wrong_answer(
    model: transformers.PreTrainedModel,
) -> None:
    model.model.layers[0].compile(backend="eager")
    with pytest.raises((ValueError, RuntimeError), match=r"layers \[0\]"):
        run(model)
    assert (plain_logits(model, TOKENS) - plain_logits(tiny_model("llama"), TOKENS)).abs().max() < (
        SMALL
    )


def test_weights_that_accelerate_brings_in(model: transformers.PreTrainedModel) -> None:
    accelerate = pytest.importorskip("accelerate", reason="pip install 'hogwild_ext[run]'")
    expected, plain = run(model), plain_logits(model, TOKENS)
    hx.unpatch(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.layers[0].self_attn.k_proj.weight.device.type == "meta"
    assert torch.equal(run(model), expected)
    assert torch.equal(plain_logits(model, TOKENS), plain)


def test_autocast() -> None:
    model = tiny_model("qwen2")
    expected = run(model)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run(model)
    assert 1e-4 < (mixed - expected).norm() / expected.norm() < 0.03


def test_norms_of_queries_and_keys_kept_in_float32() -> None:
    model = tiny_model("qwen3").bfloat16()
    expected = run(model)
    for layer in model.model.layers:
        layer.self_attn.q_norm.float()
        layer.self_attn.k_norm.float()
    kept = run(model)
    assert kept.dtype == torch.bfloat16
    assert (kept - expected).norm() / expected.norm() < 0.03


def test_a_cache_in_another_dtype_than_the_model(model: transformers.PreTrainedModel) -> None:
    expected = run(model)
    rounded = run(model, new_cache(model, dtype=torch.bfloat16))
    assert rounded.dtype == torch.float32
    assert 1e-4 < (rounded - expected).norm() / expected.norm() < 0.03


def test_dropout_is_refused() -> None:
    model = tiny_model("llama", attention_dropout=0.1)
    expected = run(model)
    with pytest.raises(ValueError, match=r"^model: expected no attention dropout, got 0\.1"):
        run(model.train())
    assert torch.equal(run(model.eval()), expected)


# ---- what forward asks of the model --------------------------------------------------------------


@contextmanager
def inputs_of(module: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects the first argument of every call of `module`."""
    seen: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


def test_all_tokens_in_one_row_and_only_the_logits_asked_for(
    model: transformers.PreTrainedModel,
) -> None:
    cache = new_cache(model)
    a, b, c = (cache.segment(name) for name in "abc")
    views, tokens = [[a], [b, a, c], [a, b]], [[5, 6, 7], [8], [9, 10]]
    with inputs_of(model.model.embed_tokens) as ids, inputs_of(model.lm_head) as hidden:
        last = hx.forward(model, cache, views, tokens)
    assert [x.tolist() for x in ids] == [[[5, 6, 7, 8, 9, 10]]]
    assert [tuple(x.shape) for x in hidden] == [(1, 3, model.config.hidden_size)]
    assert last.shape == (3, VOCABULARY)
    assert last.is_inference()

    for segment in (a, b, c):
        segment.truncate(0)
    every = hx.forward(model, cache, views, tokens, logits="all")
    assert [tuple(x.shape) for x in every] == [(3, VOCABULARY), (1, VOCABULARY), (2, VOCABULARY)]
    assert (torch.stack([x[-1] for x in every]) - last).abs().max() < SMALL
    one = hx.forward(model, cache, [[a]], [[3, 4]])
    assert one.shape == (1, VOCABULARY)


def test_no_mask_is_made(
    model: transformers.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise Injected("a mask of [T, T] for nothing")

    masks = transformers.AttentionMaskInterface._global_mapping
    monkeypatch.setitem(masks, model.config._attn_implementation, fail)
    run(model)
    with pytest.raises(Injected):
        plain_logits(model, TOKENS)


def test_tokens_as_a_tensor(model: transformers.PreTrainedModel) -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    results = []
    for tokens in (ids.tolist(), ids):
        cache = new_cache(model)
        a, b = cache.segment("a"), cache.segment("b")
        results.append(hx.forward(model, cache, [[b, a], [a, b]], tokens))
        if tokens is ids:
            ids.zero_()  # the caller's buffer is free again
        assert (a.tokens, b.tokens) == ([5, 6, 7], [8, 9, 10])
    assert torch.equal(results[0], results[1])


def test_a_mixture_of_experts_that_reports_its_router() -> None:
    model = tiny_model("mixtral", output_router_logits=True)
    assert (run(model) - plain_logits(model, TOKENS)).abs().max() < SMALL


def test_the_cache_counts(model: transformers.PreTrainedModel) -> None:
    cache = new_cache(model)
    run(model, cache)
    assert (cache.stats.steps, cache.stats.appended_tokens) == (1, len(TOKENS))
    assert cache.stats.attention_seconds > 0


# ---- all or nothing ------------------------------------------------------------------------------


class Team:
    """Two workers with something behind them, and what their segments hold."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        self.model = model
        self.cache = new_cache(model)
        self.prompt, self.a, self.b = (self.cache.segment(n) for n in ("prompt", "a", "b"))
        self.fork = self.cache.fork(self.prompt)
        self.views = [[self.prompt, self.b, self.a], [self.prompt, self.a, self.b]]
        hx.forward(model, self.cache, [[self.prompt]], [TOKENS])
        self.step()

    def step(self, **changes: Any) -> torch.Tensor:
        settings = {"views": self.views, "tokens": [[7, 8], [9]], **changes}
        return hx.forward(self.model, self.cache, **settings)

    def contents(self) -> list[Any]:
        found: list[Any] = [self.cache.free_tokens, self.cache.used_tokens, vars(self.cache.stats)]
        found = [*found[:2], {k: v for k, v in found[2].items() if k != "attention_seconds"}]
        for segment in self.cache.segments:
            found += [segment.name, len(segment), segment.tokens]
            for layer in range(self.cache.num_layers):
                found += [segment.keys(layer).tolist(), segment.values(layer).tolist()]
        return found


class Injected(Exception):
    pass


PLACES: dict[str, Callable[[Any, int], torch.nn.Module]] = {
    "embedding": lambda model, _: model.model.embed_tokens,
    "rotary": lambda model, _: model.model.rotary_emb,
    "layer": lambda model, layer: model.model.layers[layer],
    "key projection": lambda model, layer: model.model.layers[layer].self_attn.k_proj,
    "after attention": lambda model, layer: model.model.layers[layer].self_attn.o_proj,
    "mlp": lambda model, layer: model.model.layers[layer].mlp,
    "last norm": lambda model, _: model.model.norm,
    "head": lambda model, _: model.lm_head,
}
IN_EVERY_LAYER = ("layer", "key projection", "after attention", "mlp")


@pytest.mark.parametrize("error", [Injected, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize(
    ("place", "layer"),
    [(place, 0) for place in PLACES]
    + [
        (p, layer)
        for p in ("layer", "key projection", "after attention", "mlp")
        for layer in (1, 2)
    ],
)
def test_an_exception_leaves_every_segment_as_it_was(
    place: str, layer: int, error: type[BaseException]
) -> None:
    model = tiny_model("llama", num_layers=3)
    expected = Team(model).step()
    team = Team(model)
    before = team.contents()

    def fail(*_: Any) -> None:
        raise error("injected")

    for register in ("register_forward_pre_hook", "register_forward_hook"):
        handle = getattr(PLACES[place](model, layer), register)(fail)
        with pytest.raises(error, match="injected"):
            team.step()
        handle.remove()
        assert team.contents() == before
        assert patching._ACTIVE.get() is None
    assert torch.equal(team.step(), expected)


def test_an_exception_inside_our_attention(
    model: transformers.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Team(model).step()
    team = Team(model)
    before = team.contents()
    attend = hx.step.Step.attend
    for bad in range(2):

        def fail(step: Any, layer: int, *tensors: torch.Tensor, bad: int = bad) -> torch.Tensor:
            out = attend(step, layer, *tensors)
            if layer == bad:
                raise Injected("after the keys were stored")
            return out

        monkeypatch.setattr(hx.step.Step, "attend", fail)
        with pytest.raises(Injected):
            team.step()
        monkeypatch.undo()
        assert team.contents() == before
    assert torch.equal(team.step(), expected)


# ---- refusals ------------------------------------------------------------------------------------

BAD_TOKENS: dict[str, tuple[Any, type[Exception], str]] = {
    "a string": ("ab", TypeError, "tokens: expected a list"),
    "none": (None, TypeError, "tokens: expected a list"),
    "a flat list": ([7, 8], TypeError, r"tokens\[0\]: expected a list"),
    "a float": ([[7, 8.0], [9]], TypeError, r"tokens\[0\]\[1\]: expected an integer"),
    "a bool": ([[7, True], [9]], TypeError, r"tokens\[0\]\[1\]: expected an integer"),
    "negative": ([[7, 8], [-1]], ValueError, r"tokens\[1\]\[0\]: .* from 0 to 210, got -1"),
    "too large": ([[7, 211], [8]], ValueError, r"tokens\[0\]\[1\]: .* from 0 to 210, got 211"),
    "no new token": ([[7, 8], []], ValueError, r"tokens\[1\]: expected at least one new token"),
    "no worker": ([], ValueError, "tokens: expected at least one list"),
    "too few": ([[7, 8]], ValueError, "tokens: expected those of 2 workers.* got 1"),
    "int32": (torch.ones(2, 3, dtype=torch.int32), TypeError, "tokens: expected int64"),
    "floats": (torch.ones(2, 3), TypeError, "tokens: expected int64"),
    "rank 1": (torch.ones(2, dtype=torch.int64), ValueError, "tokens: expected a tensor"),
    "empty tensor": (torch.ones(2, 0, dtype=torch.int64), ValueError, "tokens: expected a tensor"),
    "another device": (
        torch.ones(2, 1, dtype=torch.int64, device="meta"),
        ValueError,
        "tokens: expected a tensor on the model's device, cpu",
    ),
    "negative in a tensor": (torch.tensor([[7], [-2]]), ValueError, "tokens: .* 210, got -2"),
    "too large in a tensor": (torch.tensor([[7], [999]]), ValueError, "tokens: .* 210, got 999"),
}


@pytest.mark.parametrize("case", BAD_TOKENS)
def test_bad_tokens(model: transformers.PreTrainedModel, case: str) -> None:
    tokens, error, message = BAD_TOKENS[case]
    team = Team(model)
    before = team.contents()
    with pytest.raises(error, match="^" + message):
        team.step(tokens=tokens)
    assert team.contents() == before
    team.step()


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ({"logits": "first"}, ValueError),
        ({"logits": True}, ValueError),
        ({"allow_beyond": 1}, TypeError),
        ({"views": []}, ValueError),
        ({"views": "ab"}, TypeError),
    ],
    ids=str,
)
def test_bad_options(
    model: transformers.PreTrainedModel, option: dict[str, Any], error: type[Exception]
) -> None:
    team = Team(model)
    before = team.contents()
    with pytest.raises(error, match=f"^({next(iter(option))}|tokens): expected"):
        team.step(**option)
    assert team.contents() == before


@pytest.mark.parametrize("made_by", ["for_model", "hand"])
def test_positions_end_where_the_model_ends(made_by: str) -> None:
    model = tiny_model("llama", max_position_embeddings=50)
    cache = new_cache(model) if made_by == "for_model" else new_cache(model, max_tokens=512)
    a, b, spare = (cache.segment(name) for name in ("a", "b", "spare"))
    hx.forward(model, cache, [[a]], [TOKENS])  # 40
    hx.forward(model, cache, [[a, b]], [[5] * 10])
    with pytest.raises(ValueError, match=r"^views\[1\]: expected .*50.*, got 51"):
        hx.forward(model, cache, [[spare], [a, b]], [[5], [6]])
    assert (len(a), len(b), len(spare)) == (40, 10, 0)
    hx.forward(model, cache, [[b]], [[6]])
    hx.forward(model, cache, [[a, b]], [[6]], allow_beyond=True)
    assert (len(a), len(b)) == (40, 12)


def test_positions_end_where_the_cache_says(model: transformers.PreTrainedModel) -> None:
    cache = new_cache(model, max_position=len(TOKENS) - 1)
    with pytest.raises(ValueError, match=r"^views\[0\]: expected .*39.*, got 40"):
        run(model, cache)
    run(model, cache, allow_beyond=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_layers", 3),
        ("num_kv_heads", 1),
        ("head_dim", 64),
        ("rope_scale", 1.5),
        ("interleaved", True),
        ("scale", 0.3),
        ("window", 7),
        ("inv_freq", torch.ones(16)),
    ],
)
def test_a_cache_that_does_not_fit_the_model(
    model: transformers.PreTrainedModel, name: str, value: Any
) -> None:
    assert (run(model, new_cache(model, max_tokens=64)) - run(model)).abs().max() < SMALL
    with pytest.raises(ValueError, match=f"^cache: expected .*{name}"):
        run(model, new_cache(model, **{name: value}))


def test_a_cache_on_another_device(model: transformers.PreTrainedModel) -> None:
    cache = new_cache(model)
    cache.device = torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"^cache: expected the model's device, cpu, got cuda:1"):
        hx.forward(model, cache, [[cache.segment("a")]], [[1]])


def test_not_a_cache(model: transformers.PreTrainedModel) -> None:
    with pytest.raises(TypeError, match=r"^cache: expected a SegmentCache, got dict"):
        hx.forward(model, {}, [[]], [[1]])
    with pytest.raises(TypeError, match=r"^model: expected a transformers model"):
        hx.forward("model", new_cache(model), [[]], [[1]])


def test_our_attention_outside_of_a_step(model: transformers.PreTrainedModel) -> None:
    hx.patch(model)
    model.set_attn_implementation(patching.ATTENTION_NAME)
    with pytest.raises(RuntimeError, match=r"expected to be called by hogwild_ext\.forward only"):
        plain_logits(model, TOKENS)
