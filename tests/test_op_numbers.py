"""Numbers at the edge: scores, scales, softcaps, frequencies, values and lengths of any size."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import hogwild_ext as hx
from compare import assert_close, assert_lse_matches, assert_same_bits
from hogwild_ext import _C
from op_cases import DTYPES, HIDDEN, ON_A_GPU, Case, pooled_errors, random_case

pytestmark = pytest.mark.usefixtures("one_thread")

LONGEST = 2**31 - 1
LARGEST = {dtype: torch.finfo(dtype).max for dtype in DTYPES}


def assert_at_most_twice_the_eager_error(*cases: Case, floor: float = 0.0) -> None:
    """Errors of all cases together, by norm."""
    ours, eager = pooled_errors(cases)
    # Half a unit in the last place is lost by storing the output, however lucky eager was.
    limit = 2 * eager + torch.finfo(cases[0].query.dtype).eps / 2 + floor
    assert ours <= limit, f"ours {ours:.3g}, eager {eager:.3g}"


# Scores -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("deviation", [600.0, 1000.0, 4000.0, 30000.0])
def test_scores_of_any_deviation(
    deviation: float, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Random scores that no short type holds: real models have them."""
    loud = deviation**0.5
    cases = []
    for _ in range(3):
        case = random_case(
            generator, dtype, [[0, 1, 2], [1, 2, 0]], [300, 129, 64], [9, 9], dim=64, kv_heads=2
        )
        case = replace(case, query=case.query * loud, keys=[key * loud for key in case.keys])
        out, lse = case.run()
        _, expected = case.reference()
        assert out.isfinite().all()
        slack = max(torch.finfo(dtype).eps, 1e-6) * expected.abs() + 2e-2
        assert ((lse.double() - expected).abs() < slack).all()
        cases.append(case)
    # float32: eager rounds nothing but the sums that make a score, and takes shorter ones.
    assert_at_most_twice_the_eager_error(*cases, floor=deviation * 2.0**-23)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", [1e5, -1e5, 3e6, 6e7, -6e7])
def test_equal_scores_of_any_size(
    score: float, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """All keys weigh the same: the mean, whatever rounds a large score."""
    case = random_case(generator, dtype, [[0, 1], [1, 0]], [130, 70], [3, 2], rotary_dim=0)
    loud = (abs(score) / 8) ** 0.5  # 64 dims, scale 1/8
    sign = 1.0 if score > 0 else -1.0
    case = replace(
        case,
        query=torch.full_like(case.query, loud),
        keys=[torch.full_like(key, sign * loud) for key in case.keys],
    )
    out, lse = case.run()
    expected, expected_lse = case.reference()
    assert_close(out, expected, relative=max(torch.finfo(dtype).eps, 2e-6))
    assert_lse_matches(lse, expected_lse, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_rise_and_fall_between_tiles(dtype: torch.dtype, generator: torch.Generator) -> None:
    """Each tile's scores thousands above or below those before it: nothing that was summed with a
    smaller maximum is left, and nothing of a lower tile gets in."""
    for steps in ([0, 3, -5, 9, 2, 11], [4, -4, 4, -4], [-9, -8, -7, -6], [9, 8, 7]):
        length = 64 * len(steps)
        case = random_case(generator, dtype, [[0]] * 3, [length], [1, 2, 3], rotary_dim=0)
        tile = torch.tensor(steps).repeat_interleave(64)[:, None]
        keys = case.keys[0].clone()
        keys[..., 0] = (1000 * tile).to(dtype)
        query = case.query.clone()
        query[..., 0] = torch.tensor([8.0, 7.5, -8.0]).to(dtype)[:, None, None]
        case = replace(case, keys=[keys], query=query)
        # Scores reach 11,000, and the last place of one counts.
        assert_at_most_twice_the_eager_error(case, floor=11000 * 2.0**-23)


def test_float32_scores_that_overflow(generator: torch.Generator) -> None:
    """Infinite scores give nan as in any softmax; those at minus infinity weigh nothing."""
    case = random_case(generator, torch.float32, [[0], [0]], [70], [1, 1], rotary_dim=0)
    query = torch.zeros_like(case.query)
    query[0, ..., 0], query[1, ..., 0] = 1e30, -1e30
    keys = case.keys[0].clone()
    keys[..., 0] = 0.0
    keys[33, :, 0] = 1e30
    out, lse = replace(case, query=query, keys=[keys]).run()
    assert out[0].isnan().all() and lse[0].isnan().all()
    others = torch.arange(70) != 33
    expected = case.values[0][others].double().mean(dim=0).repeat_interleave(3, dim=0)
    assert_close(out[1, 0], expected, relative=1e-5)
    assert_close(lse[1], torch.full_like(lse[1], math.log(69)).double(), relative=1e-5)


# Scale and softcap --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-45, 1e-38, -1e-38, 1e-30, 1e4, -1e4])
def test_any_scale(scale: float, dtype: torch.dtype, generator: torch.Generator) -> None:
    case = random_case(generator, dtype, [[0, 1], [1]], [130, 9], [3, 1], scale=scale, window=100)
    out, _ = case.run()
    assert out.isfinite().all()
    if abs(scale) < 1:  # else a row is a lottery of its largest scores
        assert_at_most_twice_the_eager_error(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "loud"), [(1e30, 1e-30), (1e34, 1e-34), (1e-36, 1e36)])
def test_a_scale_that_keys_make_up_for(
    scale: float, loud: float, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """The score is ordinary, though the query times the scale is not."""
    case = random_case(generator, dtype, [[0, 1], [1]], [130, 9], [3, 1], scale=scale / 8)
    case = replace(case, keys=[key * loud for key in case.keys])
    assert_at_most_twice_the_eager_error(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cap", [1e-50, 1e-45, 1e-39, 1e-20, 1e-7, 1e4, 1e18, 1e30, 3e38])
def test_any_softcap(cap: float, dtype: torch.dtype, generator: torch.Generator) -> None:
    """A small one makes all scores 0, a large one changes none."""
    case = random_case(generator, dtype, [[0, 1], [1]], [130, 9], [3, 1], softcap=cap, window=100)
    out, lse = case.run()
    options = {**case.options, "softcap": 0.0}
    if cap < 1:
        options["scale"] = 0.0
    expected, expected_lse = replace(case, options=options).reference()
    assert_close(out, expected, relative={4: 1e-5, 2: 8 * torch.finfo(dtype).eps}[out.itemsize])
    assert_lse_matches(lse, expected_lse, dtype)


def test_a_cache_takes_any_softcap(generator: torch.Generator) -> None:
    for cap in (1e-45, 3e38):
        cache = hx.SegmentCache(1, 1, 64, inv_freq=[], max_tokens=64, softcap=cap)
        query, key, value = torch.randn(3, 5, 1, 64, generator=generator)
        with cache.step([[cache.segment("a")]], [5]) as step:
            out = step.attend(0, query, key, value)
        assert out.isfinite().all()


# Values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loud", [0.0, 1.0, 5.0])
def test_means_of_the_largest_values(
    loud: float, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """A mean is finite if its values are, however many they are and whatever their sum."""
    case = random_case(generator, dtype, [[0, 1], [1, 0]], [700, 65], [3, 2])
    # A mean may be rounded up by a few units: float32's own largest number would be one too many.
    end = LARGEST[dtype] * (1 - 1e-5)
    flat = replace(
        case,
        query=case.query * loud,
        values=[torch.full_like(value, end) for value in case.values],
    )
    out, _ = flat.run()
    expected, _ = flat.reference()
    assert_close(out, expected, relative=max(2e-6, torch.finfo(dtype).eps))
    mixed = replace(
        flat, values=[v * s.sign() for v, s in zip(flat.values, case.values, strict=True)]
    )
    assert_at_most_twice_the_eager_error(mixed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_down_to_1e_minus_26(dtype: torch.dtype, generator: torch.Generator) -> None:
    """What keeps sums of large values finite leaves small ones their digits."""
    case = random_case(generator, dtype, [[0, 1], [1, 0]], [300, 65], [3, 2])
    tiny = replace(case, values=[value * 1e-26 for value in case.values])
    assert_at_most_twice_the_eager_error(tiny)


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_queries_and_keys_and_zeros_of_either_sign(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    """They are as good as zero, unless a partner makes up for it."""
    case = random_case(generator, dtype, [[0, 1], [1, 0]], [130, 65], [3, 2])
    smallest = torch.finfo(dtype).smallest_normal / 4
    for query in (case.query * smallest, case.query * 0.0, case.query * -0.0):
        small = replace(case, query=query)
        expected, expected_lse = small.reference()
        out, lse = small.run()
        assert_close(out, expected, relative=max(1e-5, 2 * torch.finfo(dtype).eps))
        assert_lse_matches(lse, expected_lse, dtype)


# Frequencies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("frequency", [0.0, -1.0, 1e-45, 1.5, 3.0, 1e3, 1e6, -1e10, 1e20, 3.4e38])
def test_angles_of_any_frequency(frequency: float) -> None:
    """Of the product in double precision, as cos and sin of it are, at every position."""
    positions = np.array(
        [0, 1, -1, 2, 100, 2**20, 2**20 + 7, 2**30, LONGEST, LONGEST - 1, -LONGEST], np.int32
    )
    inv_freq = np.array([0.3, frequency, 1.0], np.float32)
    angles = _C.fill_angles(positions, inv_freq)  # [n, 2, 3]
    exact = positions[:, None].astype(np.float64) * inv_freq.astype(np.float64)
    for i in range(len(positions)):
        for j in range(3):
            assert abs(angles[i, 0, j] - math.cos(exact[i, j])) < 1e-7, (positions[i], j)
            assert abs(angles[i, 1, j] - math.sin(exact[i, j])) < 1e-7, (positions[i], j)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frequency", [2.5, 1e6, 1e20, 3.4e38])
def test_large_frequencies(
    frequency: float, dtype: torch.dtype, generator: torch.Generator
) -> None:
    case = random_case(generator, dtype, [[0], [0]], [150], [1, 1], dim=64)
    options = {**case.options, "inv_freq": [1.0, frequency] * 16}
    case = replace(case, offsets=[[2**30 + 3], [149]], options=options)
    assert_at_most_twice_the_eager_error(case)


# Lengths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 300])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [LONGEST, LONGEST - 1, LONGEST - 63, LONGEST - 64])
def test_the_longest_segments(
    length: int, dtype: torch.dtype, kv_heads: int, generator: torch.Generator
) -> None:
    """Their last tile ends where int32 does. One key and value stand for all, with strides of 0."""
    dim = 64 if ON_A_GPU else 8
    key, value = torch.randn(2, 1, kv_heads, dim, generator=generator).to(dtype)
    query = torch.randn(3, 1, kv_heads, dim, generator=generator).to(dtype)
    # The first worker's new token is the last one, the second's may come a little later, the third
    # stands further back.
    out, lse = hx.concurrent_attention(
        query,
        [key.expand(length, kv_heads, dim)],
        [value.expand(length, kv_heads, dim)],
        [[length - 1], [LONGEST], [length - 500]],
        inv_freq=[],
        window=70,
        return_lse=True,
    )
    score = (query[:, 0].double() * key.double()).sum(dim=-1) * dim**-0.5
    seen = torch.tensor([70.0, max(0, 70 - (LONGEST - (length - 1))), 70.0])
    for w in range(3):
        if seen[w] == 0:
            assert_same_bits(out[w], torch.zeros_like(out[w]))
            continue
        relative = max(1e-5, torch.finfo(dtype).eps)
        assert_close(out[w, 0], value[0].double(), relative=relative)
        expected = score[w] + seen[w].log()
        assert ((lse[w, 0].double() - expected).abs() < 2e-2).all()


@pytest.mark.parametrize("window", [LONGEST, LONGEST - 1, None])
def test_the_widest_windows(window: int | None, generator: torch.Generator) -> None:
    """At the ends of int32, where a sum of position and window needs 33 bits."""
    case = random_case(generator, torch.float32, [[0]] * 4, [70], [2] * 4, rotary_dim=0)
    offsets = [[HIDDEN + 1], [LONGEST], [LONGEST - 69], [LONGEST - 1]]
    case = replace(case, offsets=offsets, options={**case.options, "window": window})
    out, lse = case.run()
    expected, expected_lse = case.reference()
    assert_close(out, expected, relative=1e-5)
    assert_lse_matches(lse, expected_lse, torch.float32)


def test_more_tiles_than_int32_counts(generator: torch.Generator) -> None:
    """64 of the longest segments, of which a worker sees the last tokens."""
    dim = 64 if ON_A_GPU else 8
    key, value = torch.randn(2, 1, 1, dim, generator=generator)
    segments = 65
    out = hx.concurrent_attention(
        torch.randn(1, 1, 1, dim, generator=generator),
        [key.expand(LONGEST, 1, dim)] * segments,
        [value.expand(LONGEST, 1, dim)] * segments,
        [[LONGEST - 1] * segments],
        inv_freq=[],
        window=3,
    )
    assert_close(out[0, 0], value[0].double(), relative=1e-5)
