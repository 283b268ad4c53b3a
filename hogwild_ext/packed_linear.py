"""Linear layers of a step with packed weights: read once, in order, for all rows together.

With the few rows of a decoding step, torch's linear layers lose what sharing gains. In float32, MKL
takes twice as long for 4 rows as for 1; bfloat16, on a CPU without instructions for it, takes as
many times as long as there are rows. csrc/cpu/linear.h takes the time of reading the weights until
arithmetic is the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from . import _C, checks

_SIDE_BY_SIDE = 16  # outputs; see csrc/cpu/linear.h
# Rows from which torch is faster where the CPU has matrix (AMX) or dot-product instructions for a
# dtype. Without them ours are as fast as torch's or faster with any number.
_MOST_ROWS_MATRIX = 12
_MOST_ROWS_DOT = 32
_MOST_ROWS_BASELINE = 2  # vectors of 4 floats without fused multiply-add
_NO_LIMIT = 2**31


class PackedWeight:
    """A copy of a linear layer's weight [outputs, inputs], packed for `_C.linear`.

    Copies and pickles of one are None: whoever has them packs anew.
    """

    def __init__(self, weight: Tensor) -> None:
        # Shares memory with the weight, so that no other tensor can come to lie there.
        self._source = weight.detach()
        self._version = _version(weight)
        self._dtype = weight.dtype
        self.code = checks.DTYPE_CODES[weight.dtype]
        self.outputs, self.inputs = weight.shape
        self.most_rows = most_rows(weight.dtype)
        unit = 4 // weight.element_size()  # inputs that share 32 bits
        whole = pad(self._source, (0, 0, 0, -self.outputs % _C.LINEAR_PANEL))
        blocks = whole.reshape(-1, _SIDE_BY_SIDE, self.inputs // unit, unit)
        self.data = blocks.transpose(1, 2).contiguous()

    def is_of(self, weight: Tensor) -> bool:
        """Whether the weight is what it was when it was packed."""
        return (
            weight.data_ptr() == self._source.data_ptr()
            and _version(weight) == self._version
            and weight.dtype == self._dtype
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def can_pack(weight: Tensor) -> bool:
    """Whether `PackedWeight` takes such a weight."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in checks.DTYPE_CODES
        and weight.numel() > 0
        and weight.shape[1] * weight.element_size() % 4 == 0
    )


def most_rows(dtype: torch.dtype) -> int:
    """With how many rows, at most, packed weights are faster than torch on this CPU."""
    if _C.isa() == "baseline":
        return _MOST_ROWS_BASELINE
    if dtype is torch.float32:
        return _NO_LIMIT
    # Private names of torch. Where they are gone, long prompts may take longer than they must.
    bfloat16 = dtype is torch.bfloat16
    matrix = "_is_amx_tile_supported" if bfloat16 else "_is_amx_fp16_supported"
    if getattr(torch.cpu, matrix, bool)():
        return _MOST_ROWS_MATRIX
    if bfloat16 and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)():
        return _MOST_ROWS_DOT
    return _NO_LIMIT


def _version(weight: Tensor) -> int:
    """Counts changes in place; tensors made in inference mode don't."""
    return 0 if weight.is_inference() else weight._version


class StepLinear(nn.Linear):
    """A linear layer that, within a step, multiplies by a packed copy of its weight.

    A model's own `nn.Linear` become this by `pack_layers`, with everything that they hold; outside
    of a step they compute what they did. The copy is made in the first step, and again in the first
    one after the weight was replaced or written to. (What is written through `weight.data` cannot
    be noticed; nor can writing to a weight that was made in inference mode.)
    """

    in_step: Callable[[], bool]
    packed: PackedWeight | None

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not self.in_step():
            return super().forward(input)
        weight, bias = self.weight, self.bias
        packed = self.packed
        if packed is None or not packed.is_of(weight):
            # accelerate brings weights in for each call, and packing takes longer than a call.
            if not can_pack(weight) or hasattr(self, "_hf_hook"):
                self.packed = None
                return super().forward(input)
            self.packed = packed = PackedWeight(weight)
        rows = input.numel() // packed.inputs
        if (
            rows > packed.most_rows
            or input.shape[-1] != packed.inputs  # which torch refuses, in its own words
            or input.dtype is not weight.dtype
            or torch.is_autocast_enabled("cpu")
            or (bias is not None and bias.dtype is not weight.dtype)
        ):
            return super().forward(input)
        x = input.float().contiguous()
        out = input.new_empty((*input.shape[:-1], packed.outputs))
        _C.linear(
            packed.code, rows, packed.inputs, packed.outputs, x.data_ptr(), packed.data.data_ptr(),
            0 if bias is None else bias.data_ptr(), out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out


def pack_layers(model: nn.Module, in_step: Callable[[], bool]) -> None:
    """Makes the model's linear layers use packed weights while `in_step` says so."""
    for layer in _layers(model):
        layer.in_step, layer.packed = in_step, None
        layer.__class__ = StepLinear


def unpack_layers(model: nn.Module) -> None:
    """Takes back what `pack_layers` did, however far it went, and releases the packed weights."""
    for layer in _layers(model):
        layer.__class__ = nn.Linear
        for name in ("in_step", "packed"):
            vars(layer).pop(name, None)


def _layers(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if type(module) in (nn.Linear, StepLinear))
