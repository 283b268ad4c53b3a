"""What is run on a cell: ours, and the attention of other libraries that would do its work.

The peers know no segments: each worker has a cache of its own, its keys rotated along its view.
What stands at the same place in all views (`Inputs.shared_tokens`) they may share. Their plans,
page tables and rotated queries are made beforehand, as ours is for `Step.attend`.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..cache import SegmentCache
from ..ops import concurrent_attention, rotate, view_offsets
from .inputs import Inputs

PAGE = 64  # tokens of a page of the peers: as many as of ours
FLASH_PAGE = 256  # the least that flash-attention takes
HALF = ("float16", "bfloat16")


@dataclass(frozen=True)
class Candidate:
    """A function to be timed, and how to tell that it does the cell's work."""

    run: Callable[[], Any]
    cache_bytes: int  # keys and values, as it stores them
    packed: Callable[[Any], Tensor]  # what it returns -> [T, Hq, D]
    expected: Tensor | None = None  # [T, Hq, D], if it is not what the cell asks for


class Peer(Protocol):
    """A way to compute a cell with another library."""

    name: str
    library: str  # the module that it comes with

    def prepare(self, inputs: Inputs) -> Candidate | None:
        """None if it has nothing to do with the cell. May raise whatever the library raises."""


def is_installed(peer: Peer) -> bool:
    return importlib.util.find_spec(peer.library) is not None


# ---- ours -------------------------------------------------------------------------------------


class StepAttend:
    """`Step.attend` on a segment cache: append, attention and merge on pages."""

    name = "step.attend"
    library = "hogwild_ext"

    def prepare(self, inputs: Inputs) -> Candidate:
        layout, heads = inputs.layout, inputs.cell.heads
        cache = SegmentCache(
            1,
            heads.kv_heads,
            heads.head_dim,
            inv_freq=inputs.inv_freq,
            max_tokens=sum(layout.lengths),
            spare_pages=len(layout.lengths),
            dtype=inputs.query.dtype,
            device=inputs.device,
        )
        segments = [cache.segment(str(s)) for s in range(len(layout.lengths))]
        for s, segment in enumerate(segments):
            if old := inputs.new_rows(s).start:
                key, value = inputs.keys[s][:old], inputs.values[s][:old]
                with cache.step([[segment]], [old]) as fill:
                    fill.attend(0, torch.zeros_like(key), key, value)
        own = [view[-1] for view in layout.views]
        key, value = (
            torch.cat([tensors[s][inputs.new_rows(s)] for s in own])
            for tensors in (inputs.keys, inputs.values)
        )
        views = [[segments[s] for s in view] for view in layout.views]
        step = cache.step(views, layout.query_lengths).__enter__()
        out = torch.empty_like(inputs.query)

        def run() -> Tensor:
            step._attended[0] = step._captured[0] = False  # the same layer again and again
            return step.attend(0, inputs.query, key, value, out=out)

        return Candidate(run, _stored_bytes(*inputs.keys, *inputs.values), lambda out: out)


class FunctionalOp:
    """`concurrent_attention` on plain tensors; it plans and copies its tables in every call."""

    name = "concurrent_attention"
    library = "hogwild_ext"

    def prepare(self, inputs: Inputs) -> Candidate:
        layout, query = inputs.layout, inputs.query
        brought = layout.query_lengths
        keys = [rotate(key, inputs.inv_freq) for key in inputs.keys]
        offsets = view_offsets(layout.views, layout.lengths, brought)
        padded = query.new_zeros(inputs.workers, max(brought), *query.shape[1:])
        parts = query.split(brought)
        for w, part in enumerate(parts):
            padded[w, : len(part)] = part
        return Candidate(
            lambda: concurrent_attention(
                padded, keys, inputs.values, offsets, inv_freq=inputs.inv_freq,
                query_lengths=brought,
            ),
            _stored_bytes(*keys, *inputs.values),
            lambda out: torch.cat([out[w, :n] for w, n in enumerate(brought)]),
        )  # fmt: skip


# ---- torch ------------------------------------------------------------------------------------


class SdpaPerWorker:
    """scaled_dot_product_attention on a contiguous cache for each worker."""

    name = "SDPA, a cache a worker"
    library = "torch"

    def prepare(self, inputs: Inputs) -> Candidate:
        from torch.nn.attention.bias import causal_lower_right

        context, new = inputs.cell.context, inputs.layout.query_lengths
        # Workers that bring as many tokens as each other go together, [W, H, n, D].
        groups = [list(range(inputs.workers))] if inputs.even else [[w] for w in range(len(new))]
        calls = []
        for group in groups:
            query, key, value = (
                torch.stack([of(w) for w in group]).transpose(1, 2).contiguous()
                for of in (inputs.view_query, inputs.view_keys, inputs.view_values)
            )
            count = new[group[0]]
            mask = None if count == 1 else causal_lower_right(count, context)
            calls.append((query, key, value, mask))

        def run() -> list[Tensor]:
            return [
                scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
                for q, k, v, mask in calls
            ]

        return Candidate(
            run,
            _stored_bytes(*(tensor for call in calls for tensor in call[1:3])),
            lambda outs: torch.cat([out.transpose(1, 2).flatten(0, 1) for out in outs]),
        )


class SdpaPacked:
    """scaled_dot_product_attention with the rows of all workers packed by hand into one call over
    one contiguous cache: no rotation and nothing hidden, the most favourable case there is."""

    name = "SDPA, rows packed"
    library = "torch"

    def prepare(self, inputs: Inputs) -> Candidate | None:
        if inputs.even != 1:
            return None  # would need masks
        heads, W = inputs.cell.heads, inputs.workers
        keys, values = torch.cat(inputs.keys), torch.cat(inputs.values)
        key, value = (x.transpose(0, 1)[None].contiguous() for x in (keys, values))
        query = inputs.query.view(W, heads.kv_heads, -1, heads.head_dim)
        query = query.transpose(0, 1).reshape(1, heads.kv_heads, -1, heads.head_dim)
        expected = concurrent_attention(
            inputs.query[:, None], [keys], [values], [[len(keys)]] * W, inv_freq=[]
        )
        assert isinstance(expected, Tensor)
        return Candidate(
            lambda: scaled_dot_product_attention(query, key, value),
            _stored_bytes(key, value),
            lambda out: out[0].unflatten(1, (W, -1)).transpose(0, 1).flatten(1, 2),
            expected[:, 0],
        )


# ---- pages for libraries that take them -------------------------------------------------------


@dataclass(frozen=True)
class PagedViews:
    """The workers' views in pages; those of `shared_tokens`, as far as they fill pages, are there
    once."""

    keys: Tensor  # [pages, page, Hkv, D]
    values: Tensor
    tables: list[list[int]]  # pages of each worker
    shared_pages: int  # at the head of every table
    last: int  # tokens of the last page

    @staticmethod
    def of(inputs: Inputs, page: int) -> PagedViews:
        context, shared = inputs.cell.context, inputs.shared_tokens // page
        own = -(-context // page) - shared
        tables = [
            [*range(shared), *range(shared + w * own, shared + (w + 1) * own)]
            for w in range(inputs.workers)
        ]
        shape = (shared + inputs.workers * own, page, *inputs.keys[0].shape[1:])
        keys, values = inputs.query.new_zeros(shape), inputs.query.new_zeros(shape)
        for w, table in enumerate(tables):
            begin = shared if w else 0  # its own pages lie one behind the other
            for pages, view in ((keys, inputs.view_keys(w)), (values, inputs.view_values(w))):
                first = table[begin] * page
                tokens = view[begin * page :]
                pages.flatten(0, 1)[first : first + len(tokens)] = tokens
        return PagedViews(keys, values, tables, shared, context - (len(tables[0]) - 1) * page)

    @property
    def stored_bytes(self) -> int:
        return _stored_bytes(self.keys, self.values)


def _ints(values: Iterable[int], device: torch.device) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32, device=device)


def _starts(counts: Iterable[int], device: torch.device) -> Tensor:
    """[n + 1] int32: prefix sums."""
    return _ints(itertools.accumulate(counts, initial=0), device)


# ---- FlashInfer -------------------------------------------------------------------------------


class FlashInfer:
    """FlashInfer's batched attention, one request a worker on a paged cache: the decode kernel with
    tensor cores for one token each, else the prefill kernel."""

    name = "FlashInfer, a request a worker"
    library = "flashinfer"

    def prepare(self, inputs: Inputs) -> Candidate | None:
        if inputs.cell.dtype not in HALF:
            return None
        flashinfer: Any = importlib.import_module("flashinfer")
        device, heads = inputs.device, inputs.cell.heads
        paged = PagedViews.of(inputs, PAGE)
        pages = _starts([len(table) for table in paged.tables], device)
        indices = _ints(itertools.chain(*paged.tables), device)
        last = _ints([paged.last] * inputs.workers, device)
        shape = (heads.num_heads, heads.kv_heads, heads.head_dim, PAGE)
        types = {"q_data_type": inputs.query.dtype, "kv_data_type": inputs.query.dtype}
        if inputs.even == 1:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                _workspace(device), "NHD", use_tensor_cores=True
            )
            wrapper.plan(pages, indices, last, *shape, **types)
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(device), "NHD")
            queries = _starts(inputs.layout.query_lengths, device)
            wrapper.plan(queries, pages, indices, last, *shape, causal=True, **types)
        query = inputs.view_queries()
        return Candidate(
            lambda: wrapper.run(query, (paged.keys, paged.values)),
            paged.stored_bytes,
            lambda out: out,
        )


class FlashInferCascade:
    """FlashInfer's cascade: what all views share first, for all rows at once, then each worker's
    own pages, and the two merged."""

    name = "FlashInfer, cascade"
    library = "flashinfer"

    def prepare(self, inputs: Inputs) -> Candidate | None:
        if inputs.cell.dtype not in HALF or inputs.shared_tokens < PAGE:
            return None
        flashinfer: Any = importlib.import_module("flashinfer")
        device, heads = inputs.device, inputs.cell.heads
        paged = PagedViews.of(inputs, PAGE)
        shared = paged.shared_pages
        own = [table[shared:] for table in paged.tables]
        new = inputs.layout.query_lengths

        wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, _workspace(device), "NHD")
        wrapper.plan(
            [_starts([sum(new)], device), _starts(new, device)],
            [_starts([shared], device), _starts([len(table) for table in own], device)],
            [_ints(paged.tables[0][:shared], device), _ints(itertools.chain(*own), device)],
            [_ints([PAGE], device), _ints([paged.last] * inputs.workers, device)],
            heads.num_heads, heads.kv_heads, heads.head_dim, PAGE,
            causal=True, q_data_type=inputs.query.dtype, kv_data_type=inputs.query.dtype,
        )  # fmt: skip
        query = inputs.view_queries()
        return Candidate(
            lambda: wrapper.run(query, (paged.keys, paged.values)),
            paged.stored_bytes,
            lambda out: out,
        )


def _workspace(device: torch.device) -> Tensor:
    return torch.zeros(128 << 20, dtype=torch.uint8, device=device)


# ---- flash-attention --------------------------------------------------------------------------


class FlashAttention:
    """flash_attn_with_kvcache on pages, one sequence a worker; flash_attn_varlen_func where workers
    bring different numbers of tokens."""

    name = "flash-attention"
    library = "flash_attn"

    def prepare(self, inputs: Inputs) -> Candidate | None:
        if inputs.cell.dtype not in HALF:
            return None
        flash: Any = importlib.import_module("flash_attn")
        device, new, context = inputs.device, inputs.layout.query_lengths, inputs.cell.context
        paged = PagedViews.of(inputs, FLASH_PAGE)
        table = torch.tensor(paged.tables, dtype=torch.int32, device=device)
        query = inputs.view_queries()
        if inputs.even:
            batched = query.unflatten(0, (inputs.workers, inputs.even))
            lengths = _ints([context] * inputs.workers, device)
            return Candidate(
                lambda: flash.flash_attn_with_kvcache(
                    batched, paged.keys, paged.values, cache_seqlens=lengths, block_table=table,
                    causal=True,
                ),
                paged.stored_bytes,
                lambda out: out.flatten(0, 1),
            )  # fmt: skip
        queries, keys = _starts(new, device), _starts([context] * inputs.workers, device)
        return Candidate(
            lambda: flash.flash_attn_varlen_func(
                query, paged.keys, paged.values, queries, keys, max(new), context, causal=True,
                block_table=table,
            ),
            paged.stored_bytes,
            lambda out: out,
        )  # fmt: skip


def _stored_bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


OURS: tuple[Peer, ...] = (StepAttend(), FunctionalOp())
PEERS: tuple[Peer, ...] = (
    SdpaPerWorker(), SdpaPacked(), FlashInfer(), FlashInferCascade(), FlashAttention(),
)  # fmt: skip
