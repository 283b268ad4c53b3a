"""The attention op on plain tensors, and what goes with it: rotation and offsets of views."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from . import _C, checks
from .backends import Ints, PlanInput, Scoring, Segments, backend_for
from .never_compiled import never_compiled

HIDDEN: int = _C.HIDDEN
"""Offset of a segment that a worker does not see."""

HostData = Any  # a CPU tensor, an array, or (nested) lists of numbers

_QUERY = "[workers, queries, heads, head_dim]"
_KEYS = "[tokens, kv_heads, head_dim]"
_VALUES = "[tokens, kv_heads, value_dim]"

_TENSORS = checks.TENSORS
_requires_grad = operator.attrgetter("requires_grad")


def concurrent_attention(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    offsets: HostData,
    *,
    inv_freq: HostData,
    query_lengths: HostData | None = None,
    scale: float | None = None,
    rope_scale: float = 1.0,
    interleaved: bool = False,
    softcap: float = 0.0,
    window: int | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of several workers over segments that each of them sees at its own place.

    Query token ``i`` of worker ``w`` stands at position ``p = offsets[w, s] + i`` relative to the
    first token of segment ``s``. It is rotated to ``p``, compared with the keys ``l <= p`` of the
    segment, and one softmax runs over all keys of all segments. Nothing stored is recomputed: a
    segment may stand at a different place in each worker's view. (Hogwild! Inference,
    arXiv 2504.06261, section 3.)

    Args:
        query: ``[W, Q, Hq, D]``, not rotated; float32, float16 or bfloat16.
        keys: one tensor ``[L_s, Hkv, D]`` a segment, key ``l`` rotated to position ``l``
            (see :func:`rotate`); dtype and device of ``query``. ``Hq`` is a multiple of ``Hkv``;
            query head ``h`` reads KV head ``h // (Hq // Hkv)``.
        values: one tensor ``[L_s, Hkv, Dv]`` a segment.
        offsets: ``[W, S]`` integers, or :data:`HIDDEN` where a worker does not see a segment; see
            :func:`view_offsets`. Host data.
        inv_freq: ``[R/2]`` inverse frequencies of the rotary embedding, ``0 <= R <= D``; the first
            R dimensions rotate. Host data.
        query_lengths: ``[W]``, how many of the Q tokens each worker brings; default: all. Rows past
            it give ``out = 0`` and ``lse = -inf``. Host data.
        scale: factor of the scores; default ``D ** -0.5``.
        rope_scale: factor of the rotated dimensions of the query (attention scaling of YaRN).
        interleaved: rotate pairs ``(2j, 2j + 1)`` instead of ``(j, j + R/2)``.
        softcap: ``c > 0`` turns a score into ``c * tanh(score / c)``.
        window: a key is seen only while ``p - l < window``.
        return_lse: return ``(out, lse)``.
        out: ``[W, Q, Hq, Dv]``, written in place and returned.

    Returns:
        ``out [W, Q, Hq, Dv]`` in the dtype of ``query``; with ``return_lse`` also the natural
        logarithm of the softmax's denominator, float32 ``[W, Q, Hq]``. A query that sees nothing
        gives 0 and -inf.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. Nothing was written.
        RuntimeError: grad mode is on and an input requires grad, or an input has a tangent (there
            is no derivative); or the call is inside of a transform of torch.func.

    Tensors are torch.Tensor or nn.Parameter, dense, with all of their memory; subclasses and other
    layouts are refused. Modes, traces and torch.compile see one operator. Tensors whose last
    dimension is dense are read in place, whatever their other strides. D and Dv are multiples of 8
    up to 256.
    """
    if torch.compiler.is_compiling() or _is_watched():
        return _through_dispatcher(
            query, keys, values, offsets, inv_freq, query_lengths, scale, rope_scale, interleaved,
            softcap, window, return_lse, out,
        )  # fmt: skip
    if type(query) is FakeTensor:
        for name, tensors in (("keys", keys), ("values", values)):
            for s, tensor in enumerate(checks.is_sequence(name, tensors, "tensors")):
                if type(tensor) is not FakeTensor:
                    raise TypeError(
                        f"{name}[{s}]: expected a FakeTensor, as query is one, "
                        f"got {checks.describe(tensor)}"
                    )
        with query.fake_mode:
            return concurrent_attention(
                query, keys, values, offsets, inv_freq=inv_freq, query_lengths=query_lengths,
                scale=scale, rope_scale=rope_scale, interleaved=interleaved, softcap=softcap,
                window=window, return_lse=return_lse, out=out,
            )  # fmt: skip

    read = _TENSORS.segments(query, keys, values)
    if read is None:
        query = checks.is_tensor("query", query, 4, _QUERY)
    dtype, device = query.dtype, query.device
    code = checks.DTYPE_CODES[checks.is_storage_dtype("query", dtype)]
    backend = backend_for("query", device)
    checks.has_no_grad("query", query)
    workers, queries, num_heads, head_dim = query.shape
    backend.check_head_dims(("query", "query"), head_dim, head_dim)
    if read is None or _may_differentiate(keys, values):
        keys = _check_tensors(query, "keys", keys, _KEYS)
        values = _check_tensors(query, "values", values, _VALUES)
        read = _check_segments(query, keys, values)
    segments, lengths, kv_heads, value_dim = read
    if value_dim != head_dim:
        backend.check_head_dims(("query", "values[0]"), head_dim, value_dim)
    checks.heads_divide(num_heads, kv_heads)

    what = f"integers [workers, segments] = [{workers}, {len(lengths)}]"
    offsets_array = checks.is_int32_array("offsets", offsets, (workers, len(lengths)), what)
    frequencies = checks.is_inv_freq(inv_freq, head_dim)
    if query_lengths is None:
        brought = np.array([queries] * workers, np.int32)
    else:
        what = f"integers [workers] = [{workers}] from 0 to {queries}"
        brought = checks.is_int32_array("query_lengths", query_lengths, (workers,), what, low=0)
        if workers and int(brought.max()) > queries:
            raise ValueError(f"query_lengths: expected {what}, got {int(brought.max())}")
    scale = head_dim**-0.5 if scale is None else checks.is_number("scale", scale)
    rope_scale = checks.is_number("rope_scale", rope_scale)
    interleaved = checks.is_bool("interleaved", interleaved)
    softcap = checks.is_number("softcap", softcap, low=0.0)
    window = 0 if window is None else checks.is_integer("window", window, 1)
    return_lse = checks.is_bool("return_lse", return_lse)
    if workers * queries * num_heads > checks.INT32_MAX:
        raise ValueError(
            f"query: expected fewer than 2**31 rows, got {workers} x {queries} x {num_heads}"
        )
    shape = (workers, queries, num_heads, value_dim)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=device)
    else:
        _check_out(out, shape, query, [*keys, *values])
    lse = torch.empty(shape[:3], dtype=torch.float32, device=device) if return_lse else None

    layout = PlanInput(
        offsets_array, lengths, brought, frequencies, num_heads // kv_heads, kv_heads, window
    )
    scoring = Scoring(scale, rope_scale, interleaved, softcap)
    backend.attend_rows(layout, code, query, keys, values, segments, out, lse, scoring)
    return out if lse is None else (out, lse)


def _is_watched() -> bool:
    """Whether torch has to see the op, and so to call it."""
    watching = checks.observer()
    if watching == checks.TORCH_FUNC:  # which could do nothing with it
        checks.is_unobserved("query")
    return watching is not None


_Read = tuple[Segments, Ints, int, int]


def _may_differentiate(keys: Sequence[Tensor], values: Sequence[Tensor]) -> bool:
    if checks.carries_tangents():
        return True
    return torch.is_grad_enabled() and any(map(_requires_grad, (*keys, *values)))


def _check_tensors(
    query: Tensor, name: str, tensors: Sequence[Tensor], shape: str
) -> Sequence[Tensor]:
    checks.is_sequence(name, tensors, f"tensors {shape}, one a segment")
    plain = []
    for s, tensor in enumerate(tensors):
        full = f"{name}[{s}]"
        tensor = checks.is_tensor(full, tensor, 3, shape)
        if tensor.dtype != query.dtype:
            raise TypeError(
                f"{full}: expected the dtype of query, {query.dtype}, got {tensor.dtype}"
            )
        if tensor.device != query.device:
            raise ValueError(
                f"{full}: expected the device of query, {query.device}, got {tensor.device}"
            )
        checks.has_no_grad(full, tensor)
        plain.append(tensor)
    return plain


def _check_segments(query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> _Read:
    """What `TensorReader.segments` reads: for an older torch, and to say what does not fit."""
    if len(keys) != len(values):
        raise ValueError(
            f"values: expected as many segments as keys ({len(keys)}), got {len(values)}"
        )
    num_heads, head_dim = query.shape[2:]
    if not keys:
        return np.zeros((0, 6), np.int64), np.zeros(0, np.int32), num_heads, head_dim

    kv_heads, value_dim = keys[0].shape[1], values[0].shape[2]
    segments: list[tuple[int, ...]] = []
    lengths: list[int] = []
    for s, (key, value) in enumerate(zip(keys, values, strict=True)):
        length = key.shape[0]
        if key.shape[1:] != (kv_heads, head_dim):
            raise ValueError(
                f"keys[{s}]: expected {_KEYS} = [*, {kv_heads}, {head_dim}], got {list(key.shape)}"
            )
        if value.shape != (length, kv_heads, value_dim):
            raise ValueError(
                f"values[{s}]: expected {_VALUES} = [{length}, {kv_heads}, {value_dim}], "
                f"got {list(value.shape)}"
            )
        if length > checks.INT32_MAX:
            raise ValueError(f"keys[{s}]: expected fewer than 2**31 tokens, got {length}")
        segments.append((key.data_ptr(), value.data_ptr(), *key.stride()[:2], *value.stride()[:2]))
        lengths.append(length)
    return np.array(segments, np.int64), np.array(lengths, np.int32), kv_heads, value_dim


def _check_out(
    out: Tensor, shape: tuple[int, ...], query: Tensor, segments: Sequence[Tensor]
) -> None:
    if not _TENSORS.fit(query, (out,), (shape,)):
        checks.is_out("out", out, 4, "[workers, queries, heads, value_dim]")
        if tuple(out.shape) != shape:
            raise ValueError(f"out: expected a tensor {list(shape)}, got {checks.describe(out)}")
        if out.dtype != query.dtype:
            raise TypeError(f"out: expected the dtype of query, {query.dtype}, got {out.dtype}")
        if out.device != query.device:
            raise ValueError(f"out: expected the device of query, {query.device}, got {out.device}")
    checks.has_no_grad("out", out)
    named = [("query", query), *(("keys and values", tensor) for tensor in segments)]
    checks.is_writable_apart("out", out, named)


@never_compiled
def rotate(
    keys: Tensor,
    inv_freq: HostData,
    start: int = 0,
    rope_scale: float = 1.0,
    interleaved: bool = False,
) -> Tensor:
    """Rotates keys to positions ``start``, ``start + 1``, ...

    Args:
        keys: ``[L, H, D]`` float32, float16 or bfloat16. The first R dimensions rotate.
        inv_freq: ``[R/2]`` inverse frequencies; host data.
        start: position of the first key; may be negative.
        rope_scale: factor of the rotated dimensions.
        interleaved: rotate pairs ``(2j, 2j + 1)`` instead of ``(j, j + R/2)``.

    Returns:
        A new tensor like ``keys``. Angles are taken in double precision, the rotation in float32.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    keys = checks.is_tensor("keys", keys, 3, "[tokens, heads, head_dim]")
    checks.is_storage_dtype("keys", keys.dtype)
    checks.has_no_grad("keys", keys)
    length, _, head_dim = keys.shape
    frequencies = checks.is_inv_freq(inv_freq, head_dim)
    start = checks.is_integer("start", start, -(2**31) + 1, checks.INT32_MAX - length)
    rope_scale = checks.is_number("rope_scale", rope_scale)
    interleaved = checks.is_bool("interleaved", interleaved)

    half = len(frequencies)
    positions = np.arange(start, start + length, dtype=np.int32)
    angles = torch.from_numpy(_C.fill_angles(positions, frequencies)).to(keys.device)
    cos, sin = angles[:, None, 0], angles[:, None, 1]  # [L, 1, R/2]
    x = keys.detach().float()
    result = x.clone()
    low, high = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
        if interleaved
        else (slice(0, half), slice(half, 2 * half))
    )
    result[..., low] = (x[..., low] * cos - x[..., high] * sin) * rope_scale
    result[..., high] = (x[..., low] * sin + x[..., high] * cos) * rope_scale
    return result.to(keys.dtype)


@never_compiled
def view_offsets(
    views: Sequence[Sequence[int]], lengths: HostData, query_lengths: HostData
) -> Tensor:
    """Offsets of segments in the workers' views.

    Args:
        views: one list of segment indices a worker, in the order in which it reads them; the last
            one is the segment that it writes.
        lengths: ``[S]``, tokens in each segment, counted after this step's append. Host data.
        query_lengths: ``[W]``, new tokens of each worker, the last ones of its last segment.

    Returns:
        ``[W, S]`` int32: the position of a worker's first new token relative to the first token of
        the segment, :data:`HIDDEN` for segments that its view does not hold.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    checks.is_sequence("views", views, "lists of segment indices, one a worker")
    tokens = checks.is_int32_array("lengths", lengths, (None,), "integers [segments]", low=0)
    what = f"integers [workers] = [{len(views)}]"
    brought = checks.is_int32_array("query_lengths", query_lengths, (len(views),), what, low=0)
    offsets = np.full((len(views), len(tokens)), HIDDEN, dtype=np.int32)
    for w, view in enumerate(views):
        checks.is_sequence(f"views[{w}]", view, "segment indices")
        distance = -int(brought[w])
        for segment in reversed(view):
            index = checks.is_integer(f"views[{w}]", segment, 0, len(tokens) - 1)
            if offsets[w, index] != HIDDEN:
                raise ValueError(f"views[{w}]: expected each segment once, got {index} twice")
            distance += int(tokens[index])
            if distance > checks.INT32_MAX:
                raise ValueError(f"views[{w}]: expected fewer than 2**31 tokens, got {distance}")
            offsets[w, index] = distance
        written = int(tokens[view[-1]]) if view else 0
        if brought[w] > written:
            raise ValueError(
                f"query_lengths[{w}]: expected at most the length of the view's last segment, "
                f"{written}, got {int(brought[w])}"
            )
    return torch.from_numpy(offsets)


# ---- torch.library ------------------------------------------------------------------------
# Compiled code sees one opaque operator; eager code calls the binding directly, because passing
# through the dispatcher costs more than a short step's plan.


@torch.library.custom_op("hogwild_ext::concurrent_attention", mutates_args=())
def _concurrent_attention(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    offsets: Tensor,
    inv_freq: Tensor,
    query_lengths: Tensor | None,
    scale: float,
    rope_scale: float,
    interleaved: bool,
    softcap: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    out, lse = concurrent_attention(
        query, list(keys), list(values), offsets, inv_freq=inv_freq, query_lengths=query_lengths,
        scale=scale, rope_scale=rope_scale, interleaved=interleaved, softcap=softcap,
        window=window or None, return_lse=True,
    )  # fmt: skip
    return out, lse


@_concurrent_attention.register_fake
def _(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    offsets: Tensor,
    inv_freq: Tensor,
    query_lengths: Tensor | None,
    scale: float,
    rope_scale: float,
    interleaved: bool,
    softcap: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    workers, queries, num_heads, head_dim = query.shape
    value_dim = values[0].shape[2] if values else head_dim
    return (
        query.new_empty(workers, queries, num_heads, value_dim),
        query.new_empty(workers, queries, num_heads, dtype=torch.float32),
    )


def _host_tensor(value: HostData, dtype: torch.dtype) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=dtype, device="cpu")


def _through_dispatcher(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    offsets: HostData,
    inv_freq: HostData,
    query_lengths: HostData | None,
    scale: float | None,
    rope_scale: float,
    interleaved: bool,
    softcap: float,
    window: int | None,
    return_lse: bool,
    out: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    result, lse = torch.ops.hogwild_ext.concurrent_attention(
        query,
        list(keys),
        list(values),
        _host_tensor(offsets, torch.int32),
        _host_tensor(inv_freq, torch.float32),
        None if query_lengths is None else _host_tensor(query_lengths, torch.int32),
        query.shape[-1] ** -0.5 if scale is None else scale,
        rope_scale,
        interleaved,
        softcap,
        window or 0,
    )
    if out is not None:
        result = out.copy_(result)
    return (result, lse) if return_lse else result
