"""Linear layers of a step with packed weights: read once, in order, for all rows together.

With the few rows of a decoding step, torch's linear layers lose what sharing gains. In float32, MKL
takes twice as long for 4 rows as for 1; bfloat16, on a CPU without instructions for it, takes as
many times as long as there are rows. csrc/cpu/linear.h takes the time of reading the weights until
arithmetic is the limit.
"""

from __future__ import annotations

import sys
from collections import Counter
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

_WORD = 4  # bytes, of which fingerprints are made
_SAMPLE = 64  # words
_LOOKS_AT_ALL = 16  # every so many steps
# Of a weight's memory: the weight, `_source`, and torch's Python object for it.
_OUR_USES = 3
_OUR_REFERENCES = 2  # to a weight while it is looked at, beside those of its modules


class PackedWeight:
    """A copy of a linear layer's weight [outputs, inputs], packed for `_C.linear`.

    Copies and pickles of one are None: whoever has them packs anew.
    """

    def __init__(self, weight: Tensor) -> None:
        # Shares memory with the weight, so that no other tensor can come to lie there.
        self._source = weight.detach()
        self._storage = self._source.untyped_storage()._cdata
        self._version = _version(weight)
        self._dtype = weight.dtype
        self._words = weight.nbytes // _WORD
        self._all = self._fingerprint(1)
        self._sampled = self._fingerprint(self._sample_step)
        self._looks = 0
        self.code = checks.DTYPE_CODES[weight.dtype]
        self.outputs, self.inputs = weight.shape
        self.most_rows = most_rows(weight.dtype)
        unit = 4 // weight.element_size()  # inputs that share 32 bits
        whole = pad(self._source, (0, 0, 0, -self.outputs % _C.LINEAR_PANEL))
        blocks = whole.reshape(-1, _SIDE_BY_SIDE, self.inputs // unit, unit)
        self.data = blocks.transpose(1, 2).contiguous()

    def is_of(self, weight: Tensor, may_have_changed: bool) -> bool:
        """Whether the weight is what it was when it was packed.

        Looks at all of it if it may have changed, or somebody has a tensor that shares its memory;
        and now and then in any case. Else at a sample.
        """
        if not (
            weight.data_ptr() == self._source.data_ptr()
            and _version(weight) == self._version
            and weight.dtype == self._dtype
        ):
            return False
        self._looks += 1
        if (
            may_have_changed
            or torch._C._storage_Use_Count(self._storage) > _OUR_USES
            or self._looks % _LOOKS_AT_ALL == 0
        ):
            return self._fingerprint(1) == self._all
        return self._fingerprint(self._sample_step) == self._sampled

    @property
    def _sample_step(self) -> int:
        # Odd, and so not always in the same columns.
        return max(1, self._words // _SAMPLE) | 1

    def _fingerprint(self, step: int) -> int:
        number: int = _C.fingerprint(
            self._source.data_ptr(), self._words, step, torch.get_num_threads()
        )
        return number

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
        and weight.is_contiguous()
        and weight.shape[1] * weight.element_size() % 4 == 0
        and checks.has_memory(weight)
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
    one after the weight has changed. What is compared:

    - in every step the weight's place, type and version, which torch counts up when it writes;
    - all its numbers, if since the last step somebody has asked the layer for its weight, or has it
      still, or has a tensor or array that shares its memory: so writing through `weight.data`, as
      when PEFT merges adapters, or by a fused optimiser, is noticed;
    - else a sample of 64 words in every step, and all numbers in every 16th.

    So there is one way to change a weight and see the old one for up to 15 more steps: writing a
    few single numbers through `.data` or numpy to what `model.parameters()` or `state_dict()` gave,
    keeping nothing of it. After `patch(model, linear="packed")`, again, the next step compares all.
    """

    in_step: Callable[[], bool]
    packed: PackedWeight | None
    asked: bool  # for the weight, since the last step
    owners: int  # modules that hold the weight

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        if not torch.compiler.is_compiling():
            self.__dict__["asked"] = True
        return self._parameters["weight"]  # type: ignore[return-value]

    def forward(self, input: Tensor) -> Tensor:
        weight: Any = self._parameters["weight"]
        bias = self.bias
        if torch.compiler.is_compiling() or not self.in_step():
            return nn.functional.linear(input, weight, bias)
        held = sys.getrefcount(weight) > self.owners + _OUR_REFERENCES
        asked, self.__dict__["asked"] = self.asked, False
        packed = self.packed
        if packed is None or not packed.is_of(weight, asked or held):
            # accelerate brings weights in for each call, and packing takes longer than a call.
            if not can_pack(weight) or hasattr(self, "_hf_hook"):
                self.packed = None
                return nn.functional.linear(input, weight, bias)
            self.packed = packed = PackedWeight(weight)
        rows = input.numel() // packed.inputs
        if (
            rows > packed.most_rows
            or input.shape[-1] != packed.inputs  # which torch refuses, in its own words
            or input.dtype is not weight.dtype
            or torch.is_autocast_enabled("cpu")
            or not checks.has_memory(input)
            or (bias is not None and not (bias.dtype is weight.dtype and checks.has_memory(bias)))
        ):
            return nn.functional.linear(input, weight, bias)
        x = input.float().contiguous()
        out = input.new_empty((*input.shape[:-1], packed.outputs))
        _C.linear(
            packed.code, rows, packed.inputs, packed.outputs, x.data_ptr(), packed.data.data_ptr(),
            0 if bias is None else bias.data_ptr(), out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out


def pack_layers(model: nn.Module, in_step: Callable[[], bool]) -> None:
    """Makes the model's linear layers use packed weights while `in_step` says so."""
    owners = Counter(
        id(parameter) for module in model.modules() for parameter in module._parameters.values()
    )
    for layer in _layers(model):
        layer.owners = owners[id(layer._parameters["weight"])]
        layer.in_step, layer.packed, layer.asked = in_step, None, False
        layer.__class__ = StepLinear


def compare_all(model: nn.Module) -> None:
    """Lets the next step compare all numbers of all weights with those that were packed."""
    for layer in _layers(model):
        if type(layer) is StepLinear:
            layer.asked = True


def unpack_layers(model: nn.Module) -> None:
    """Takes back what `pack_layers` did, however far it went, and releases the packed weights."""
    for layer in _layers(model):
        layer.__class__ = nn.Linear
        for name in ("in_step", "packed", "asked", "owners"):
            vars(layer).pop(name, None)


def _layers(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if type(module) in (nn.Linear, StepLinear))
