"""`concurrent_attention` against the float64 oracle, and the oracle against simpler words."""

from __future__ import annotations

import cmath
import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hogwild_ext as hx
from compare import (
    LIMITS,
    assert_close,
    assert_lse_matches,
    assert_out_matches,
    assert_out_near,
    assert_same_bits,
    relative_error,
)
from hogwild_ext._reference import reference_attention
from op_cases import (
    DTYPES,
    HIDDEN,
    MEMORY,
    ON_A_GPU,
    Case,
    Layout,
    inverse_frequencies,
    laid_out,
    layouts,
    offsets_of_views,
    random_case,
)

# One thread gives the bits of any number of threads: test_op_bits.py.
pytestmark = pytest.mark.usefixtures("one_thread")

UGLY_SIZES = [1, 2, 3, 17, 129, 1134]


def assert_case(case: Case) -> None:
    """The op keeps the limits for standard-normal data."""
    out, lse = case.run()
    expected, expected_lse = case.reference()
    assert out.dtype == case.query.dtype
    assert_out_near(out, expected, case.eager)
    assert_lse_matches(lse, expected_lse, case.query.dtype)


# The op -------------------------------------------------------------------------------------------


@given(layout=layouts())
def test_any_layout(layout: Layout) -> None:
    assert_case(layout.build())


@given(layout=layouts(), how=st.sampled_from(MEMORY))
def test_out_given_is_filled_and_returned(layout: Layout, how: str) -> None:
    """A strided `out` gets the same bits as a fresh one, and nothing beside it is written."""
    case = layout.build()
    fresh, lse = case.run()
    out = laid_out(torch.full_like(fresh, torch.nan, memory_format=torch.contiguous_format), how)
    around = out.untyped_storage().nbytes()
    before = torch.empty(0, dtype=out.dtype).set_(out.untyped_storage()).clone()

    returned, lse_again = hx.concurrent_attention(
        *case.arguments(), **case.options, return_lse=True, out=out
    )
    assert returned.data_ptr() == out.data_ptr()
    assert returned.shape == out.shape
    assert returned.stride() == out.stride()
    assert_same_bits(out, fresh, "out")
    assert_same_bits(lse_again, lse, "lse")
    out.fill_(torch.nan)
    after = torch.empty(0, dtype=out.dtype).set_(out.untyped_storage())
    assert out.untyped_storage().nbytes() == around
    assert_same_bits(after, before, "the buffer around out")


def test_lse_is_optional(generator: torch.Generator) -> None:
    case = random_case(generator, torch.float32, [[0, 1]], [17, 3], [3])
    out, _ = case.run()
    only = hx.concurrent_attention(*case.arguments(), **case.options)
    assert isinstance(only, torch.Tensor)
    assert_same_bits(only, out, "out")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", UGLY_SIZES)
def test_ugly_sizes(tokens: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    """One worker brings `tokens` tokens, another one token; they read each other's segments."""
    lengths = [tokens, 129, tokens, 0]
    views = [[1, 3, 2, 0], [0, 1, 2], [3]]
    case = random_case(
        generator, dtype, views, lengths, [tokens, 1, 0], kv_heads=1, group=3, dim=64, value_dim=96
    )
    assert_case(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 3, 5, 7, 8, 40, 71])
def test_any_ratio_of_heads(group: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    case = random_case(
        generator, dtype, [[0, 1], [1, 0]], [70, 33], [2, 3], kv_heads=2, group=group, dim=128
    )
    assert_case(case)


@pytest.mark.parametrize("dim", range(8, 257, 8))
def test_any_head_dim(dim: int, generator: torch.Generator) -> None:
    for dtype, value_dim in zip(DTYPES, (dim, 264 - dim, dim), strict=True):
        case = random_case(
            generator,
            dtype,
            [[0, 1], [1, 0]],
            [65, 5],
            [1, 2],
            dim=dim,
            value_dim=value_dim,
            interleaved=dim % 16 == 0,
        )
        assert_case(case)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1_000_000, 2**20 - 1, 2**20 + 7, 2**30 + 3, 2**31 - 1])
def test_far_positions(
    offset: int, dtype: torch.dtype, interleaved: bool, generator: torch.Generator
) -> None:
    """Position 1,000,000 is as exact as position 1; the last ones lie beyond int32."""
    case = random_case(
        generator, dtype, [[0], [0]], [150], [3, 2], dim=128, interleaved=interleaved
    )
    assert_case(replace(case, offsets=[[offset], [offset - 1]]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nobody_sees_anything(dtype: torch.dtype, generator: torch.Generator) -> None:
    """Hidden, empty, still to come, or past the query length: zeros and -inf, never nan."""
    case = random_case(generator, dtype, [[0, 1]] * 4, [30, 0], [3, 3, 3, 0])
    blind = replace(case, offsets=[[HIDDEN, HIDDEN], [HIDDEN, 5], [-3, -(2**31) + 1], [9, 9]])
    out, lse = blind.run()
    assert_same_bits(out, torch.zeros_like(out), "out")
    assert_same_bits(lse, torch.full_like(lse, -torch.inf), "lse")


def test_no_queries(generator: torch.Generator) -> None:
    """No workers, or no tokens: an empty result of the right shape."""
    case = random_case(generator, torch.float32, [[0]], [5], [1], value_dim=96)
    for query, offsets in (
        (case.query[:0], torch.empty(0, 1, dtype=torch.int32)),
        (case.query[:, :0], [[4]]),
    ):
        empty = replace(
            case, query=query, offsets=offsets, options={**case.options, "query_lengths": None}
        )
        out, lse = empty.run()
        assert out.shape == (*query.shape[:3], 96)
        assert lse.shape == query.shape[:3]


def test_no_segments(generator: torch.Generator) -> None:
    """Workers that have nothing to read yet: zeros and -inf, with Dv = D for want of values."""
    query = torch.randn(3, 2, 4, 64, generator=generator)
    offsets = torch.empty(3, 0, dtype=torch.int32)
    out, lse = hx.concurrent_attention(
        query, [], [], offsets, inv_freq=inverse_frequencies(64), return_lse=True
    )
    assert_same_bits(out, torch.zeros(3, 2, 4, 64), "out")
    assert_same_bits(lse, torch.full((3, 2, 4), -torch.inf), "lse")


# Data that is not standard normal: at most twice the error of the eager reference ----------------


def outlier_channels(case: Case) -> Case:
    """Some dims eight times larger than the others, as trained models have."""
    loud = torch.ones(case.query.shape[-1]).to(case.query.dtype)
    loud[1::8] = 8.0
    return replace(case, query=case.query * loud, keys=[key * loud for key in case.keys])


def large_queries_and_keys(case: Case) -> Case:
    """Scores up to a hundred: a few keys take nearly all."""
    return replace(case, query=case.query * 5, keys=[key * 5 for key in case.keys])


def far_means(case: Case) -> Case:
    """Values and keys whose mean is large beside their spread."""
    return replace(
        case, keys=[key + 8 for key in case.keys], values=[value + 50 for value in case.values]
    )


def cancelling_values(case: Case) -> Case:
    """Every second value the negative of the one before, and nearly uniform probabilities."""
    signs = [torch.tensor([1.0, -1.0]).repeat(len(v))[: len(v), None, None] for v in case.values]
    values = [
        (sign * (30 + v.float() / 16)).to(v.dtype)
        for sign, v in zip(signs, case.values, strict=True)
    ]
    return replace(case, query=case.query / 16, values=values)


def tiny_values(case: Case) -> Case:
    """Values about float16's smallest normal numbers."""
    return replace(case, values=[value * 6e-5 for value in case.values])


def biased_keys(case: Case) -> Case:
    """Single dims of unrotated keys 100 to 300 times the others, as Qwen2's biases make them."""
    bias = torch.zeros(case.query.shape[-1])
    bias[[3, 20, 35, -1]] = torch.tensor([300.0, -120.0, 170.0, 100.0])
    inv_freq = case.options["inv_freq"]
    keys = [hx.rotate(key.float() + bias, inv_freq).to(key.dtype) for key in case.keys]
    return replace(case, query=case.query / 4, keys=keys)


def other_spreads(case: Case) -> Case:
    """Standard deviations from 1e-3 to 1e3, another one in each tensor."""
    by_segment = zip(case.values, (1e3, 1.0, 1e-3), strict=True)
    return replace(
        case,
        query=case.query * 1e3,
        keys=[key * 2e-3 for key in case.keys],
        values=[value * spread for value, spread in by_segment],
    )


def numbers_that_round_badly(case: Case) -> Case:
    """Thirds, numbers a little above 1, and products half way between two numbers."""
    dtype = case.query.dtype
    return replace(
        case,
        query=((case.query.float() * 3).round() / 3 + 1 / 3).to(dtype),
        keys=[(1 + 2**-9 * (key.float() * 4).round()).to(dtype) for key in case.keys],
        values=[((v.float() * 8).round() / 8 + 1 + 2**-8).to(dtype) for v in case.values],
    )


def one_dominant_key(case: Case) -> Case:
    """A key that takes nearly all of half of the rows and nothing of the others, in a late tile."""
    keys = [key.clone() for key in case.keys]
    keys[0][700] *= 30
    keys[1][3] *= 10
    return replace(case, keys=keys)


def ties(case: Case) -> Case:
    """Each key four times, with other values, and loud: the largest scores are equal."""
    keys = [key[torch.arange(len(key)) // 4] * 6 for key in case.keys]
    return replace(case, query=case.query * 6, keys=keys)


def zero_queries(case: Case) -> Case:
    """All probabilities equal; with 1134 tokens they are near float16's subnormals."""
    return replace(case, query=torch.zeros_like(case.query))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize(
    "change",
    [
        outlier_channels,
        large_queries_and_keys,
        far_means,
        cancelling_values,
        tiny_values,
        biased_keys,
        other_spreads,
        numbers_that_round_badly,
        one_dominant_key,
        ties,
        zero_queries,
    ],
)
def test_other_data_at_most_twice_the_eager_error(
    change, softcap: float, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Errors are pooled over many rows: where two large scores compete, one row's is a lottery."""
    ours = eager = size = 0.0
    for _ in range(3):
        case = change(
            random_case(
                generator, dtype, [[0, 1, 2], [1, 2, 0]], [777, 129, 64], [25, 25], softcap=softcap
            )
        )
        expected, _ = case.reference()
        ours += (case.run()[0].double() - expected).square().sum().item()
        eager += (case.eager().double() - expected).square().sum().item()
        size += expected.square().sum().item()
    ours, eager = (ours / size) ** 0.5, (eager / size) ** 0.5
    # Half a unit in the last place is lost by storing the output, however lucky eager was.
    assert ours <= 2 * eager + torch.finfo(dtype).eps / 2, f"ours {ours:.3g}, eager {eager:.3g}"


@given(
    layout=layouts(), powers=st.tuples(st.integers(-8, 8), st.integers(-4, 2), st.integers(-6, 6))
)
def test_any_layout_of_any_magnitude(layout: Layout, powers: tuple[int, int, int]) -> None:
    """Powers of two on query, scores and values: at most twice the eager error, by norm."""
    of_query, of_scores, of_values = powers
    case = layout.build()
    case = replace(
        case,
        query=case.query * 2.0**of_query,
        keys=[k * 2.0 ** (of_scores - of_query) for k in case.keys],
        values=[v * 2.0**of_values for v in case.values],
    )
    out, _ = case.run()
    expected, _ = case.reference()
    eager = relative_error(case.eager(), expected)
    ours = relative_error(out, expected)
    # The fixed limit is the floor: a handful of elements can be lucky in the eager reference.
    assert ours <= max(2 * eager, LIMITS[layout.dtype].out), f"ours {ours:.3g}, eager {eager:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 33.0])
def test_a_row_that_sees_one_key_gets_its_value(
    softcap: float, dtype: torch.dtype, generator: torch.Generator
) -> None:
    case = random_case(generator, dtype, [[0]] * 64, [1], [1] * 64, softcap=softcap)
    out, _ = case.run()
    expected = case.reference()[0].to(dtype)
    if ON_A_GPU and dtype is not torch.float16:
        # float32 divides by a sum that is 1 but for rounding; bfloat16 rounds the one probability
        # there is, and sums what it was before.
        assert_close(out, expected.double(), relative=torch.finfo(dtype).eps)
    else:
        assert_same_bits(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", [-8192.0, -6200.0, -512.0, 512.0, 6200.0, 8192.0])
def test_all_scores_far_from_zero(
    score: float, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Whatever stands in for an unseen key must stay below the lowest score, and no sum overflow.

    Tile edges, a window, and rows that see one key only; scores a few units apart.
    """
    case = random_case(
        generator, dtype, [[0, 1], [1, 0]], [130, 70], [3, 2], rotary_dim=0, window=100
    )
    loud = (abs(score) / 8) ** 0.5  # 64 dims, scale 1/8
    sign = 1.0 if score > 0 else -1.0

    def around(x: torch.Tensor, mean: float, step: float) -> torch.Tensor:
        moved = torch.full_like(x, mean)
        moved[..., 0] += (x[..., 0].float() * 2).round().clamp(-3, 3).to(x.dtype) * step
        return moved

    case = replace(
        case,
        query=torch.full_like(case.query, loud),
        keys=[around(key, sign * loud, 8 / loud) for key in case.keys],
        offsets=[[0, 63], [129, HIDDEN]],
    )
    out, lse = case.run()
    expected, expected_lse = case.reference()
    assert (expected_lse[expected_lse.isfinite()] * sign).min() > 0.9 * abs(score)
    # The scores themselves are rounded, in float32: a unit in the last place of 8192 is 0.001.
    assert_close(out, expected, relative=max(LIMITS[dtype].out, abs(score) * 1e-6))
    assert_lse_matches(lse, expected_lse, torch.float32)


# float16 near its end ----------------------------------------------------------------------------


@pytest.mark.parametrize("rope_scale", [1.0, 1.5])
@pytest.mark.parametrize("interleaved", [False, True])
def test_float16_queries_and_keys_near_overflow(
    interleaved: bool, rope_scale: float, generator: torch.Generator
) -> None:
    """Rotating them leaves float16's range, and so do their products; the scores are ordinary."""
    case = random_case(
        generator,
        torch.float16,
        [[0, 1], [1, 0]],
        [200, 65],
        [3, 3],
        dim=128,
        interleaved=interleaved,
        rope_scale=rope_scale,
        scale=128**-0.5 / 6e4**2,
    )
    loud = 6e4 / 3.5

    def near_the_end(x: torch.Tensor) -> torch.Tensor:
        return (x.float() * loud).clamp(-65504, 65504).to(torch.float16)

    case = replace(
        case,
        query=near_the_end(case.query),
        keys=[near_the_end(key) for key in case.keys],
        options={**case.options, "scale": 128**-0.5 / loud**2},
    )
    assert case.query.abs().max() > 4e4
    assert_case(case)


def test_float16_all_dims_at_the_end(generator: torch.Generator) -> None:
    """|q'| = 65504 * sqrt(2) in every pair: infinite in float16, plain in float32."""
    case = random_case(generator, torch.float16, [[0]], [100], [2], dim=64)
    case = replace(
        case,
        query=torch.full_like(case.query, 65504.0),
        keys=[key.sign() * 65504 for key in case.keys],
        options={**case.options, "scale": 64**-0.5 / 65504.0**2},
    )
    assert_case(case)


def test_float16_values_at_the_end(generator: torch.Generator) -> None:
    """The mean of values that all are 65504 is 65504, and the sum before it is not infinite."""
    case = random_case(generator, torch.float16, [[0, 1]], [1134, 200], [2])
    case = replace(case, values=[torch.full_like(value, 65504.0) for value in case.values])
    out, _ = case.run()
    assert_same_bits(out, torch.full_like(out, 65504.0), "out")


def test_float16_long_flat_softmax(generator: torch.Generator) -> None:
    """Probabilities of 1 / 9000, each with few float16 digits left."""
    case = random_case(
        generator, torch.float16, [[0, 1]], [9000, 2], [1], kv_heads=1, group=1, scale=0.01
    )
    assert_case(case)


# Meaning: one text, split in any way --------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [0, 2, 24, 96])
@pytest.mark.parametrize("cuts", [[], [0], [1, 2], [30, 30, 47], [64, 90]])
def test_split_text_is_plain_causal_attention(
    cuts: list[int], rotary_dim: int, interleaved: bool, generator: torch.Generator
) -> None:
    """A text cut into segments, each rotated from its own zero, is the uncut text.

    Both the oracle and the op, against torch's own attention over keys rotated by complex numbers.
    """
    text, new, heads, kv_heads, dim = 100, 5, 6, 2, 96
    inv_freq = inverse_frequencies(rotary_dim)
    query = torch.randn(new, heads, dim, generator=generator, dtype=torch.float64)
    key = torch.randn(text, kv_heads, dim, generator=generator, dtype=torch.float64)
    value = torch.randn(text, kv_heads, dim, generator=generator, dtype=torch.float64)

    positions = torch.arange(text)
    causal = positions[text - new :, None] >= positions
    expected = torch.nn.functional.scaled_dot_product_attention(
        turned(query, inv_freq, positions[text - new :], interleaved).transpose(0, 1),
        turned(key, inv_freq, positions, interleaved).transpose(0, 1),
        value.transpose(0, 1),
        attn_mask=causal,
        enable_gqa=True,
    ).transpose(0, 1)[None]

    # The last segment has to hold the new tokens: cuts lie before them.
    bounds = [0, *cuts, text]
    spans = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    keys = [turned(key[s], inv_freq, torch.arange(s.stop - s.start), interleaved) for s in spans]
    values = [value[s] for s in spans]
    lengths = [len(k) for k in keys]
    offsets = offsets_of_views([range(len(spans))], lengths, [new])

    options = {"inv_freq": inv_freq, "interleaved": interleaved}
    oracle, _ = reference_attention(query[None], keys, values, offsets, **options)
    assert_close(oracle, expected, relative=1e-12, name="oracle")

    out = hx.concurrent_attention(
        query[None].float(),
        [k.float() for k in keys],
        [v.float() for v in values],
        offsets,
        **options,
    )
    assert_out_matches(out, expected)


def turned(x: torch.Tensor, inv_freq, positions: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """`x` [tokens, heads, dim] with its pairs taken as complex numbers and turned."""
    half = len(inv_freq)
    angles = positions[:, None, None].double() * torch.from_numpy(inv_freq).double()
    turn = torch.polar(torch.ones_like(angles), angles)
    rotary, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        pairs = rotary.unflatten(-1, (half, 2))
        result = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn).flatten(-2)
    else:
        pairs = torch.complex(rotary[..., :half].contiguous(), rotary[..., half:].contiguous())
        result = torch.cat([(pairs * turn).real, (pairs * turn).imag], dim=-1)
    return torch.cat([result, rest], dim=-1)


# The oracle itself, against the definition written out in scalars ---------------------------------


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("softcap", [0.0, 0.7])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [0, 2, 6, 8])
def test_oracle_is_the_definition(
    rotary_dim: int,
    interleaved: bool,
    softcap: float,
    window: int | None,
    generator: torch.Generator,
) -> None:
    workers, new, kv_heads, group, dim, value_dim = 3, 3, 2, 2, 8, 3
    lengths = [5, 0, 7]
    offsets = [[3, 9, -1], [HIDDEN, 2, 20], [-7, HIDDEN, HIDDEN]]
    query_lengths, scale, rope_scale = [3, 2, 3], 0.4, 1.25
    inv_freq = inverse_frequencies(rotary_dim)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    query = tensor(workers, new, kv_heads * group, dim)
    keys = [tensor(n, kv_heads, dim) for n in lengths]
    values = [tensor(n, kv_heads, value_dim) for n in lengths]
    out, lse = reference_attention(
        query,
        keys,
        values,
        offsets,
        inv_freq=inv_freq,
        query_lengths=query_lengths,
        scale=scale,
        rope_scale=rope_scale,
        interleaved=interleaved,
        softcap=softcap,
        window=window,
    )

    def rotated(x: list[float], p: int) -> list[float]:
        x, half = list(x), rotary_dim // 2
        for j in range(half):
            a, b = (2 * j, 2 * j + 1) if interleaved else (j, j + half)
            pair = rope_scale * complex(x[a], x[b]) * cmath.exp(1j * p * float(inv_freq[j]))
            x[a], x[b] = pair.real, pair.imag
        return x

    expected, expected_lse = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    rows = 0
    for w in range(workers):
        for i in range(query_lengths[w]):
            for h in range(kv_heads * group):
                weights, seen = [], []
                for s, length in enumerate(lengths):
                    p = offsets[w][s] + i
                    turned_query = rotated(query[w, i, h].tolist(), p)
                    for token in range(length):
                        key = keys[s][token, h // group].tolist()
                        score = scale * sum(a * b for a, b in zip(turned_query, key, strict=True))
                        if softcap:
                            score = softcap * math.tanh(score / softcap)
                        near = window is None or p - token < window
                        if offsets[w][s] != HIDDEN and token <= p and near:
                            weights.append(math.exp(score))
                            seen.append(values[s][token, h // group])
                if seen:
                    total = sum(weights)
                    parts = [a / total * v for a, v in zip(weights, seen, strict=True)]
                    expected[w, i, h] = torch.stack(parts).sum(dim=0)
                    expected_lse[w, i, h] = math.log(total)
                    rows += 1
    assert rows >= 8
    assert_close(out, expected, relative=1e-13, name="oracle")
    assert_close(lse, expected_lse, relative=1e-13, name="oracle's lse")
