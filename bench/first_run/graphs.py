"""What a fresh process can get wrong: a CUDA graph captured before any kernel was launched, and
scores that are large for float16.

    python graphs.py

With FIRST_RUN_DRY=1 nothing is captured, and the scores are the CPU's. Lines that begin with "> "
are for the summary.
"""

from __future__ import annotations

import os
import sys

import torch

import hogwild_ext as hx

DRY = bool(os.environ.get("FIRST_RUN_DRY"))
DEVICE = "cpu" if DRY else "cuda"
DIM, KV_HEADS, GROUP, LAYERS = 128, 2, 5, 2
INV_FREQ = 1e4 ** (-torch.arange(0, DIM, 2) / DIM)


def captures() -> bool:
    """Two workers that each see their own token only: what they get is its value."""
    cache = hx.SegmentCache(
        LAYERS, KV_HEADS, DIM, inv_freq=INV_FREQ, max_tokens=2048, dtype=torch.bfloat16,
        device=DEVICE,
    )  # fmt: skip
    views = [[cache.segment(name)] for name in "ab"]

    def drawn(heads: int) -> list[torch.Tensor]:
        shape = (LAYERS, len(views), heads, DIM)
        return list(torch.randn(shape, device=DEVICE).to(torch.bfloat16))

    query, key, value = drawn(KV_HEADS * GROUP), drawn(KV_HEADS), drawn(KV_HEADS)
    out = [torch.zeros_like(layer) for layer in query]
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), cache.step(views, [1, 1]) as step:
        step.prepare(KV_HEADS * GROUP)
        with torch.cuda.graph(graph):
            for layer in range(LAYERS):
                step.attend(layer, query[layer], key[layer], value[layer], out=out[layer])
        step.replay(graph)
    return all(
        torch.equal(got, seen.repeat_interleave(GROUP, 1))
        for got, seen in zip(out, value, strict=True)
    )


def large_scores(loud: float) -> bool:
    """float16, with scores of about `loud` standard deviations, beside float64."""
    query = (loud * torch.randn(4, 1, GROUP, DIM, device=DEVICE)).half()
    key, value = (torch.randn(200, 1, DIM, device=DEVICE).half() for _ in range(2))
    got = hx.concurrent_attention(query, [key], [value], [[199]] * 4, inv_freq=[])
    scores = torch.einsum("wqhd,lkd->wqhl", query.double(), key.double()) * DIM**-0.5
    expected = torch.einsum("wqhl,lkd->wqhd", scores.softmax(-1), value.double())
    error = ((got.double() - expected).norm() / expected.norm()).item()
    # A score is rounded by a part in 2^11 of a query's: of thousands, that is more than 1.
    good = bool(got.isfinite().all()) and error < max(1e-2, 1e-3 * loud)
    print(f"> float16, scores of about {loud:g}: error {error:.1e}{'' if good else ' WRONG'}")
    return good


def main() -> int:
    torch.manual_seed(0)
    captured = DRY or captures()
    said = "not tried" if DRY else "right" if captured else "WRONG"
    print(f"> a graph captured before any launch: {said}")
    return 0 if all([captured, *map(large_scores, (1, 100, 1000, 4000))]) else 1


if __name__ == "__main__":
    sys.exit(main())
