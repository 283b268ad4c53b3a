"""The op as torch sees it, and the two functions that go with it: `rotate` and `view_offsets`."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

import hogwild_ext as hx
from compare import LIMITS, assert_close, assert_lse_matches, assert_out_matches, assert_same_bits
from hogwild_ext._reference import reference_rotate
from op_cases import (
    DTYPES,
    HIDDEN,
    MEMORY,
    Case,
    inverse_frequencies,
    laid_out,
    offsets_of_views,
    random_case,
)

# Inductor imports this when it compiles. By then other tests may have loaded another distutils than
# the one that setuptools insists on.
with suppress(ImportError):
    import torch.utils.cpp_extension


pytestmark = pytest.mark.usefixtures("one_thread")


def registered_arguments(case: Case, **changed: Any) -> tuple[Any, ...]:
    """The arguments of `torch.ops.hogwild_ext.concurrent_attention`: host data as tensors."""
    lengths = case.options.get("query_lengths")
    options = {"rope_scale": 1.0, "interleaved": False, "softcap": 0.0, "window": 0, **changed}
    return (
        case.query,
        case.keys,
        case.values,
        torch.tensor(case.offsets, dtype=torch.int32),
        torch.from_numpy(case.options["inv_freq"]),
        None if lengths is None else torch.tensor(lengths, dtype=torch.int32),
        case.query.shape[-1] ** -0.5,
        *options.values(),
    )


def small_case(generator: torch.Generator, dtype: torch.dtype = torch.float32, **more: Any) -> Case:
    return random_case(
        generator, dtype, [[0, 1], [1, 2, 0]], [17, 70, 3], [2, 3], dim=64, value_dim=96, **more
    )


# torch.library ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths_given", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype, lengths_given: bool, generator: torch.Generator) -> None:
    case = small_case(generator, dtype)
    if not lengths_given:
        case = replace(case, options={**case.options, "query_lengths": None})
    arguments = registered_arguments(
        case, rope_scale=1.5, interleaved=True, softcap=20.0, window=40
    )
    results = torch.library.opcheck(
        torch.ops.hogwild_ext.concurrent_attention.default, arguments, raise_exception=True
    )
    assert results and set(results.values()) == {"SUCCESS"}


def test_registered_op_is_the_function(generator: torch.Generator) -> None:
    case = small_case(generator)
    out, lse = torch.ops.hogwild_ext.concurrent_attention(
        *registered_arguments(case, rope_scale=1.5, interleaved=True, softcap=2.0, window=20)
    )
    options = {"rope_scale": 1.5, "interleaved": True, "softcap": 2.0, "window": 20}
    expected, expected_lse = replace(case, options={**case.options, **options}).run()
    assert_same_bits(out, expected, "out")
    assert_same_bits(lse, expected_lse, "lse")


@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_tensors(dtype: torch.dtype, generator: torch.Generator) -> None:
    """Shapes, dtypes and strides come out as from the real one, and nothing is computed."""
    case = small_case(generator, dtype)
    real = case.run()
    with FakeTensorMode() as mode:
        fake = replace(
            case,
            query=mode.from_tensor(case.query),
            keys=[mode.from_tensor(x) for x in case.keys],
            values=[mode.from_tensor(x) for x in case.values],
        ).run()
    for a, b in zip(fake, real, strict=True):
        assert isinstance(a, torch._subclasses.FakeTensor)
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def function_to_compile(
    query: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], options: dict
) -> torch.Tensor:
    out, lse = hx.concurrent_attention(query * 1.5, keys, values, **options, return_lse=True)
    return out.sum(dim=-1) + lse


def compiled_matches(case: Case, backend: Any) -> None:
    options = {**case.options, "offsets": case.offsets}
    torch._dynamo.reset()
    compiled = torch.compile(function_to_compile, backend=backend, fullgraph=True)
    expected = function_to_compile(case.query, case.keys, case.values, options)
    assert expected.isfinite().all()
    result = compiled(case.query, case.keys, case.values, options)
    torch.testing.assert_close(result, expected)


def one_opaque_node(graph: torch.fx.GraphModule, _: Any) -> Any:
    """A backend of torch.compile that runs the graph as it is, if the op is one node of it."""
    targets = [str(node.target) for node in graph.graph.nodes]
    assert len([t for t in targets if "hogwild_ext.concurrent_attention" in t]) == 1, targets
    return graph.forward


@pytest.mark.parametrize("backend", [one_opaque_node, "aot_eager"])
def test_compiled_in_one_graph(backend: Any, generator: torch.Generator) -> None:
    """Host data given as tensors or lists: no graph break, and the op is one node."""
    case = small_case(generator)
    case = replace(case, query=case.query[:, :2], options={**case.options, "query_lengths": None})
    as_lists = {**case.options, "inv_freq": case.options["inv_freq"].tolist()}
    compiled_matches(replace(case, options=as_lists), backend)
    as_tensors = {**case.options, "inv_freq": torch.from_numpy(case.options["inv_freq"])}
    compiled_matches(
        replace(case, options=as_tensors, offsets=torch.tensor(case.offsets, dtype=torch.int32)),
        backend,
    )


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")),
    reason="torch.compile's inductor needs a C++ compiler, and none is on the PATH",
)
def test_compiled_by_inductor(generator: torch.Generator) -> None:
    case = small_case(generator)
    case = replace(case, query=case.query[:, :2], options={**case.options, "query_lengths": None})
    options = {**case.options, "inv_freq": torch.from_numpy(case.options["inv_freq"])}
    offsets = torch.tensor(case.offsets, dtype=torch.int32)
    compiled_matches(replace(case, options=options, offsets=offsets), "inductor")


# Gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["query", "keys[1]", "values[2]", "out"])
def test_a_gradient_is_refused_by_name(name: str, generator: torch.Generator) -> None:
    case = small_case(generator)
    out, _ = case.run()
    before = out.clone()
    tensors = {"query": case.query, "keys[1]": case.keys[1], "values[2]": case.values[2]}
    (out if name == "out" else tensors[name]).requires_grad_(True)
    with pytest.raises(RuntimeError) as error:
        hx.concurrent_attention(*case.arguments(), **case.options, out=out)
    assert str(error.value).startswith(f"{name}:"), error.value
    assert "grad" in str(error.value)
    assert_same_bits(out.detach(), before, "out")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inputs_that_require_grad_pass_without_grad_mode(
    mode: Any, generator: torch.Generator
) -> None:
    case = small_case(generator)
    expected, _ = case.run()
    for x in (case.query, *case.keys, *case.values):
        x.requires_grad_(True)
    with mode():
        out, lse = case.run()
    assert not out.requires_grad and not lse.requires_grad
    assert_same_bits(out, expected, "out")


def test_a_gradient_is_refused_by_the_registered_op(generator: torch.Generator) -> None:
    """The graph never silently loses a gradient, whichever way the op is called."""
    case = small_case(generator)
    case.query.requires_grad_(True)
    with pytest.raises(RuntimeError, match="autograd"):
        out, _ = torch.ops.hogwild_ext.concurrent_attention(*registered_arguments(case))
        out.sum().backward()


# rotate -------------------------------------------------------------------------------------------


@given(
    length=st.integers(0, 40),
    heads=st.integers(1, 4),
    dim=st.integers(1, 32).map(lambda n: 8 * n),
    rotary=st.floats(0, 1),
    start=st.integers(-300, 300) | st.sampled_from([2**20 + 7, 2**30, -(2**30)]),
    rope_scale=st.just(1.0) | st.floats(0.25, 2.0),
    interleaved=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    how=st.sampled_from(MEMORY),
    number=st.integers(0, 2**32 - 1),
)
def test_rotate_is_the_oracle(
    length: int,
    heads: int,
    dim: int,
    rotary: float,
    start: int,
    rope_scale: float,
    interleaved: bool,
    dtype: torch.dtype,
    how: str,
    number: int,
) -> None:
    generator = torch.Generator().manual_seed(number)
    keys = laid_out(torch.randn(length, heads, dim, generator=generator).to(dtype), how)
    before = keys.clone()
    inv_freq = inverse_frequencies(2 * int(rotary * dim / 2))
    rotated = hx.rotate(keys, inv_freq, start, rope_scale, interleaved)
    expected = reference_rotate(
        keys,
        inv_freq,
        range(start, start + length),
        rope_scale=rope_scale,
        interleaved=interleaved,
    )
    assert rotated.dtype == dtype
    # Far tighter than the op: one rotation in float32, one rounding.
    assert_close(
        rotated, expected, relative=2 * torch.finfo(dtype).eps, worst=3 * torch.finfo(dtype).eps
    )
    assert_same_bits(keys, before, "keys, which are left as they are")
    rest = 2 * len(inv_freq)
    assert_same_bits(rotated[..., rest:], keys[..., rest:], "dims that do not rotate")


def test_rotate_starts_at_zero_and_turns_halves(generator: torch.Generator) -> None:
    """The defaults: position 0 first, no factor, pairs (j, j + R/2)."""
    keys = torch.randn(3, 1, 8, generator=generator)
    inv_freq = [1.0, 0.5]
    rotated = hx.rotate(keys, inv_freq)
    assert_same_bits(rotated[0], keys[0], "the key at position 0")
    expected = reference_rotate(keys, inv_freq, [0, 1, 2])
    assert_close(rotated, expected, relative=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_only_the_distance_counts(
    interleaved: bool, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """rotate and the op agree on what a position is, also far out.

    Keys rotated to 1000, 1001, ... and a query at 1030 give what the same keys rotated to 0, 1, ...
    and a query at 30 give.
    """
    raw = torch.randn(20, 2, 64, generator=generator).to(dtype)
    value = torch.randn(20, 2, 64, generator=generator).to(dtype)
    query = torch.randn(1, 1, 4, 64, generator=generator).to(dtype)
    inv_freq = inverse_frequencies(64)
    options = {"inv_freq": inv_freq, "interleaved": interleaved}
    near, near_lse = hx.concurrent_attention(
        query, [hx.rotate(raw, inv_freq, 0, 1.0, interleaved)], [value], [[30]],
        **options, return_lse=True,
    )  # fmt: skip
    far, far_lse = hx.concurrent_attention(
        query, [hx.rotate(raw, inv_freq, 1000, 1.0, interleaved)], [value], [[1030]],
        **options, return_lse=True,
    )  # fmt: skip
    # Each side has rounded its keys, at other angles: twice the limit, and once more.
    assert_out_matches_loosely(far, near)
    assert_lse_matches(far_lse, near_lse.double(), torch.bfloat16)


def assert_out_matches_loosely(out: torch.Tensor, expected: torch.Tensor) -> None:
    assert_close(out, expected.double(), relative=3 * LIMITS[out.dtype].out)


# view_offsets -------------------------------------------------------------------------------------


@given(data=st.data())
def test_view_offsets_are_the_definition(data: st.DataObject) -> None:
    """A step is played token by token; an offset is where the first new token stood."""
    segments = data.draw(st.integers(1, 6))
    lengths = data.draw(st.lists(st.integers(0, 50), min_size=segments, max_size=segments))
    order = st.permutations(range(segments))
    workers = data.draw(st.integers(0, 5))
    views = [data.draw(order)[: data.draw(st.integers(1, segments))] for _ in range(workers)]
    brought = [data.draw(st.integers(0, lengths[view[-1]])) for view in views]

    expected = torch.full((workers, segments), HIDDEN, dtype=torch.int32)
    for w, view in enumerate(views):
        text = [(s, token) for s in view for token in range(lengths[s])]  # as the worker reads it
        first_new = len(text) - brought[w]
        for s in view:
            begins = len([1 for other, _ in text if view.index(other) < view.index(s)])
            expected[w, s] = first_new - begins

    offsets = hx.view_offsets(views, lengths, brought)
    assert offsets.dtype == torch.int32
    assert offsets.device.type == "cpu"
    assert torch.equal(offsets, expected)
    assert offsets.tolist() == offsets_of_views(views, lengths, brought)
    for kind in (np.array, torch.tensor, tuple):
        again = hx.view_offsets(
            views, kind(lengths), kind(brought) if workers else np.zeros(0, np.int32)
        )
        assert torch.equal(again, expected)


def test_hidden_is_the_smallest_int32() -> None:
    assert hx.HIDDEN == HIDDEN == torch.iinfo(torch.int32).min


def test_rotate_view_offsets_and_the_op_make_plain_attention(generator: torch.Generator) -> None:
    """The three together, as a user calls them: two workers that read each other.

    Each worker's result is that of torch's attention over its own text in its own order.
    """
    lengths, views, brought = [40, 9, 12], [[0, 2, 1], [0, 1, 2]], [2, 3]
    heads, kv_heads, dim = 6, 2, 64
    inv_freq = inverse_frequencies(dim)
    raw = [torch.randn(n, kv_heads, dim, generator=generator) for n in lengths]
    values = [torch.randn(n, kv_heads, dim, generator=generator) for n in lengths]
    query = torch.randn(2, 3, heads, dim, generator=generator)
    out = hx.concurrent_attention(
        query,
        [hx.rotate(key, inv_freq) for key in raw],
        values,
        hx.view_offsets(views, lengths, brought),
        inv_freq=inv_freq,
        query_lengths=brought,
    )
    for w, view in enumerate(views):
        key = torch.cat([raw[s] for s in view]).double()
        value = torch.cat([values[s] for s in view]).double()
        text, new = len(key), brought[w]
        turned_key = reference_rotate(key, inv_freq, range(text))
        turned_query = reference_rotate(query[w, :new], inv_freq, range(text - new, text))
        mask = torch.arange(text - new, text)[:, None] >= torch.arange(text)
        expected = torch.nn.functional.scaled_dot_product_attention(
            turned_query.transpose(0, 1),
            turned_key.transpose(0, 1),
            value.transpose(0, 1),
            attn_mask=mask,
            enable_gqa=True,
        ).transpose(0, 1)
        assert_out_matches(out[w, :new], expected)
        assert not out[w, new:].any()
