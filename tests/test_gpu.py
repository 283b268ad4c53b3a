"""On a real GPU: `pytest -m gpu`.

The suites of the op and of the cache run as they are, with HOGWILD_TEST_GPU=1 (see real_gpu.py).
What is here beside them is what only tensors on a device can show.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import graph_turns
import hogwild_ext as hx
from compare import assert_lse_matches, assert_out_matches, assert_same_bits
from models import random_tokens, tiny_model
from op_cases import DTYPES, GPU_DIMS, MEMORY, Case, laid_out, random_case
from paged_games import Game

pytestmark = pytest.mark.gpu

TESTS = Path(__file__).parent
SUITES = ["op_oracle", "op_bits", "op_nonfinite", "cache", "emulated_layouts"]


@pytest.mark.parametrize("suite", SUITES)
def test_suites_of_the_cpu(suite: str, seed: int) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"test_{suite}.py"],
        cwd=TESTS,
        env={**os.environ, "HOGWILD_TEST_GPU": "1", "HOGWILD_TEST_SEED": str(seed)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    assert " passed" in result.stdout, result.stdout


def on_gpu(case: Case, how: str = "dense", device: str = "cuda") -> Case:
    def moved(x: torch.Tensor) -> torch.Tensor:
        return laid_out(x.to(device), how)

    keys, values = ([moved(x) for x in side] for side in (case.keys, case.values))
    return replace(case, query=moved(case.query), keys=keys, values=values)


# ---- the op --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", MEMORY)
@pytest.mark.parametrize("dim", GPU_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_op(dtype: torch.dtype, dim: int, how: str, generator: torch.Generator) -> None:
    case = random_case(generator, dtype, [[0, 1, 2], [2, 1, 0]], [300, 64, 17], [2, 5], dim=dim)
    there = on_gpu(case, how)
    out, lse = there.run()
    assert out.device == lse.device == there.query.device
    expected, expected_lse = case.reference()
    assert_out_matches(out.cpu(), expected)
    assert_lse_matches(lse.cpu(), expected_lse, dtype)
    given = laid_out(torch.full_like(out, torch.nan), how)
    returned = hx.concurrent_attention(*there.arguments(), **there.options, out=given)
    assert returned is given
    assert_same_bits(given.cpu(), out.cpu())


def test_rotate(generator: torch.Generator) -> None:
    keys = torch.randn(70, 2, 64, generator=generator)
    inv_freq = [1.0, 0.3, 0.01]
    there = hx.rotate(keys.cuda(), inv_freq, start=5)
    assert there.is_cuda
    torch.testing.assert_close(there.cpu(), hx.rotate(keys, inv_freq, start=5))


def test_bad_arguments_are_named(generator: torch.Generator) -> None:
    case = on_gpu(random_case(generator, torch.float32, [[0]], [5], [1]))
    query, keys, values, offsets = case.arguments()
    run = hx.concurrent_attention
    options = case.options
    frequencies = torch.as_tensor(options["inv_freq"]).cuda()
    with pytest.raises(ValueError, match="^offsets: expected host data"):
        run(query, keys, values, torch.tensor(offsets).cuda(), **options)
    with pytest.raises(ValueError, match="^inv_freq: expected host data"):
        run(query, keys, values, offsets, **{**options, "inv_freq": frequencies})
    with pytest.raises(ValueError, match=r"^keys\[0\]: expected the device of query"):
        run(query, [keys[0].cpu()], values, offsets, **options)
    with pytest.raises(ValueError, match="^out: expected memory of its own"):
        run(query, keys, values, offsets, **options, out=query)
    with pytest.raises(ValueError, match="^query: expected a head dimension of 64"):
        run(query[..., :32], [keys[0][..., :32]], values, offsets, **options)
    with pytest.raises(RuntimeError, match="^query: .*no gradient"):
        run(query.requires_grad_(), keys, values, offsets, **options)
    with pytest.raises(ValueError, match="^device: .*cuda:99"):
        hx.SegmentCache(1, 1, 64, inv_freq=[], device="cuda:99")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype, generator: torch.Generator) -> None:
    case = on_gpu(random_case(generator, dtype, [[0, 1], [1, 0]], [17, 70], [2, 3]))
    torch.library.opcheck(
        torch.ops.hogwild_ext.concurrent_attention.default,
        (
            case.query, case.keys, case.values, torch.tensor(case.offsets, dtype=torch.int32),
            torch.from_numpy(case.options["inv_freq"]), torch.tensor([2, 3], dtype=torch.int32),
            0.125, 1.0, False, 0.0, 0,
        ),
    )  # fmt: skip


# ---- the cache -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(20))
def test_lives_of_a_cache(number: int, seed: int) -> None:
    Game(seed, device="cuda").play(6)


def test_a_device_without_a_number_is_the_current_one() -> None:
    last = torch.cuda.device_count() - 1
    with torch.cuda.device(last):
        cache = hx.SegmentCache(1, 1, 64, inv_freq=[], max_tokens=64, device="cuda")
    assert cache.device == torch.device("cuda", last)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one(generator: torch.Generator, seed: int) -> None:
    assert torch.cuda.current_device() == 0
    Game(seed, device="cuda:1").play(3)
    case = random_case(generator, torch.bfloat16, [[0]], [300], [2])
    out, _ = on_gpu(case, device="cuda:1").run()
    assert out.device == torch.device("cuda", 1)
    assert_out_matches(out.cpu(), case.reference()[0])


# ---- streams and synchronisation -----------------------------------------------------------------


@contextmanager
def no_waiting() -> Iterator[None]:
    """What waits for the device raises RuntimeError."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_waits_for_the_device(generator: torch.Generator) -> None:
    case = on_gpu(random_case(generator, torch.bfloat16, [[0, 1]], [300, 5], [1]))
    cache = graph_turns.make_cache(torch.bfloat16, "cuda")
    a, b = cache.segment("a"), cache.segment("b")
    model = graph_turns.Model(3, torch.bfloat16, "cuda")
    ids = torch.zeros(1, 3, dtype=torch.int64, device="cuda")
    with no_waiting():
        case.run()
        for segment in (a, b):
            with cache.step([[segment]], [3], ids) as step:
                model.attend(step, 3)
        fork = cache.fork(a)
        with cache.step([[a], [fork]], [1, 2]) as step:
            model.attend(step, 3)
        cache.commit(b, a)
        a.truncate(2)


def test_a_forward_does_not_wait_for_the_device() -> None:
    model = tiny_model("llama", head_dim=64).cuda()
    cache = hx.SegmentCache.for_model(model, max_tokens=512)
    a, b = cache.segment("a"), cache.segment("b")
    hx.forward(model, cache, [[a]], [random_tokens(9, seed=1)])
    with no_waiting():
        hx.forward(model, cache, [[a, b], [b, a]], [[5, 6], [7]])
        hx.forward(model, cache, [[b, a]], torch.tensor([[5]]).pin_memory().cuda(non_blocking=True))


def test_the_current_stream_is_used(generator: torch.Generator) -> None:
    """The op reads a query that is written on its stream after a while: elsewhere it would be too
    early."""
    case = on_gpu(random_case(generator, torch.float16, [[0]], [300], [1]))
    expected, _ = case.run()
    late = torch.zeros_like(case.query)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late.copy_(case.query)
        out, _ = replace(case, query=late).run()
    torch.cuda.current_stream().wait_stream(side)
    assert_same_bits(out.cpu(), expected.cpu())


def test_a_step_does_not_overwrite_what_the_last_one_still_reads() -> None:
    """Many steps are sent off while the device is busy with something else."""
    results = []
    for busy in (False, True):
        cache = graph_turns.make_cache(torch.bfloat16, "cuda")
        segments = [cache.segment(name) for name in "abc"]
        model = graph_turns.Model(3, torch.bfloat16, "cuda")
        model.draw(torch.Generator().manual_seed(1), 3)
        outs = []
        torch.cuda.synchronize()
        if busy:
            torch.cuda._sleep(200_000_000)
        for turn in range(40):
            order = segments[turn % 3 :] + segments[: turn % 3]
            with cache.step([order], [1 + turn % 3]) as step:
                model.attend(step, 1 + turn % 3)
            outs += [out.clone() for out in model.out]
        results.append([out.cpu() for out in outs])
    for late, early in zip(*results, strict=True):
        assert_same_bits(late, early)


# ---- CUDA graphs ---------------------------------------------------------------------------------


def capture(
    cache: hx.SegmentCache, model: graph_turns.Model, views: Any, sizes: Sequence[int]
) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with cache.step(views, sizes) as step:
        step.prepare(graph_turns.HEADS)
        with torch.cuda.graph(graph):
            model.attend(step, sum(sizes))
        step.replay(graph)
    return graph


@pytest.mark.parametrize("workers", [1, 3, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_replays_equal_plain_steps(dtype: torch.dtype, workers: int, seed: int) -> None:
    replayed = graph_turns.play(dtype, workers, seed, capture, "cuda")
    plain = graph_turns.play(dtype, workers, seed, None, "cuda")
    for got, expected in zip(replayed, plain, strict=True):
        assert_same_bits(got.cpu(), expected.cpu())


def test_a_capture_without_prepare_is_refused() -> None:
    cache = graph_turns.make_cache(torch.float16, "cuda")
    model = graph_turns.Model(1, torch.float16, "cuda")
    a = cache.segment("a")
    with (
        pytest.raises(RuntimeError, match="prepare"),
        cache.step([[a]], [1]) as step,
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        model.attend(step, 1)
    graph_turns.append(cache, a, 1)
