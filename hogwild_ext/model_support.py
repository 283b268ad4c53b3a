"""Which transformers models the plug-in can drive, and what it reads from one.

A family fits when its decoder layers are `model.base_model.layers[i].self_attn`, each calls its
module's `apply_rotary_pos_emb` on every query and key, the rotary embedding is one module for all
layers, and nothing but `softmax(scale * q k) v`, causal or with one window for all layers, happens
in between. Everything else is refused by name, because a wrong guess would not raise: it would
quietly generate worse text.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from typing import Any

import torch

try:
    from transformers import AttentionInterface, PreTrainedModel
except ImportError as error:
    raise ImportError(
        "driving a language model needs transformers 5.0 or newer: pip install 'hogwild_ext[run]'"
    ) from error

__all__ = [
    "FAMILIES",
    "ROPE_TYPES",
    "AttentionInterface",
    "ModelShape",
    "PreTrainedModel",
    "attention_device",
    "attention_modules",
    "check_supported",
    "embedding_module",
    "modelling_module",
    "parameter_count",
    "read_attention",
    "read_model",
    "rotary_module",
    "underlying_model",
]

# model_type -> whether RoPE turns neighbours (2j, 2j + 1) instead of halves (j, j + R/2).
# tests/test_models.py compares every one of them with the unpatched model.
FAMILIES: dict[str, bool] = {
    "gemma": False,
    "glm": True,
    "glm4": True,
    "granite": False,
    "llama": False,
    "mistral": False,
    "mixtral": False,
    "olmo2": False,
    "phi3": False,
    "qwen2": False,
    "qwen2_moe": False,
    "qwen3": False,
    "qwen3_moe": False,
    "seed_oss": False,
    "starcoder2": False,
}

# How a family finds the window of a layer: in the config, for all layers alike, or for each in its
# attention module, as the config's `layer_types` say. The others know no window, whatever their
# config holds.
WINDOW_OF_CONFIG = ("mistral", "mixtral", "phi3", "starcoder2")
WINDOW_OF_MODULE = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe")

# Adapters of PEFT that live inside of the layers, so that the model they are put into is all of it.
# Others put tokens before the prompt, or choose by what they are given.
ADAPTERS = ("ADALORA", "BOFT", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "OFT", "VERA")

# The others ("dynamic", "longrope") change their frequencies with the length of the text, so a
# stored key would have to be rotated anew whenever a text grows.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class ModelShape:
    """What a cache has to know of a model; see `read_model`."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    inv_freq: torch.Tensor  # [R/2] float32, on the CPU
    rope_scale: float  # transformers' attention_scaling, as in YaRN
    interleaved: bool
    scale: float  # of the scores; head_dim ** -0.5 in most models
    window: int | None  # how far back every layer sees, counting the query's own token
    max_position: int  # how many positions it was made for
    dtype: torch.dtype
    device: torch.device


def underlying_model(model: Any) -> PreTrainedModel:
    """The model itself: what `torch.compile(model)` or a PeftModel wraps, or `model` as it is.

    The layers of a PeftModel hold its adapters, so they stay active. Raises TypeError for anything
    but a transformers model, ValueError for adapters that are more than that.
    """
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, PreTrainedModel) and hasattr(inner, "get_base_model"):
        _check_adapters(inner)
        inner = inner.get_base_model()
        inner = getattr(inner, "_orig_mod", inner)
    if not isinstance(inner, PreTrainedModel):
        wrapped = getattr(inner, "module", None)  # as DataParallel and others call it
        hint = "; its .module is one" if isinstance(wrapped, PreTrainedModel) else ""
        raise TypeError(
            "model: expected a transformers model (PreTrainedModel), got "
            f"{type(model).__name__}{hint}"
        )
    return inner


def _check_adapters(model: Any) -> None:
    """Of a PeftModel: raises ValueError unless its base model computes what it computes."""
    for name, config in getattr(model, "peft_config", {}).items():
        kind = getattr(config.peft_type, "value", config.peft_type)
        activated = getattr(config, "alora_invocation_tokens", None) is not None
        if kind not in ADAPTERS or activated:
            raise ValueError(
                f"model: expected adapters of the kinds {', '.join(ADAPTERS)}, got {name!r}, "
                f"{'an activated LoRA' if activated else kind}, which is more than its base model"
            )


# Modules have the type Any: a checker takes every attribute of one for a tensor or a module.


def attention_modules(model: PreTrainedModel) -> list[Any]:
    """The attention module of every layer, first to last. `model` is of a supported family."""
    base: Any = model.base_model
    return [layer.self_attn for layer in base.layers]


def rotary_module(model: PreTrainedModel) -> Any:
    """The one module that makes cos and sin for all layers. `model` is of a supported family."""
    base: Any = model.base_model
    return base.rotary_emb


def modelling_module(model: PreTrainedModel) -> Any:
    """The Python module in which the attention of the model, of a supported family, is written."""
    return sys.modules[type(attention_modules(model)[0]).__module__]


def embedding_module(model: PreTrainedModel) -> Any:
    """What turns token ids into vectors."""
    return model.get_input_embeddings()


def check_supported(model: PreTrainedModel) -> None:
    """Raises ValueError, with the reason, for a model that the plug-in cannot drive."""
    config = model.config
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model: expected one of the model types {', '.join(sorted(FAMILIES))}, "
            f"got {config.model_type!r}"
        )
    if model.get_output_embeddings() is None or not hasattr(model.base_model, "layers"):
        raise ValueError(
            "model: expected a causal language model, which ends in logits over its vocabulary, "
            f"got {type(model).__name__}"
        )
    for module in attention_modules(model):
        home = type(module).__module__
        if not home.startswith("transformers.models.") or not hasattr(
            sys.modules[home], "apply_rotary_pos_emb"
        ):
            raise ValueError(
                "model: expected attention of transformers' own, with apply_rotary_pos_emb beside "
                f"it, got {type(module).__qualname__} of {home}"
            )
    rope_type = getattr(rotary_module(model), "rope_type", None)
    if rope_type not in ROPE_TYPES:
        raise ValueError(
            f"model: expected one of the RoPE types {', '.join(ROPE_TYPES)}, got {rope_type!r}"
        )
    read_attention(model)
    _device(model)


def read_attention(model: PreTrainedModel) -> tuple[float, int | None]:
    """(scale of the scores, window) of the attention in all layers, as its modules say now.

    Raises ValueError unless it is causal, and the same in all layers.
    """
    for i, module in enumerate(attention_modules(model)):
        if not getattr(module, "is_causal", True) or not getattr(model.config, "is_causal", True):
            raise ValueError(
                "model: expected causal attention, got a config or an attention module that looks "
                f"ahead (is_causal=False or use_bidirectional_attention, in layer {i})"
            )
    return _scale(model), _window(model)


def read_model(model: Any) -> ModelShape:
    """Reads the shape, the RoPE and the attention of a supported model.

    `model`: a transformers model, patched or not. Frequencies come from the model's own rotary
    module, so they are what its unpatched attention uses, whatever the model was cast to.

    Raises TypeError for anything but a transformers model, ValueError for one that is not
    supported, with the reason.
    """
    model = underlying_model(model)
    check_supported(model)
    config = model.config
    attention = attention_modules(model)
    rotary = rotary_module(model)
    scale, window = read_attention(model)
    return ModelShape(
        num_layers=len(attention),
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=int(attention[0].head_dim),
        inv_freq=rotary.inv_freq.detach().to("cpu", torch.float32),
        rope_scale=float(rotary.attention_scaling),
        interleaved=FAMILIES[config.model_type],
        scale=scale,
        window=window,
        max_position=config.max_position_embeddings,
        dtype=model.dtype,
        device=_device(model),
    )


def parameter_count(model: Any) -> int:
    """How many parameters the config describes, shared ones once.

    What a model holds tells less of it: quantised layers have several weights in a number, or
    nothing but buffers; adapters add their own.
    """
    inner = underlying_model(model)
    with torch.device("meta"):
        count: int = type(inner)(inner.config).num_parameters()
    return count


def _window(model: PreTrainedModel) -> int | None:
    """The one sliding window of all layers, None without one. ValueError for a mix."""
    if model.config.model_type in WINDOW_OF_CONFIG:
        windows = {getattr(model.config, "sliding_window", None)}
    elif model.config.model_type in WINDOW_OF_MODULE:
        windows = {getattr(module, "sliding_window", None) for module in attention_modules(model)}
    else:
        return None
    windows = {window or None for window in windows}  # some say 0 for none
    if len(windows) != 1:
        raise ValueError(
            "model: expected the same attention in all layers, full or with one sliding window, "
            "got layers of the kinds full_attention, sliding_attention"
        )
    return windows.pop()


def _scale(model: PreTrainedModel) -> float:
    scales = {float(module.scaling) for module in attention_modules(model)}
    if len(scales) != 1:
        raise ValueError(
            f"model: expected the same attention scale in all layers, got {sorted(scales)}"
        )
    return scales.pop()


def attention_device(module: Any) -> torch.device | None:
    """Where the weights of an attention module are, None where accelerate keeps them elsewhere.

    Quantised layers may hold them in buffers alone.
    """
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if tensor.device.type != "meta":
            device: torch.device = tensor.device
            return device
    return None


def _device(model: PreTrainedModel) -> torch.device:
    """Where attention runs. Weights that accelerate keeps elsewhere between calls do not count."""
    places = [attention_device(module) for module in attention_modules(model)]
    devices = {place for place in places if place is not None}
    if len(devices) > 1:
        raise ValueError(
            "model: expected all layers on one device, "
            f"got {', '.join(sorted(str(device) for device in devices))}"
        )
    if devices:
        return devices.pop()
    device: torch.device = rotary_module(model).inv_freq.device
    return device
