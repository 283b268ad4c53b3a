"""The kernels of csrc/cuda as ptxas makes them: one `Kernel` for each instantiation and
architecture, with what the compiler and the launcher take for it."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import sass

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from emulator import build  # noqa: E402

TILE = 64  # keys
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
STORAGE = {"8BFloat16": "bfloat16", "7Float16": "float16", "7Float32": "float32"}
# Of a multiprocessor: shared memory in KB, threads, blocks. 64 Ki registers everywhere.
PROCESSORS = {
    80: (164, 2048, 32),
    86: (100, 1536, 16),
    89: (100, 1536, 24),
    90: (228, 2048, 32),
    100: (228, 2048, 32),
    120: (100, 1536, 24),
}
REGISTERS = 64 * 1024

# Prints what the launcher asks for: kind, dimension, row tiles, architecture, shared
# memory in bytes, threads.
SHAPES = r"""
#include <cstdio>
#include "attention.cuh"
#include "attention_f32.cuh"
using namespace hogwild::cuda;
template <int D, int ROW_TILES> void print() {
  using S = Shape<D, ROW_TILES>;
  for (int a : {80, 86, 89, 90, 100, 120})
    std::printf("half %d %d %d %d %d\n", D, ROW_TILES, a, S::shared_bytes(S::ring(a)), S::THREADS);
}
template <int D> void print_f32() {
  for (int a : {80, 86, 89, 90, 100, 120})
    std::printf("f32 %d 1 %d %d %d\n", D, a, ShapeF32<D>::shared_bytes(), ShapeF32<D>::THREADS);
}
int main() {
  print<64, 1>(); print<64, 2>(); print<64, 4>(); print<96, 1>(); print<96, 2>(); print<96, 4>();
  print<128, 1>(); print<128, 2>(); print<128, 4>(); print<256, 1>(); print<256, 2>();
  print_f32<64>(); print_f32<96>(); print_f32<128>(); print_f32<256>();
}
"""


@dataclass(frozen=True)
class Kernel:
    """An instantiation for one architecture."""

    architecture: int
    what: str  # attend, attend_f32, merge, append, move
    dtype: str
    dim: int  # 0: any
    row_tiles: int  # of 16 rows; 0: not attention
    registers: int
    stack: int  # bytes of local memory a thread
    spills: int  # bytes
    shared: int  # bytes a block
    threads: int  # of a block
    code: sass.Kernel

    @property
    def is_attention(self) -> bool:
        return self.what.startswith("attend")

    @property
    def warps(self) -> int:
        """Of a block."""
        return self.threads // 32

    @property
    def blocks(self) -> int:
        """That a multiprocessor holds at once."""
        shared, threads, blocks = PROCESSORS[self.architecture]
        warp_registers = -(-self.registers * 32 // 256) * 256
        return min(
            blocks,
            threads // self.threads,
            REGISTERS // warp_registers // self.warps,
            shared * 1024 // (self.shared + 1024),  # 1 KB of each block is the system's
        )


@dataclass(frozen=True)
class MainLoop:
    """One turn of the loop over whole tiles of keys, as a warp runs it."""

    turn: list[sass.Instruction]
    tiles: int  # of a turn
    warps: int

    @property
    def instructions_per_key(self) -> float:
        """Of all warps of the block."""
        return len(self.turn) * self.warps / (self.tiles * TILE)


def main_loop(kernel: Kernel) -> MainLoop:
    """The loop of an attention kernel on the tensor cores."""
    rows = kernel.row_tiles * 16
    # m16n8k16: scores of 64 keys over D, then D values over 64 keys, shared by the warps.
    mma = 2 * rows * TILE * kernel.dim // (16 * 8 * 16) // kernel.warps
    loop = sass.innermost_loop(kernel.code, Counter(HMMA=mma, LDGSTS=2))
    turn = sass.usual_path(kernel.code, *loop, "LDGSTS")
    tiles, rest = divmod(sum(i.name == "HMMA" for i in turn), mma)
    if tiles < 1 or rest:
        raise ValueError(f"{kernel.code.name}: {len(turn)} instructions are not whole tiles")
    return MainLoop(turn, tiles, kernel.warps)


def kernels(
    architectures: Sequence[int] = ARCHITECTURES, sources: Sequence[str] = ()
) -> list[Kernel]:
    """All kernels, or those of some sources. Compiles them: half a minute an architecture."""
    paths = [p for p in sorted((build.CSRC / "cuda").glob("*.cu")) if "__global__" in _text(p)]
    if sources:
        paths = [p for p in paths if p.name in sources]
    jobs = [(path, a) for a in architectures for path in paths]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        shapes = _shapes(Path(folder))
        parts = pool.map(lambda job: _compile(*job, Path(folder), shapes), jobs)
        return [kernel for part in parts for kernel in part]


def _text(path: Path) -> str:
    """A source with the headers that it includes."""
    return "".join(p.read_text() for p in build.with_includes(path))


def _shapes(folder: Path) -> dict[tuple[str, int, int, int], tuple[int, int]]:
    source, program = folder / "shapes.cu", folder / "shapes"
    source.write_text(SHAPES)
    command = [str(build.find_nvcc()), "-std=c++17", "--expt-relaxed-constexpr", "-arch=sm_80"]
    command += [f"-I{build.CSRC / 'cuda'}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    shapes = {}
    for line in lines.splitlines():
        kind, *numbers = line.split()
        dim, tiles, architecture, shared, threads = map(int, numbers)
        shapes[kind, dim, tiles, architecture] = shared, threads
    return shapes


def _compile(
    source: Path,
    architecture: int,
    folder: Path,
    shapes: dict[tuple[str, int, int, int], tuple[int, int]],
) -> list[Kernel]:
    cubin = folder / f"{source.stem}.{architecture}.cubin"
    command = [str(build.find_nvcc()), *build.KERNEL_FLAGS, "-Xptxas", "-v", "-cubin"]
    command += [f"-arch=sm_{architecture}", str(source), "-o", str(cubin)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    usage = {
        name: tuple(map(int, numbers))
        for name, *numbers in re.findall(
            r"Function properties for (\S+)\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, "
            r"(\d+) bytes spill loads\n.*?Used (\d+) registers",
            said,
        )
    }
    found = []
    for code in sass.disassemble(cubin):
        named = re.search(r"4cuda\d+(\w+?)_kernelI(?:NS0_(\d\w+?)E)?((?:Li\d+E)*)", code.name)
        if not named:
            raise ValueError(f"{source.name}: what is the kernel {code.name}?")
        what, storage, numbers = named.groups()
        dim, tiles = [*map(int, re.findall(r"\d+", numbers)), 0, 0][:2]
        stack, stores, loads, registers = usage[code.name]
        shared, threads = 0, 128
        if what.startswith("attend"):
            tiles = tiles or 1
            kind = "f32" if what == "attend_f32" else "half"
            shared, threads = shapes[kind, dim, tiles, architecture]
        dtype = STORAGE[storage] if storage else "float32"
        resources = (registers, stack, stores + loads, shared, threads)
        found.append(Kernel(architecture, what, dtype, dim, tiles, *resources, code))
    return found
