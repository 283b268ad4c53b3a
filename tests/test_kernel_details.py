"""What only some shapes of a call bring to light: found by planting faults, see faults.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import hogwild_ext as hx
from compare import assert_lse_matches, assert_out_matches, assert_same_bits
from conftest import EMULATED
from hogwild_ext import _C
from hogwild_ext._reference import reference_attention
from op_cases import DTYPES, ON_A_GPU, TILE, Case, inverse_frequencies, random_case

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_case(case: Case) -> None:
    (out, lse), (expected, expected_lse) = case.run(), case.reference()
    assert_out_matches(out, expected)
    assert_lse_matches(lse, expected_lse, case.query.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_same_bits_where_a_block_folds_several_partial_results(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    """So many rows and heads fill a GPU without a block for every partial result: two blocks take
    three of them. A worker alone leaves each to a block of its own."""
    rows_of_a_block = 16 if dtype == torch.float32 else 64
    kv_heads, group, blocks, tokens = 88, 4, 6, 2
    workers = rows_of_a_block * blocks // (group * tokens)
    case = random_case(
        generator, dtype, [[0, 1, 2]] * workers, [100, 64, 70], [tokens] * workers,
        kv_heads=kv_heads, group=group,
    )  # fmt: skip
    # At -1 the first token sees nothing of a segment, and the second one its first key.
    offsets = [[232, 132, 68], [-1, 40, 99], [98, -1, 162], [168, 98, -1]]
    case = replace(case, offsets=[offsets[w % 4] for w in range(workers)])
    out, lse = case.run()
    for w in (0, 1, 2, workers - 1):
        alone_out, alone_lse = case.worker(w).run()
        assert_same_bits(out[w : w + 1], alone_out, "out")
        assert_same_bits(lse[w : w + 1], alone_lse, "lse")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_turns_its_queries_for_every_segment(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    """So many heads leave several segments to a block: 30 of them, 16 blocks a head."""
    views = [list(range(30)), [*range(29, -1, -1)]]
    case = random_case(generator, dtype, views, [1, 2, 3] * 10, [1, 1], kv_heads=66, group=1)
    assert_case(case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("shift", "tokens"), [(1, 1), (2, 1), (1, 40)])
def test_rotation_does_not_depend_on_how_the_query_lies(
    shift: int, tokens: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Queries at multiples of 8 bytes are rotated by code of their own. Rounding hides another
    order of operations in most elements, but not in all of so many."""
    case = random_case(
        generator, dtype, [[0], [0]], [40], [tokens, tokens], kv_heads=16, group=8, dim=128
    )
    room = torch.full((*case.query.shape[:-1], 128 + shift), torch.nan, dtype=dtype)
    room[..., shift:] = case.query
    (out, lse), (again, lse_again) = case.run(), replace(case, query=room[..., shift:]).run()
    assert_same_bits(again, out, "out")
    assert_same_bits(lse_again, lse, "lse")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 129])
def test_windows_that_end_at_every_key_around_a_tiles_edge(
    window: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """A key that is the only one of its tile to be seen counts like any other."""
    positions = [p for edge in (TILE, 2 * TILE) for p in range(edge - 3, edge + 4)]
    case = random_case(
        generator, dtype, [[0]] * len(positions), [3 * TILE], [1] * len(positions), kv_heads=1,
        window=window,
    )  # fmt: skip
    assert_case(replace(case, offsets=[[p] for p in positions]))


@pytest.mark.parametrize("window", [1, 3, 100])
def test_lse_is_of_probabilities_that_nobody_rounded(
    window: int, generator: torch.Generator
) -> None:
    """bfloat16's: queries that are not rotated are not rounded either: then lse is as exact as
    float32's. (float16 on tensor cores sums what they multiply, and so does bfloat16 where a CPU
    multiplies it.)"""
    dtype = torch.bfloat16
    case = random_case(generator, dtype, [[0], [0]], [150], [20, 1], rotary_dim=0, window=window)
    sums_rounded = not ON_A_GPU and _C.isa() in ("amx", "avx512_bf16")
    limits = dtype if sums_rounded else torch.float32
    assert_lse_matches(case.run()[1], case.reference()[1], limits)


# A pass is 2 tiles long until a GPU is full; with so many KV heads it is a whole segment.
KV_HEADS = 264


@pytest.mark.parametrize(
    ("dtype", "dim", "group"),
    [
        (torch.float32, 64, 1),
        (torch.float16, 64, 1),  # the tensor-core kernel with a ring of 4 places,
        (torch.bfloat16, 256, 1),  # 3,
        (torch.float16, 256, 16),  # and 2
    ],
)
def test_more_tiles_than_places_in_the_ring(
    dtype: torch.dtype, dim: int, group: int, generator: torch.Generator
) -> None:
    case = random_case(
        generator,
        dtype,
        [[0], [0]],
        [5 * TILE + 7],
        [1, 1],
        kv_heads=KV_HEADS,
        group=group,
        dim=dim,
    )
    assert_case(replace(case, offsets=[[5 * TILE + 6], [2 * TILE + 5]]))


def test_more_pages_than_are_known_ahead(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages of two segments in turns, against the same keys as plain tensors."""
    dim = 64
    inv_freq = inverse_frequencies(dim)
    cache = hx.SegmentCache(
        1, KV_HEADS, dim, inv_freq=inv_freq, max_tokens=16 * TILE, dtype=torch.float16
    )

    def attend(view: list[hx.Segment], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        query, key, value = torch.randn(3, tokens, KV_HEADS, dim, generator=generator).half()
        with cache.step([view], [tokens]) as step:
            return query, step.attend(0, query, key, value)

    a, b = cache.segment("a"), cache.segment("b")
    with monkeypatch.context() as patched:
        if EMULATED:  # stores only: attention among all tokens would take long
            patched.setattr(_C.cuda, "attend", lambda *_: None)
        for segment, tokens in ((a, TILE), (b, TILE), (a, TILE), (b, 2 * TILE), (b, TILE + 62)):
            attend([segment], tokens)
    query, out = attend([a, b], 1)
    expected, _ = reference_attention(
        query[None], [a.keys(0), b.keys(0)], [a.values(0), b.values(0)],
        hx.view_offsets([[0, 1]], [len(a), len(b)], [1]), inv_freq=inv_freq,
    )  # fmt: skip
    assert_out_matches(out, expected[0])


@pytest.mark.skipif("EMULATED is None", reason="needs HOGWILD_EMULATE=1; test_emulated.py sets it")
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fewer_blocks_than_work(
    dtype: torch.dtype, blocks: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A captured launch has a fixed grid, and a later step may have more work than blocks."""
    case = random_case(
        generator, dtype, [[0, 1, 3], [2, 1], [1, 0, 2]], [300, 129, 64, 5], [2, 30, 0], group=3
    )
    out, lse = case.run()
    attend = _C.cuda.attend

    def with_few_blocks(*arguments: object) -> None:
        with EMULATED.runtime.capture() as calls:
            attend(*arguments)
        assert len(calls) == 2  # attention and merge
        for call in calls:
            grid = [min(blocks, size) for size in call.grid]
            assert grid[0] < call.grid[0]
            EMULATED.engine.launch(call.name, grid, call.block, call.params, call.shared)

    monkeypatch.setattr(_C.cuda, "attend", with_few_blocks)
    again, lse_again = case.run()
    assert_same_bits(again, out, "out")
    assert_same_bits(lse_again, lse, "lse")


@pytest.mark.cpu
@pytest.mark.parametrize("dim", [8, 24, 40, 64, 104])
def test_scores_are_those_of_unrounded_queries(dim: int, generator: torch.Generator) -> None:
    """Where factors are rounded, what that leaves is multiplied too: with a lone key lse is its
    score, whatever the dimension."""
    case = random_case(generator, torch.bfloat16, [[0]] * 3, [1], [1] * 3, dim=dim)
    (_, lse), (_, expected) = case.run(), case.reference()
    assert (lse.double() - expected).abs().max() < 2e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 40])
def test_segments_that_share_a_tile(
    dtype: torch.dtype, window: int | None, generator: torch.Generator
) -> None:
    """Many short ones, of which each worker has others hidden: nothing of those reaches it, and its
    bits are those of the worker alone."""
    lengths = torch.randint(1, 12, (44,), generator=generator).tolist()
    views = []
    for skipped in ([], [0, 7, 20], range(5, 40, 9)):
        views.append([s for s in range(44) if s not in skipped])
    tokens = [3, 1, 2]
    case = random_case(generator, dtype, views, lengths, tokens, window=window)
    assert_case(case)
    out, lse = case.run()
    for w in range(3):
        unseen = set(range(44)) - set(views[w])
        values = [v * float("nan") if s in unseen else v for s, v in enumerate(case.values)]
        alone_out, alone_lse = replace(case, values=values).worker(w).run()
        assert_same_bits(out[w : w + 1, : tokens[w]], alone_out, "out")
        assert_same_bits(lse[w : w + 1, : tokens[w]], alone_lse, "lse")
