"""FlashInfer and flash-attention as the benchmark calls them, in a few lines of torch.

Only what their documentation says of the functions used, so that page tables, prefix sums and
layouts that the benchmark hands over can be tested where the libraries cannot be installed.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """[n, Hq, D] against [L, Hkv, D], causal from the lower right: (out, lse [n, Hq])."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.float().repeat_interleave(group, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->qhk", query.float(), key) * query.shape[2] ** -0.5
    if causal:
        place = torch.arange(len(key))[None] - (len(key) - len(query))
        scores.masked_fill_((place > torch.arange(len(query))[:, None])[:, None], -torch.inf)
    out = torch.einsum("qhk,khd->qhd", scores.softmax(-1), value)
    return out, scores.logsumexp(-1)


def gather(pages: Tensor, table: Sequence[int] | Tensor, length: int) -> Tensor:
    """[length, Hkv, D] of pages [*, page, Hkv, D]."""
    assert len(table) == -(-length // pages.shape[1])
    return pages[torch.as_tensor(table).long()].flatten(0, 1)[:length]


# ---- FlashInfer -------------------------------------------------------------------------------


class BatchPrefillWithPagedKVCacheWrapper:
    def __init__(self, workspace: Tensor, kv_layout: str) -> None:
        assert workspace.dtype == torch.uint8 and kv_layout == "NHD"

    def plan(
        self, qo_indptr: Tensor, paged_kv_indptr: Tensor, paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor, num_qo_heads: int, num_kv_heads: int, head_dim_qk: int,
        page_size: int, *, causal: bool = False, q_data_type: Any = "float16",
        kv_data_type: Any = None,
    ) -> None:  # fmt: skip
        tables = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert all(table.dtype == torch.int32 for table in tables)
        assert q_data_type == kv_data_type
        self.starts, self.pages, self.indices, self.last = (table.tolist() for table in tables)
        self.heads = num_qo_heads, num_kv_heads, head_dim_qk
        self.page_size, self.causal = page_size, causal

    def run(self, q: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        return self.run_with_lse(q, cache)[0].to(q.dtype)

    def run_with_lse(self, q: Tensor, cache: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        assert q.shape == (self.starts[-1], self.heads[0], self.heads[2])
        assert cache[0].shape[1:] == (self.page_size, *self.heads[1:])
        results = []
        for i, last in enumerate(self.last):
            table = self.indices[self.pages[i] : self.pages[i + 1]]
            length = (len(table) - 1) * self.page_size + last
            key, value = (gather(pages, table, length) for pages in cache)
            query = q[self.starts[i] : self.starts[i + 1]]
            results.append(attend(query, key, value, self.causal))
        outs, lses = zip(*results, strict=True)
        return torch.cat(outs), torch.cat(lses)


class BatchDecodeWithPagedKVCacheWrapper:
    def __init__(self, workspace: Tensor, kv_layout: str, use_tensor_cores: bool) -> None:
        self._prefill = BatchPrefillWithPagedKVCacheWrapper(workspace, kv_layout)

    def plan(
        self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, *sizes: int, **types: Any
    ) -> None:
        requests = torch.arange(len(last_page_len) + 1, dtype=torch.int32)
        self._prefill.plan(requests, indptr, indices, last_page_len, *sizes, **types)

    def run(self, q: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        return self._prefill.run(q, cache)


class MultiLevelCascadeAttentionWrapper:
    def __init__(self, num_levels: int, workspace: Tensor, kv_layout: str) -> None:
        self._levels = [
            BatchPrefillWithPagedKVCacheWrapper(workspace, kv_layout) for _ in range(num_levels)
        ]

    def plan(
        self, qo_indptr: list[Tensor], indptr: list[Tensor], indices: list[Tensor],
        last: list[Tensor], *sizes: int, causal: bool, **types: Any,
    ) -> None:  # fmt: skip
        for i, level in enumerate(self._levels):
            tables = qo_indptr[i], indptr[i], indices[i], last[i]
            of_last = causal and i == len(self._levels) - 1
            level.plan(*tables, *sizes, causal=of_last, **types)

    def run(self, q: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        results = [level.run_with_lse(q, cache) for level in self._levels]
        outs, lses = (torch.stack(parts) for parts in zip(*results, strict=True))
        return (outs * lses.softmax(0)[..., None]).sum(0).to(q.dtype)


# ---- flash-attention --------------------------------------------------------------------------


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, block_table: Tensor,
    causal: bool,
) -> Tensor:  # fmt: skip
    assert k_cache.shape[1] % 256 == 0
    assert cache_seqlens.dtype == block_table.dtype == torch.int32
    outs = []
    for query, length, table in zip(q, cache_seqlens.tolist(), block_table, strict=True):
        key, value = (gather(pages, table, length) for pages in (k_cache, v_cache))
        outs.append(attend(query, key, value, causal)[0])
    return torch.stack(outs).to(q.dtype)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, *, causal: bool, block_table: Tensor,
) -> Tensor:  # fmt: skip
    queries, lengths = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    assert queries.max() == max_seqlen_q and lengths.max() == max_seqlen_k
    outs = []
    for query, length, table in zip(q.split(queries.tolist()), lengths, block_table, strict=True):
        key, value = (gather(pages, table, int(length)) for pages in (k, v))
        outs.append(attend(query, key, value, causal)[0])
    return torch.cat(outs).to(q.dtype)


MODULES = {
    "flashinfer": (
        BatchDecodeWithPagedKVCacheWrapper,
        BatchPrefillWithPagedKVCacheWrapper,
        MultiLevelCascadeAttentionWrapper,
    ),
    "flash_attn": (flash_attn_with_kvcache, flash_attn_varlen_func),
}


@contextmanager
def installed() -> Iterator[None]:
    """Both libraries can be imported."""
    before = {name: sys.modules.get(name) for name in MODULES}
    for name, contents in MODULES.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        for content in contents:
            setattr(module, content.__name__, content)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
