"""Microseconds a layer of decoding, in a CUDA graph of many layers that each have keys and values
of their own, so that nothing of the last replay is in the L2 cache.

    python speed.py SECONDS

Beside it torch's attention over contiguous keys and values, the rows of all workers packed into one
call by hand, without rotation; each kernel by the profiler; and a prompt's TFLOP/s. With
FIRST_RUN_DRY=1 the CPU's backend goes through the same, with sizes that take no time, and the
figures mean nothing. Lines that begin with "> " are for the summary.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import hogwild_ext as hx

DRY = bool(os.environ.get("FIRST_RUN_DRY"))
DEVICE = "cpu" if DRY else "cuda"
DTYPE = torch.bfloat16
RUNS = 3 if DRY else 15
KEPT_BYTES = 4e6 if DRY else 1.2e9  # keys and values of all layers: many times an L2 cache
OWN = 31  # tokens in each worker's own segment
PIECE = 8192  # tokens of a prompt that are stored at a time
BACKENDS = (
    [SDPBackend.MATH]
    if DRY
    else [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
)


@dataclass(frozen=True)
class Job:
    """Workers that all read `tokens` tokens in so many segments, with these heads."""

    model: str
    heads: int
    kv_heads: int
    dim: int
    tokens: int
    workers: int
    segments: int = 1

    @property
    def layer_bytes(self) -> int:
        return 2 * self.tokens * self.kv_heads * self.dim * DTYPE.itemsize

    @property
    def layers(self) -> int:
        return max(2, min(48, math.ceil(KEPT_BYTES / self.layer_bytes)))

    def __str__(self) -> str:
        heads = f"{self.heads}/{self.kv_heads}x{self.dim}"
        return f"{self.model} {heads}, {self.tokens} x {self.segments}, {self.workers} workers"


QWQ, QWEN, LLAMA = ("qwq", 40, 8, 128), ("qwen2.5-0.5b", 14, 2, 64), ("llama-3", 32, 8, 128)
JOBS = [
    *(Job(*QWQ, tokens, workers) for tokens in (32768, 4096, 1024) for workers in (1, 4, 8, 2)),
    *(Job(*QWQ, 16384, workers, segments=64) for workers in (1, 4)),
    *(Job(*QWEN, tokens, 4) for tokens in (1024, 16384)),
    Job(*LLAMA, 131072, 1),
]
DRY_JOBS = [Job(*QWEN, 256, 2), Job(*QWEN, 256, 1, segments=4)]


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(DTYPE)


def wait() -> None:
    if not DRY:
        torch.cuda.synchronize()


def seconds(run: Callable[[], Any]) -> tuple[float, float]:
    """Median of several runs, and half the distance of their quartiles as a part of it."""
    run()
    wait()
    taken = []
    for _ in range(RUNS):
        if DRY:
            began = time.perf_counter()
            run()
            taken.append(time.perf_counter() - began)
        else:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) / 1e3)
    low, median, high = statistics.quantiles(taken, n=4)
    return median, (high - low) / 2 / median


def graphed(run: Callable[[], Any]) -> Callable[[], Any]:
    if DRY:
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what a library does at its first call must not be captured
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def read_rate() -> float:
    """Bytes a second that a sum reads; prints those of a copy too."""
    source = torch.zeros(1 << (22 if DRY else 30), dtype=torch.uint8, device=DEVICE)
    target, numbers = torch.empty_like(source), source.view(torch.float32)
    copy, _ = seconds(lambda: target.copy_(source))
    read, _ = seconds(numbers.sum)
    size = source.numel()
    print(f"> copy {2 * size / copy / 1e9:.0f} GB/s, read {size / read / 1e9:.0f} GB/s")
    return size / read


class Ours:
    """A job on a segment cache."""

    def __init__(self, job: Job) -> None:
        self._job = job
        inv_freq = 1e6 ** (-torch.arange(0, job.dim, 2) / job.dim)
        pieces = job.segments + job.workers
        self._cache = hx.SegmentCache(
            job.layers, job.kv_heads, job.dim, inv_freq=inv_freq,
            max_tokens=job.tokens + (OWN + 1) * job.workers, spare_pages=pieces + job.workers,
            dtype=DTYPE, device=DEVICE,
        )  # fmt: skip
        length = job.tokens // job.segments
        shared = [self._filled(f"shared {i}", length) for i in range(job.segments)]
        self._own = [self._filled(f"own {i}", OWN) for i in range(job.workers)]
        self._views = []
        for w, mine in enumerate(self._own):
            first = w % len(shared)
            others = [segment for segment in self._own if segment is not mine]
            self._views.append([*shared[first:], *shared[:first], *others, mine])
        self._query = drawn(job.workers, job.heads, job.dim)
        self._key, self._value = (drawn(job.workers, job.kv_heads, job.dim) for _ in range(2))
        self._out = torch.empty_like(self._query)

    def _filled(self, name: str, length: int) -> hx.Segment:
        segment = self._cache.segment(name)
        for begin in range(0, length, PIECE):
            count = min(PIECE, length - begin)
            key, value = (drawn(count, self._job.kv_heads, self._job.dim) for _ in range(2))
            with self._cache.step([[segment]], [count]) as step:
                for layer in range(self._job.layers):
                    step.attend(layer, key, key, value)
        return segment

    def _layers(self, step: hx.cache.Step) -> None:
        for layer in range(self._job.layers):
            step.attend(layer, self._query, self._key, self._value, out=self._out)

    def step(self) -> None:
        """A whole step with its plan, launched kernel by kernel, in place of the last one."""
        for segment in self._own:
            segment.truncate(OWN)
        with self._cache.step(self._views, [1] * self._job.workers) as step:
            self._layers(step)

    def replay(self) -> Callable[[], Any]:
        """The same in a graph: launches and nothing else. It writes the same tokens each time."""
        if DRY:
            return self.step
        graph = torch.cuda.CUDAGraph()
        with self._cache.step(self._views, [1] * self._job.workers) as step:
            step.prepare(self._job.heads)
            with torch.cuda.graph(graph):
                self._layers(step)
            step.replay(graph)
        return graph.replay

    def kernels(self, replay: Callable[[], Any]) -> dict[str, float]:
        """Microseconds of each kernel, by torch's profiler."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            replay()
            wait()
        return {
            name: round(event.device_time_total / event.count, 2)
            for event in profiled.key_averages()
            for name in ("append", "attend", "merge")
            if f"{name}_" in event.key and "kernel" in event.key
        }


def peers(job: Job) -> dict[str, float | str]:
    """Microseconds of torch's kernels for the same rows and keys."""
    rows = job.workers * job.heads // job.kv_heads
    kept = [
        (drawn(1, job.kv_heads, job.tokens, job.dim), drawn(1, job.kv_heads, job.tokens, job.dim))
        for _ in range(job.layers)
    ]
    query = drawn(1, job.kv_heads, rows, job.dim)
    found: dict[str, float | str] = {}
    for backend in BACKENDS:

        def run(backend: Any = backend) -> None:
            with sdpa_kernel(backend):
                for key, value in kept:
                    scaled_dot_product_attention(query, key, value)

        name = backend.name.split("_")[0].lower()
        try:
            found[name] = round(seconds(graphed(run))[0] / job.layers * 1e6, 1)
        except RuntimeError as error:  # not for this GPU, type or shape
            found[name] = " ".join(str(error).split())[:60]
    return found


def decode(job: Job, read: float) -> None:
    ours = Ours(job)
    replay = ours.replay()
    graph, spread = seconds(replay)
    kernels = {} if DRY else ours.kernels(replay)
    alone, _ = seconds(ours.step)
    microseconds = graph / job.layers * 1e6
    reached = job.layer_bytes * job.layers / graph / read
    print(
        f"> {job}: {microseconds:.1f} us +-{spread:.0%}, {reached:.0%} of the read rate; without a "
        f"graph, with its plan, {alone / job.layers * 1e6:.1f}; kernels {kernels or 'unknown'} | "
        f"torch, rows packed: {peers(job) if job.segments == 1 else 'not asked'}",
        flush=True,
    )


def prompt() -> None:
    tokens = 256 if DRY else 8192
    heads, kv_heads, dim = 32, 8, 128
    query = drawn(1, tokens, heads, dim)
    key, value = drawn(tokens, kv_heads, dim), drawn(tokens, kv_heads, dim)
    inv_freq = 1e6 ** (-torch.arange(0, dim, 2) / dim)
    work = 2 * tokens * tokens * heads * dim / 1e12  # the half of both products that is seen
    taken, _ = seconds(
        lambda: hx.concurrent_attention(query, [key], [value], [[0]], inv_freq=inv_freq)
    )
    words = [f"ours {work / taken:.0f}"]
    query, *others = (x.transpose(1, 2).contiguous() for x in (query, key[None], value[None]))
    for backend in BACKENDS[:2]:
        name = f"torch {backend.name.split('_')[0].lower()}"
        try:
            with sdpa_kernel(backend):
                taken, _ = seconds(
                    lambda: scaled_dot_product_attention(
                        query, *others, is_causal=True, enable_gqa=True
                    )
                )
            words.append(f"{name} {work / taken:.0f}")
        except RuntimeError as error:
            words.append(f"{name}: {' '.join(str(error).split())[:60]}")
    print(f"> prompt of {tokens} tokens, {heads}/{kv_heads}x{dim}: TFLOP/s {', '.join(words)}")


@torch.inference_mode()
def main(limit: float) -> int:
    """Exit code 1 if a job fails."""
    deadline = time.monotonic() + limit
    read, failed = read_rate(), 0
    for job in DRY_JOBS if DRY else JOBS:
        if time.monotonic() > deadline - 12:
            print("> no time for the rest")
            return failed
        try:
            decode(job, read)
        except Exception as error:  # the next one may do better
            print(f"> {job}: {type(error).__name__}: {' '.join(str(error).split())[:150]}")
            failed = 1
        if not DRY:
            torch.cuda.empty_cache()
    if time.monotonic() < deadline - 15:
        prompt()
    return failed


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))
