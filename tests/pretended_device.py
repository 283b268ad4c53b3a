"""Pretended devices, `pretended:0` and `pretended:1`, whose memory is the CPU's.

What a machine without a GPU cannot see otherwise: an operation on tensors of two devices raises, as
it does on a GPU, and only a copy gets from one to the other. So code that moves tensors to a device
and back can be tested without one. `tensor_there(t)` is what lies in the memory.

It stands on a function of torch's that is not public; `start` raises ImportError where it has gone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

KIND = "pretended"
COUNT = 2
_COPIES = {"aten::copy_", "aten::_to_copy"}
_kept: list[Any] = []  # a library's implementations go with the last reference to it


def tensor_there(tensor: Tensor) -> Tensor:
    """The CPU's tensor behind one of a pretended device."""
    if not isinstance(tensor, _Pretended):
        raise AssertionError(f"expected a tensor of a pretended device, got one on {tensor.device}")
    return tensor.there


def start() -> None:
    """Makes torch know the devices; once in a process."""
    if _kept:
        return
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(KIND, backend_module=_Module())
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    _kept.append(library)


class _Module:
    """What torch asks of a kind of device."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return COUNT

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None: ...


class _Pretended(torch.Tensor):
    there: Tensor

    @staticmethod
    def __new__(cls, there: Tensor, device: torch.device) -> _Pretended:
        tensor: _Pretended = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            there.shape,
            strides=there.stride(),
            storage_offset=there.storage_offset(),
            dtype=there.dtype,
            device=device,
        )
        tensor.there = there
        return tensor

    def data_ptr(self) -> int:
        return self.there.data_ptr()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"<{self.there} on {self.device}>"

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        # One of the CPU's without dimensions stands for a number, and goes with any device.
        places = {tensor.device for tensor in tensors if tensor.dim() or isinstance(tensor, cls)}
        name = function._schema.name
        if len(places) > 1 and name not in _COPIES:
            raise RuntimeError(
                f"{name}: expected tensors of one device, got {sorted(map(str, places))}"
            )
        asked = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
        target = asked[0] if asked else next(x.device for x in tensors if isinstance(x, cls))
        args, kwargs = tree_map_only(cls, tensor_there, (args, kwargs))
        args, kwargs = tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs))
        result = function(*args, **kwargs)
        if name.endswith("_"):  # in place: what came in goes out
            return leaves[0]
        if target.type != KIND:
            return result
        return tree_map_only(Tensor, lambda there: cls(there, target), result)


def _place(device: torch.device | None) -> torch.device:
    return torch.device(KIND, (device.index if device is not None else None) or 0)


def _empty(size: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return _Pretended(torch.empty(size, dtype=dtype, device="cpu"), _place(device))


def _empty_strided(
    size: Any, stride: Any, *, dtype: Any = None, device: Any = None, **_: Any
) -> Tensor:
    return _Pretended(torch.empty_strided(size, stride, dtype=dtype, device="cpu"), _place(device))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    def behind(tensor: Tensor) -> Tensor:
        return tensor.there if isinstance(tensor, _Pretended) else tensor

    behind(target).copy_(behind(source))
    return target
