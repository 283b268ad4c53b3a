"""Tensors in which a stride is zero, as `expand` makes them: many tokens or heads, one memory."""

from __future__ import annotations

import pytest
import torch

import hogwild_ext as hx
from compare import assert_same_bits

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def expanded(x: torch.Tensor, dims: list[int]) -> torch.Tensor:
    for dim in dims:
        x = x.narrow(dim, 0, 1).expand(*(n if d == dim else -1 for d, n in enumerate(x.shape)))
    return x


def dense(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [[0], [1], [0, 1]])
@pytest.mark.parametrize("dim", [64, 40])
def test_keys_and_values_with_zero_strides(
    generator: torch.Generator, dtype: torch.dtype, dims: list[int], dim: int
) -> None:
    def some(tokens: int) -> torch.Tensor:
        return expanded(torch.randn(tokens, 3, dim, generator=generator).to(dtype), dims)

    lengths, offsets, inv_freq = [67, 5], [[70, 2], [66, 5]], torch.ones(4)
    query = torch.randn(2, 3, 6, dim, generator=generator).to(dtype)
    keys, values = [some(n) for n in lengths], [some(n) for n in lengths]
    out = hx.concurrent_attention(query, keys, values, offsets, inv_freq=inv_freq)
    expected = hx.concurrent_attention(
        query, list(map(dense, keys)), list(map(dense, values)), offsets, inv_freq=inv_freq
    )
    assert_same_bits(out, expected, "out")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [[0], [1], [2], [0, 1, 2]])
def test_queries_with_zero_strides(
    generator: torch.Generator, dtype: torch.dtype, dims: list[int]
) -> None:
    query = expanded(torch.randn(3, 2, 4, 64, generator=generator).to(dtype), dims)
    keys = [torch.randn(70, 2, 64, generator=generator).to(dtype)]
    values = [torch.randn(70, 2, 64, generator=generator).to(dtype)]
    offsets = [[68], [3], [-1]]
    out = hx.concurrent_attention(query, keys, values, offsets, inv_freq=torch.ones(32))
    expected = hx.concurrent_attention(dense(query), keys, values, offsets, inv_freq=torch.ones(32))
    assert_same_bits(out, expected, "out")
