"""Models whose type does not tell everything: changed configs, wrapped models, strange layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import hogwild_ext as hx
from hogwild_ext import prompts
from hogwild_ext.model_support import FAMILIES, parameter_count, underlying_model
from models import plain_logits, random_tokens, tiny_config, tiny_model

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]

TOKENS = random_tokens(24, seed=3)
SMALL = 1e-4


def ours(model: Any, **options: Any) -> torch.Tensor:
    cache = hx.SegmentCache.for_model(model, max_tokens=128)
    (logits,) = hx.forward(
        model, cache, [[cache.segment("all")]], [TOKENS], logits="all", **options
    )
    return logits


def assert_same_model(model: Any) -> None:
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0]
    assert (ours(model) - expected).abs().max() < SMALL


# ---- configs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_config_that_looks_ahead_is_refused(family: str) -> None:
    model = tiny_model(family, is_causal=False)
    with pytest.raises(ValueError, match="model: expected causal attention"):
        hx.SegmentCache.for_model(model, max_tokens=64)
    with pytest.raises(ValueError, match="model: expected causal attention"):
        hx.patch(model)


def test_gemma_both_ways_is_refused() -> None:
    with pytest.raises(ValueError, match="model: expected causal attention"):
        hx.patch(tiny_model("gemma", use_bidirectional_attention=True))


@pytest.mark.parametrize("where", ["config", "module"])
def test_what_looks_ahead_after_patching_is_refused(where: str) -> None:
    model = tiny_model("llama")
    cache = hx.SegmentCache.for_model(model, max_tokens=64)
    segment = cache.segment("a")
    hx.forward(model, cache, [[segment]], [TOKENS[:3]])
    changed = model.config if where == "config" else model.model.layers[1].self_attn
    changed.is_causal = False
    with pytest.raises(ValueError, match="model: expected causal attention"):
        hx.forward(model, cache, [[segment]], [TOKENS[3:5]])
    assert len(segment) == 3
    changed.is_causal = True
    hx.forward(model, cache, [[segment]], [TOKENS[3:5]])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_window_is_what_the_family_makes_of_it(family: str) -> None:
    """A config may hold a window that its family never looks at."""
    model = tiny_model(family, sliding_window=5, layer_types=["full_attention"] * 2)
    assert_same_model(model)


@pytest.mark.parametrize("family", ["mistral", "mixtral", "phi3", "starcoder2"])
def test_a_window_that_changes_after_patching_is_refused(family: str) -> None:
    model = tiny_model(family)
    cache = hx.SegmentCache.for_model(hx.patch(model), max_tokens=64)
    model.config.sliding_window = 4
    with pytest.raises(ValueError, match="model: expected window=None, as it was"):
        hx.forward(model, cache, [[cache.segment("a")]], [TOKENS])
    hx.unpatch(model)
    assert_same_model(model)


def test_a_scale_that_changes_after_patching_is_refused() -> None:
    model = tiny_model("llama")
    cache = hx.SegmentCache.for_model(hx.patch(model), max_tokens=64)
    for layer in model.model.layers:
        layer.self_attn.scaling *= 2
    with pytest.raises(ValueError, match="model: expected scale=.* as it was"):
        hx.forward(model, cache, [[cache.segment("a")]], [TOKENS])
    hx.unpatch(model)
    assert_same_model(model)


def test_attention_of_ones_own_is_refused() -> None:
    """It may do anything, even if it is made of transformers' own."""
    llama = transformers.models.llama.modeling_llama

    class Attention(llama.LlamaAttention):  # type: ignore[misc, name-defined]
        pass

    model = tiny_model("llama")
    model.model.layers[1].self_attn.__class__ = Attention
    with pytest.raises(ValueError, match="model: expected attention of transformers' own"):
        hx.patch(model)


# ---- wrapped models ------------------------------------------------------------------------------


def with_adapters(config: Any) -> Any:
    peft = pytest.importorskip("peft", reason="pip install peft")
    model = peft.get_peft_model(tiny_model("llama"), config(peft)).eval()
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_", "hada_", "lokr_", "ia3_")):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(1 + 0.3 * noise if "ia3" in name else 0.3 * noise)
    return model


def lora(peft: Any) -> Any:
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])


TAKEN = {
    "LoRA": lora,
    "DoRA": lambda peft: peft.LoraConfig(r=4, target_modules=["k_proj", "o_proj"], use_dora=True),
    "LoHa": lambda peft: peft.LoHaConfig(r=2, target_modules=["q_proj", "up_proj"]),
    "LoKr": lambda peft: peft.LoKrConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "IA3": lambda peft: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    ),
}


@pytest.mark.parametrize("kind", TAKEN)
@pytest.mark.parametrize("linear", [None, "packed"])
def test_a_peft_model_is_its_base_model_with_adapters(kind: str, linear: Any) -> None:
    model = with_adapters(TAKEN[kind])
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0]
        with model.disable_adapter():
            plain = model(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0]
    assert (expected - plain).abs().max() > 0.01
    assert (ours(model, linear=linear) - expected).abs().max() < SMALL
    with model.disable_adapter():
        assert (ours(model) - plain).abs().max() < SMALL
    model.merge_adapter()
    assert (ours(model) - expected).abs().max() < SMALL
    model.unmerge_adapter()
    assert (ours(model) - expected).abs().max() < SMALL
    assert hx.unpatch(model) is model


REFUSED = {
    "PROMPT_TUNING": lambda peft: peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3
    ),
    "PREFIX_TUNING": lambda peft: peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3
    ),
    "activated LoRA": lambda peft: peft.LoraConfig(
        target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[5]
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_adapters_that_are_more_than_layers_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=f"model: expected adapters .* {kind}"):
        hx.patch(with_adapters(REFUSED[kind]))


def test_a_wrapper_like_that_of_peft() -> None:
    """The same without peft itself."""
    model = tiny_model("llama")

    class Wrapper(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.peft_config = {"default": SimpleNamespace(peft_type=kind)}

        def get_base_model(self) -> Any:
            return model

    assert underlying_model(Wrapper("LORA")) is model
    assert ours(Wrapper("LORA")).shape == (len(TOKENS), model.config.vocab_size)
    with pytest.raises(ValueError, match="model: expected adapters .* 'default', XLORA"):
        underlying_model(Wrapper("XLORA"))


def test_a_parallel_wrapper_is_refused_with_the_way_in() -> None:
    with pytest.raises(TypeError, match=r"got DataParallel; its \.module is one"):
        hx.patch(nn.DataParallel(tiny_model("llama")))


# ---- layers without parameters -------------------------------------------------------------------


class BufferLinear(nn.Module):
    """As GPTQ and AWQ keep their weights: in buffers, several in a number."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        scale = weight.abs().amax(1, keepdim=True) / 127
        packed = (weight / scale).round().to(torch.int8).contiguous().view(torch.int32)
        self.register_buffer("qweight", packed)
        self.register_buffer("scales", scale)
        self.bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.qweight.view(torch.int8) * self.scales).T


def quantised(family: str) -> transformers.PreTrainedModel:
    model = tiny_model(family)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, module in list(block.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(block, name, BufferLinear(module))
    return model


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("linear", [None, "packed"])
def test_layers_may_hold_buffers_only(family: str, linear: Any) -> None:
    model = quantised(family)
    expected = plain_logits(model, TOKENS)
    assert (ours(model, linear=linear) - expected).abs().max() < SMALL


# ---- size ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_size_is_that_of_the_config(family: str, tied: bool) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    assert parameter_count(model) == model.num_parameters()
    assert parameter_count(hx.patch(model)) == model.num_parameters()


def test_the_size_does_not_depend_on_how_weights_are_kept() -> None:
    model = quantised("llama")
    assert model.num_parameters() < parameter_count(model) == tiny_model("llama").num_parameters()
    with torch.device("meta"):
        large = transformers.AutoModelForCausalLM.from_config(
            tiny_config("llama", hidden_size=4096, intermediate_size=9999, num_layers=20)
        )
    expected = parameter_count(large)
    for layer in large.model.layers:
        layer.self_attn, layer.mlp = nn.Module(), nn.Module()  # next to nothing is left
    assert parameter_count(large) == expected
    assert prompts.prompts_for(expected) is prompts.REASONING
    assert prompts.prompts_for(large.num_parameters()) is prompts.SHORT
