"""The meaning of the attention op in float64 numpy: an oracle for tests, obvious, not fast.

Nothing here knows of tiles, chunks or instruction sets, and nothing is shared with the kernels. One
query token at a time, only what that token sees is ever touched, so that a NaN in a key that a row
does not see cannot reach it by accident.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

HIDDEN = -(2**31)

Array = np.ndarray[Any, np.dtype[Any]]


def reference_rotate(
    x: torch.Tensor,
    inv_freq: Any,
    positions: Any,
    *,
    rope_scale: float = 1.0,
    interleaved: bool = False,
) -> torch.Tensor:
    """Rotate `x` [tokens, heads, dim] to `positions` [tokens]; float64 of the same shape.

    The first `2 * len(inv_freq)` dims turn in pairs, (j, j + R/2) or (2j, 2j + 1) if interleaved,
    and are multiplied by `rope_scale`. The other dims stay as they are.
    """
    frequencies = _host(inv_freq, np.float32).astype(np.float64)
    rows = zip(_float64(x), _host(positions, np.int64), strict=True)
    rotated = [_rotate(row, int(p), frequencies, rope_scale, interleaved) for row, p in rows]
    return torch.from_numpy(np.stack(rotated)) if rotated else x.to(torch.float64)


def reference_attention(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    offsets: Any,
    *,
    inv_freq: Any,
    query_lengths: Any = None,
    scale: float | None = None,
    rope_scale: float = 1.0,
    interleaved: bool = False,
    softcap: float = 0.0,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `concurrent_attention` computes, in float64.

    `query` [W, Q, Hq, D]; `keys` and `values`: one [L, Hkv, D] and [L, Hkv, Dv] a segment;
    `offsets` [W, S]; `inv_freq` [R/2]. Returns out [W, Q, Hq, Dv] and lse [W, Q, Hq], both float64.
    """
    workers, tokens, heads, dim = query.shape
    value_dim = values[0].shape[2] if values else dim
    out = np.zeros((workers, tokens, heads, value_dim))
    lse = np.full((workers, tokens, heads), -np.inf)
    if scale is None:
        scale = dim**-0.5

    q = _float64(query)
    heads_first_keys = [_float64(key).transpose(1, 0, 2) for key in keys]  # [Hkv, L, D]
    heads_first_values = [_float64(value).transpose(1, 0, 2) for value in values]
    frequencies = _host(inv_freq, np.float32).astype(np.float64)
    table = _host(offsets, np.int64).reshape(workers, len(keys))
    brought = _lengths(query_lengths, workers, tokens)

    for w in range(workers):
        for i in range(brought[w]):
            scores: list[Array] = []  # of each segment that is seen: [Hkv, group, seen tokens]
            seen_values: list[Array] = []  # [Hkv, seen tokens, Dv]
            for s in range(len(keys)):
                if table[w, s] == HIDDEN:
                    continue
                position = int(table[w, s]) + i
                seen = _seen_tokens(keys[s].shape[0], position, window)
                if seen.start >= seen.stop:
                    continue
                key = heads_first_keys[s][:, seen]
                rotated = _rotate(q[w, i], position, frequencies, rope_scale, interleaved)
                grouped = rotated.reshape(key.shape[0], -1, dim)
                with np.errstate(invalid="ignore", over="ignore"):
                    scores.append(scale * (grouped @ key.transpose(0, 2, 1)))
                seen_values.append(heads_first_values[s][:, seen])
            if not scores:
                continue
            with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
                score = np.concatenate(scores, axis=2)
                if softcap:
                    score = softcap * np.tanh(score / softcap)
                top = score.max(axis=2, keepdims=True)
                weight = np.exp(score - top)
                total = weight.sum(axis=2, keepdims=True)
                result = (weight / total) @ np.concatenate(seen_values, axis=1)
                out[w, i] = result.reshape(heads, value_dim)
                lse[w, i] = (top + np.log(total)).reshape(heads)
    return torch.from_numpy(out), torch.from_numpy(lse)


def eager_attention(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    offsets: Any,
    *,
    inv_freq: Any,
    query_lengths: Any = None,
    scale: float | None = None,
    rope_scale: float = 1.0,
    interleaved: bool = False,
    softcap: float = 0.0,
    window: int | None = None,
) -> torch.Tensor:
    """The same as a framework does it op by op: out [W, Q, Hq, Dv] in the type of `query`.

    The rotated query, the probabilities and the output are rounded to the storage type; cos and
    sin, the rotation, scores, softmax and both sums are float32. Its distance from
    `reference_attention` is the yardstick for data on which no fixed limit makes sense.
    """
    workers, tokens, heads, dim = query.shape
    value_dim = values[0].shape[2] if values else dim
    out = np.zeros((workers, tokens, heads, value_dim), np.float32)
    if scale is None:
        scale = dim**-0.5

    q = _float32(query)
    heads_first_keys = [_float32(key).transpose(1, 0, 2) for key in keys]
    heads_first_values = [_float32(value).transpose(1, 0, 2) for value in values]
    frequencies = _host(inv_freq, np.float32).astype(np.float64)
    table = _host(offsets, np.int64).reshape(workers, len(keys))
    brought = _lengths(query_lengths, workers, tokens)

    for w in range(workers):
        for i in range(brought[w]):
            scores: list[Array] = []
            seen_values: list[Array] = []
            for s in range(len(keys)):
                if table[w, s] == HIDDEN:
                    continue
                position = int(table[w, s]) + i
                seen = _seen_tokens(keys[s].shape[0], position, window)
                if seen.start >= seen.stop:
                    continue
                key = heads_first_keys[s][:, seen]
                rotated = _rotate(q[w, i], position, frequencies, rope_scale, interleaved)
                grouped = _rounded(rotated, query.dtype).reshape(key.shape[0], -1, dim)
                with np.errstate(invalid="ignore", over="ignore"):
                    scores.append(np.float32(scale) * (grouped @ key.transpose(0, 2, 1)))
                seen_values.append(heads_first_values[s][:, seen])
            if not scores:
                continue
            with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
                score = np.concatenate(scores, axis=2)
                if softcap:
                    score = np.float32(softcap) * np.tanh(score / np.float32(softcap))
                weight = np.exp(score - score.max(axis=2, keepdims=True))
                probability = weight / weight.sum(axis=2, keepdims=True)
                probability = _rounded(probability, query.dtype)
                result = probability @ np.concatenate(seen_values, axis=1)
                out[w, i] = result.reshape(heads, value_dim)
    return torch.from_numpy(out).to(query.dtype)


def _rotate(
    x: Array, position: int, frequencies: Array, rope_scale: float, interleaved: bool
) -> Array:
    """One token's `x` [heads, dim], rotated to `position`, in the arithmetic of `x`.

    The angle is always float64: at position 1,000,000 a float32 angle is off by 0.03.
    """
    half = len(frequencies)
    angle = position * frequencies
    cos = (rope_scale * np.cos(angle)).astype(x.dtype)
    sin = (rope_scale * np.sin(angle)).astype(x.dtype)
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    rotated = x.copy()
    with np.errstate(invalid="ignore"):
        rotated[:, first] = x[:, first] * cos - x[:, second] * sin
        rotated[:, second] = x[:, second] * cos + x[:, first] * sin
    return rotated


def _seen_tokens(length: int, position: int, window: int | None) -> slice:
    """The tokens l < length with l <= position and, with a window, position - l < window."""
    oldest = 0 if window is None else max(0, position - window + 1)
    return slice(oldest, min(length, position + 1))


def _lengths(query_lengths: Any, workers: int, tokens: int) -> list[int]:
    if query_lengths is None:
        return [tokens] * workers
    return [int(n) for n in _host(query_lengths, np.int64)]


def _host(data: Any, dtype: Any) -> Array:
    if isinstance(data, torch.Tensor):
        data = data.cpu().numpy()
    return np.asarray(data, dtype=dtype)


def _float64(x: torch.Tensor) -> Array:
    return x.detach().cpu().to(torch.float64).numpy()


def _float32(x: torch.Tensor) -> Array:
    return x.detach().cpu().to(torch.float32).numpy()


def _rounded(x: Array, dtype: torch.dtype) -> Array:
    """`x` rounded to the storage type `dtype`, as float32."""
    return torch.from_numpy(np.ascontiguousarray(x)).to(dtype).to(torch.float32).numpy()
