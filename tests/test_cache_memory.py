"""A cache's memory: not shared by copies, and asked for in words that say how much it is."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import hogwild_ext as hx
from hogwild_ext import cache as caches
from hogwild_ext.cpu_backend import CpuBackend
from models import plain_logits, random_tokens, tiny_model
from scripted import VOCABULARY, team

INV_FREQ = np.array([1.0, 0.1], np.float32)
COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "old pickle": lambda x: pickle.dumps(x, protocol=0),
    "in a dict": lambda x: copy.deepcopy({"mine": [x]}),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# ---- copies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_refused(how: str) -> None:
    cache = hx.SegmentCache(1, 1, 8, inv_freq=INV_FREQ, max_tokens=64)
    segment = cache.segment("a")
    with cache.step([[segment]], [3]) as step:
        step.attend(0, *torch.ones(3, 3, 1, 8))
        with pytest.raises(TypeError, match=r"^step: expected not .* cache\.step"):
            COPIES[how](step)
    with pytest.raises(TypeError, match=r"^cache: expected not .* cache\.fork"):
        COPIES[how](cache)
    with pytest.raises(TypeError, match=r"^segment: expected not .* cache\.fork"):
        COPIES[how](segment)
    assert len(cache.fork(segment)) == 3 and cache.used_tokens == 3


def test_copies_of_a_run_are_refused_and_of_a_team_are_not() -> None:
    workers = team(tiny_model("llama", vocab_size=VOCABULARY), 2)
    with workers.stream("p", 3) as run:
        next(run)
        for how in COPIES.values():
            with pytest.raises(TypeError, match=r"^run: expected not .*result"):
                how(run)
    twin = copy.deepcopy(workers)
    assert twin.model is not workers.model
    assert twin.run("p", 3).text == workers.run("p", 3).text


@pytest.mark.parametrize("linear", [None, "packed"])
def test_copies_of_a_patched_model_are_patched_models_of_their_own(linear: str | None) -> None:
    model, tokens = tiny_model("llama"), random_tokens(9, seed=1)

    def logits(model: Any) -> torch.Tensor:
        cache = hx.SegmentCache.for_model(model, max_tokens=64)
        found = hx.forward(model, cache, [[cache.segment("a")]], [tokens], linear=linear)
        assert isinstance(found, torch.Tensor)
        return found

    expected, plain = logits(model), plain_logits(model, tokens)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.model.layers[1].self_attn.config._rotary is twin.model.rotary_emb
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
        assert torch.equal(logits(twin), expected)
        assert torch.equal(plain_logits(twin, tokens), plain)
        with torch.no_grad():
            model.lm_head.weight.div_(2)
        assert torch.equal(logits(model), expected)


# ---- memory that there is not -------------------------------------------------------------------


@pytest.mark.cpu
@pytest.mark.parametrize(
    "sizes",
    [
        {"num_layers": 64, "num_kv_heads": 8, "head_dim": 128, "max_tokens": 2**30},
        {"num_layers": 2**31 - 1, "num_kv_heads": 2**31 - 1, "head_dim": 256},
        {"num_layers": 1, "num_kv_heads": 2**31 - 1, "head_dim": 256, "max_tokens": 2**30},
        {"num_layers": 1, "num_kv_heads": 2**26, "head_dim": 8, "max_tokens": 2**30},
        {"num_layers": 1, "num_kv_heads": 1024, "head_dim": 256, "spare_pages": 2**20},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_that_is_too_large(sizes: dict[str, int], dtype: torch.dtype) -> None:
    settings = {"max_tokens": 2**20, "spare_pages": 2**20, **sizes}
    with pytest.raises(MemoryError, match=r"^max_tokens: expected .*max_tokens=\d+ .*GB"):
        hx.SegmentCache(inv_freq=INV_FREQ, dtype=dtype, **settings)  # type: ignore[arg-type]


@pytest.mark.cpu
@pytest.mark.parametrize(
    "error, kind",
    [
        (MemoryError(), MemoryError),
        (OSError(12, "Cannot allocate memory"), MemoryError),
        (OverflowError("mmap: too large"), MemoryError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError),
        (torch.OutOfMemoryError("CUDA out of memory."), torch.OutOfMemoryError),
    ],
    ids=lambda x: getattr(x, "__name__", type(x).__name__),
)
@pytest.mark.parametrize("at", [0, 5])
def test_memory_that_ends_midway(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], at: int
) -> None:
    """The backend's error becomes one that says what to do, and what was had by then goes back."""
    kept: list[weakref.ref[torch.Tensor]] = []
    reserve = CpuBackend.reserve

    def fail(*args: Any) -> torch.Tensor:
        if len(kept) == at:
            raise error
        storage = reserve(*args)
        kept.append(weakref.ref(storage))
        return storage

    monkeypatch.setattr(CpuBackend, "reserve", fail)
    monkeypatch.setattr(CpuBackend, "free_memory", lambda self: 12_345_678_901)
    model = tiny_model("llama", num_layers=4)
    with pytest.raises(kind) as caught:
        hx.SegmentCache.for_model(model, max_tokens=1000)
    assert type(caught.value) is kind and caught.value.__cause__ is error
    words = str(caught.value)
    assert words.startswith("max_tokens: expected") and "max_tokens=1000" in words
    assert "of about 12.3 GB that are free" in words and str(error) in words
    assert len(kept) == at and not any(storage() is not None for storage in kept)
    monkeypatch.undo()
    assert hx.SegmentCache.for_model(model, max_tokens=1000).free_tokens == 1000


@pytest.mark.cpu
def test_a_run_without_memory_names_its_own_argument() -> None:
    workers = team(tiny_model("llama", vocab_size=VOCABULARY), 2, max_tokens=2**30)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(CpuBackend, "reserve", lambda *_: exec("raise MemoryError"))
        with pytest.raises(MemoryError, match=r"^max_tokens: .*max_tokens=1073741824"):
            workers.run("p", 3)


def test_the_gigabytes_are_those_that_are_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = hx.SegmentCache(3, 2, 16, inv_freq=INV_FREQ, max_tokens=1000, value_dim=24)
    reserved = sum(storage.nbytes for storage in (*cache._keys, *cache._values))
    monkeypatch.setattr(caches, "_gigabytes", lambda size: f"{size} bytes")
    elements = cache._keys[0].numel() + cache._values[0].numel()  # of a layer
    assert f"which take {reserved} bytes" in str(cache._too_large(elements, MemoryError()))


def test_a_refused_change_keeps_nothing_alive() -> None:
    """Errors hold frames; without the garbage collector the cache must go all the same."""
    gc.collect()
    gc.disable()
    try:
        cache = hx.SegmentCache(1, 1, 8, inv_freq=INV_FREQ, max_tokens=128)
        segment = cache.segment("a")
        with pytest.raises(hx.OutOfPages), cache.step([[segment]], [1000]):
            pass
        with cache.step([[segment]], [3]) as step:
            with pytest.raises(RuntimeError):
                segment.truncate(0)
            with pytest.raises(RuntimeError), cache.step([[segment]], [1]):
                pass
            step.attend(0, *torch.ones(3, 3, 1, 8))
        storage = weakref.ref(cache._keys[0])
        del cache, segment, step
        assert storage() is None
    finally:
        gc.enable()
