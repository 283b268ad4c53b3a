"""Which transformers models the plug-in can drive, and what it reads from one.

A family fits when its decoder layers are `model.base_model.layers[i].self_attn`, each calls its
module's `apply_rotary_pos_emb` on every query and key, the rotary embedding is one module for all
layers, and nothing but `softmax(scale * q k) v`, causal or with one window for all layers, happens
in between. Everything else is refused by name, because a wrong guess would not raise: it would
quietly generate worse text.
"""

from __future__ import annotations

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
    "attention_modules",
    "check_supported",
    "embedding_module",
    "modelling_module",
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
    """The model itself: what `torch.compile(model)` wraps, or `model` as it is.

    Raises TypeError for anything but a transformers model.
    """
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(
            f"model: expected a transformers model (PreTrainedModel), got {type(model).__name__}"
        )
    return inner


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
    if not hasattr(modelling_module(model), "apply_rotary_pos_emb"):
        raise ValueError(
            "model: expected attention of transformers' own, with apply_rotary_pos_emb beside it, "
            f"got {type(attention_modules(model)[0]).__qualname__} without one"
        )
    rope_type = getattr(rotary_module(model), "rope_type", None)
    if rope_type not in ROPE_TYPES:
        raise ValueError(
            f"model: expected one of the RoPE types {', '.join(ROPE_TYPES)}, got {rope_type!r}"
        )
    _window(config)
    _scale(model)
    _device(model)


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
    return ModelShape(
        num_layers=len(attention),
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=int(attention[0].head_dim),
        inv_freq=rotary.inv_freq.detach().to("cpu", torch.float32),
        rope_scale=float(rotary.attention_scaling),
        interleaved=FAMILIES[config.model_type],
        scale=_scale(model),
        window=_window(config),
        max_position=config.max_position_embeddings,
        dtype=model.dtype,
        device=_device(model),
    )


def _window(config: Any) -> int | None:
    """The one sliding window of all layers, None without one. ValueError for a mix."""
    window: int | None = getattr(config, "sliding_window", None) or None  # some say 0 for none
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return window
    kinds = set(layer_types)
    if kinds == {"full_attention"}:
        return None
    if kinds == {"sliding_attention"} and window is not None:
        return window
    raise ValueError(
        "model: expected the same attention in all layers, full or with one sliding window, "
        f"got layers of the kinds {', '.join(sorted(kinds))}"
    )


def _scale(model: PreTrainedModel) -> float:
    scales = {float(module.scaling) for module in attention_modules(model)}
    if len(scales) != 1:
        raise ValueError(
            f"model: expected the same attention scale in all layers, got {sorted(scales)}"
        )
    return scales.pop()


def _device(model: PreTrainedModel) -> torch.device:
    """Where attention runs. Weights that accelerate keeps elsewhere between calls do not count."""
    devices = {
        parameter.device
        for module in attention_modules(model)
        for parameter in module.parameters()
        if parameter.device.type != "meta"
    }
    if len(devices) > 1:
        raise ValueError(
            "model: expected all layers on one device, "
            f"got {', '.join(sorted(str(device) for device in devices))}"
        )
    if devices:
        return devices.pop()
    device: torch.device = rotary_module(model).inv_freq.device
    return device
