"""torch's process-wide settings: every result is the same under each, to the bit.

All levels of the package run once with torch as it comes, and once under each setting that somebody
may have made for reasons of his own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import hogwild_ext as hx
from models import tiny_model
from scripted import VOCABULARY, team

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]

D, HEADS, KV = 32, 4, 2
INV_FREQ = 1e4 ** (-np.arange(0, D, 2) / D)
VIEWS, LENGTHS = [[0, 2, 1], [0, 1, 2]], [70, 5, 9]


def numbers(*shape: int, seed: int) -> torch.Tensor:
    data = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return torch.from_numpy(data)


# ---- what runs -----------------------------------------------------------------------------------


def the_op(_: Any) -> list[Any]:
    results: list[Any] = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        query = numbers(2, 3, HEADS, D, seed=1).to(dtype)
        values = [numbers(n, KV, D, seed=n).to(dtype) for n in LENGTHS]
        raw = [numbers(n, KV, D, seed=n + 50).to(dtype) for n in LENGTHS]
        keys = [hx.rotate(key, INV_FREQ.tolist(), 3, 0.5) for key in raw]
        offsets = hx.view_offsets(VIEWS, LENGTHS, [3, 2])
        for host in (list, np.array):
            results += hx.concurrent_attention(
                query, keys, values, offsets, inv_freq=host(INV_FREQ.tolist()),
                query_lengths=host([3, 2]), softcap=5.0, window=60, return_lse=True,
            )  # fmt: skip
        results += [*keys, offsets, hx.concurrent_attention(
            query, [], [], np.zeros((2, 0), np.int32), inv_freq=[]
        )]  # fmt: skip
    return results


def a_cache(_: Any) -> list[Any]:
    cache = hx.SegmentCache(2, KV, D, inv_freq=INV_FREQ, max_tokens=256)
    prompt, own = cache.segment("prompt"), cache.segment("own")
    results: list[Any] = []
    for views, counts in (([[prompt]], [66]), ([[prompt, own]], [3]), ([[own]], [1])):
        with cache.step(views, counts) as step:
            for layer in range(2):
                key, value = numbers(2, counts[0], KV, D, seed=layer)
                query = numbers(counts[0], HEADS, D, seed=layer + 7)
                results.append(step.attend(layer, query, key, value))
    fork = cache.fork(prompt)
    cache.commit(own, fork)
    fork.truncate(68)
    for segment in (prompt, fork):
        results += [segment.keys(1), segment.values(0), segment.tokens]
    return results


def a_model(model: Any) -> list[Any]:
    hx.unpatch(model)
    cache = hx.SegmentCache.for_model(model, max_tokens=256)
    prompt, a, b = (cache.segment(name) for name in "pab")
    views = [[prompt, a, b], [prompt, b, a]]
    return [
        hx.forward(model, cache, [[prompt]], [[5, 9, 17]]),
        *hx.forward(model, cache, views, [[6, 7], [8]], logits="all"),
        hx.forward(model, cache, views, torch.from_numpy(np.array([[9], [10]])), linear="packed"),
        prompt.keys(1),
        a.tokens,
    ]


def a_run(model: Any) -> list[Any]:
    config = transformers.GenerationConfig(
        do_sample=True, top_p=0.95, min_p=0.01, repetition_penalty=1.1, suppress_tokens=[2]
    )
    results = []
    for generation_config in (config, transformers.GenerationConfig()):
        writers = team(model, 2, generation_config=generation_config, seed=3)
        result = writers.run("?", max_steps=6)
        results += [worker.tokens for worker in result.workers] + [result.text]
    return results


EVERYTHING: dict[str, Callable[[Any], list[Any]]] = {
    "op": the_op,
    "cache": a_cache,
    "model": a_model,
    "run": a_run,
}


# ---- settings ------------------------------------------------------------------------------------


@contextmanager
def setting(put: Callable[[Any], Any], value: Any, before: Any) -> Iterator[None]:
    put(value)
    try:
        yield
    finally:
        put(before)


@contextmanager
def deterministic() -> Iterator[None]:
    assert torch.utils.deterministic.fill_uninitialized_memory
    with setting(torch.use_deterministic_algorithms, True, False):
        yield


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "default dtype float64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "default dtype bfloat16": lambda: setting(
        torch.set_default_dtype, torch.bfloat16, torch.float32
    ),
    "default dtype float16": lambda: setting(torch.set_default_dtype, torch.float16, torch.float32),
    "default device meta": lambda: setting(torch.set_default_device, "meta", None),
    "within another device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "grad": lambda: torch.set_grad_enabled(True),
    "anomalies detected": torch.autograd.detect_anomaly,
    "deterministic algorithms": deterministic,
    "three threads": lambda: setting(torch.set_num_threads, 3, 1),
    "denormals flushed": lambda: setting(torch.set_flush_denormal, True, False),
    "sparse checks": torch.sparse.check_sparse_tensor_invariants,
    "forward-mode": torch.autograd.forward_ad.dual_level,
    "profiled": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", vocab_size=VOCABULARY, head_dim=16)


@pytest.fixture(scope="module")
def expected(model: Any) -> dict[str, list[Any]]:
    return {name: run(model) for name, run in EVERYTHING.items()}


def assert_same(results: list[Any], expected: list[Any]) -> None:
    assert len(results) == len(expected)
    for mine, other in zip(results, expected, strict=True):
        if isinstance(other, torch.Tensor):
            assert type(mine) is torch.Tensor
            assert mine.dtype == other.dtype and mine.device == other.device
            assert torch.equal(mine, other)
        else:
            assert mine == other


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", EVERYTHING)
@pytest.mark.parametrize("name", SETTINGS)
def test_results_are_the_same(
    name: str, what: str, model: Any, expected: dict[str, list[Any]]
) -> None:
    with SETTINGS[name]():
        results = EVERYTHING[what](model)
    assert_same(results, expected[what])


@pytest.mark.parametrize("what", ["op", "cache"])
def test_autocast_changes_nothing_of_ours(what: str, expected: dict[str, list[Any]]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        results = EVERYTHING[what](None)
    assert_same(results, expected[what])


def test_a_model_under_autocast(model: Any, expected: dict[str, list[Any]]) -> None:
    """Its own products are rounded; what is stored keeps the cache's type."""
    with torch.autocast("cpu", torch.bfloat16):
        results = a_model(model)
    for mine, other in zip(results, expected["model"], strict=True):
        if isinstance(other, torch.Tensor):
            assert (mine.float() - other).norm() < 0.05 * other.norm()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("what", ["cache", "model", "run"])
def test_a_compiled_caller(
    what: str, backend: str, model: Any, expected: dict[str, list[Any]]
) -> None:
    """torch.compile around somebody's own step function; the op itself is traced elsewhere."""
    torch._dynamo.reset()
    compiled = torch.compile(EVERYTHING[what], backend=backend)
    for _ in range(2):
        assert_same(compiled(model), expected[what])
    torch._dynamo.reset()
