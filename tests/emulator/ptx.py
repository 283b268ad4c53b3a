"""Small kernels written as PTX text, run on numpy arrays. Need neither nvcc nor a runtime."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from .build import build_engine
from .engine import Engine, Finding

Array = NDArray[np.generic]

HEADER = ".version 8.0\n.target sm_90\n.address_size 64\n"
REGISTERS = """
.reg .pred %p<16>;
.reg .b16 %h<16>;
.reg .b32 %r<32>;
.reg .f32 %f<32>;
.reg .b64 %d<32>;
.reg .b64 %array<8>;
.reg .b32 %thread, %block;
"""
# Where findings say that a body stands: each of its lines is one of the source.
SOURCE = "body.ptx"


@cache
def engine() -> Engine:
    """The one engine of this process."""
    return Engine(ctypes.CDLL(str(build_engine())))


def kernel(body: str, arrays: int = 0, more_params: str = "", declarations: str = "") -> str:
    """A module with one kernel, `kernel`. Its body finds the addresses of the arrays in %array0,
    %array1, ..., the thread's number in the grid in %thread, and that of the block in %block."""
    params = [f".param .u64 array{n}" for n in range(arrays)] + ([more_params] * bool(more_params))
    lines = "\n".join(
        f".loc 1 {number} 0\n{line}" for number, line in enumerate(body.strip().split("\n"), 1)
    )
    addresses = "".join(f"ld.param.u64 %array{n}, [array{n}];\n" for n in range(arrays))
    return f"""{HEADER}.file 1 "{SOURCE}"
{declarations}
.visible .entry kernel({", ".join(params)})
{{{REGISTERS}{addresses}
mov.u32 %block, %ctaid.x;
mov.u32 %thread, %tid.x;
mov.u32 %r31, %ntid.x;
mad.lo.s32 %thread, %block, %r31, %thread;
{lines}
ret;
}}
"""


def load(text: str) -> None:
    """Lowers and loads. Raises ValueError for what is not understood."""
    engine().know(text)
    engine().load("kernel")


def run(
    body: str,
    arrays: Sequence[Array] = (),
    *,
    uninitialised: Sequence[Array] = (),
    grid: int = 1,
    block: int = 32,
    shared: int = 0,
    more_params: Sequence[tuple[str, bytes]] = (),
    declarations: str = "",
) -> list[Finding]:
    """Runs a kernel on `arrays`, and on `uninitialised` after them; what was found in it."""
    everything = [*arrays, *uninitialised]
    params = ", ".join(declaration for declaration, _ in more_params)
    load(kernel(body, len(everything), params, declarations))
    for array in everything:
        known = not any(array is other for other in uninitialised)
        engine().register(array.ctypes.data, array.nbytes, known)
    values = [array.ctypes.data.to_bytes(8, "little") for array in everything]
    values += [value for _, value in more_params]
    engine().clear_findings()
    engine().clear_counters()
    try:
        engine().launch("kernel", (grid,), (block,), values, shared)
    finally:
        for array in everything:
            engine().unregister(array.ctypes.data)
        found = engine().findings()
        engine().clear_findings()
    return found


def dynamic_shared(name: str = "memory") -> str:
    return f".extern .shared .align 128 .b8 {name}[];"


def line_of(body: str, statement: str) -> str:
    """Where a finding says that this statement of a body stands."""
    lines = [n for n, line in enumerate(body.strip().split("\n"), 1) if statement in line]
    assert len(lines) == 1, f"{statement!r} stands in {len(lines)} lines"
    return f"{SOURCE}:{lines[0]}"


def aligned(values: Array) -> Array:
    """A copy that begins where a GPU's memory would: at a multiple of 256 bytes."""
    room = np.empty(values.nbytes + 256, np.uint8)
    start = -room.ctypes.data % 256
    copy = room[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy
