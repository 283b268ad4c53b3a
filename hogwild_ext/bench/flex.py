"""torch's FlexAttention, which is made at run time and cannot be made on every machine.

python -m hogwild_ext.bench.flex     makes one for the CPU; its last line says why not
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import torch
from torch import Tensor

MOST_KERNELS = 256
PROBE_SECONDS = 120


def compiled() -> Any:
    """flex_attention for shapes that change from call to call."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def first_call(function: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    """Compiles for these inputs. More kernels are kept than torch keeps by itself: past its limit
    it would compute without a kernel, or give up."""
    with torch._dynamo.config.patch(recompile_limit=MOST_KERNELS):
        out: Tensor = function(query, key, value, block_mask=mask, enable_gqa=True)
    return out


def lower_right(new: int, context: int) -> Any:
    """The mask under which the last of `new` queries sees all keys, the one before it one less."""
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query + (context - new)

    return create_block_mask(sees, None, None, new, context, device="cpu")


def why_not(seconds: float = PROBE_SECONDS) -> str:
    """Why this machine cannot compile it, tried in a process of its own; empty if it can."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", __spec__.name], capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return f"compiling took more than {seconds:.0f} s"
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return f"does not compile: {lines[-1][:120] if lines else f'status {done.returncode}'}"


def _probe() -> None:
    query, key, value = (torch.randn(2, heads, 64, 64) for heads in (2, 1, 1))
    function = compiled()
    try:
        with torch.inference_mode():
            first_call(function, query, key, value, lower_right(64, 64))
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")


if __name__ == "__main__":
    _probe()
