"""Checks of arguments: each raises an error that names the argument, what was expected and what
came, and returns the value in the form the code works with."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from . import _C

DTYPE_CODES = {
    torch.float32: _C.FLOAT32,
    torch.float16: _C.FLOAT16,
    torch.bfloat16: _C.BFLOAT16,
}
INT32_MAX = 2**31 - 1
_INT32, _FLOAT32 = np.dtype(np.int32), np.dtype(np.float32)
HIDDEN = _C.HIDDEN

_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
TENSORS: Any = _C.TensorReader(*_PLAIN_TYPES)
"""Looks at many tensors at once, where torch shows them to C."""

_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_jit_trace = torch._C._get_tracing_state
_functorch_level = torch._C._functorch.maybe_current_level
_is_functorch = torch._C._functorch.is_functorch_wrapped_tensor
TORCH_FUNC = "a transform of torch.func (vmap, grad, jvp, functionalize)"

T = TypeVar("T")


def describe(value: object) -> str:
    """A short description of what came: type, and shape and dtype where there are any."""
    if isinstance(value, torch.Tensor):
        kind = "tensor" if type(value) in _PLAIN_TYPES else type(value).__name__
        try:
            shape = f" {list(value.shape)}"
        except RuntimeError:  # nested, or not initialised
            shape = ""
        place = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"a {kind}{shape} of {str(value.dtype).removeprefix('torch.')}{place}"
    if isinstance(value, np.ndarray):
        return f"an array {list(value.shape)} of {value.dtype}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


# ---- tensors as plain memory ---------------------------------------------------------------------
# The kernels read addresses. So a tensor has to be what it seems: elements that lie in its storage,
# with their strides and as they are. And what computes beside torch, torch cannot see.


def is_plain(name: str, value: torch.Tensor) -> torch.Tensor:
    """The tensor, if a kernel may read what lies at its address.

    One that torch would negate or conjugate when it reads it comes back with that done. Where
    tensors live is for whoever knows the backend to check.

    Raises TypeError for a subclass or another layout, RuntimeError for what torch.func wraps,
    ValueError for one that lacks memory.
    """
    if TENSORS.is_plain(value):
        return value
    if type(value) not in _PLAIN_TYPES:
        raise TypeError(
            f"{name}: expected a torch.Tensor, got {describe(value)}, and a subclass may keep its "
            "numbers elsewhere; give the tensor that it stands for (full_tensor() of a DTensor, "
            "dequantize() of a quantised one, as_subclass(torch.Tensor) of one that adds nothing)"
        )
    if _is_functorch(value) or torch._is_functional_tensor(value):
        raise RuntimeError(
            f"{name}: expected a plain tensor, got one that a transform of torch.func wraps (vmap, "
            "grad, jvp, functionalize); call it outside of the transform"
        )
    if value.layout is not torch.strided or value.is_nested or value.is_quantized:
        kind = "nested" if value.is_nested else "quantised" if value.is_quantized else value.layout
        raise TypeError(
            f"{name}: expected a dense tensor, got a {kind} one; to_dense(), to_padded_tensor() or "
            "dequantize() makes one of it"
        )
    if value.is_neg() or value.is_conj():
        return is_plain(name, value.resolve_neg().resolve_conj())
    if value.device.type in ("cpu", "cuda") and value.numel():
        last = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
        begin, size = value.storage_offset(), value.element_size()
        needed, there = (begin + last + 1) * size, value.untyped_storage().nbytes()
        if there < needed or value.data_ptr() == begin * size:
            raise ValueError(
                f"{name}: expected a tensor that has its memory, got {describe(value)} whose "
                f"storage holds {there} of {needed} bytes: it was freed or cut"
            )
    return value


def has_memory(value: torch.Tensor) -> bool:
    """Whether `is_plain` takes the tensor as it is."""
    if TENSORS.is_plain(value):
        return True
    try:
        return is_plain("tensor", value) is value
    except (TypeError, ValueError, RuntimeError):
        return False


def observer() -> str | None:
    """What of torch watches all that is computed now, if anything: a mode, a trace, a transform."""
    if not (
        _dispatch_modes()
        or _function_modes()
        or _jit_trace() is not None
        or _functorch_level() is not None
    ):
        return None
    if _functorch_level() is not None:
        return TORCH_FUNC
    if _dispatch_modes():
        return "a TorchDispatchMode"
    if _jit_trace() is not None:
        return "torch.jit.trace"
    # That of torch.set_default_device and `with torch.device(...)` only looks at factories.
    modes = _get_current_function_mode_stack()
    return None if all(type(mode) is DeviceContext for mode in modes) else "a TorchFunctionMode"


def is_unobserved(name: str) -> None:
    """For what torch could not see, although something of torch's wants to see all."""
    if (watching := observer()) is not None:
        raise RuntimeError(
            f"{name}: expected a call outside of torch's modes, traces and transforms, which do "
            f"not see what is computed here, got one inside of {watching}"
        )


def is_tensor(name: str, value: Any, rank: int, shape: str) -> torch.Tensor:
    """A tensor of this rank whose last dimension is dense, in plain memory; see `is_plain`."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {describe(value)}")
    value = is_plain(name, value)
    if value.is_meta:
        raise ValueError(f"{name}: expected a tensor with numbers in it, got {describe(value)}")
    if value.dim() != rank:
        raise ValueError(f"{name}: expected a tensor {shape}, got {describe(value)}")
    if value.stride(-1) != 1 and value.shape[-1] > 1:
        raise ValueError(
            f"{name}: expected a dense last dimension, got strides {list(value.stride())}; "
            f"{name}.contiguous() gives one"
        )
    return value


def is_out(name: str, value: Any, rank: int, shape: str) -> torch.Tensor:
    """`is_tensor` for one that is written: the very memory that was given."""
    out = is_tensor(name, value, rank, shape)
    if out is not value:
        raise ValueError(
            f"{name}: expected a tensor that is written as it is, got one that torch negates when "
            f"it reads it; {name}.resolve_neg() gives one"
        )
    return out


def carries_tangents() -> bool:
    """Whether forward-mode differentiation goes on."""
    return forward_ad._current_level >= 0


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
    # Tangents travel also where no gradients are recorded.
    if carries_tangents() and forward_ad.unpack_dual(value).tangent is not None:
        raise RuntimeError(
            f"{name}: expected a tensor without a tangent, got a dual one; attention over segments "
            "has no derivative, give it forward_ad.unpack_dual(...).primal"
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
        value = is_plain(name, value)
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
