"""What torch.compile must run as it is.

Steps and caches change themselves and hand addresses to kernels: traced, they would be recorded
once, with the numbers of that once. torch.compiler.disable says so too, but it takes half a
microsecond a call, and a second at import, where it loads torch's compiler.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from types import FunctionType
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def never_compiled(what: T) -> T:
    """Decorates a function, or a class for all its methods: compiled callers call it, uncompiled.

    Where torch's compiler meets the call it ends a graph; nor does it look at what runs inside.
    """
    for function in _functions(what):
        # As torch.compiler.disable marks its wrappers, here without a wrapper.
        function.__dict__.update(
            _torchdynamo_disable=True,
            _torchdynamo_disable_msg="it runs a step or changes a cache",
            _torchdynamo_disable_recursive=True,
        )
        _skip(function.__code__)
    return what


def _functions(what: Any) -> list[FunctionType]:
    if inspect.isfunction(what):
        return [what]
    members = []
    for member in vars(what).values():
        if isinstance(member, property):
            members += [member.fget, member.fset]
        else:
            members.append(getattr(member, "__func__", member))
    return [member for member in members if inspect.isfunction(member)]


def _skip(code: Any) -> None:
    """Lets the interpreter's frames of this code, and all below them, pass by torch's compiler."""
    frames = torch._C._dynamo.eval_frame
    with suppress(AttributeError, TypeError):  # private names; before torch 2.7 there were none
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(code, frames._FrameExecStrategy(skip, skip))
