"""Several workers in one forward pass of a transformers model, without copying its code.

Three small things are put into a model, and none of them does anything until `forward` runs a step:

- its attention modules see the config through `_StepConfig`, which names our attention function
  while a step of this very model runs in this very thread, and the model's own otherwise;
- a hook on its rotary module hands the layers, in such a step, a marker instead of cos and sin;
- the modelling module's `apply_rotary_pos_emb`, given that marker, returns queries and keys as
  they are. (A rotary module that returns ones and zeros does the same without touching the
  modelling module, but multiplying by them takes 36 to 51 microseconds a layer.)

On request its linear layers use packed weights in a step; see packed_linear.py.

The model's own config is never touched. So masks, `generate` and everything else that asks for the
attention's name work as before, and so does `model.set_attn_implementation` on a patched model.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from . import checks
from .cache import Segment, SegmentCache
from .model_support import (
    AttentionInterface,
    ModelShape,
    PreTrainedModel,
    attention_device,
    attention_modules,
    embedding_module,
    modelling_module,
    read_attention,
    read_model,
    rotary_module,
    underlying_model,
)
from .never_compiled import never_compiled
from .packed_linear import compare_all, pack_layers, unpack_layers
from .step import Step

ATTENTION_NAME = "hogwild_ext"
LINEAR = ("packed",)  # ways of computing linear layers in a step, beside the model's own
Model = TypeVar("Model")
Cache = TypeVar("Cache", bound=SegmentCache)


class _Unrotated:
    """Stands for cos and for sin in a step: leave queries and keys as they are."""


@dataclass(frozen=True)
class _ActiveStep:
    step: Step
    dtype: torch.dtype  # of the cache
    rotary: torch.nn.Module  # of the model that runs the step: it has one, and no other model has


# The step that `forward` runs in this thread. A ContextVar, because another thread may at the same
# time generate with the same model, or run a step of another cache.
_ACTIVE: ContextVar[_ActiveStep | None] = ContextVar("hogwild_ext_active_step", default=None)


def _active_step() -> _ActiveStep | None:
    # Code that torch.compile traces never belongs to a step, and must not depend on one.
    active = None if torch.compiler.is_compiling() else _ACTIVE.get()
    # Threads may inherit the variable. The step is not theirs.
    return active if active is None or active.step.is_open else None


class _StepConfig:
    """A model's config as its attention modules see it: the same, but for the attention's name."""

    def __init__(self, config: Any, shape: ModelShape, rotary: torch.nn.Module) -> None:
        self._config = config
        self._shape = shape
        self._rotary = rotary
        self._packed = False  # set when all linear layers can use packed weights, and not before

    def in_step(self) -> bool:
        """Whether a step of this model runs in this thread."""
        active = _active_step()
        return active is not None and active.rotary is self._rotary

    def in_packed_step(self) -> bool:
        """Whether linear layers are to use packed weights."""
        return self._packed and self.in_step()

    @property
    def _attn_implementation(self) -> str | None:
        return ATTENTION_NAME if self.in_step() else self._config._attn_implementation

    def __getattr__(self, name: str) -> Any:
        if name == "_config" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)  # copy and pickle ask before there is a config
        return getattr(self._config, name)


# ---- patch, unpatch -----------------------------------------------------------------------------


def patch(model: Model, *, linear: str | None = None) -> Model:
    """Prepares a transformers model for `forward`, in place; returns it.

    Without a step the model behaves exactly as before: the same logits, the same `generate`, the
    attention implementation it was given, or is given later. Patching a patched model does nothing.
    Plain models of the same family live beside it. (`forward` patches by itself.)

    Args:
        linear: "packed", for a model on a CPU: in steps, its linear layers (`nn.Linear`) read a
            packed copy of their weights, once for all rows; logits differ by rounding.
            `hogwild bench generate` shows what it gains. It doubles the memory of the weights,
            since `generate`, `state_dict` and the like go on using the model's own; an output
            layer that shares its weight with the embedding gets a copy too. The copies are made in
            the first step, and again when a weight has changed (`packed_linear.StepLinear` says
            what is noticed, and when); given again, the next step compares every number. `unpatch`
            releases them.
            None: the layers stay as they are, packed or not.

    Raises TypeError for anything but a transformers model, ValueError for a model that is not
    supported, with the reason; the model is then as it was.
    """
    inner = underlying_model(model)
    if linear is not None and linear not in LINEAR:
        raise ValueError(f"linear: expected 'packed' or None, got {checks.describe(linear)}")
    is_patched = _is_patched(inner)
    packs = linear == "packed" and not _is_packed(inner)
    if packs and (device := read_model(inner).device).type != "cpu":
        raise ValueError(f"linear: expected a model on the CPU for 'packed', got one on {device}")
    if not is_patched:
        _patch_attention(inner)
    if packs:
        _pack(inner)
    elif linear == "packed":
        compare_all(inner)
    return model


# Both may be cut short, or done by two threads at once. What they have put in by then does nothing,
# and the next one puts in everything again.


def _patch_attention(inner: PreTrainedModel) -> None:
    shape = read_model(inner)
    _wrap_apply_rotary(modelling_module(inner))
    rotary = rotary_module(inner)
    if _mark_unrotated not in rotary._forward_hooks.values():
        rotary.register_forward_hook(_mark_unrotated)
    config = _StepConfig(inner.config, shape, rotary)
    for module in reversed(attention_modules(inner)):  # with the first one the model is patched
        module.config = config


def _pack(inner: PreTrainedModel) -> None:
    config = _step_config(inner)
    pack_layers(inner, config.in_packed_step)
    config._packed = True


def unpatch(model: Model) -> Model:
    """Takes out what `patch` put into the model, in place; returns it. Nothing if not patched.

    What stays is the thin wrapper of the modelling module's `apply_rotary_pos_emb`, which other
    models of the family may be using.

    Raises TypeError for anything but a transformers model.
    """
    inner = underlying_model(model)
    for module in inner.modules():  # with the first attention module the model is patched no more
        if isinstance(config := getattr(module, "config", None), _StepConfig):
            config._packed = False  # cut short, this must not leave some layers packed
            module.config = config._config
        # By identity and not with the handle from registration: that one does not survive a copy.
        hooks = module._forward_hooks
        for key in [key for key, hook in hooks.items() if hook is _mark_unrotated]:
            del hooks[key]
    unpack_layers(inner)
    return model


def _is_patched(model: PreTrainedModel) -> bool:
    layers: Any = getattr(model.base_model, "layers", None) or [None]
    attention = getattr(layers[0], "self_attn", None)
    return isinstance(getattr(attention, "config", None), _StepConfig)


def _is_packed(model: PreTrainedModel) -> bool:
    return _is_patched(model) and _step_config(model)._packed


def _wrap_apply_rotary(modelling: Any) -> None:
    """Lets the module's apply_rotary_pos_emb know the marker. Once for each modelling module."""
    original = modelling.apply_rotary_pos_emb
    if getattr(original, "_knows_unrotated", False):
        return

    @functools.wraps(original)
    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Any, sin: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if isinstance(cos, _Unrotated):
            return q, k
        return original(q, k, cos, sin, *args, **kwargs)

    apply_rotary_pos_emb._knows_unrotated = True  # type: ignore[attr-defined]
    modelling.apply_rotary_pos_emb = apply_rotary_pos_emb


def _mark_unrotated(
    rotary: torch.nn.Module, args: tuple[Any, ...], output: Any
) -> tuple[_Unrotated, _Unrotated] | None:
    """Forward hook of a patched model's rotary module. None keeps its output."""
    active = _active_step()
    if active is None or active.rotary is not rotary:
        return None
    marker = _Unrotated()
    return marker, marker


# ---- a step --------------------------------------------------------------------------------------


@never_compiled
def forward(
    model: Any,
    cache: SegmentCache,
    views: Sequence[Sequence[Segment]],
    tokens: Sequence[Sequence[int]] | Tensor,
    *,
    logits: str = "last",
    allow_beyond: bool = False,
    linear: str | None = None,
) -> Tensor | list[Tensor]:
    """One forward pass of several workers: appends their tokens, returns their logits.

    Each worker reads its view and writes the view's last segment. All new tokens are stored before
    anybody attends, so workers that see each other see this step's tokens too.

    Args:
        model: a causal language model of transformers, of a supported family; patched if it is
            not yet (see `patch`).
        cache: made by `SegmentCache.for_model(model)`, or with the same sizes and frequencies.
        views: one list of segments a worker, as in `SegmentCache.step`.
        tokens: the new token ids: one list a worker, of any lengths from 1, or an int64 tensor
            [W, Q] on the model's device, which is not read back from there.
        logits: "last" for those of each worker's last new token, "all" for those of every one.
        allow_beyond: allow positions past the model's `max_position_embeddings`.
        linear: "packed" for packed linear layers, in this step and later ones; see `patch`.

    Returns:
        [W, vocab] for "last", a list of one [n_w, vocab] tensor a worker for "all"; in the model's
        dtype and on its device. They were made under `torch.inference_mode()`: clone them to
        write into them.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        OutOfPages: no room for the tokens.
        Whatever the model raises. In every case the segments are as they were.
    """
    checks.is_unobserved("model")
    inner = underlying_model(model)
    if logits not in ("last", "all"):
        raise ValueError(f"logits: expected 'last' or 'all', got {checks.describe(logits)}")
    allow_beyond = checks.is_bool("allow_beyond", allow_beyond)
    patch(inner, linear=None if linear == "packed" and _is_packed(inner) else linear)
    _check_cache(inner, cache)
    query_lengths, token_ids, input_ids = _read_tokens(inner, cache.device, tokens)
    if len(checks.is_sequence("views", views, "lists of segments, one a worker")) != len(
        query_lengths
    ):
        raise ValueError(
            f"tokens: expected those of {len(views)} workers, as many as views, "
            f"got {len(query_lengths)}"
        )
    step = cache.step(views, query_lengths, token_ids, allow_beyond=allow_beyond)
    if not allow_beyond:
        _check_positions(inner, step)

    keep: int | Tensor = 0  # all of them
    if logits == "last":
        ends = [end - 1 for end in itertools.accumulate(query_lengths)]
        keep = _on_device(ends, input_ids.device)
    arguments = {
        "input_ids": input_ids,
        # A mask of four dimensions is passed on as it is, and so none is made; our attention does
        # not look at it. Nor does a step need positions, but the model would make some.
        "attention_mask": input_ids.new_zeros((1, 1, 1, 1), dtype=torch.bool),
        "position_ids": torch.zeros_like(input_ids),
        "use_cache": False,
        "return_dict": True,
        "logits_to_keep": keep,
        **({"output_router_logits": False} if _has_router(inner) else {}),
    }
    active = _ActiveStep(step, cache.dtype, rotary_module(inner))
    with torch.inference_mode(), step:
        step.lasts_no_longer_than(sys._getframe())
        # Python leaves the copy of the context whatever is raised: outside of it no step is active.
        output = copy_context().run(_in_charge, active, _eager_call(inner), arguments)
        rows: Tensor = output.logits[0]
    return rows if logits == "last" else list(rows.split(query_lengths))


def cache_for_model(cls: type[Cache], model: Any, max_tokens: int, spare_pages: int) -> Cache:
    """`SegmentCache.for_model`: a cache of class `cls` that fits a supported model."""
    shape = read_model(model)
    return cls(
        shape.num_layers,
        shape.num_kv_heads,
        shape.head_dim,
        inv_freq=shape.inv_freq,
        max_tokens=max_tokens,
        spare_pages=spare_pages,
        dtype=shape.dtype,
        device=shape.device,
        rope_scale=shape.rope_scale,
        interleaved=shape.interleaved,
        scale=shape.scale,
        window=shape.window,
        max_position=shape.max_position,
    )


def _in_charge(active: _ActiveStep, call: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """The call, in which the attention is the step's. Run it in a context of its own."""
    _ACTIVE.set(active)
    return call(**arguments)


def _has_router(model: PreTrainedModel) -> bool:
    """A mixture of experts can be told to add up a loss for training, which needs a real mask."""
    return hasattr(model.config, "output_router_logits")


def _eager_call(model: PreTrainedModel) -> Any:
    """What to call for one forward pass of `model` that torch.compile does not trace."""
    return model if model._compiled_call_impl is None else model.forward


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in a step, with unrotated queries and keys.

    query [1, Hq, T, D], key [1, Hkv, T, D], value [1, Hkv, T, Dv] -> [1, T, Hq, Dv].
    """
    active = _active_step()
    if active is None:
        raise RuntimeError(
            f"attention {ATTENTION_NAME!r}: expected to be called by hogwild_ext.forward only"
        )
    if dropout:
        raise ValueError(
            f"model: expected no attention dropout, got {dropout}; model.eval() turns it off"
        )
    # Under autocast, or with norms kept in float32, they need not have the model's dtype.
    queries, keys, values = (x[0].transpose(0, 1).to(active.dtype) for x in (query, key, value))
    out = active.step.attend(module.layer_idx, queries, keys, values)
    return out.to(value.dtype).unsqueeze(0), None


# Without a mask function beside it: no config for which masks are made ever names it.
AttentionInterface.register(ATTENTION_NAME, _attend)


# ---- checks --------------------------------------------------------------------------------------


def _step_config(model: PreTrainedModel) -> _StepConfig:
    """Of a patched model."""
    config: _StepConfig = attention_modules(model)[0].config
    return config


def _check_cache(model: PreTrainedModel, cache: Any) -> None:
    """Raises unless the cache stores what this model's attention makes, and rotates as it does."""
    if not isinstance(cache, SegmentCache):
        raise TypeError(f"cache: expected a SegmentCache, got {checks.describe(cache)}")
    shape = _step_config(model)._shape
    for name in (
        "num_layers",
        "num_kv_heads",
        "head_dim",
        "rope_scale",
        "interleaved",
        "scale",
        "window",
    ):
        expected, got = getattr(shape, name), getattr(cache, name)
        if got != expected:
            raise ValueError(f"cache: expected the model's {name}={expected}, got {got}")
    # What decides about attention may have changed since the model was patched.
    for name, value in zip(("scale", "window"), read_attention(model), strict=True):
        if value != getattr(shape, name):
            raise ValueError(
                f"model: expected {name}={getattr(shape, name)}, as it was when it was patched, "
                f"got {value}; unpatch it, and make a new cache for it"
            )
    weights = attention_device(attention_modules(model)[0])
    if weights not in (cache.device, None):
        raise ValueError(f"cache: expected the model's device, {weights}, got {cache.device}")
    inv_freq = rotary_module(model).inv_freq
    # Elsewhere than on the CPU, looking at the numbers would wait for the device.
    if inv_freq.device.type == "cpu" and not np.array_equal(inv_freq.float(), cache.inv_freq):
        raise ValueError(
            "cache: expected the frequencies of the model's rotary embedding as inv_freq; "
            "SegmentCache.for_model(model) takes them over"
        )


def _check_positions(model: PreTrainedModel, step: Step) -> None:
    limit = model.config.max_position_embeddings
    for w, total in enumerate(step.view_lengths):
        if total > limit:
            raise ValueError(
                f"views[{w}]: expected at most the model's {limit} positions, new tokens "
                f"included (or allow_beyond=True), got {total}"
            )


def _read_tokens(
    model: PreTrainedModel, device: torch.device, tokens: Any
) -> tuple[list[int], list[list[int]] | Tensor, Tensor]:
    """New tokens of each worker, checked -> how many each brings, their ids, input_ids [1, T]."""
    vocabulary: int = embedding_module(model).num_embeddings
    if isinstance(tokens, Tensor):
        if tokens.device != device:
            raise ValueError(
                f"tokens: expected a tensor on the model's device, {device}, "
                f"got {checks.describe(tokens)}"
            )
        tokens = checks.is_plain("tokens", tokens)
        if tokens.dtype != torch.int64:
            raise TypeError(f"tokens: expected int64, got {checks.describe(tokens)}")
        if tokens.dim() != 2 or 0 in tokens.shape:
            raise ValueError(
                "tokens: expected a tensor [workers, new tokens] with at least one of each, "
                f"got {checks.describe(tokens)}"
            )
        if device.type == "cpu":  # elsewhere, looking at them would wait for the device
            low, high = (int(x) for x in tokens.aminmax())
            if low < 0 or high >= vocabulary:
                raise ValueError(
                    f"tokens: expected ids from 0 to {vocabulary - 1}, "
                    f"got {low if low < 0 else high}"
                )
        return [tokens.shape[1]] * tokens.shape[0], tokens, tokens.reshape(1, -1)

    lists = []
    for w, ids in enumerate(checks.is_sequence("tokens", tokens, "lists of ids, one a worker")):
        checks.is_sequence(f"tokens[{w}]", ids, "token ids")
        if not ids:
            raise ValueError(
                f"tokens[{w}]: expected at least one new token, got none; leave a worker that "
                "has nothing to say out of views and tokens"
            )
        lists.append(
            [
                checks.is_integer(f"tokens[{w}][{i}]", token, 0, vocabulary - 1)
                for i, token in enumerate(ids)
            ]
        )
    if not lists:
        raise ValueError("tokens: expected at least one list of ids, got none")
    flat = _on_device([[token for ids in lists for token in ids]], device)
    return [len(ids) for ids in lists], lists, flat


def _on_device(numbers: list[Any], device: torch.device) -> Tensor:
    """An int64 tensor. The copy to a GPU is not waited for, nor what the GPU does before it."""
    tensor = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
