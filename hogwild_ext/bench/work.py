"""What the GPU's kernels do for one layer of a step, counted from the step's tables.

Nothing is run: a step's tables (csrc/cuda/tables.h) name every block's rows and keys, and what a
block loads, stores and multiplies follows from them. The counts are those of the hardware's own
counters: sectors of 32 bytes for each instruction of a warp, and m16n8k16 products. The tests hold
them against kernels that run on the emulated GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .. import _C, checks
from ..backends import PlanInput
from ..ops import view_offsets
from .grid import Cell

SECTOR = 32  # bytes
ELEMENT_SIZE = 2  # of what the tensor cores take
WARP = 32
TILE = _C.PAGE_SIZE
WRITES_OUTPUT, FOLDS, STORES = 0, 1, 2

Array = np.ndarray[Any, Any]

# ---- tables, as csrc/cuda/tables.h lays them out ----------------------------------------------

_ARRAYS = (
    "items", "merges", "rows", "passes", "offsets", "tile_pages", "segments", "slots",
    "offset_angles", "token_angles", "key_angles",
)  # fmt: skip
_HEADER = np.dtype(
    [(name, "<i4") for name in (
        "num_items", "num_merges", "num_segments", "num_tokens", "half_rotary", "slot_rows"
    )] + [("window", "<i8")] + [(name, "<i4") for name in _ARRAYS]
)  # fmt: skip


def _ints(*names: str) -> np.dtype[Any]:
    return np.dtype([(name, "<i4") for name in names])


_ITEM = _ints(
    "pass_begin", "pass_end", "row_begin", "row_count", "slot_row", "what", "worker_tokens",
    "reserved",
)  # fmt: skip
_MERGE = _ints("row_begin", "row_count", "slot_row", "num_slots")
_ROW = _ints("worker", "token", "index", "head")
_PASS = np.dtype(
    [(name, "<i4") for name in (
        "segment", "begin", "end", "tile", "first_tile", "end_tile", "whole_begin", "whole_end"
    )] + [("seen_by", "<u8"), ("padding", "<u8")]
)  # fmt: skip


@dataclass(frozen=True)
class StepTables:
    """A step's tables for the CUDA kernels."""

    header: Any
    items: Array  # of one KV head, as merges
    merges: Array
    rows: Array
    passes: Array
    most_rows: int

    @staticmethod
    def parse(tables: _C.cuda.Tables) -> StepTables:
        data = tables.bytes
        header = np.frombuffer(data, _HEADER, 1)[0]

        def array(name: str, dtype: Any, count: int) -> Array:
            return np.frombuffer(data, dtype, count, header[name])

        items = array("items", _ITEM, header["num_items"])
        rows = int((items["row_begin"] + items["row_count"]).max(initial=0))
        passes = array("passes", _PASS, int(items["pass_end"].max(initial=0)))
        return StepTables(
            header,
            items,
            array("merges", _MERGE, header["num_merges"]),
            array("rows", _ROW, rows),
            passes,
            tables.most_rows,
        )


def step_tables(cell: Cell) -> StepTables:
    """The tables of a cell's step on a segment cache."""
    layout, heads = cell.layout(), cell.heads
    lengths = np.array(layout.lengths, np.int32)
    brought = np.array(layout.query_lengths, np.int32)
    tiles = -(-lengths // TILE)
    first_tile = np.cumsum(tiles) - tiles
    own = np.array([view[-1] for view in layout.views])
    start = (lengths[own] - brought).astype(np.int32)
    places = np.concatenate([np.arange(s, s + n) for s, n in zip(start, brought, strict=True)])
    slots = np.repeat(first_tile[own], brought) * TILE + places
    code = checks.DTYPE_CODES[getattr(torch, cell.dtype)]
    plan = PlanInput(
        view_offsets(layout.views, lengths, brought).numpy(),
        lengths,
        brought,
        np.zeros(heads.head_dim // 2, np.float32),  # the angles are not looked at
        heads.num_heads // heads.kv_heads,
        heads.kv_heads,
        0,
        start,
        np.arange(tiles.sum(), dtype=np.int32),
        slots.astype(np.int32),
        packed=True,
    ).plan(_C.cuda.row_group(code, heads.head_dim))
    return StepTables.parse(_C.cuda.Tables(plan, heads.kv_heads))


# ---- kernels, as csrc/cuda/attention.cuh shapes them ------------------------------------------


@dataclass(frozen=True)
class AttentionKernel:
    """One instantiation of the attention kernel, for half precision."""

    head_dim: int
    row_tiles: int  # of 16 rows, in a block

    @staticmethod
    def of(head_dim: int, most_rows: int) -> AttentionKernel:
        """The one that is launched for a step with items of at most so many rows."""
        tiles = 1 if most_rows <= 16 else 2 if most_rows <= 32 or head_dim > 128 else 4
        return AttentionKernel(head_dim, tiles)

    @property
    def warps(self) -> int:
        return 8 if self.row_tiles == 4 else 4

    def shared_bytes(self, shared_of_processor: int) -> int:
        """Dynamic shared memory of a block, on a GPU with so many bytes a multiprocessor."""
        rows, dim = 16 * self.row_tiles, self.head_dim
        others = 2 * rows * (dim + TILE) + 56 * rows
        for blocks in (2, 1):  # a multiprocessor; the longest ring of tiles that leaves the room
            for ring in (4, 3, 2):
                size = ring * TILE * 2 * dim + others
                if size <= shared_of_processor // blocks - 1024:
                    return size
        raise ValueError(f"no ring of tiles fits into {shared_of_processor} bytes")

    def blocks_at_once(self, shared_of_processor: int) -> int:
        """Blocks of a multiprocessor, as far as shared memory and __launch_bounds__ say."""
        fit = shared_of_processor // (self.shared_bytes(shared_of_processor) + 1024)
        bound = 1 if self.head_dim > 128 or self.warps == 8 else 3 if self.row_tiles == 1 else 2
        return min(fit, bound)


# ---- counting ---------------------------------------------------------------------------------

SMALL_WARPS = 4  # of a block of the append and merge kernels

# Sectors of the small tables (header, items, passes, pages, limits) that a warp loads, as runs of
# the kernels show: few beside the keys and values. Only these, and where the statistics of partial
# results begin within a sector, are not exact.
_BLOCK_LOADS, _PASS_LOADS, _TILE_LOADS = 16, 16, 1
_OUTPUT_LOADS = 6  # for each row that a block writes
_APPEND_LOADS, _APPEND_ROW_LOADS = 3, 4  # of a warp in any block, and of one with dimensions to do
_MERGE_LOADS, _MERGE_ROW_LOADS = 5, 6  # of a warp in any block, and in one with a row to do


@dataclass(frozen=True)
class Counts:
    """What one launch does, all its blocks together."""

    blocks: int
    load_sectors: int
    store_sectors: int
    mma: int = 0


@dataclass(frozen=True)
class ItemWork:
    """What a block of the attention kernel does."""

    tiles: int  # of keys, and as many of values
    kv_rows: int
    passes: int
    segments: int  # that the queries are rotated for
    load_sectors: int
    store_sectors: int
    partial_rows: int  # rows of its partial results that hold something when it ends
    mma: int
    keys: tuple[tuple[int, int, int], ...]  # (segment, begin, end) of what is loaded


def count_item(tables: StepTables, kernel: AttentionKernel, item: Any) -> ItemWork:
    """The work of one item, for one KV head."""
    rows = tables.rows[item["row_begin"] : item["row_begin"] + item["row_count"]]
    passes = tables.passes[item["pass_begin"] : item["pass_end"]]
    dim = kernel.head_dim
    begin = passes["begin"] + passes["first_tile"] * TILE
    end = np.minimum(passes["begin"] + passes["end_tile"] * TILE, passes["end"])
    tiles = int((passes["end_tile"] - passes["first_tile"]).sum())
    kv_rows = int((end - begin).sum())

    row = np.arange(len(rows), dtype=np.uint64)
    sees = (passes["seen_by"][None] >> row[:, None] & np.uint64(1)).astype(bool)  # [rows, passes]
    seeing = sees.sum(axis=0)
    seen_so_far = np.maximum.accumulate(sees, axis=1).sum(axis=0)
    row_sectors = dim * 4 // SECTOR  # of a partial result
    statistics = -(-len(rows) * 8 // SECTOR)
    what = int(item["what"])
    if what == STORES:
        partial_rows = int(seeing.sum())
        stores = partial_rows * row_sectors + len(passes) * statistics
        folds = 0
    else:
        kept = len(passes) - (what == WRITES_OUTPUT)  # all but a last one that is written
        partial_rows = int(seen_so_far[-1:].sum()) * (what == FOLDS)
        stores = int(seen_so_far[:kept].sum()) * row_sectors + max(0, kept) * statistics
        folds = int(seen_so_far[:-1].sum()) * row_sectors
        if what == WRITES_OUTPUT:
            stores += len(rows) * dim // 8  # 16 bytes of a row at a time

    segments = int(np.count_nonzero(np.diff(passes["segment"], prepend=-1)))
    loads = 2 * kv_rows * dim * ELEMENT_SIZE // SECTOR + folds
    loads += segments * _query_sectors(rows, dim, int(item["worker_tokens"]))
    loads += -(-len(rows) * 16 // SECTOR) + (what == WRITES_OUTPUT) * len(rows) * _OUTPUT_LOADS
    loads += kernel.warps * (_BLOCK_LOADS + len(passes) * _PASS_LOADS + tiles * _TILE_LOADS)
    return ItemWork(
        tiles,
        kv_rows,
        len(passes),
        segments,
        loads,
        stores,
        partial_rows,
        tiles * kernel.row_tiles * dim,
        tuple(zip(passes["segment"].tolist(), begin.tolist(), end.tolist(), strict=True)),
    )


def _query_sectors(rows: Array, dim: int, worker_tokens: int) -> int:
    """Sectors for rotating the queries once: themselves, and the angles of workers and tokens,
    which rows that a warp does together share."""
    together = 2 if dim == 96 else WARP * 8 // dim  # 4 dimensions and their partners a lane
    warp = np.arange(len(rows)) // together

    def distinct(numbers: Array) -> int:
        return len(np.unique(warp * (int(numbers.max()) + 1) + numbers))

    angles = distinct(rows["worker"])
    if worker_tokens > 1:
        angles += distinct(rows["token"])
    return len(rows) * dim * ELEMENT_SIZE // SECTOR + angles * dim * 4 // SECTOR


# ---- a layer ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepBytes:
    """What a layer has to move at least."""

    cache: int  # keys and values of all segments, once
    operands: int  # queries, outputs, new keys and values as they come
    partial: int  # partial results, which are written and read

    @property
    def total(self) -> int:
        return self.cache + self.operands + 2 * self.partial


def step_bytes(cell: Cell, tables: StepTables) -> StepBytes:
    """The bytes of one layer of a cell's step."""
    heads, size = cell.heads, getattr(torch, cell.dtype).itemsize
    layout, dim = cell.layout(), heads.head_dim
    return StepBytes(
        2 * sum(layout.lengths) * heads.kv_heads * dim * size,
        sum(layout.query_lengths) * 2 * (heads.num_heads + heads.kv_heads) * dim * size,
        int(tables.header["slot_rows"]) * heads.kv_heads * (dim + 2) * 4,
    )


@dataclass(frozen=True)
class LayerWork:
    """What one layer of a step does: append, attention and, where work was split, merge."""

    kernel: AttentionKernel
    kv_heads: int
    items: list[ItemWork]  # of one KV head, in the order in which they start
    append: Counts
    attention: Counts
    merge: Counts | None
    merged_rows: int  # rows that the merge writes
    merged_slots: int  # partial results of single rows that it folds
    bytes: StepBytes

    @property
    def launches(self) -> list[Counts]:
        return [self.append, self.attention, *([self.merge] if self.merge else [])]

    @property
    def tiles(self) -> int:
        """Loads of a tile's keys and values, all KV heads together."""
        return self.kv_heads * sum(item.tiles for item in self.items)


def check(cell: Cell) -> None:
    """Raises ValueError for a cell that the tensor cores have no kernel for, or whose context is
    too short."""
    if cell.dtype == "float32":
        raise ValueError("dtype: expected bfloat16 or float16 for the model, got float32")
    dim = cell.heads.head_dim
    if not _C.cuda.has_head_dim(dim):
        raise ValueError(f"heads: expected a head dimension that GPUs have kernels for, got {dim}")
    cell.layout()


def count_layer(cell: Cell) -> LayerWork:
    """Counts one layer of a cell's step, through `Step.attend`. Raises ValueError as `check`."""
    check(cell)
    kv_heads, dim = cell.heads.kv_heads, cell.heads.head_dim
    tables = step_tables(cell)
    kernel = AttentionKernel.of(dim, tables.most_rows)
    items = [count_item(tables, kernel, item) for item in tables.items]
    merges = tables.merges
    return LayerWork(
        kernel,
        kv_heads,
        items,
        _count_append(int(tables.header["num_tokens"]) * kv_heads, dim),
        Counts(
            len(items) * kv_heads,
            kv_heads * sum(item.load_sectors for item in items),
            kv_heads * sum(item.store_sectors for item in items),
            kv_heads * sum(item.mma for item in items),
        ),
        _count_merge(tables, items, kv_heads, dim) if len(merges) else None,
        kv_heads * int(merges["row_count"].sum()),
        kv_heads * int((merges["row_count"] * merges["num_slots"]).sum()),
        step_bytes(cell, tables),
    )


def _count_append(blocks: int, dim: int) -> Counts:
    """A block a token and KV head; a warp takes 32 dimensions of a key, of its partners in the
    rotation, of the two angles and of the value."""
    row, angles = dim * ELEMENT_SIZE // SECTOR, dim * 4 // SECTOR
    small = SMALL_WARPS * _APPEND_LOADS + min(SMALL_WARPS, dim // WARP) * _APPEND_ROW_LOADS
    return Counts(blocks, blocks * (3 * row + 2 * angles + small), blocks * 2 * row)


def _count_merge(tables: StepTables, items: list[ItemWork], kv_heads: int, dim: int) -> Counts:
    """A block for each row; all its warps read the statistics of every partial result."""
    merges = tables.merges
    rows = int(merges["row_count"].sum())
    slots = int((merges["row_count"] * merges["num_slots"]).sum())
    blocks = len(merges) * tables.most_rows
    results = sum(item.partial_rows for item in items) * dim * 4 // SECTOR
    small = slots + rows * _MERGE_ROW_LOADS + blocks * _MERGE_LOADS
    return Counts(
        blocks * kv_heads,
        kv_heads * (results + SMALL_WARPS * small),
        kv_heads * rows * dim * ELEMENT_SIZE // SECTOR,
    )
