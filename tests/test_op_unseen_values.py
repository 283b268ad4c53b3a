"""Values that a row does not see, beside those that it does: in recycled pages, and in segments
that share a tile with its own. A weight of zero would not hide what is not a number."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import hogwild_ext as hx
from compare import assert_same_bits
from op_cases import DTYPES, random_case

pytestmark = pytest.mark.usefixtures("one_thread")

KV_HEADS, DIM = 2, 64


def attended(
    lengths: list[int], dtype: torch.dtype, before: float, window: int | None, seed: int
) -> torch.Tensor:
    """Out of a worker that reads segments of these lengths, in pages that held `before`."""
    generator = torch.Generator().manual_seed(seed)
    cache = hx.SegmentCache(
        1, KV_HEADS, DIM, inv_freq=[], max_tokens=64 * (len(lengths) + 3), dtype=dtype,
        window=window,
    )  # fmt: skip
    for storage in (*cache._keys, *cache._values):
        storage.fill_(before)
    segments = [cache.segment(f"segment {s}") for s in range(len(lengths))]
    for segment, length in zip(segments, lengths, strict=True):
        key, value = torch.randn(2, length, KV_HEADS, DIM, generator=generator).to(dtype)
        with cache.step([[segment]], [length]) as step:
            step.attend(0, key, key, value)
    query, key, value = torch.randn(3, 2, KV_HEADS, DIM, generator=generator).to(dtype)
    with cache.step([[*segments, cache.segment("own")]], [2]) as step:
        return step.attend(0, query, key, value)


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("before", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_page_held_before_is_nobodys(
    dtype: torch.dtype, before: float, window: int | None, seed: int
) -> None:
    """Behind segments of any length, odd ones too: there half a word is theirs."""
    for lengths in ([n] for n in (1, 2, 3, 15, 16, 17, 33, 62, 63, 64, 65, 127)):
        clean = attended(lengths, dtype, 0.0, window, seed)
        assert clean.isfinite().all()
        assert_same_bits(attended(lengths, dtype, before, window, seed), clean, f"{lengths}")


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("before", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_short_segments_pages_held_before_is_nobodys(
    dtype: torch.dtype, before: float, window: int | None, seed: int
) -> None:
    """Of so many that they share tiles."""
    for lengths in ([1] * 33, [5, 2, 3, 7] * 5, [31] * 16):
        clean = attended(lengths, dtype, 0.0, window, seed)
        assert clean.isfinite().all()
        assert_same_bits(attended(lengths, dtype, before, window, seed), clean, f"{lengths}")


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [3, 40, 100])
def test_values_of_a_shared_tile_reach_only_rows_that_see_their_segment(
    window: int, dtype: torch.dtype, poison: float, generator: torch.Generator
) -> None:
    """Tokens of one worker, from which a window hides more and more of the segments."""
    lengths, tokens = [5, 2, 3, 7] * 8, 12
    views = [list(range(len(lengths)))] * 2
    case = random_case(generator, dtype, views, lengths, [tokens, 3], window=window)
    case = replace(case, offsets=[[offset + w for offset in row] for w, row in
                                  enumerate(case.offsets)])  # fmt: skip
    out, lse = case.run()
    for segment in (0, 11, len(lengths) - 2):
        values = [v.clone() for v in case.values]
        values[segment][:] = poison
        bad, bad_lse = replace(case, values=values).run()
        assert_same_bits(bad_lse, lse, "lse")
        clean = 0
        for w, brought in enumerate((tokens, 3)):
            for i in range(brought):
                position = case.offsets[w][segment] + i
                if position - (lengths[segment] - 1) >= window or position < 0:
                    assert_same_bits(bad[w, i], out[w, i], f"segment {segment}, row {w}, {i}")
                    clean += 1
        assert clean or window == 100
