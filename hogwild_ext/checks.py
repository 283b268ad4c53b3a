"""Checks of arguments: each raises an error that names the argument, what was expected and what
came, and returns the value in the form the code works with."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from . import _C

DTYPE_CODES = {
    torch.float32: _C.FLOAT32,
    torch.float16: _C.FLOAT16,
    torch.bfloat16: _C.BFLOAT16,
}
INT32_MAX = 2**31 - 1
_INT32, _FLOAT32 = np.dtype(np.int32), np.dtype(np.float32)
HIDDEN = _C.HIDDEN

T = TypeVar("T")


def describe(value: object) -> str:
    """A short description of what came: type, and shape and dtype where there are any."""
    if isinstance(value, torch.Tensor):
        shape = list(value.shape)
        place = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"a tensor {shape} of {str(value.dtype).removeprefix('torch.')}{place}"
    if isinstance(value, np.ndarray):
        return f"an array {list(value.shape)} of {value.dtype}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def is_tensor(name: str, value: Any, rank: int, shape: str) -> torch.Tensor:
    """A tensor of this rank whose last dimension is dense."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {describe(value)}")
    if value.dim() != rank:
        raise ValueError(f"{name}: expected a tensor {shape}, got {describe(value)}")
    if value.stride(-1) != 1 and value.shape[-1] > 1:
        raise ValueError(
            f"{name}: expected a dense last dimension, got strides {list(value.stride())}; "
            f"{name}.contiguous() gives one"
        )
    return value


def is_storage_dtype(name: str, dtype: Any) -> torch.dtype:
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name}: expected a torch.dtype, got {describe(dtype)}")
    if dtype not in DTYPE_CODES:
        raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {dtype}")
    return dtype


def has_no_grad(name: str, value: torch.Tensor) -> None:
    if value.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{name}: expected a tensor that needs no gradient, got one with requires_grad=True; "
            "attention over segments has no backward pass, call it under torch.no_grad()"
        )


def is_integer(name: str, value: Any, low: int, high: int = INT32_MAX) -> int:
    """An integer within [low, high]; bools are refused."""
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected an integer, got {describe(value)}")
    try:
        number = operator.index(value)
    except (TypeError, RuntimeError):
        raise TypeError(f"{name}: expected an integer, got {describe(value)}") from None
    if not low <= number <= high:
        raise ValueError(f"{name}: expected an integer from {low} to {high}, got {number}")
    return number


def is_number(name: str, value: Any, *, low: float | None = None) -> float:
    """A finite real number that float32 can hold."""
    if isinstance(value, (bool, np.bool_, str, bytes, complex)):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: expected a number, got {describe(value)}") from None
    if not abs(number) <= 3.4028234663852886e38:
        raise ValueError(f"{name}: expected a finite float32 number, got {number}")
    if low is not None and not number >= low:
        raise ValueError(f"{name}: expected a number of at least {low}, got {number}")
    return number


def is_bool(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {describe(value)}")
    return bool(value)


def is_sequence(name: str, value: Any, of: str) -> Sequence[Any]:
    if isinstance(value, (list, tuple)):
        return value
    raise TypeError(f"{name}: expected a list of {of}, got {describe(value)}")


def _as_array(name: str, value: Any, what: str) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        if not value.is_cpu:
            raise ValueError(
                f"{name}: expected host data (a CPU tensor, array or list), got {describe(value)}; "
                "reading it from the device would synchronise"
            )
        if value.requires_grad:
            value = value.detach()
        if value.dtype == torch.bfloat16:
            value = value.float()
        return value.numpy()
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, (list, tuple)):
        try:
            array = np.array(value)
        except (ValueError, TypeError, OverflowError):
            raise ValueError(f"{name}: expected {what}, got {describe(value)}") from None
        if array.dtype == object:
            raise ValueError(f"{name}: expected {what}, got {describe(value)}")
        return array
    raise TypeError(f"{name}: expected {what}, got {describe(value)}")


def is_int32_array(
    name: str, value: Any, shape: tuple[int | None, ...], what: str, *, low: int = -(2**31)
) -> np.ndarray:
    """Host data of integers -> int32 array, C-contiguous. None in `shape` takes any size."""
    array = _as_array(name, value, what)
    if array.dtype == _INT32 and array.shape == shape and low == -(2**31):
        return np.ascontiguousarray(array)
    if array.size == 0 and array.dtype == np.float64:  # an empty list has no type of its own
        array = array.astype(np.int32)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected {what}, got {describe(array)}")
    if len(array.shape) == 1 and array.size == 0 and len(shape) == 2 and 0 in shape:
        array = array.reshape([size or 0 for size in shape])
    fits = array.ndim == len(shape) and all(
        want is None or want == got for want, got in zip(shape, array.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name}: expected {what}, got {describe(value)}")
    if array.size:
        smallest, largest = int(array.min()), int(array.max())
        if smallest < low or largest > INT32_MAX:
            bad = smallest if smallest < low else largest
            raise ValueError(f"{name}: expected integers from {low} to {INT32_MAX}, got {bad}")
    return np.ascontiguousarray(array, dtype=np.int32)


def is_inv_freq(value: Any, head_dim: int | None) -> np.ndarray:
    """Host data [R/2] -> float32 array; R at most head_dim."""
    what = "inverse frequencies [R/2] with 0 <= R <= head_dim"
    array = _as_array("inv_freq", value, what)
    if array.dtype.kind != "f" and array.size:
        raise TypeError(f"inv_freq: expected floating point {what}, got {describe(array)}")
    if array.ndim != 1:
        raise ValueError(f"inv_freq: expected {what}, got {describe(value)}")
    if head_dim is not None and 2 * array.shape[0] > head_dim:
        raise ValueError(
            f"inv_freq: expected {what}; head_dim is {head_dim}, got {array.shape[0]} frequencies"
        )
    array = np.ascontiguousarray(array, dtype=_FLOAT32)
    if not _C.all_finite(array):
        raise ValueError("inv_freq: expected finite numbers, got inf or nan")
    return array


def is_head_dim(name: str, dim: int) -> int:
    if dim % 8 or not 8 <= dim <= _C.MAX_DIM:
        raise ValueError(
            f"{name}: expected a head dimension that is a multiple of 8, from 8 to {_C.MAX_DIM}, "
            f"got {dim}"
        )
    return dim


def heads_divide(num_heads: int, kv_heads: int, name: str = "query") -> None:
    if kv_heads < 1 or num_heads < 1 or num_heads % kv_heads:
        raise ValueError(
            f"{name}: expected a number of heads that is a multiple of the {kv_heads} key heads, "
            f"got {num_heads}"
        )


def is_writable_apart(name: str, out: torch.Tensor, others: Iterable[tuple[str, Any]]) -> None:
    """An output whose elements lie apart from each other and from the memory of other tensors."""
    reach = 1  # how many elements the dimensions so far span
    for stride, size in sorted(zip(out.stride(), out.shape, strict=True)):
        if size > 1 and stride < reach:
            raise ValueError(
                f"{name}: expected elements that do not overlap, got strides {list(out.stride())}"
            )
        reach += stride * (size - 1)
    first, last = _memory(out)
    for other, tensor in others:
        start, end = _memory(tensor)
        if first < end and start < last:
            raise ValueError(f"{name}: expected memory of its own, got memory shared with {other}")


def _memory(tensor: torch.Tensor) -> tuple[int, int]:
    """The range of addresses that a tensor spans."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def is_text(name: str, value: Any) -> str:
    """A string that can be encoded. Raises TypeError and ValueError, naming it."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a string, got {describe(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: expected text, got {value[error.start]!r}, half of a character, at "
            f"{error.start}"
        ) from None
    return value
