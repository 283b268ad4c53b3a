"""Decode attention over one long segment, beside torch's SDPA given everything it could wish for.

    python bench/decode_attention.py

The peer is scaled_dot_product_attention over one contiguous cache with the rows of all workers
packed by hand into one call: no rotation, no pages, no segments. Ours rotates the queries and reads
pages (`step.attend`) or plain tensors (`concurrent_attention`). The three run in turn in one
process; figures are medians, the spread is half the distance between the quartiles. KV is larger
than the caches, so it is read from memory each time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import hogwild_ext as hx

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


def measure(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, the functions taking turns."""
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return times


def build(
    dtype: torch.dtype, workers: int, tokens: int, heads: int, kv_heads: int, dim: int
) -> dict[str, Callable[[], object]]:
    group = heads // kv_heads
    inv_freq = 1e4 ** (-torch.arange(0, dim, 2) / dim)
    keys = torch.randn(tokens, kv_heads, dim).to(dtype)
    values = torch.randn(tokens, kv_heads, dim).to(dtype)
    query = torch.randn(workers, heads, dim).to(dtype)

    packed = query.view(workers, kv_heads, group, dim).transpose(0, 1)
    packed = packed.reshape(1, kv_heads, workers * group, dim)
    contiguous = [x.transpose(0, 1)[None].contiguous() for x in (keys, values)]

    # One token a worker behind the shared segment.
    cache = hx.SegmentCache(
        1, kv_heads, dim, inv_freq=inv_freq, max_tokens=tokens + 64 * (workers + 1), dtype=dtype
    )
    shared = cache.segment("shared")
    with cache.step([[shared]], [tokens]) as step:
        step.attend(0, query.new_zeros(tokens, heads, dim), keys, values)
    views = [[shared, cache.segment(f"worker {w}")] for w in range(workers)]
    own = torch.randn(2, workers, kv_heads, dim).to(dtype)
    out = torch.empty_like(query)
    step = cache.step(views, [1] * workers).__enter__()

    def attend() -> None:
        step._attended[0] = 0  # the same layer again and again
        step.attend(0, query, own[0], own[1], out=out)

    offsets = torch.full((workers, 1), tokens, dtype=torch.int32)
    return {
        "step.attend": attend,
        "concurrent_attention": lambda: hx.concurrent_attention(
            query[:, None], [keys], [values], offsets, inv_freq=inv_freq
        ),
        "SDPA, rows packed": lambda: torch.nn.functional.scaled_dot_product_attention(
            packed, *contiguous
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=40)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)

    print(
        f"{options.heads} query heads, {options.kv_heads} KV heads, head_dim {options.dim}, "
        f"{options.tokens} tokens, {options.threads} threads, {hx._C.isa()} kernels, "
        f"torch {torch.__version__}\n"
    )
    print(
        "| dtype | workers | what | median ms | spread | GB/s | GFMA/s | times faster than SDPA |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for dtype in options.dtype:
        for workers in options.workers:
            functions = build(
                DTYPES[dtype], workers, options.tokens, options.heads, options.kv_heads, options.dim
            )
            times = measure(functions, options.rounds)
            size = 2 * options.kv_heads * options.tokens * options.dim
            moved = size * DTYPES[dtype].itemsize
            computed = size * workers * options.heads // options.kv_heads
            peer = times["SDPA, rows packed"]
            for name, seconds in times.items():
                low, median, high = statistics.quantiles(seconds, n=4)
                ratio = statistics.median(b / a for a, b in zip(seconds, peer, strict=True))
                print(
                    f"| {dtype} | {workers} | {name} | {median * 1e3:.2f} | "
                    f"{(high - low) / 2 / median:.0%} | {moved / median / 1e9:.1f} | "
                    f"{computed / median / 1e9:.1f} | {ratio:.2f} |"
                )


if __name__ == "__main__":
    main()
