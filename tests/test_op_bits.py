"""The same inputs give the same bits: any number of threads, any company, any memory layout."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hogwild_ext as hx
from compare import assert_same_bits
from hogwild_ext import ops
from op_cases import DTYPES, HIDDEN, MEMORY, Case, Layout, as_host, laid_out, layouts, random_case

pytestmark = pytest.mark.usefixtures("one_thread")

ISAS = {  # what each one needs of the processor, in the words of /proc/cpuinfo
    "baseline": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512_bf16": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"},
    "amx": {"avx512_bf16", "amx_tile", "amx_bf16"},
}


def assert_same_results(
    actual: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]
) -> None:
    assert_same_bits(actual[0], expected[0], "out")
    assert_same_bits(actual[1], expected[1], "lse")


def workers(case: Case, chosen: list[int]) -> Case:
    """The same call with the workers `chosen`, in that order; the same segments."""
    lengths = case.options["query_lengths"]
    return replace(
        case,
        query=case.query[chosen],
        offsets=[[int(x) for x in case.offsets[w]] for w in chosen],
        options={
            **case.options,
            "query_lengths": None if lengths is None else [int(lengths[w]) for w in chosen],
        },
    )


# Repetition and threads ---------------------------------------------------------------------------


@given(layout=layouts())
def test_same_bits_for_any_number_of_threads(layout: Layout) -> None:
    case = layout.build()
    torch.set_num_threads(1)
    expected = case.run()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert_same_results(case.run(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_where_work_is_split(dtype: torch.dtype, generator: torch.Generator) -> None:
    """One KV head and long segments: several threads then share the keys of a row."""
    case = random_case(generator, dtype, [[0, 1], [1, 0]], [9000, 777], [1, 2], kv_heads=1, group=2)
    torch.set_num_threads(1)
    expected = case.run()
    for threads in (2, 3, 5, 16, 1):
        torch.set_num_threads(threads)
        for _ in range(3):
            assert_same_results(case.run(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_where_heads_take_turns(dtype: torch.dtype, generator: torch.Generator) -> None:
    """More KV heads than one thread reads side by side, and work that is split among threads."""
    case = random_case(
        generator, dtype, [[0, 1], [1, 0]], [700, 2100], [1, 2], kv_heads=11, group=1
    )
    apart = replace(
        case,
        keys=[laid_out(key, "heads first") for key in case.keys],
        values=[laid_out(value, "heads first") for value in case.values],
    )
    expected = apart.run()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert_same_results(case.run(), expected)


# Company ------------------------------------------------------------------------------------------


@given(layout=layouts(), data=st.data())
def test_same_bits_whoever_else_is_in_the_call(layout: Layout, data: st.DataObject) -> None:
    """Each worker alone, and any choice of workers in any order."""
    case = layout.build()
    out, lse = case.run()
    count = len(layout.offsets)
    chosen = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=count + 3))
    assert_same_results(workers(case, chosen).run(), (out[chosen], lse[chosen]))
    for w in range(count):
        alone = case.worker(w)
        tokens = alone.query.shape[1]
        assert_same_results(alone.run(), (out[w : w + 1, :tokens], lse[w : w + 1, :tokens]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("brought", [1, 2, 17])
def test_same_bits_beside_63_others(
    brought: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Beside 0 to 63 others with whatever views, one of which brings 100 tokens, in any order."""
    lengths, everybody = [200, 129, 64, 1, 0, 130], 64
    views, brings = [], []
    for _ in range(everybody):
        order = torch.randperm(len(lengths), generator=generator).tolist()
        views.append(order[: int(torch.randint(0, len(lengths) + 1, (), generator=generator))])
        brings.append(int(torch.randint(0, 3, (), generator=generator)))
    views[0], brings[0] = [2, 3, 5, 1, 0], brought
    views[1], brings[1] = [3, 0, 5], 100
    case = random_case(generator, dtype, views, lengths, brings, kv_heads=2, group=3)

    def first_worker(company: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        place = int(torch.randint(0, len(company) + 1, (), generator=generator))
        out, lse = workers(case, [*company[:place], 0, *company[place:]]).run()
        return out[place, :brought], lse[place, :brought]

    out, lse = case.worker(0).run()
    assert out.isfinite().all() and lse.isfinite().all()
    for size in (0, 1, 2, 3, 6, 15, 31, 62):
        shuffled = (2 + torch.randperm(everybody - 2, generator=generator)).tolist()
        others = shuffled[:size]
        assert_same_results(first_worker(others), (out[0], lse[0]))
        with_long = [*others, 1]
        order = torch.randperm(len(with_long), generator=generator).tolist()
        assert_same_results(first_worker([with_long[i] for i in order]), (out[0], lse[0]))


@given(layout=layouts(), data=st.data())
def test_same_bits_whatever_rows_sit_beside(layout: Layout, data: st.DataObject) -> None:
    """Without a worker's later tokens, and without some of a KV head's query heads."""
    case = layout.build()
    out, lse = case.run()

    tokens = data.draw(st.integers(1, layout.query_tokens))
    lengths = layout.query_lengths
    fewer = replace(
        case,
        query=case.query[:, :tokens],
        options={
            **case.options,
            "query_lengths": None if lengths is None else [min(n, tokens) for n in lengths],
        },
    )
    assert_same_results(fewer.run(), (out[:, :tokens], lse[:, :tokens]))

    kept = data.draw(st.lists(st.integers(0, layout.group - 1), min_size=1, unique=True))
    heads = [kv * layout.group + h for kv in range(layout.kv_heads) for h in kept]
    thinner = replace(case, query=case.query[:, :, heads])
    assert_same_results(thinner.run(), (out[:, :, heads], lse[:, :, heads]))


# What a row cannot see ----------------------------------------------------------------------------


@given(layout=layouts(), data=st.data())
def test_what_a_row_cannot_see_is_a_bitwise_no_op(layout: Layout, data: st.DataObject) -> None:
    """Other numbers in every key and value that a row does not see leave its bits alone."""
    case = layout.build()
    out, lse = case.run()
    w = data.draw(st.integers(0, len(layout.offsets) - 1))
    i = data.draw(st.integers(0, layout.query_tokens - 1))
    loudness = data.draw(st.sampled_from([0.0, 1.0, 1e4]))

    keys, values = [], []
    for offset, key, value in zip(layout.offsets[w], case.keys, case.values, strict=True):
        token = torch.arange(len(key))
        seen = (token <= offset + i) & (offset != HIDDEN)
        if layout.window is not None:
            seen &= offset + i - token < layout.window
        keys.append(torch.where(seen[:, None, None], key, torch.randn_like(key) * loudness))
        values.append(torch.where(seen[:, None, None], value, torch.randn_like(value) * loudness))
    changed = replace(case, keys=keys, values=values).run()
    assert_same_results((changed[0][w, i], changed[1][w, i]), (out[w, i], lse[w, i]))


@given(layout=layouts(), data=st.data())
def test_hidden_and_empty_segments_are_bitwise_no_ops(layout: Layout, data: st.DataObject) -> None:
    """A segment that nobody sees, or that is empty, may stand anywhere in the list."""
    case = layout.build()
    expected = case.run()
    place = data.draw(st.integers(0, len(layout.lengths)))
    length = data.draw(st.sampled_from([0, 1, 64, 150]))
    offset = 5 if length == 0 else HIDDEN
    key = torch.randn(length, layout.kv_heads, layout.dim).to(layout.dtype)
    value = torch.randn(length, layout.kv_heads, layout.value_dim).to(layout.dtype)
    more = replace(
        case,
        keys=[*case.keys[:place], key, *case.keys[place:]],
        values=[*case.values[:place], value, *case.values[place:]],
        offsets=[[*row[:place], offset, *row[place:]] for row in layout.offsets],
    )
    assert_same_results(more.run(), expected)


# How the inputs come ------------------------------------------------------------------------------


@given(layout=layouts())
def test_same_bits_however_tensors_lie_in_memory(layout: Layout) -> None:
    expected = replace(layout, memory=["dense"], host="list").build().run()
    assert_same_results(layout.build().run(), expected)


@pytest.mark.parametrize("host", ["list", "numpy", "torch"])
def test_same_bits_for_lists_arrays_and_tensors(host: str, generator: torch.Generator) -> None:
    case = random_case(generator, torch.bfloat16, [[0, 1], [1, 0]], [70, 9], [2, 1])
    as_given: dict[str, Any] = {
        name: as_host(torch.as_tensor(case.options[name]).numpy(), host)
        for name in ("inv_freq", "query_lengths")
    }
    offsets = as_host(torch.tensor(case.offsets, dtype=torch.int32).numpy(), host)
    again = replace(case, offsets=offsets, options={**case.options, **as_given})
    assert_same_results(again.run(), case.run())


def older_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose tensors C code cannot read."""
    monkeypatch.setattr(ops, "_TENSORS", hx._C.TensorReader(object))


def as_parameters(case: Case) -> Case:
    keys = [torch.nn.Parameter(key, requires_grad=False) for key in case.keys]
    return replace(case, keys=keys)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_are_read_alike_in_python_and_in_c(
    dtype: torch.dtype, memory: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = random_case(
        generator, dtype, [[0, 1, 2], [2, 0]], [70, 0, 3], [2, 1], dim=64, value_dim=96
    )
    case = replace(
        case,
        keys=[laid_out(key, memory) for key in case.keys],
        values=tuple(laid_out(value, memory) for value in case.values),
    )
    tensors = case.query, case.keys, case.values
    if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        read = ops._TENSORS.segments(*tensors)
        assert read is not None
        for mine, expected in zip(read, ops._check_segments(*tensors), strict=True):
            assert np.array_equal(mine, expected)
    expected = case.run()
    assert_same_results(as_parameters(case).run(), expected)
    older_torch(monkeypatch)
    assert ops._TENSORS.segments(*tensors) is None
    assert_same_results(case.run(), expected)


# Instruction sets ---------------------------------------------------------------------------------


def test_isa_is_the_forced_one() -> None:
    forced = os.environ.get("HOGWILD_ISA")
    if not forced:
        pytest.skip("HOGWILD_ISA is not set: the instruction set was chosen, not forced")
    assert hx._C.isa() == forced


@pytest.mark.cpu
@pytest.mark.skipif("HOGWILD_ISA" in os.environ, reason="one instruction set is forced already")
@pytest.mark.parametrize("isa", ISAS)
def test_each_isa(isa: str, seed: int) -> None:
    """These tests and the oracle's, in a process of their own with the instruction set forced.

    The one that this process runs on needs no second run: there only the forcing is tried.
    """
    missing = ISAS[isa] - processor_flags()
    if missing:
        pytest.skip(f"this processor has no {', '.join(sorted(missing))}")
    tests = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    chosen = "not plain_causal and not oracle_is and not 1134 and not other_data"
    if isa == hx._C.isa():
        chosen = "isa_is_the_forced_one"
    result = subprocess.run(
        [*command, "test_op_bits.py", "test_op_oracle.py", "-k", chosen],
        cwd=tests,
        env={
            **os.environ,
            "HOGWILD_ISA": isa,
            "HYPOTHESIS_PROFILE": "quick",
            "HOGWILD_TEST_SEED": str(seed),
        },
        capture_output=True,
        text=True,
    )
    summary = result.stdout.strip().splitlines()[-1:]
    assert result.returncode == 0, f"HOGWILD_ISA={isa}\n{result.stdout}\n{result.stderr}"
    assert "passed" in summary[0], result.stdout


def processor_flags() -> set[str]:
    """The features of this machine's processor that Linux lists; all of them if it lists none."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split(":")[1].split())
    return set()
