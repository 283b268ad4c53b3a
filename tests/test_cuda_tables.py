"""How a step's work is cut for a GPU. The tables are made on the CPU, in every build."""

from __future__ import annotations

import numpy as np
import pytest

from hogwild_ext import _C

HIDDEN = -(2**31)


def make_tables(
    lengths: list[int],
    workers: int = 1,
    kv_heads: int = 8,
    group: int = 5,
    offsets: np.ndarray | None = None,
) -> _C.cuda.Tables:
    """Every worker brings one token and, unless told otherwise, sees all segments."""
    if offsets is None:
        offsets = np.tile(np.cumsum(lengths[::-1])[::-1] - 1, (workers, 1))
    plan = _C.Plan(
        offsets.astype(np.int32),
        np.array(lengths, np.int32),
        np.ones(workers, np.int32),
        np.ones(32, np.float32),
        group,
        kv_heads,
        row_group=64,
    )
    return _C.cuda.Tables(plan, kv_heads)


@pytest.mark.parametrize("workers", [1, 4, 13])
@pytest.mark.parametrize(
    "lengths",
    [
        [2048],
        [2049],
        [2112],  # 33 tiles, 34 and 67: just past a size of passes
        [2176],
        [4288],
        [65536],
        [1500, *[100] * 5, 48],
        [700, 700, 648],
        [32] * 64,
        [1] * 2048,
    ],
)
def test_a_large_gpu_is_busy_from_2048_tokens_on(lengths: list[int], workers: int) -> None:
    tables = make_tables(lengths, workers)
    assert tables.num_items * 8 >= 128


@pytest.mark.parametrize(
    ("lengths", "most"),
    [([16384], 33), ([256] * 64, 33), ([16] * 1000, 33), ([1] * 200, 34), ([128] * 4, 4)],
)
def test_short_neighbours_share_a_pass(lengths: list[int], most: int) -> None:
    """Partial results are about as many as of one segment, however it is cut."""
    assert make_tables(lengths).num_passes <= most


def test_a_long_segment_does_not_lose_its_passes_to_short_ones() -> None:
    alone = make_tables([16384]).num_passes
    assert alone <= make_tables([16384, *[30] * 8]).num_passes <= alone + 4


def test_what_nobody_sees_is_in_no_pass() -> None:
    lengths = [64] * 20
    everything = make_tables(lengths, kv_heads=264)  # one pass for as many keys as there are
    assert everything.num_passes == 1
    offsets = np.full((1, 20), HIDDEN)
    assert make_tables(lengths, kv_heads=264, offsets=offsets).num_passes == 0
    offsets[0, 7] = 63
    assert make_tables(lengths, kv_heads=264, offsets=offsets).num_passes == 1


def test_results_that_are_not_merged_need_little_room() -> None:
    tables = make_tables([16] * 1000, workers=4)
    assert tables.workspace_floats(8, 128) <= 33 * 20 * 8 * (128 + 2)
