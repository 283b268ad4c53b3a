"""How long a layer would take at least on a named GPU: a model, not a measurement.

Blocks start in order, as many at a time as fit on the multiprocessors (a wave). A wave takes as
long as the slowest of three: its bytes at the memory's rate, its instructions at the issue rate of
the multiprocessors that have a block, its products at the tensor cores' rate. Each launch adds a
fixed cost. Latency, the filling of pipelines and the L2 cache's own rate are not in it, so that a
GPU can only be slower.
"""

from __future__ import annotations

from dataclasses import dataclass

from .work import ELEMENT_SIZE, TILE, LayerWork

LAUNCH_SECONDS = 2.5e-6  # of a kernel behind another one on the same stream: an assumption
ISSUED_A_CLOCK = 4  # warp instructions of a multiprocessor
MMA_FLOP = 2 * 16 * 8 * 16


@dataclass(frozen=True)
class Gpu:
    """Figures that NVIDIA publishes."""

    title: str
    multiprocessors: int
    shared_bytes: int  # of a multiprocessor
    bytes_per_second: float  # of memory
    clock: float  # Hz, boost
    tensor_flops: float  # dense bfloat16 with float32 sums


# mma.sync reaches about two thirds of a Hopper's rate and less of a Blackwell's, whose full rates
# are those of newer instructions; for attention of few rows that is not the limit.
GPUS = {
    "h100": Gpu("H100 SXM", 132, 228 * 1024, 3.35e12, 1.83e9, 989e12),
    "a100": Gpu("A100 SXM 80 GB", 108, 164 * 1024, 2.039e12, 1.41e9, 312e12),
    "l40s": Gpu("L40S", 142, 100 * 1024, 0.864e12, 2.52e9, 362e12),
    "4090": Gpu("RTX 4090", 128, 100 * 1024, 1.008e12, 2.52e9, 165.2e12),
    "b200": Gpu("B200", 148, 228 * 1024, 8.0e12, 1.85e9, 2250e12),
}


@dataclass(frozen=True)
class Instructions:
    """Warp instructions of an attention block, for one KV head."""

    token: float  # for each key and value loaded
    run: float  # for each run of keys: rotating the queries, filling the ring, storing the result


# By (head_dim, row tiles). Of a token: the main loop as ptxas makes it for sm_90 (see
# bench/counted_work.py). Of a run: what else a block with one run does, in PTX without moves
# between registers, three quarters of its rows in use.
INSTRUCTIONS = {
    (64, 1): Instructions(9.44, 2000),
    (64, 2): Instructions(13.9, 2600),
    (64, 4): Instructions(26.8, 5300),
    (96, 1): Instructions(10.3, 2300),
    (96, 2): Instructions(15.3, 3300),
    (96, 4): Instructions(29.0, 6500),
    (128, 1): Instructions(12.0, 2400),
    (128, 2): Instructions(17.4, 3300),
    (128, 4): Instructions(32.9, 6600),
    (256, 1): Instructions(16.4, 3200),
    (256, 2): Instructions(25.8, 4500),
}
APPEND_BLOCK = 620  # warp instructions of the PTX
MERGE_ROW, MERGE_SLOT = 700, 150


@dataclass(frozen=True)
class Estimate:
    """What the model says of one layer."""

    seconds: float
    limit: str  # what most of the time goes to: memory, issue, tensor or launches
    waves: int
    instructions: int


def estimate(work: LayerWork, gpu: Gpu) -> Estimate:
    """The time of one layer on a GPU."""
    limits = dict.fromkeys(("memory", "issue", "tensor"), 0.0)
    instructions = 0.0

    def take(blocks: int, moved: float, issued: float, mma: float) -> None:
        nonlocal instructions
        instructions += issued
        used = min(blocks, gpu.multiprocessors)
        times = {
            "memory": moved / gpu.bytes_per_second,
            "issue": issued / (used * ISSUED_A_CLOCK * gpu.clock),
            "tensor": mma * MMA_FLOP / (gpu.tensor_flops * used / gpu.multiprocessors),
        }
        limit = max(times, key=lambda name: times[name])
        limits[limit] += times[limit]

    append = work.append
    new_bytes = 2 * append.blocks * 2 * work.kernel.head_dim * ELEMENT_SIZE
    take(append.blocks, new_bytes, append.blocks * APPEND_BLOCK, 0)
    waves = _waves(work, gpu)
    for wave in waves:
        take(*wave)
    if work.merge:
        issued = work.merged_rows * MERGE_ROW + work.merged_slots * MERGE_SLOT
        take(work.merge.blocks, work.bytes.partial, issued, 0)
    launches = len(work.launches) * LAUNCH_SECONDS
    shares = {**limits, "launches": launches}
    return Estimate(
        sum(shares.values()), max(shares, key=lambda name: shares[name]), len(waves),
        round(instructions),
    )  # fmt: skip


def _waves(work: LayerWork, gpu: Gpu) -> list[tuple[int, float, float, float]]:
    """(blocks, bytes from memory, instructions, products) of the attention kernel's waves."""
    kernel, kv_heads = work.kernel, work.kv_heads
    at_once = gpu.multiprocessors * kernel.blocks_at_once(gpu.shared_bytes)
    costs = INSTRUCTIONS[kernel.head_dim, kernel.row_tiles]
    key_bytes = 2 * kernel.head_dim * ELEMENT_SIZE  # of a key and its value
    blocks = work.attention.blocks
    # Queries, outputs and partial results are few bytes: each block has its share of them.
    others = (work.bytes.operands + work.bytes.partial) / max(1, blocks)
    waves = []
    for first in range(0, blocks, at_once):
        last = min(first + at_once, blocks)
        moved = others * (last - first)
        issued = mma = 0.0
        read: dict[tuple[int, int, int], int] = {}  # blocks of a wave meet in the L2 cache
        for i in range(first // kv_heads, -(-last // kv_heads)):
            item = work.items[i]
            heads = min(last, (i + 1) * kv_heads) - max(first, i * kv_heads)
            for keys in item.keys:
                read[keys] = max(read.get(keys, 0), heads)
            issued += heads * (item.tiles * TILE * costs.token + item.passes * costs.run)
            mma += heads * item.mma
        moved += key_bytes * sum((end - begin) * heads for (_, begin, end), heads in read.items())
        waves.append((last - first, moved, issued, mma))
    return waves
