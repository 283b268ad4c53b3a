"""Several workers that see each other, slowly and obviously: what `hogwild_ext.forward` must equal.

Every segment keeps the keys as the model made them, before any rotation, one tensor a layer. In a
step, each worker concatenates the keys and values of its view, numbers them 0, 1, 2, ... as a plain
sequence, rotates all of them to those positions with the model's own rotary embedding, rotates its
queries to the last positions, and takes an ordinary causal softmax. There are no offsets, no pages
and no stored rotations here, so nothing in it can be wrong in the way the package could be.

It uses transformers' public interface for attention functions and shares no code with the package.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers

ATTENTION_NAME = "eager_workers_for_tests"


class EagerSegment:
    """Tokens with their unrotated keys and their values: one [length, Hkv, D] tensor a layer."""

    def __init__(self, num_layers: int) -> None:
        self.tokens: list[int] = []
        self.keys: list[torch.Tensor | None] = [None] * num_layers
        self.values: list[torch.Tensor | None] = [None] * num_layers

    def __len__(self) -> int:
        return len(self.tokens)

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self.keys[layer] = _joined(self.keys[layer], key)
        self.values[layer] = _joined(self.values[layer], value)

    def truncate(self, length: int) -> None:
        self.tokens = self.tokens[:length]
        self.keys = [key[:length] if key is not None else None for key in self.keys]
        self.values = [value[:length] if value is not None else None for value in self.values]

    def fork(self) -> EagerSegment:
        twin = EagerSegment(len(self.keys))
        twin.tokens, twin.keys, twin.values = self.tokens[:], self.keys[:], self.values[:]
        return twin

    def commit_to(self, target: EagerSegment) -> None:
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            if key is not None and value is not None:
                target.append(layer, key, value)
        target.tokens = target.tokens + self.tokens
        self.truncate(0)


class EagerWorkers:
    """Runs steps of several workers with a plain transformers model, which it leaves as it was.

    `window`: how many tokens back a query sees, itself included; None for all.
    """

    def __init__(self, model: transformers.PreTrainedModel, window: int | None = None) -> None:
        self.model = model
        self.window = window
        self.rotary = model.base_model.rotary_emb
        modelling = sys.modules[type(model.base_model.layers[0].self_attn).__module__]
        self.apply_rotary = modelling.apply_rotary_pos_emb
        self.views: Sequence[Sequence[EagerSegment]] = ()
        self.query_lengths: list[int] = []

    def segment(self) -> EagerSegment:
        return EagerSegment(len(self.model.base_model.layers))

    def step(
        self, views: Sequence[Sequence[EagerSegment]], tokens: Sequence[Sequence[int]]
    ) -> list[torch.Tensor]:
        """One forward pass of all workers. Returns one [n_w, vocab] tensor of logits a worker."""
        self.views, self.query_lengths = views, [len(new) for new in tokens]
        for view, new in zip(views, tokens, strict=True):
            view[-1].tokens = view[-1].tokens + list(new)
        flat = torch.tensor([[token for new in tokens for token in new]])
        with torch.no_grad(), self._in_charge():
            logits = self.model(input_ids=flat, use_cache=False).logits[0]
        return list(logits.split(self.query_lengths))

    @contextmanager
    def _in_charge(self) -> Iterator[None]:
        """The model calls our attention, with queries and keys that its RoPE left alone."""
        transformers.AttentionInterface.register(ATTENTION_NAME, self._attention)
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation(ATTENTION_NAME)
        self.model.base_model.rotary_emb = _NoRotation(self.rotary)
        try:
            yield
        finally:
            self.model.base_model.rotary_emb = self.rotary
            self.model.set_attn_implementation(before)

    def _attention(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """query [1, Hq, T, D], key and value [1, Hkv, T, D] -> [1, T, Hq, D]."""
        queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))
        layer = module.layer_idx
        pieces = [x.split(self.query_lengths) for x in (queries, keys, values)]
        for view, _, new_keys, new_values in zip(self.views, *pieces, strict=True):
            view[-1].append(layer, new_keys, new_values)
        out = [
            self._worker(layer, view, new_queries, scaling)
            for view, new_queries in zip(self.views, pieces[0], strict=True)
        ]
        return torch.cat(out)[None], None

    def _worker(
        self, layer: int, view: Sequence[EagerSegment], query: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """query [n, Hq, D] -> [n, Hq, D]: what one worker's new tokens read in its view."""
        seen_keys, seen_values = [], []
        for segment in view:
            key, value = segment.keys[layer], segment.values[layer]
            if key is not None and value is not None:
                seen_keys.append(key)
                seen_values.append(value)
        key, value = torch.cat(seen_keys), torch.cat(seen_values)
        total, new = len(key), len(query)
        key_positions = torch.arange(total)
        query_positions = key_positions[total - new :]

        group = query.shape[1] // key.shape[1]
        key = self._rotate(key, key_positions).repeat_interleave(group, dim=1)
        value = value.repeat_interleave(group, dim=1)
        query = self._rotate(query, query_positions)

        distance = query_positions[:, None] - key_positions[None, :]
        hidden = distance < 0
        if self.window is not None:
            hidden = hidden | (distance >= self.window)
        scores = torch.einsum("qhd,khd->hqk", query.float(), key.float()) * scale
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        return torch.einsum("hqk,khd->qhd", weights, value.float()).to(query.dtype)

    def _rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x [n, H, D], unrotated -> the same at `positions` [n], by the model's own RoPE."""
        cos, sin = self.rotary(x, position_ids=positions[None])
        heads = x.transpose(0, 1)[None]
        rotated, _ = self.apply_rotary(heads, heads, cos, sin)
        return rotated[0].transpose(0, 1)


@contextmanager
def exact_angles(model: transformers.PreTrainedModel) -> Iterator[None]:
    """Within, the model's RoPE makes its angles in float64, rounding only cos and sin.

    transformers multiplies positions and frequencies in float32, which moves the logits of the
    tests' models by up to 1e-4 at position 4,096. Without that, what is left of a difference is
    rounding, and a limit can be drawn close.
    """
    rotary = model.base_model.rotary_emb

    def forward(x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        angles = position_ids[..., None].double() * rotary.inv_freq.double()
        angles = torch.cat([angles, angles], dim=-1)
        scale = rotary.attention_scaling
        return (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)

    rotary.forward = forward
    try:
        yield
    finally:
        del rotary.forward


class _NoRotation(torch.nn.Module):
    """Ones for cos and zeros for sin: RoPE that changes nothing."""

    def __init__(self, rotary: torch.nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cos, sin = self.rotary(x, position_ids=position_ids)
        return torch.ones_like(cos), torch.zeros_like(sin)


def _joined(first: torch.Tensor | None, second: torch.Tensor) -> torch.Tensor:
    return second.clone() if first is None else torch.cat([first, second])
