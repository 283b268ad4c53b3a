"""Attention on the emulated GPU (sm_90), one launch at a time, and what it counted.

To be imported before hogwild_ext.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from emulator import build, session

EMULATED = session.start(90)

import torch  # noqa: E402

from hogwild_ext import _C  # noqa: E402
from hogwild_ext.backends import PlanInput  # noqa: E402

CODES = {"float32": _C.FLOAT32, "float16": _C.FLOAT16, "bfloat16": _C.BFLOAT16}


@dataclass(frozen=True)
class Heads:
    dtype: str
    dim: int
    kv_heads: int
    group: int  # query heads of a KV head


@dataclass(frozen=True)
class Work:
    """Of one launch of the attention kernel: totals over all blocks."""

    blocks: int
    passes: int  # of all blocks
    keys: int  # times KV heads
    instructions: int  # of warps
    computing: int  # the same without moves between registers
    sectors: int
    wavefronts: int
    least_wavefronts: int
    mma: int


@cache
def _lines_of_moves(kernel: str) -> list[int]:
    """Lines of the PTX that move a register to another one, from 0."""
    move = re.compile(r"\s*(?:@\S+\s+)?mov\.\w+\s+%[a-z]+\d+, %[a-z]+\d+;")
    for path in build.build(90).ptx:
        text = path.read_text()
        if f".entry {kernel}(" in text:
            return [n for n, line in enumerate(text.split("\n")) if move.match(line)]
    raise ValueError(f"no PTX of {kernel}")


def _moves(kernel: str) -> int:
    """So many of them have run so far."""
    counts = EMULATED.engine.line_counts(kernel)
    return sum(counts[n + 1] for n in _lines_of_moves(kernel) if n + 1 < len(counts))


def make_plan(heads: Heads, workers: int, lengths: Sequence[int]) -> _C.Plan:
    """Every worker brings one token and sees all segments, whose pages lie anywhere."""
    tiles = sum(-(-n // _C.PAGE_SIZE) for n in lengths)
    offsets = np.tile(np.cumsum(lengths[::-1])[::-1] - 1, (workers, 1)).astype(np.int32)
    layout = PlanInput(
        offsets=offsets,
        lengths=np.array(lengths, np.int32),
        query_lengths=np.ones(workers, np.int32),
        inv_freq=(1e6 ** (-np.arange(0, heads.dim, 2) / heads.dim)).astype(np.float32),
        group=heads.group,
        kv_heads=heads.kv_heads,
        window=0,
        tile_pages=np.random.default_rng(0).permutation(tiles).astype(np.int32),
        packed=True,
    )
    return layout.plan(_C.cuda.row_group(CODES[heads.dtype], heads.dim))


def make_tables(heads: Heads, workers: int, lengths: Sequence[int]) -> _C.cuda.Tables:
    return _C.cuda.Tables(make_plan(heads, workers, lengths), heads.kv_heads)


def attend(heads: Heads, workers: int, lengths: Sequence[int]) -> Work:
    """What attention does for one layer, without the merge. Raises if the sanitizer objects."""
    dtype, code = getattr(torch, heads.dtype), CODES[heads.dtype]
    plan = make_plan(heads, workers, lengths)
    tables = _C.cuda.Tables(plan, heads.kv_heads)
    data = torch.frombuffer(bytearray(tables.bytes), dtype=torch.uint8)
    tiles = sum(-(-n // _C.PAGE_SIZE) for n in lengths)
    shape = (2, tiles, heads.kv_heads, _C.PAGE_SIZE, heads.dim)
    keys, values = torch.zeros(shape, dtype=dtype)
    num_heads = heads.kv_heads * heads.group
    query = torch.zeros(workers, num_heads, heads.dim, dtype=dtype)
    out = torch.empty_like(query)
    workspace = torch.empty(max(1, tables.workspace_floats(heads.kv_heads, heads.dim)))

    def spans(*tensors: torch.Tensor) -> list[tuple[int, int]]:
        return [(t.data_ptr(), t.nbytes) for t in tensors]

    engine, runtime = EMULATED.engine, EMULATED.runtime
    with engine.calling(spans(data, keys, values, query), spans(out, workspace)):
        runtime.clear_calls()
        _C.cuda.attend(
            tables, data.data_ptr(), code, num_heads, heads.kv_heads, heads.dim,
            (query.data_ptr(), 0, *query.stride()[:2]), keys.data_ptr(), values.data_ptr(),
            (out.data_ptr(), 0, *out.stride()[:2]), 0, 0, workspace.data_ptr(),
            heads.dim**-0.5, 1.0, False, 0.0, 0,
        )  # fmt: skip
        attention = next(call for call in runtime.calls() if call.is_launch)
        engine.clear_counters()
        before = _moves(attention.name)
        runtime.replay([attention])  # once more, by itself
        counted = engine.counters()
        moves = _moves(attention.name) - before
    return Work(
        blocks=attention.grid[0],
        passes=sum(map(len, plan.visits)) * heads.kv_heads,
        keys=sum(lengths) * heads.kv_heads,
        instructions=counted.warp_instructions,
        computing=counted.warp_instructions - moves,
        sectors=counted.load_sectors,
        wavefronts=counted.wavefronts,
        least_wavefronts=counted.least_wavefronts,
        mma=counted.mma,
    )
