"""nan and inf reach whoever sees them, and nobody else."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import hogwild_ext as hx
from compare import assert_out_matches, assert_same_bits, assert_same_masks
from op_cases import (
    DTYPES,
    HIDDEN,
    TILE,
    Layout,
    laid_out,
    layouts,
    random_case,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def seen_tokens(layout: Layout, segment: int) -> torch.Tensor:
    """[W, Q, L] bool: who sees which token of the segment."""
    workers, length = len(layout.offsets), layout.lengths[segment]
    offsets = torch.tensor([row[segment] for row in layout.offsets], dtype=torch.int64)
    brought = torch.tensor(layout.query_lengths or [layout.query_tokens] * workers)
    i = torch.arange(layout.query_tokens)
    position = (offsets[:, None] + i)[:, :, None]
    token = torch.arange(length)
    seen = (token <= position) & (offsets != HIDDEN)[:, None, None]
    seen &= (i < brought[:, None])[:, :, None]
    if layout.window is not None:
        seen &= position - token < layout.window
    return seen


def may_be_reached(layout: Layout, segment: int, token: int) -> torch.Tensor:
    """[W, Q] bool: rows that see the token, and rows of a worker for which its tile is an edge.

    A tile is a worker's edge if some row of that worker sees a part of it and not the token.
    Rows that see nothing at all stay clean even then.
    """
    begin = token // TILE * TILE
    seen = seen_tokens(layout, segment)
    part = seen[:, :, begin : begin + TILE].any(dim=2)  # [W, Q]
    reached = seen[:, :, token]
    edge = (part & ~reached).any(dim=1, keepdim=True)
    something = torch.zeros_like(reached)
    for s in range(len(layout.lengths)):
        something |= seen_tokens(layout, s).any(dim=2)
    return reached | (edge & part.any(dim=1, keepdim=True) & something)


def poisoned(
    tensors: list[torch.Tensor], segment: int, place: tuple[int, ...], poison: float
) -> list[torch.Tensor]:
    """The same tensors with `poison` at one place of one of them."""
    changed = [x.clone() for x in tensors]
    changed[segment][place] = poison
    return changed


@given(
    layout=layouts(),
    data=st.data(),
    poison=st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    of_keys=st.booleans(),
)
def test_one_bad_number_reaches_only_who_sees_it(
    layout: Layout, data: st.DataObject, poison: float, of_keys: bool
) -> None:
    assume(any(layout.lengths))
    s = data.draw(st.sampled_from([s for s, n in enumerate(layout.lengths) if n]))
    token = data.draw(st.integers(0, layout.lengths[s] - 1))
    kv_head = data.draw(st.integers(0, layout.kv_heads - 1))
    dim = data.draw(st.integers(0, (layout.dim if of_keys else layout.value_dim) - 1))
    place = (token, kv_head, dim)

    case = layout.build()
    out, lse = case.run()
    if of_keys:
        bad = replace(case, keys=poisoned(case.keys, s, place, poison))
    else:
        bad = replace(case, values=poisoned(case.values, s, place, poison))
    bad_out, bad_lse = bad.run()

    heads = torch.zeros(layout.kv_heads * layout.group, dtype=torch.bool)
    heads[kv_head * layout.group : (kv_head + 1) * layout.group] = True
    clean = ~(may_be_reached(layout, s, token)[:, :, None] & heads)
    assert_same_bits(bad_out[clean], out[clean], "out of rows that cannot see it")
    assert_same_bits(bad_lse[clean], lse[clean], "lse of rows that cannot see it")

    sees = seen_tokens(layout, s)[:, :, token][:, :, None] & heads
    if not sees.any():
        return
    expected, _ = bad.reference()
    if of_keys and poison != poison:
        assert bad_out[sees].isnan().all(), "a row that sees a nan key gives no number"
        assert bad_lse[sees].isnan().all(), "the lse of a row that sees a nan key is nan"
    elif not of_keys:
        # inf * weight is inf, and what else it may become on the way to the sum is no number.
        assert torch.equal(bad_out[sees].isfinite(), expected[sees].isfinite())
        assert_same_bits(bad_lse[sees], lse[sees], "lse, which knows no values")
        assert_out_matches(
            torch.where(expected.isfinite() & sees[..., None], bad_out, 0),
            torch.where(expected.isfinite() & sees[..., None], expected, 0),
        )


@given(layout=layouts(), data=st.data())
def test_a_segment_of_nan_is_nothing_to_whom_it_is_hidden_from(
    layout: Layout, data: st.DataObject
) -> None:
    s = data.draw(st.integers(0, len(layout.lengths) - 1))
    case = layout.build()
    out, lse = case.run()
    bad_out, bad_lse = replace(
        case,
        keys=[torch.full_like(k, torch.nan) if i == s else k for i, k in enumerate(case.keys)],
        values=[torch.full_like(v, torch.nan) if i == s else v for i, v in enumerate(case.values)],
    ).run()
    sees = seen_tokens(layout, s).any(dim=2)  # [W, Q]
    blind = ~sees.any(dim=1)
    assert_same_bits(bad_out[blind], out[blind], "out of workers that do not see it")
    assert_same_bits(bad_lse[blind], lse[blind], "lse of workers that do not see it")
    assert bad_out[sees].isnan().all()
    assert bad_lse[sees].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_passes_between_threads(dtype: torch.dtype, generator: torch.Generator) -> None:
    """Threads that share a row's keys hand each other nan and nothing worse."""
    case = random_case(generator, dtype, [[0, 1], [1]], [5000, 300], [1, 2], kv_heads=1, group=4)
    keys = poisoned(case.keys, 0, (4000, 0, 3), torch.nan)
    bad = replace(case, keys=keys)
    out, lse = bad.run()
    assert out[0, 0].isnan().all() and lse[0, 0].isnan().all()
    assert out[1].isfinite().all() and lse[1].isfinite().all()
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        again, lse_again = bad.run()
        assert_same_bits(again[1], out[1], "out of the worker that does not see it")
        assert_same_bits(lse_again[1], lse[1], "lse of the worker that does not see it")
        assert again[0, 0].isnan().all() and lse_again[0, 0].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [10, 61, 62, 70, 125, 130, 190])
def test_nan_in_tiles_ahead(offset: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Tiles that lie wholly ahead of a worker are nothing to it, though others see them."""
    case = random_case(generator, dtype, [[0], [0]], [300], [2, 2])
    case = replace(case, offsets=[[offset], [298]])
    out, _ = case.run()
    ahead = ((offset + 1) // TILE + 1) * TILE
    keys, values = [case.keys[0].clone()], [case.values[0].clone()]
    keys[0][ahead:], values[0][ahead:] = torch.nan, torch.nan
    bad, _ = replace(case, keys=keys, values=values).run()
    assert_same_bits(bad[0], out[0], "out of the worker that has not come so far")
    assert bad[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [83, 84, 100, 147, 148, 200, 280])
def test_nan_in_tiles_behind_the_window(
    offset: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """And so are tiles that a worker's window has left behind."""
    window = 20
    case = random_case(generator, dtype, [[0], [0]], [300], [2, 2], window=window)
    case = replace(case, offsets=[[offset], [20]])
    out, _ = case.run()
    behind = (offset - window + 1) // TILE * TILE
    assert behind >= TILE
    keys, values = [case.keys[0].clone()], [case.values[0].clone()]
    keys[0][:behind], values[0][:behind] = torch.nan, torch.nan
    bad, _ = replace(case, keys=keys, values=values).run()
    assert_same_bits(bad[0], out[0], "out of the worker that has left them behind")
    assert bad[1].isnan().all()


@given(layout=layouts(), data=st.data())
def test_a_nan_query_reaches_its_own_row_only(layout: Layout, data: st.DataObject) -> None:
    case = layout.build()
    out, lse = case.run()
    w = data.draw(st.integers(0, len(layout.offsets) - 1))
    i = data.draw(st.integers(0, layout.query_tokens - 1))
    h = data.draw(st.integers(0, layout.kv_heads * layout.group - 1))
    query = case.query.clone()
    query[w, i, h] = torch.nan
    bad_out, bad_lse = replace(case, query=query).run()
    other = torch.ones_like(lse, dtype=torch.bool)
    other[w, i, h] = False
    assert_same_bits(bad_out[other], out[other], "out of other rows")
    assert_same_bits(bad_lse[other], lse[other], "lse of other rows")
    # The row itself: nan if it sees anything, else zeros.
    assert_same_masks(bad_out[w, i, h], torch.where(lse[w, i, h].isinf(), out[w, i, h], torch.nan))


# Memory that is not the call's --------------------------------------------------------------------


@pytest.mark.parametrize("how", ["inside", "misaligned", "every other token"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 24, 64, 104, 128])
def test_what_lies_around_a_view_is_not_read(
    dim: int, dtype: torch.dtype, how: str, generator: torch.Generator
) -> None:
    """Inputs cut out of buffers of nan: past the last token, between heads, past the dims."""
    case = random_case(
        generator,
        dtype,
        [[0, 1, 2], [2, 1], [3]],
        [1, 65, 127, 3],
        [3, 1, 0],
        dim=dim,
        value_dim=264 - dim,
    )
    views = replace(
        case,
        query=laid_out(case.query, how),
        keys=[laid_out(x, how) for x in case.keys],
        values=[laid_out(x, how) for x in case.values],
    )
    assert not views.keys[1].is_contiguous()
    (out, lse), (expected, expected_lse) = views.run(), case.run()
    assert expected.isfinite().all()
    assert_same_bits(out, expected, "out")
    assert_same_bits(lse, expected_lse, "lse")


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_that_held_nan_before_is_no_matter(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    """A call full of nan leaves nothing behind, neither in scratch memory nor in freed tensors."""
    big = random_case(generator, dtype, [[0, 1], [1, 0]], [700, 65], [9, 9], dim=256)
    small = random_case(generator, dtype, [[0, 1], [1]], [130, 3], [2, 1], dim=40)
    out, lse = small.run()
    for _ in range(3):
        bad, _ = replace(
            big,
            query=big.query * torch.nan,
            keys=[key * torch.nan for key in big.keys],
            values=[value * torch.nan for value in big.values],
        ).run()
        assert bad.isnan().all()
        del bad
        again, lse_again = small.run()
        assert_same_bits(again, out, "out")
        assert_same_bits(lse_again, lse, "lse")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="guards pages with mprotect")
def test_nothing_is_read_past_the_end_of_memory() -> None:
    """Tensors that end where a forbidden page begins, or begin where one ends.

    In a process of its own, since a wrong read kills it.
    """
    program = f"import {Path(__file__).stem} as tests; tests.run_beside_forbidden_pages()"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert result.returncode == 0, f"exit status {result.returncode}\n{result.stderr}"
    assert result.stdout.split() == ["calls", "72"], result.stdout


def run_beside_forbidden_pages() -> None:
    generator = torch.Generator().manual_seed(1)
    calls = 0
    for dtype in DTYPES:
        for dim, value_dim in ((8, 8), (24, 40), (64, 64), (72, 256), (128, 96), (256, 8)):
            for length in (1, 15, 65, 128):
                case = random_case(
                    generator, dtype, [[0, 1], [1, 0]], [length, 3], [1, 1], kv_heads=1,
                    dim=dim, value_dim=value_dim,
                )  # fmt: skip
                expected, _ = case.run()
                for at_end in (True, False):
                    guarded = replace(
                        case,
                        query=beside_forbidden_page(case.query, at_end),
                        keys=[beside_forbidden_page(x, at_end) for x in case.keys],
                        values=[beside_forbidden_page(x, at_end) for x in case.values],
                    )
                    out = beside_forbidden_page(torch.zeros_like(expected), at_end)
                    hx.concurrent_attention(*guarded.arguments(), **guarded.options, out=out)
                    assert_same_bits(out, expected, "out")
                calls += 1
    print("calls", calls)


def beside_forbidden_page(x: torch.Tensor, at_end: bool) -> torch.Tensor:
    """A copy of `x` right before a page that may not be read, or right behind one."""
    import ctypes
    import mmap

    page = mmap.PAGESIZE
    size = x.numel() * x.element_size()
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for guard in (start, start + (pages + 1) * page):
        if libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    begin = page + (pages * page - size if at_end else 0)
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=begin).view(x.shape)
    copy.copy_(x)
    return copy
