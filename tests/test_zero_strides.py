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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [[0], [1], [0, 1]])
@pytest.mark.parametrize("dim", [64, 40])
def test_keys_and_values_with_zero_strides(
    generator: torch.Generator, dtype: torch.dtype, dims: list[int], dim: int
) -> None:
    lengths = [67, 5]
    query = torch.randn(2, 3, 6, dim, generator=generator).to(dtype)
    inv_freq = torch.ones(4)
    offsets = [[70, 2], [66, 5]]
    plain, strided = [
        [
            [torch.randn(n, 3, dim, generator=torch.Generator().manual_seed(n + k)) for n in lengths]
            for k in range(2)
        ]
        for _ in range(2)
    ]
    keys, values = ([expanded(x.to(dtype), dims) for x in tensors] for tensors in strided)
    copies = [[expanded(x.to(dtype), dims).clone(memory_format=torch.contiguous_format)
               for x in tensors] for tensors in plain]  # fmt: skip
    assert keys[0].stride() != copies[0][0].stride()
    out = hx.concurrent_attention(query, keys, values, offsets, inv_freq=inv_freq)
    expected = hx.concurrent_attention(query, *copies, offsets, inv_freq=inv_freq)
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
    dense = query.clone(memory_format=torch.contiguous_format)
    expected = hx.concurrent_attention(dense, keys, values, offsets, inv_freq=torch.ones(32))
    assert_same_bits(out, expected, "out")
