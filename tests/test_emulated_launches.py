"""What a step launches on a GPU, from the list of calls that the emulated runtime keeps."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch

import hogwild_ext as hx
from conftest import EMULATED
from emulator.runtime import Call
from hogwild_ext import _C
from hogwild_ext.cache import Segment, SegmentCache

if EMULATED is None:
    pytest.skip("needs HOGWILD_EMULATE=1; test_emulated.py sets it", allow_module_level=True)

LAYERS, KV_HEADS, HEADS, DIM = 3, 2, 6, 64
KERNELS = {"append_kernel": "append", "merge_kernel": "merge", "move_kernel": "move"} | {
    "attend_kernel": "attend",
    "attend_f32_kernel": "attend",
}
INV_FREQ = 1e4 ** (-torch.arange(0, DIM, 2) / DIM)


def make_cache(dtype: torch.dtype = torch.float16, **changes: int) -> SegmentCache:
    sizes = {"num_layers": LAYERS, "num_kv_heads": KV_HEADS, "head_dim": DIM, **changes}
    return SegmentCache(**sizes, inv_freq=INV_FREQ, max_tokens=8192, dtype=dtype)


def run_step(
    cache: SegmentCache,
    views: Sequence[Sequence[Segment]],
    sizes: Sequence[int],
    heads: int = HEADS,
) -> None:
    with cache.step(views, sizes) as step:
        for layer in range(cache.num_layers):
            query, key, value = (
                torch.randn(sum(sizes), n, cache.head_dim).to(cache.dtype)
                for n in (heads, cache.num_kv_heads, cache.num_kv_heads)
            )
            step.attend(layer, query, key, value)


def names(calls: Sequence[Call]) -> list[str]:
    """What each call is: one of our kernels, or the runtime's function."""
    found = []
    for call in calls:
        known = [short for name, short in KERNELS.items() if re.search(rf"\d{name}I", call.name)]
        found.append(known[0] if call.is_launch and known else call.name)
    return found


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each copy to the device."""
    assert EMULATED
    copies: list[int] = []
    send = type(EMULATED.backend)._send

    def counted(self: object, data: bytes, to: torch.Tensor) -> None:
        copies.append(len(data))
        send(self, data, to)  # type: ignore[arg-type]

    monkeypatch.setattr(type(EMULATED.backend), "_send", counted)
    return copies


@pytest.fixture
def calls() -> object:
    """The calls made since the fixture was asked for."""
    assert EMULATED
    EMULATED.runtime.clear_calls()
    return EMULATED.runtime.calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("merged", [False, True])
def test_a_layer_is_append_attend_and_merge(dtype, merged: bool, calls, sent) -> None:
    """Nothing is allocated, copied or waited for, and nothing else is launched."""
    cache = make_cache(dtype)
    a, b = cache.segment("a"), cache.segment("b")
    if merged:  # several chunks, folded by several blocks
        run_step(cache, [[a]], [200])
        run_step(cache, [[a, b]], [200])
        EMULATED.runtime.clear_calls()
        sent.clear()
    run_step(cache, [[a, b]], [1])
    layer = ["append", "attend", "merge"] if merged else ["append", "attend"]
    assert names(calls()) == layer * LAYERS
    assert len(sent) == 1, "one copy of the tables a step"
    assert all(call.is_launch and call.stream == 0 for call in calls())


def test_the_memory_of_a_step_stays_where_it_is() -> None:
    cache = make_cache()
    a = cache.segment("a")
    places = set()
    for size in (1, 30, 1, 200, 1):
        run_step(cache, [[a]], [size])
        memory = cache._layers.step_memory
        places.add((memory._tables.data_ptr(), memory._workspace.data_ptr()))
    assert len(places) == 1


def test_memory_grown_in_inference_mode_serves_steps_outside_of_it() -> None:
    cache = make_cache()
    a = cache.segment("a")
    with torch.inference_mode():
        run_step(cache, [[a]], [1])
    run_step(cache, [[a]], [1])


def test_commit_and_fork_take_one_launch_for_all_layers(calls, sent) -> None:
    cache = make_cache()
    a, b = cache.segment("a"), cache.segment("b")
    run_step(cache, [[a], [b]], [70, 66])
    fork = cache.fork(a)
    EMULATED.runtime.clear_calls()
    sent.clear()
    cache.commit(b, a)
    # `a` grows within a page that it shares: a copy of its rows, then the move.
    assert names(calls()) == ["move", "move"] and len(sent) == 2
    EMULATED.runtime.clear_calls()
    empty = cache.segment("empty")
    cache.commit(fork, empty)  # pages change hands
    cache.fork(empty)
    cache.segment("c")
    assert calls() == []
    run_step(cache, [[empty]], [1])
    assert Counter(names(calls())) == {"move": 1, "append": LAYERS, "attend": LAYERS}


def test_the_op_on_plain_tensors_is_one_launch(calls, sent) -> None:
    query, key = torch.randn(1, 1, HEADS, DIM), torch.randn(100, KV_HEADS, DIM)
    hx.concurrent_attention(query, [key], [key], [[99]], inv_freq=INV_FREQ)
    assert names(calls()) == ["attend"] and len(sent) == 1


def step_blocks(lengths: Sequence[int], views: Sequence[Sequence[int]], kv_heads: int) -> int:
    """Blocks of the attention kernel in a decode step, by the tables that the device would get."""
    brought = [1] * len(views)
    plan = _C.Plan(
        np.asarray(hx.view_offsets(views, lengths, brought)), np.array(lengths, np.int32),
        np.array(brought, np.int32), np.zeros(0, np.float32), 5, kv_heads, 0, None, None, None,
        True, _C.cuda.row_group(_C.BFLOAT16, 128),
    )  # fmt: skip
    return int(_C.cuda.Tables(plan, kv_heads).num_items) * kv_heads


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 8, 12, 16, 33, 64])
@pytest.mark.parametrize("context", [2048, 2049, 4095, 5000, 16384, 65536])
@pytest.mark.parametrize("kv_heads", [8, 9, 16])
def test_a_decode_step_fills_a_large_gpu(workers: int, context: int, kv_heads: int) -> None:
    """At least 128 blocks, whether the text lies in one segment or in many."""
    own = list(range(1, workers + 1))
    views = [[0, *(o for o in own if o != w), w] for w in own]
    assert step_blocks([context, *[1] * workers], views, kv_heads) >= 128
    shared = context // 2
    rest = [(context - shared) // workers + 1] * workers
    assert step_blocks([shared, *rest], views, kv_heads) >= 128
