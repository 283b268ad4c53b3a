"""Counts what the attention kernels do, without a GPU: `python bench/counted_work.py`.

Two sources, named with each figure. nvcc's PTX is run on the emulated GPU (tests/emulator), which
counts sectors, wavefronts, tensor-core instructions and warp instructions as they are executed.
And the main loop is read in the machine code that ptxas makes for sm_90, where an instruction is
one issue slot. Nothing here is a time.

    main loop     what one more key costs, all rows of a pass together: the difference of two runs
                  that differ in the segment's length only
    fixed cost    what a block costs beside its keys, and what each further segment costs at equal
                  keys, with a partial result of its own. Moves between registers, of which PTX is
                  full and ptxas leaves few, are told apart

Prints tables of Markdown, with the limit beside each figure, and ends in 1 if one is exceeded.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from emulated import Heads, Work, attend, make_tables
from kernels import kernels, main_loop

HEADS = Heads("bfloat16", dim=128, kv_heads=8, group=5)  # Qwen's 40 query heads
PASS = 64  # rows that share one pass over the keys, at most

MOST_INSTRUCTIONS = {1: 14, 2: 20, 4: 34}  # a key and KV head, by 16-row tiles of a pass; SASS
MOST_SECTORS = 16.4  # a key, KV head and pass; 16 is keys and values once
MOST_WAVEFRONTS = 1.05  # of the least possible
MOST_FIXED, MOST_A_SEGMENT = 3000, 600  # warp instructions, up to 32 rows
LEAST_BLOCKS, FROM_TOKENS = 128, 2048

# ---- tables -----------------------------------------------------------------------------------

exceeded = False


def limited(figure: float, limit: float, at_least: bool = False) -> str:
    """The figure, the limit beside it, and a mark if it is exceeded."""
    global exceeded
    good = figure >= limit if at_least else figure <= limit
    exceeded |= not good
    number = f"{figure:.2f}" if figure < 100 else f"{figure:,.0f}"
    return f"{number} ({'>=' if at_least else '<='} {limit:,g}){'' if good else ' **exceeded**'}"


def row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |")


def head(*cells: str) -> None:
    row(*cells)
    row(*("---" for _ in cells))


def instructions_of_main_loop() -> dict[int, float]:
    """By 16-row tiles of a block: SASS instructions per key, all warps of the block."""
    return {
        kernel.row_tiles: main_loop(kernel).instructions_per_key
        for kernel in kernels([90], ["attention_bf16.cu"])
        if kernel.dim == HEADS.dim
    }


def print_main_loop() -> None:
    print("## Main loop, per key and KV head, all workers together\n")
    sass = instructions_of_main_loop()
    head("workers", "rows", "instructions (SASS)", "the same (PTX)", "mma", "load sectors",
         "shared wavefronts", "of the least possible")  # fmt: skip
    for workers in (1, 2, 3, 4, 6, 8, 12, 16, 32):
        rows = workers * HEADS.group
        short, long = (attend(HEADS, workers, [n]) for n in (33 * 512, 33 * 1024))
        assert short.blocks == long.blocks

        def marginal(name: str, short: Work = short, long: Work = long) -> float:
            return float(getattr(long, name) - getattr(short, name)) / (long.keys - short.keys)

        passes = -(-rows // PASS)
        # All passes but the last have 64 rows.
        last = -(-(rows - (passes - 1) * PASS) // 16)
        tiles = 4 if passes > 1 or last > 2 else last
        row(
            workers,
            rows,
            limited(sass[tiles] * passes, MOST_INSTRUCTIONS[tiles] * passes),
            f"{marginal('instructions'):.2f}",
            f"{marginal('mma'):.2f}",
            limited(marginal("sectors"), MOST_SECTORS * passes),
            f"{marginal('wavefronts'):.2f}",
            limited(marginal("wavefronts") / marginal("least_wavefronts"), MOST_WAVEFRONTS),
        )


def print_fixed_cost() -> None:
    print("\n## Fixed cost, warp instructions (PTX)\n")
    head("rows", "a block with one segment", "each further segment", "both without moves")
    # So many KV heads that each has one block, which takes all segments.
    one_block = replace(HEADS, kv_heads=1056)
    for workers in (1, 3, 4, 6):
        chunks = 33  # blocks of a head
        short, long = (attend(HEADS, workers, [chunks * n]) for n in (512, 1024))
        one, eight = (attend(one_block, workers, [512 // n] * n) for n in (1, 8))
        assert short.blocks == long.blocks and one.blocks == eight.blocks

        def costs(name: str, runs: tuple[Work, ...] = (short, long, one, eight)) -> list[float]:
            a, b, c, d = (getattr(work, name) / work.blocks for work in runs)
            return [2 * a - b, (d - c) / 7]

        block, segment = costs("instructions")
        without_moves = ", ".join(f"{cost:,.0f}" for cost in costs("computing"))
        row(
            workers * HEADS.group,
            limited(block, MOST_FIXED),
            limited(segment, MOST_A_SEGMENT),
            without_moves,
        )


def print_blocks() -> None:
    print(f"\n## Blocks of a launch, {HEADS.kv_heads} KV heads\n")
    head("tokens in one segment", "1 worker", "4 workers", "16 workers")
    for tokens in (512, 1024, 2048, 3000, 4096, 8192, 16384, 65536, 1 << 20):
        blocks = [
            make_tables(HEADS, workers, [tokens]).num_items * HEADS.kv_heads
            for workers in (1, 4, 16)
        ]
        row(
            f"{tokens:,}",
            *(
                limited(n, LEAST_BLOCKS, at_least=True) if tokens >= FROM_TOKENS else n
                for n in blocks
            ),
        )


def main() -> int:
    print(f"{HEADS.dtype}, head dimension {HEADS.dim}, {HEADS.group} query heads a KV head,")
    print(f"{HEADS.kv_heads} KV heads, pages, one rotation of the queries a segment. PTX and SASS")
    print("of nvcc for sm_90.\n")
    print_main_loop()
    print_fixed_cost()
    print_blocks()
    return int(exceeded)


if __name__ == "__main__":
    sys.exit(main())
