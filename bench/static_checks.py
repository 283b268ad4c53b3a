"""Checks what ptxas made of the kernels: `python bench/static_checks.py [--archs 80,90]`.

Compiles every kernel for every architecture (half a minute each), reads registers, memory and
machine code, and prints a table of Markdown. A cell that breaks a rule is bold, and then the
command ends in 1. Needs nvcc and nvdisasm (pip install nvidia-cuda-nvdisasm), no GPU.

    all kernels        no spills, no local memory
    attention          shared memory of a block: MOST_SHARED; at least 8 warps on a multiprocessor
                       up to head dimension 128, one block beyond; copies to shared memory in the
                       background and 16-byte accesses
    its main loop      no bank conflicts, counted on the emulated GPU
    on tensor cores    mma and ldmatrix, and no local memory in between
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable

from emulated import Heads, attend
from kernels import ARCHITECTURES, Kernel, kernels

# KB a block, by architecture: up to 32 rows, and 64 rows. Beyond head dimension 128 and where no
# number is, all that a block can have.
MOST_SHARED = {80: (81, 99), 86: (49, 99), 89: (49, 99), 120: (49, 99)}
ALL_OF_IT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
LEAST_WARPS = 8


def most_shared(kernel: Kernel) -> int:
    """KB of shared memory that a block may take."""
    if kernel.dim > 128 or kernel.architecture not in MOST_SHARED:
        return ALL_OF_IT[kernel.architecture]
    return MOST_SHARED[kernel.architecture][kernel.row_tiles > 2]


def needed_opcodes(kernel: Kernel) -> dict[str, bool]:
    """What must stand in the machine code, and whether it does."""
    opcodes = kernel.code.opcodes()

    def has(name: str, modifier: str = "") -> bool:
        return any(o.split(".")[0] == name and modifier in o for o in opcodes)

    needed = {"LDGSTS.128": has("LDGSTS", "128"), "16-byte loads": has("LDS", "128")}
    if kernel.what == "attend":
        needed |= {"HMMA": has("HMMA"), "LDSM": has("LDSM"), "16-byte loads": has("LDG", "128")}
    return needed


def conflicts(dtype: str, dim: int, row_tiles: int) -> float:
    """Passes of shared memory in the main loop, as a multiple of the least possible."""
    heads = Heads(dtype, dim, kv_heads=66, group=16 * row_tiles)
    # Four chunks, and then the same four with longer runs of whole tiles.
    short, long = (attend(heads, 1, [4 * 64 * tiles]) for tiles in (4, 6))
    assert short.blocks == long.blocks
    return (long.wavefronts - short.wavefronts) / (long.least_wavefronts - short.least_wavefronts)


class Table:
    """Prints Markdown; remembers whether a cell was bad."""

    def __init__(self, *columns: str) -> None:
        self.bad = False
        self._print(columns)
        self._print(["---"] * len(columns))

    def _print(self, cells: Iterable[str]) -> None:
        print("| " + " | ".join(cells) + " |", flush=True)

    def row(self, *cells: object) -> None:
        """Cells are (text, good) or just text."""
        texts = []
        for cell in cells:
            text, good = cell if isinstance(cell, tuple) else (cell, True)
            self.bad |= not good
            texts.append(str(text) if good else f"**{text}**")
        self._print(texts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", default=",".join(map(str, ARCHITECTURES)))
    architectures = [int(a) for a in parser.parse_args().archs.split(",")]
    if unknown := set(architectures) - set(ARCHITECTURES):
        parser.error(f"--archs: expected some of {ARCHITECTURES}, got {sorted(unknown)}")
    all_kernels = kernels(architectures)

    found: dict[tuple[str, int, int], float] = {}
    for k in all_kernels:
        key = k.dtype, k.dim, k.row_tiles
        if k.is_attention and key not in found:
            found[key] = conflicts(*key)

    table = Table(
        "kernel", "dtype", "dim", "rows", "sm", "registers", "spills, stack", "shared KB a block",
        "warps an SM", "conflicts", "machine code",
    )  # fmt: skip
    for k in sorted(all_kernels, key=lambda k: (k.what, k.dtype, k.dim, k.row_tiles)):
        local = [o for o in k.code.opcodes() if o.split(".")[0] in ("LDL", "STL")]
        memory = (f"{k.spills}, {k.stack}", not (k.spills or k.stack or local))
        cells: list[object] = [k.what, k.dtype, k.dim or "any"]
        if not k.is_attention:
            table.row(*cells, "", k.architecture, k.registers, memory, "", "", "", "")
            continue
        shared = k.shared / 1024
        warps = k.blocks * k.warps
        least = LEAST_WARPS if k.dim <= 128 else k.warps
        opcodes = needed_opcodes(k)
        missing = [name for name, there in opcodes.items() if not there]
        conflict = found[k.dtype, k.dim, k.row_tiles]
        table.row(
            *cells,
            16 * k.row_tiles,
            k.architecture,
            k.registers,
            memory,
            (f"{shared:.1f} of {most_shared(k)}", shared <= most_shared(k)),
            (f"{warps} ({k.blocks} x {k.warps})", warps >= least),
            (f"{conflict:.3f}", conflict <= 1),
            ("lacks " + ", ".join(missing), False) if missing else ", ".join(opcodes),
        )
    print(f"\n{len(all_kernels)} kernels, {'with breaches' if table.bad else 'no breach'}.")
    return int(table.bad)


if __name__ == "__main__":
    sys.exit(main())
