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
from ..step import Step
from . import flex
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
    """A way to compute a cell."""

    name: str
    library: str  # the module that it comes with

    def why_not(self) -> str:
        """Why it cannot be run here; empty if it can."""
        return "" if importlib.util.find_spec(self.library) else "not installed"

    def prepare(self, inputs: Inputs) -> Candidate | None:
        """None if it has nothing to do with the cell. May raise whatever the library raises."""


# ---- ours -------------------------------------------------------------------------------------


class StepAttend(Peer):
    """`Step.attend` on a segment cache: append, attention and merge on pages."""

    name = "step.attend"
    library = "hogwild_ext"

    def prepare(self, inputs: Inputs) -> Candidate:
        step, key, value = open_step(inputs)
        out = torch.empty_like(inputs.query)

        def run() -> Tensor:
            step._attended[0] = step._captured[0] = False  # the same layer again and again
            return step.attend(0, inputs.query, key, value, out=out)

        return Candidate(run, _stored_bytes(*inputs.keys, *inputs.values), lambda out: out)


def open_step(inputs: Inputs) -> tuple[Step, Tensor, Tensor]:
    """An open step on a segment cache that holds all but the new tokens, and their keys and values
    [T, Hkv, D]."""
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
    cache.window = 1  # while it is filled: nobody asks for that attention
    for s, segment in enumerate(segments):
        if old := inputs.new_rows(s).start:
            key, value = inputs.keys[s][:old], inputs.values[s][:old]
            with cache.step([[segment]], [old]) as fill:
                fill.attend(0, torch.zeros_like(key), key, value)
    cache.window = None
    own = [view[-1] for view in layout.views]
    key, value = (
        torch.cat([tensors[s][inputs.new_rows(s)] for s in own])
        for tensors in (inputs.keys, inputs.values)
    )
    views = [[segments[s] for s in view] for view in layout.views]
    return cache.step(views, layout.query_lengths).__enter__(), key, value


class FunctionalOp(Peer):
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


class SdpaPerWorker(Peer):
    """scaled_dot_product_attention on a contiguous cache for each worker. For one worker whose
    whole context is new that is torch's causal path."""

    name = "SDPA, a cache a worker"
    library = "torch"

    def prepare(self, inputs: Inputs) -> Candidate:
        keys, values = inputs.caches
        new, W = inputs.layout.query_lengths, inputs.workers
        # Workers that bring as many tokens as each other go together, [W, H, n, D].
        groups = [slice(0, W)] if inputs.even else [slice(w, w + 1) for w in range(W)]
        calls = []
        for group in groups:
            queries = [inputs.view_query(w) for w in range(W)[group]]
            query = torch.stack(queries).transpose(1, 2).contiguous()
            mask = _causal(new[group.start], inputs)
            calls.append((query, keys[group], values[group], mask))

        def run() -> list[Tensor]:
            return [
                scaled_dot_product_attention(q, k, v, **mask, enable_gqa=True)
                for q, k, v, mask in calls
            ]

        return Candidate(
            run,
            _stored_bytes(keys, values),
            lambda outs: torch.cat([out.transpose(1, 2).flatten(0, 1) for out in outs]),
        )


def _causal(new: int, inputs: Inputs) -> dict[str, Any]:
    """How scaled_dot_product_attention is told that the last `new` tokens see what is before
    them: a tensor where only its kernels on GPUs know a word for it."""
    context = inputs.cell.context
    if new == 1:
        return {}
    if new == context:
        return {"is_causal": True}
    if inputs.device.type == "cpu":
        hidden = torch.ones(new, context, dtype=torch.bool).triu(context - new + 1)
        return {"attn_mask": inputs.query.new_zeros(new, context).masked_fill(hidden, -torch.inf)}
    from torch.nn.attention.bias import causal_lower_right

    return {"attn_mask": causal_lower_right(new, context)}


class SdpaPacked(Peer):
    """scaled_dot_product_attention with the rows of all workers packed by hand into one call over
    one contiguous cache: no rotation and nothing hidden, the most favourable case there is. Several
    new tokens would need a mask, and those of one worker are what `SdpaPerWorker` does."""

    name = "SDPA, rows packed"
    library = "torch"

    def prepare(self, inputs: Inputs) -> Candidate | None:
        if inputs.even != 1:
            return None
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


class Flex(Peer):
    """torch's FlexAttention on a contiguous cache for each worker, compiled beforehand."""

    name = "FlexAttention"
    library = "torch"

    def why_not(self) -> str:
        return flex.why_not()

    def prepare(self, inputs: Inputs) -> Candidate | None:
        new = inputs.even
        if new is None:
            return None
        keys, values = inputs.caches
        query = inputs.view_queries().unflatten(0, (inputs.workers, new)).transpose(1, 2)
        query = query.contiguous()
        mask = None if new == 1 else flex.lower_right(new, inputs.cell.context)
        function = flex.compiled()
        flex.first_call(function, query, keys, values, mask)
        return Candidate(
            lambda: function(query, keys, values, block_mask=mask, enable_gqa=True),
            _stored_bytes(keys, values),
            lambda out: out.transpose(1, 2).flatten(0, 1),
        )


class RotateAndConcatenate(Peer):
    """What the paper calls the slow path: all segments are stored once, and in every step each
    worker's view is put together, its keys rotated to their places, as transformers rotates, and
    given to scaled_dot_product_attention."""

    name = "rotate, concat, SDPA"
    library = "torch"

    def prepare(self, inputs: Inputs) -> Candidate:
        views, new = inputs.layout.views, inputs.layout.query_lengths
        angles = torch.arange(inputs.cell.context)[:, None].double() * inputs.inv_freq.double()
        cos, sin = (
            torch.cat([x, x], -1)[:, None].to(inputs.query)  # [context, 1, D]
            for x in (angles.cos(), angles.sin())
        )
        queries = [
            inputs.view_query(w).transpose(0, 1)[None].contiguous() for w in range(inputs.workers)
        ]
        masks = {n: _causal(n, inputs) for n in set(new)}

        def run() -> list[Tensor]:
            outs = []
            for w, view in enumerate(views):
                keys = torch.cat([inputs.keys[segment] for segment in view])
                values = torch.cat([inputs.values[segment] for segment in view])
                first, second = keys.chunk(2, -1)
                keys = keys * cos + torch.cat([-second, first], -1) * sin
                key, value = (x.transpose(0, 1)[None] for x in (keys, values))
                outs.append(
                    scaled_dot_product_attention(
                        queries[w], key, value, **masks[new[w]], enable_gqa=True
                    )
                )
            return outs

        return Candidate(
            run,
            _stored_bytes(*inputs.keys, *inputs.values),
            lambda outs: torch.cat([out[0].transpose(0, 1) for out in outs]),
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
            for pages, caches in zip((keys, values), inputs.caches, strict=True):
                first = table[begin] * page
                tokens = caches[w, :, begin * page :].transpose(0, 1)
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


class FlashInfer(Peer):
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


class FlashInferCascade(Peer):
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


class FlashAttention(Peer):
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
GPU_PEERS: tuple[Peer, ...] = (
    SdpaPerWorker(), SdpaPacked(), FlashInfer(), FlashInferCascade(), FlashAttention(),
)  # fmt: skip
CPU_PEERS: tuple[Peer, ...] = (SdpaPerWorker(), SdpaPacked(), Flex(), RotateAndConcatenate())
