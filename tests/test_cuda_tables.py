"""How a step's work is cut for a GPU. The tables are made on the CPU, in every build."""

from __future__ import annotations

import numpy as np
import pytest

from hogwild_ext import _C

HIDDEN = -(2**31)
HIDDEN_LENGTH = 500


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


def test_items_are_as_many_as_the_gpu_wants_of_many_segments() -> None:
    """A thousand short segments are not a thousand blocks a head, each with a handful of keys."""
    assert make_tables([16] * 1000).num_items * 8 <= 1056
    assert make_tables([HIDDEN_LENGTH] * 3, offsets=np.full((1, 3), HIDDEN)).num_items == 1
