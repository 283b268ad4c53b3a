"""Packed linear layers: the numbers of torch's, in steps only, and never those of old weights."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import linear
from torch.testing._internal.two_tensor import TwoTensor

import hogwild_ext as hx
from hogwild_ext import packed_linear
from hogwild_ext.packed_linear import PackedWeight, StepLinear, pack_layers, unpack_layers
from models import plain_logits, random_tokens, tiny_model

TOKENS = random_tokens(40, seed=1)
SMALL = 2e-5
# ||out - float64|| / ||float64||, dominated by the rounding of the result
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
pytestmark = pytest.mark.cpu


@pytest.fixture
def model() -> transformers.PreTrainedModel:
    torch.set_num_threads(1)
    return tiny_model("llama")


def packed_layer(
    inputs: int, outputs: int, dtype: torch.dtype = torch.float32, bias: bool = True
) -> StepLinear:
    """A layer that is always in a step."""
    layer = nn.Linear(inputs, outputs, bias).to(dtype).requires_grad_(False)
    pack_layers(layer, lambda: True)
    assert isinstance(layer, StepLinear)
    return layer


def run(model: Any, **options: Any) -> torch.Tensor:
    """The logits [n, vocab] of TOKENS."""
    cache = hx.SegmentCache.for_model(model, max_tokens=128)
    (logits,) = hx.forward(
        model, cache, [[cache.segment("all")]], [TOKENS], logits="all", **options
    )
    return logits


def packed_weights(model: nn.Module) -> list[PackedWeight]:
    found = [module.packed for module in model.modules() if isinstance(module, StepLinear)]
    return [packed for packed in found if packed is not None]


# ---- one layer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("inputs, outputs", [(2, 1), (6, 17), (64, 64), (130, 63), (576, 200)])
def test_a_layer_is_that_of_torch(
    inputs: int, outputs: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_linear, "most_rows", lambda dtype: 1000)
    for bias in (True, False):
        layer = packed_layer(inputs, outputs, dtype, bias)
        for rows in (*range(1, 15), 17, 25, 129):
            x = torch.randn(rows, inputs).to(dtype)
            out = layer(x)
            exact = linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
            assert out.dtype == dtype and out.shape == (rows, outputs)
            error = (out.double() - exact).norm() / exact.norm()
            assert error < TOLERANCE[dtype], (rows, bias)
        assert layer.packed is not None


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_bits_do_not_depend_on_rows_or_threads(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_linear, "most_rows", lambda dtype: 1000)
    layer = packed_layer(194, 333, dtype)
    x = torch.randn(50, 194).to(dtype)
    torch.set_num_threads(1)
    whole = layer(x)
    torch.set_num_threads(3)
    assert torch.equal(layer(x), whole)
    for rows in (1, 2, 3, 5, 7, 12, 13):
        assert torch.equal(layer(x[9 : 9 + rows]), whole[9 : 9 + rows])


def test_leading_dimensions_and_strides() -> None:
    layer = packed_layer(6, 5)
    x = torch.randn(3, 12, 2).transpose(0, 1)[::2, :, :].reshape(3, 6, 2).transpose(1, 2)
    assert not x.is_contiguous()
    torch.testing.assert_close(layer(x), linear(x, layer.weight, layer.bias))
    assert layer(x[:0]).shape == (0, 2, 5)


def test_nothing_is_lost_to_what_stands_beside() -> None:
    """A NaN stays in its row, one in the weight in its output."""
    layer = packed_layer(8, 70)
    x = torch.randn(5, 8)
    x[2, 3] = float("nan")
    out = layer(x)
    assert out.isnan().any(1).tolist() == [False, False, True, False, False]
    with torch.no_grad():
        layer.weight[69, 0] = float("inf")
    out = layer(torch.ones(3, 8))
    assert out.isfinite().all(0).tolist() == [True] * 69 + [False]


def test_what_cannot_be_packed_is_left_to_torch() -> None:
    odd = packed_layer(5, 4, torch.bfloat16)
    x = torch.randn(2, 5).bfloat16()
    assert torch.equal(odd(x), linear(x, odd.weight, odd.bias))
    double = packed_layer(4, 4, torch.float64)
    y = torch.randn(2, 4, dtype=torch.float64)
    assert torch.equal(double(y), linear(y, double.weight, double.bias))
    assert odd.packed is None and double.packed is None
    with pytest.raises(RuntimeError):
        packed_layer(4, 4)(torch.randn(2, 6))
    with pytest.raises(RuntimeError):
        packed_layer(4, 4)(torch.randn(2, 4).double())


def test_many_rows_are_left_to_torch_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linear, "most_rows", lambda dtype: 3)
    layer = packed_layer(576, 64)
    x = torch.randn(4, 576)
    calls: list[int] = []
    monkeypatch.setattr(packed_linear._C, "linear", lambda code, rows, *_: calls.append(rows))
    layer(x)
    layer(x[:3])
    assert calls == [3]


def test_limits_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def limits(*names: str, isa: str = "avx2") -> list[bool]:
        for name in ("amx_tile", "amx_fp16", "avx512_bf16"):
            monkeypatch.setattr(
                torch.cpu, f"_is_{name}_supported", lambda able=name in names: able, raising=False
            )
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        monkeypatch.setattr(packed_linear._C, "isa", lambda: isa)
        return [packed_linear.most_rows(dtype) < 100 for dtype in dtypes]

    assert limits() == [False, False, False]
    assert limits(isa="baseline") == [True, True, True]
    assert limits("avx512_bf16") == [False, True, False]
    assert limits("avx512_bf16", "amx_tile") == [False, True, False]
    assert limits("amx_tile", "amx_fp16") == [False, True, True]


# ---- weights that change -------------------------------------------------------------------------


def test_a_changed_weight_is_packed_anew() -> None:
    layer = packed_layer(32, 48)
    x = torch.randn(3, 32)

    def check() -> None:
        right = linear(x.to(layer.weight.dtype), layer.weight, layer.bias)
        torch.testing.assert_close(layer(x.to(layer.weight.dtype)), right)
        assert layer.packed is not None

    check()
    first = layer.packed
    check()
    assert layer.packed is first
    with torch.no_grad():
        layer.weight.mul_(-2)
    check()
    layer.load_state_dict(nn.Linear(32, 48).state_dict())
    check()
    layer.weight = nn.Parameter(torch.randn(48, 32), requires_grad=False)
    check()
    layer.weight.data = torch.randn(48, 32)
    check()
    layer.to(torch.bfloat16)
    layer.to(torch.float32)  # may come to lie where it was
    check()
    layer.to(torch.bfloat16)
    check()


def merge(weight: torch.Tensor) -> None:
    """As PEFT does it."""
    weight.data += 0.3 * torch.randn(weight.shape[0], 2) @ torch.randn(2, weight.shape[1])


def write_one(weight: torch.Tensor) -> None:
    weight.data[-1, 3] += 1


def write_by_numpy(weight: torch.Tensor) -> None:
    weight.detach().numpy()[0, -1] += 1


def swap_rows(weight: torch.Tensor) -> None:
    weight.data[:] = weight.data.flip(0).clone()


def swap_numbers(weight: torch.Tensor) -> None:
    weight.data[5, [2, 9]] = weight.data[5, [9, 2]]


def train(weight: torch.Tensor) -> None:
    weight.grad = torch.zeros_like(weight)
    weight.grad[7, 7] = 1.0
    weight.requires_grad_(True)
    torch.optim.SGD([weight], lr=1.0, fused=True).step()
    weight.requires_grad_(False)


UNCOUNTED = [merge, write_one, write_by_numpy, swap_rows, swap_numbers, train]


def assert_current(layer: StepLinear, x: torch.Tensor) -> None:
    """Compares with the weight as it is, without asking the layer for it."""
    weight = layer._parameters["weight"]
    right = linear(x, weight, layer.bias)
    del weight
    torch.testing.assert_close(layer(x), right)
    assert layer.packed is not None


@pytest.mark.parametrize("change", UNCOUNTED)
def test_a_change_that_torch_does_not_count_is_noticed(change: Any) -> None:
    layer = packed_layer(32, 48)
    x = torch.randn(3, 32)
    for _ in range(3):
        assert_current(layer, x)
        version = layer.weight._version
        change(layer.weight)
        assert layer.weight._version == version or change is train
        assert_current(layer, x)


@pytest.mark.parametrize("keep", ["weight", "data", "numpy"])
def test_what_is_kept_of_a_weight_may_be_written_at_any_time(keep: str) -> None:
    layer = packed_layer(32, 48)
    x = torch.randn(3, 32)
    kept: Any = layer.weight if keep == "weight" else layer.weight.data
    if keep == "numpy":
        kept = kept.numpy()
    for i in range(4):
        assert_current(layer, x)
        assert_current(layer, x)
        (kept.data if keep == "weight" else kept)[i, 3] += 1
        assert_current(layer, x)


def test_a_weight_that_nobody_asked_for_is_compared_in_time() -> None:
    """One number, through the list of parameters, and nothing kept: the hardest to notice."""
    layer = packed_layer(512, 96)
    x = torch.randn(3, 512)
    assert_current(layer, x)
    next(layer.parameters()).data[50, 51] += 1
    for _ in range(packed_linear._LOOKS_AT_ALL):
        layer(x)
    assert_current(layer, x)
    next(layer.parameters()).data += 0.1  # all of them: at once
    assert_current(layer, x)


def test_unchanged_weights_are_hardly_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = packed_layer(512, 96)
    x = torch.randn(3, 512)
    layer(x)
    steps: list[int] = []
    fingerprint = packed_linear._C.fingerprint
    monkeypatch.setattr(
        packed_linear._C, "fingerprint", lambda *a: steps.append(a[2]) or fingerprint(*a)
    )
    for _ in range(packed_linear._LOOKS_AT_ALL):
        layer(x)
    assert steps.count(1) == 1 and min(steps[:-1]) > 700


def test_fingerprints_know_every_word_and_its_place() -> None:
    for words in (1, 7, 8, 9, 300, 2**17 + 5, 2**18):
        data = torch.randint(-(2**31), 2**31 - 1, (words,), dtype=torch.int64).to(torch.int32)
        seen = {packed_linear._C.fingerprint(data.data_ptr(), words, 1, 2)}
        places = sorted({0, words // 2, words - 1, min(8, words - 1), min(2**17, words - 1)})
        for place in places:
            data[place] += 1
            seen.add(packed_linear._C.fingerprint(data.data_ptr(), words, 1, 1))
        data[[0, -1]] = data[[-1, 0]]
        seen.add(packed_linear._C.fingerprint(data.data_ptr(), words, 1, 2))
        assert len(seen) == len(places) + 1 + (words > 1)


def test_a_model_whose_adapters_are_merged(model: transformers.PreTrainedModel) -> None:
    """Every layer, in the very next step."""
    hx.patch(model, linear="packed")
    run(model)
    layers = [module for module in model.modules() if isinstance(module, StepLinear)]
    for layer in layers:
        for change in (write_one, merge):
            change(layer.weight)
            expected = plain_logits(model, TOKENS)
            logits = run(model)
            assert (logits - expected).abs().max() < 1e-3 * expected.abs().max()


def test_patching_again_compares_all(model: transformers.PreTrainedModel) -> None:
    hx.patch(model, linear="packed")
    run(model)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data[1, 1] += 5
    expected = plain_logits(model, TOKENS)
    hx.patch(model, linear="packed")
    assert (run(model) - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("where", ["weight", "bias", "input"])
def test_what_is_no_plain_memory_is_left_to_torch(where: str) -> None:
    layer = packed_layer(32, 48)
    x = torch.randn(3, 32)
    expected = layer(x)
    if where == "input":
        result = layer(TwoTensor(x, x))
    else:
        plain = layer._parameters[where].data
        strange = nn.Parameter(TwoTensor(plain, plain), requires_grad=False)
        setattr(layer, where, strange)
        result = layer(x)
    assert isinstance(result, TwoTensor)
    torch.testing.assert_close(result.a, expected)
    negative = packed_layer(32, 48, bias=False)
    negative.weight = nn.Parameter(torch._neg_view(torch.randn(48, 32)), requires_grad=False)
    torch.testing.assert_close(negative(x), linear(x, negative.weight))


def test_weights_of_inference_mode() -> None:
    with torch.inference_mode():
        layer = packed_layer(16, 16)
        x = torch.randn(2, 16)
        torch.testing.assert_close(layer(x), linear(x, layer.weight, layer.bias))
        assert layer.packed is not None


# ---- a model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "qwen3_moe", "gemma", "granite"])
def test_logits_of_a_packed_model(family: str) -> None:
    model = tiny_model(family, tie_word_embeddings=True)
    expected = run(model)
    assert hx.patch(model, linear="packed") is model
    assert not packed_weights(model)  # the first step makes them
    logits = run(model)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(packed_weights(model)) == len(layers) > 4
    assert (logits - expected).norm() / expected.norm() < 2e-6
    assert torch.equal(run(model), logits)


def test_half_precision() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = tiny_model("llama").to(dtype)
        expected = run(model).float()
        logits = run(model, linear="packed").float()
        assert packed_weights(model)
        assert (logits - expected).norm() / expected.norm() < 0.03


def test_nothing_changes_outside_of_a_step(model: transformers.PreTrainedModel) -> None:
    plain, names = plain_logits(model, TOKENS), list(model.state_dict())
    hx.patch(model, linear="packed")
    run(model)
    assert torch.equal(plain_logits(model, TOKENS), plain)
    assert list(model.state_dict()) == names
    assert isinstance(model.lm_head, nn.Linear)
    ids = torch.tensor([TOKENS[:5]])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    packed = model.generate(ids, **options)
    hx.unpatch(model)
    assert torch.equal(model.generate(ids, **options), packed)
    assert torch.equal(plain_logits(model, TOKENS), plain)


def test_patching_twice_and_unpatching(model: transformers.PreTrainedModel) -> None:
    expected = run(model)
    hx.patch(model, linear="packed")
    run(model)
    before = packed_weights(model)
    hx.patch(model, linear="packed")
    hx.patch(model)  # leaves the layers as they are, and so does `forward`
    run(model)
    assert packed_weights(model) == before != []
    hx.unpatch(model)
    assert not any(isinstance(module, StepLinear) for module in model.modules())
    assert all(
        type(module) is nn.Linear and not {"packed", "in_step"} & set(vars(module))
        for module in model.modules()
        if isinstance(module, nn.Linear)
    )
    assert torch.equal(run(model), expected)
    unpack_layers(model)  # nothing to do


def test_weights_loaded_between_steps(model: transformers.PreTrainedModel) -> None:
    other = tiny_model("llama", seed=5)
    expected = run(other)
    hx.patch(model, linear="packed")
    run(model)
    model.load_state_dict(other.state_dict())
    assert (run(model) - expected).norm() / expected.norm() < 2e-6


def test_copies_pickles_and_files(model: transformers.PreTrainedModel, tmp_path: Path) -> None:
    logits, plain = run(model, linear="packed"), plain_logits(model, TOKENS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not packed_weights(twin)
        assert torch.equal(run(twin), logits)
        with torch.no_grad():
            twin.lm_head.weight.mul_(2)
        assert torch.equal(run(twin), 2 * logits)
        assert torch.equal(plain_logits(twin, TOKENS), 2 * plain)
        hx.unpatch(twin)
    assert torch.equal(run(model), logits)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain_logits(loaded, TOKENS), plain)


def test_other_models_inside_a_step(model: transformers.PreTrainedModel) -> None:
    """A packed model that runs within another's step computes as outside of one."""
    other = hx.patch(tiny_model("llama", seed=2), linear="packed")
    wanted = plain_logits(other, TOKENS)
    seen = []

    def use_other(*_: Any) -> None:
        seen.append(plain_logits(other, TOKENS))

    model.model.layers[1].register_forward_pre_hook(use_other)
    run(model, linear="packed")
    assert len(seen) == 1
    assert torch.equal(seen[0], wanted)
    assert not packed_weights(other)


def test_compiled_and_autocast(model: transformers.PreTrainedModel) -> None:
    plain = plain_logits(model, TOKENS)
    logits = run(model, linear="packed")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert (plain_logits(compiled, TOKENS) - plain).abs().max() < SMALL
    assert torch.equal(run(compiled), logits)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run(model)
    assert 1e-4 < (mixed - logits).norm() / logits.norm() < 0.05


def test_weights_that_accelerate_brings_in(model: transformers.PreTrainedModel) -> None:
    accelerate = pytest.importorskip("accelerate", reason="pip install 'hogwild_ext[run]'")
    expected = run(model)
    hx.patch(model, linear="packed")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(run(model), expected)
    assert not packed_weights(model)


def test_bad_values(model: transformers.PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="linear: expected 'packed' or None, got str 'fast'"):
        hx.patch(model, linear="fast")
    with pytest.raises(ValueError, match="linear: expected"):
        run(model, linear="fast")
