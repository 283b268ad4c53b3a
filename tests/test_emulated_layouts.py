"""Layouts of every kind on the emulated GPU, few heads at a time: outputs against the float64
oracle, and not a word from the sanitizer.

`python tests/random_layouts.py --count 5000` goes on where the random ones end.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from compare import assert_lse_matches, assert_out_near
from op_cases import (
    DTYPES,
    GPU_DIMS,
    HIDDEN,
    MEMORY,
    ON_A_GPU,
    Case,
    Layout,
    laid_out,
    layouts,
    random_case,
)
from paged_games import Game

if not ON_A_GPU:
    pytest.skip("needs HOGWILD_EMULATE=1; test_emulated.py sets it", allow_module_level=True)

GROUPS = [1, 3, 5, 7, 8]


def assert_case(case: Case) -> None:
    out, lse = case.run()
    expected, expected_lse = case.reference()
    assert_out_near(out, expected, case.eager)
    assert_lse_matches(lse, expected_lse, case.query.dtype)


def with_memory(case: Case, how: str) -> Case:
    """The same numbers, laid out in another way."""
    return replace(
        case,
        query=laid_out(case.query, how),
        keys=[laid_out(key, how) for key in case.keys],
        values=[laid_out(value, how) for value in case.values],
    )


# ---- random layouts ------------------------------------------------------------------------------


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(layout=layouts())
def test_random_layouts(layout: Layout) -> None:
    assert_case(layout.build())


@pytest.mark.parametrize("number", range(12))
def test_random_lives_of_a_cache(number: int, seed: int) -> None:
    Game(seed).play(4)


# ---- each kernel, each ratio of heads ------------------------------------------------------------


@pytest.mark.parametrize("dim", GPU_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_and_ratio_of_heads(
    dtype: torch.dtype, dim: int, generator: torch.Generator
) -> None:
    """Plain tensors in all sorts of memory; full tiles, tails and single keys; both rotations."""
    memory = itertools.cycle(MEMORY)
    for n, group in enumerate(GROUPS):
        case = random_case(
            generator, dtype, [[0, 1, 2], [1, 2, 0]], [67, 1, 64], [1, 1 + n], kv_heads=2 - n % 2,
            group=group, dim=dim, interleaved=n % 2 == 1, rotary_dim=dim // (1 + n % 2),
        )  # fmt: skip
        assert_case(with_memory(case, next(memory)))


@pytest.mark.parametrize("dim", GPU_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_and_ratio_of_heads_on_pages(dtype: torch.dtype, dim: int, seed: int) -> None:
    for n, group in enumerate(GROUPS):
        game = Game(seed + n, dtype=dtype, dim=dim, group=group, kv_heads=1 + n % 2, layers=1)
        prompt, alice, bob = (game.segment() for _ in range(3))
        game.step([[prompt]], [66])
        game.step([[prompt, bob, alice], [prompt, alice, bob]], [1, 1 + n])
        game.assert_stored()


# ---- how many segments, workers, tokens ----------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_of_segments(count: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Of one token each, and of a few more."""
    order = torch.randperm(count, generator=generator).tolist()
    for lengths in ([1] * count, [1 + 13 * s % 29 for s in range(count)]):
        assert_case(
            random_case(generator, dtype, [range(count), order], lengths, [1, 1], kv_heads=1)
        )


@pytest.mark.parametrize("count", [1, 2, 3, 200])
def test_numbers_of_segments_on_pages(count: int, seed: int) -> None:
    sizes = {"dim": 64, "kv_heads": 1, "group": 3, "layers": 1, "spare_pages": 300}
    game = Game(seed, dtype=torch.float16, window=None, **sizes)
    twins = [game.segment() for _ in range(count)]
    for start in range(0, count, 50):  # one token in each of them
        writers = twins[start : start + 50]
        game.step([[twin] for twin in writers], [1] * len(writers))
    game.step([twins], [1])
    game.assert_stored()


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 16, 17, 33, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_of_workers(workers: int, dtype: torch.dtype, seed: int) -> None:
    """All read a prompt and each other, and write something of their own."""
    sizes = {"dim": 64, "kv_heads": 1, "group": 5, "layers": 1, "spare_pages": 300}
    game = Game(seed, dtype=dtype, window=None, **sizes)
    prompt = game.segment()
    own = [game.segment() for _ in range(workers)]
    game.step([[prompt]], [70])
    for _ in range(2):
        views = [[prompt, *(o for o in own if o is not twin), twin] for twin in own]
        game.step(views, [1] * workers)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_long_prefill_into_a_view_of_ten_segments(dtype: torch.dtype, seed: int) -> None:
    game = Game(seed, dtype=dtype, window=None, dim=64, kv_heads=1, group=1, layers=1)
    view = [game.segment() for _ in range(10)]
    game.step([[twin] for twin in view[:9]], [1, 63, 64, 65, 3, 17, 128, 2, 40])
    game.step([view], [1000])
    game.step([view], [1])
    game.assert_stored()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_workers_that_see_nothing_in_common(dtype: torch.dtype, generator: torch.Generator) -> None:
    """Rows of one tile that belong to workers with other segments, some with none at all."""
    case = random_case(generator, dtype, [[s] for s in range(6)], [70, 1, 64, 129, 3, 5], [2] * 6)
    offsets = [list(row) for row in case.offsets]
    offsets[4] = [HIDDEN] * 6
    assert_case(replace(case, offsets=offsets))
