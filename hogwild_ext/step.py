"""A step: one forward pass of several workers over a segment cache, all or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from threading import get_ident
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import checks
from .backends import PlanInput
from .changes import Change, finished, is_alive, thread_name
from .never_compiled import never_compiled
from .pages import PAGE_SIZE, PageTable

if TYPE_CHECKING:
    from .cache import Content, Segment, SegmentCache

Offsets = np.ndarray[Any, np.dtype[np.int32]]

_KEYS = "[tokens, kv_heads, head_dim]"
_VALUES = "[tokens, kv_heads, value_dim]"


@dataclass(frozen=True)
class CapturedStep:
    """What a CUDA graph of all layers was captured for. The plan keeps its memory alive."""

    num_tokens: int
    num_heads: int
    plan: Any


_NOT_ENTERED = finished()


@never_compiled
class Step:
    """What `SegmentCache.step` returns; enter it with `with`, at once.

    On entering, room for all new tokens is taken. On leaving, every layer must have been attended
    once, and the segments grow. If anything is raised they stay as they were. Their lengths and
    tokens do not change before the step has ended well. It belongs to the thread that entered it.

    `query_lengths` are the workers' new tokens, `num_tokens` (T) their sum, and `view_lengths` the
    tokens in each worker's view, everybody's new ones included.
    """

    def __init__(
        self,
        cache: SegmentCache,
        version: int,
        writers: list[Segment],
        order: dict[Segment, Content],
        sizes: list[int],
        ids: Sequence[list[int] | torch.Tensor],
        offsets: Offsets,
        view_lengths: list[int],
    ) -> None:
        self.query_lengths = tuple(sizes)
        self.view_lengths = tuple(view_lengths)
        self.num_tokens = sum(sizes)
        self._cache = cache
        self._version = version  # of the cache that the step was made for
        self._writers = writers  # [W]
        self._order = order  # [S], all segments seen, as they are: columns of the offsets
        self._ids = ids  # [W]
        self._offsets = offsets  # [W, S]
        self._grown: dict[Segment, tuple[PageTable, int]] = {}  # tables and lengths to be
        self._change = _NOT_ENTERED
        self._attended = bytearray(cache.num_layers)
        self._captured = bytearray(cache.num_layers)  # into a CUDA graph, not run

        # What attend compares with in every layer. Only the queries tell how many heads there are,
        # so that the plan is made in the first layer.
        self._plan: Any = None  # the backend's
        self._threads = 1
        self._query_shape: tuple[int, ...] = ()
        self._key_shape = (self.num_tokens, cache.num_kv_heads, cache.head_dim)
        self._value_shape = (self.num_tokens, cache.num_kv_heads, cache.value_dim)
        self._shapes: tuple[tuple[int, ...], ...] = (
            self._query_shape,
            self._key_shape,
            self._value_shape,
        )
        self._out_shape: tuple[int, ...] = ()

    def __enter__(self) -> Step:
        cache = self._cache
        if self._change is not _NOT_ENTERED:
            raise RuntimeError(f"step: expected a new one, got one that is {self._state}")
        change = Change("step", sys._getframe(), step=self)
        cache._savepoint(change)
        try:
            if self._version != cache._version:
                raise RuntimeError(
                    "step: expected to be entered at once, but the cache has changed"
                )
            self._change = change
            # Shortest first: of writers that share their last page, the one with the most rows in
            # it comes last. By then it is the only holder, and it writes behind everybody's rows.
            pairs = zip(self._writers, self.query_lengths, strict=True)
            for segment, size in sorted(pairs, key=lambda pair: self._order[pair[0]].length):
                content = self._order[segment]
                self._grown[segment] = cache._grow(content, size), content.length + size
            cache._check_capacity()
            self._threads = torch.get_num_threads()
            cache._note_totals(change)
            change.open()
            return self
        except BaseException as error:
            cache._tidy_up(change)
            cache._raise_if_full(error, self.num_tokens)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._require_open()
                self._store()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Undo the step unless it has ended. `with` calls it when anything is raised.

        Only a Ctrl-C that strikes between the end of the block and `with`'s own cleaning up gets
        past that. The step is then over, without having happened, when nobody holds it any more: a
        loop that keeps it says `step.abandon()` before it goes on.

        Raises RuntimeError in another thread than the step's, while that is alive.
        """
        change = self._change
        if change.over or change is _NOT_ENTERED:
            return
        if change.owner == get_ident():
            self._cache._tidy_up(change)
        elif is_alive(change.owner):
            self._require_open()

    def lasts_no_longer_than(self, call: FrameType) -> None:
        """The open step is over when `call` has ended, even if `__exit__` was not reached."""
        self._change.lasts_no_longer_than(call)

    @property
    def is_open(self) -> bool:
        """Whether it can be used now, in this thread."""
        return self._change.opened_by == get_ident()

    @property
    def _state(self) -> str:
        change = self._change
        if change is _NOT_ENTERED:
            return "not entered"
        if change.over:
            return "over"
        owner = change.owner
        return "open" if owner == get_ident() else f"open in thread {thread_name(owner)!r}"

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Store the layer's new keys and values, then attend with the new queries.

        Args:
            layer: 0 .. num_layers - 1, each once in a step, in any order.
            query: [T, Hq, D], not rotated, worker after worker; Hq is a multiple of Hkv and the
                same in most layers.
            key, value: [T, Hkv, D], not rotated, and [T, Hkv, Dv]. Like `query` they have the
                cache's dtype and device, and are read in place if their last dimension is dense.
            out: [T, Hq, Dv] to write to, apart from the inputs' memory; a new tensor if None.

        Returns out. Raises TypeError or ValueError for a bad argument, and RuntimeError outside
        of the `with` block, or if an input requires grad while grad mode is on.
        """
        cache = self._cache
        if self._change.opened_by != get_ident():
            self._require_open()
        as_planned = (
            checks.TENSORS.fit(cache._keys[0], (query, key, value), self._shapes)
            and not torch.is_grad_enabled()
            and not checks.carries_tangents()
            and checks.observer() is None
            and type(layer) is int
            and 0 <= layer < cache.num_layers
        )
        if not as_planned:
            layer, query, key, value = self._check(layer, query, key, value)
        if self._attended[layer] or self._captured[layer]:
            raise ValueError(f"layer: expected one not attended in this step so far, got {layer}")
        if out is None:
            out = torch.empty(self._out_shape, dtype=cache.dtype, device=cache.device)
        else:
            self._check_out(out, query, key, value)
        started = time.perf_counter()
        done = cache._backend.attend_layer(
            self._plan, cache._layers, layer, query, key, value, out, self._threads
        )
        (self._attended if done else self._captured)[layer] = True
        cache.stats.attention_seconds += time.perf_counter() - started
        return out

    # ---- CUDA graphs ------------------------------------------------------------------------

    def prepare(self, num_heads: int) -> None:
        """Plan for queries of `num_heads` heads and send the plan to the device, ahead of `attend`.

        Only a CUDA graph needs it: between here and the end of the step the layers then are
        launches and nothing else, and `torch.cuda.graph` can capture them. Later steps `replay`
        the graph, with other segments and views if need be.

            graph = torch.cuda.CUDAGraph()
            with cache.step(views, [1, 1]) as step:
                step.prepare(num_heads)
                with torch.cuda.graph(graph):  # captured, not run
                    for layer in range(num_layers):
                        out[layer] = step.attend(layer, query[layer], key[layer], value[layer])
                step.replay(graph)
            with cache.step(views, [1, 1]) as step:
                ...  # write the new queries, keys and values into the same tensors
                step.replay(graph)

        Raises TypeError or ValueError for a bad `num_heads`, RuntimeError outside of the `with`
        block, and while a graph is captured or after it.
        """
        self._require_open()
        if any(self._captured):
            raise RuntimeError("step: expected prepare before a capture, got it after one")
        num_heads = checks.is_integer("num_heads", num_heads, 1)
        checks.heads_divide(num_heads, self._cache.num_kv_heads, "num_heads")
        self._plan_for(num_heads)

    def replay(self, graph: Any) -> None:
        """Run all layers as `graph` captured them, on the tensors that it captured.

        The step that captures has to do it too: a capture by itself runs nothing. A later step may
        have other views, longer segments and fewer tokens than that one, T' <= T in all: then the
        first T' rows of the queries, keys and values are read, and the first T' of the outputs
        written.

        Raises TypeError for what is not a graph, RuntimeError outside of the `with` block, and
        ValueError for a graph that did not capture every layer of a step of this cache, that was
        captured with fewer tokens, or whose memory the cache has outgrown: capture it again.
        """
        self._require_open()
        cache = self._cache
        if not hasattr(graph, "replay"):
            raise TypeError(f"graph: expected a torch.cuda.CUDAGraph, got {checks.describe(graph)}")
        if any(self._attended):
            raise ValueError("graph: expected a step of which no layer has been attended so far")
        if any(self._captured):
            if not all(self._captured):
                missing = [layer for layer, done in enumerate(self._captured) if not done]
                raise ValueError(f"graph: expected every layer in it, but {missing} are not")
            cache._graphs[graph] = CapturedStep(self.num_tokens, self._query_shape[1], self._plan)
        captured = cache._graphs.get(graph)
        if captured is None:
            raise ValueError(
                f"graph: expected one that captured a step of this cache, got {graph!r}"
            )
        if self.num_tokens > captured.num_tokens:
            raise ValueError(
                f"graph: expected one captured with at least this step's {self.num_tokens} new "
                f"tokens, got one with {captured.num_tokens}"
            )
        if not any(self._captured):
            self._plan_for(captured.num_heads)
        started = time.perf_counter()
        cache._backend.replay(self._plan, captured.plan, graph)
        self._attended[:] = b"\1" * cache.num_layers
        cache.stats.attention_seconds += time.perf_counter() - started

    def _require_open(self) -> None:
        if not self.is_open:
            raise RuntimeError(f"step: expected an open one, got one that is {self._state}")

    def _check(
        self, layer: int, query: Any, key: Any, value: Any
    ) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Everything that attend asks of its arguments, and a plan for the queries' heads.

        The tensors come back in plain memory.
        """
        cache = self._cache
        checks.is_unobserved("step")
        layer = checks.is_integer("layer", layer, 0, cache.num_layers - 1)
        query = checks.is_tensor("query", query, 3, "[tokens, heads, head_dim]")
        heads = query.shape[1]
        plain = []
        query_shape = (self.num_tokens, heads, cache.head_dim)
        for name, tensor, shape, what in (
            ("query", query, query_shape, "[tokens, heads, head_dim]"),
            ("key", key, self._key_shape, _KEYS),
            ("value", value, self._value_shape, _VALUES),
        ):
            tensor = checks.is_tensor(name, tensor, 3, what)
            if tensor.shape != shape:
                raise ValueError(
                    f"{name}: expected {what} = {list(shape)}, got {checks.describe(tensor)}"
                )
            self._check_storage(name, tensor)
            plain.append(tensor)
        checks.heads_divide(heads, cache.num_kv_heads)
        if query_shape != self._query_shape:
            self._plan_for(heads)
        query, key, value = plain
        return layer, query, key, value

    def _plan_for(self, num_heads: int) -> None:
        cache = self._cache
        self._plan = self._make_plan(num_heads // cache.num_kv_heads)
        self._query_shape = (self.num_tokens, num_heads, cache.head_dim)
        self._shapes = self._query_shape, self._key_shape, self._value_shape
        self._out_shape = (self.num_tokens, num_heads, cache.value_dim)

    def _check_storage(self, name: str, tensor: torch.Tensor) -> None:
        dtype, device = self._cache.dtype, self._cache.device
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected the cache's dtype, {dtype}, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name}: expected the cache's device, {device}, got {tensor.device}")
        checks.has_no_grad(name, tensor)

    def _check_out(self, out: torch.Tensor, *inputs: torch.Tensor) -> None:
        if not checks.TENSORS.fit(self._cache._keys[0], (out,), (self._out_shape,)):
            checks.is_out("out", out, 3, "[tokens, heads, value_dim]")
            if out.shape != self._out_shape:
                raise ValueError(
                    f"out: expected [tokens, heads, value_dim] = {list(self._out_shape)}, "
                    f"got {checks.describe(out)}"
                )
            self._check_storage("out", out)
        checks.has_no_grad("out", out)
        names = ("query", "key", "value")
        checks.is_writable_apart("out", out, zip(names, inputs, strict=True))

    def _make_plan(self, group: int) -> Any:
        """The plan of all layers whose queries have `group` heads for each KV head."""
        cache = self._cache
        tables, lengths = [], []
        for segment, content in self._order.items():
            table, length = self._grown.get(segment) or content[:2]
            tables.append(table)
            lengths.append(length)
        slots = []
        starts = [self._order[segment].length for segment in self._writers]
        for segment, start, size in zip(self._writers, starts, self.query_lengths, strict=True):
            places = np.arange(start, start + size)
            pages = self._grown[segment][0][places // PAGE_SIZE]
            slots.append(pages * PAGE_SIZE + places % PAGE_SIZE)
        layout = PlanInput(
            self._offsets,
            np.array(lengths, np.int32),
            np.array(self.query_lengths, np.int32),
            cache.inv_freq,
            group,
            cache.num_kv_heads,
            cache.window or 0,
            np.array(starts, np.int32),
            np.concatenate(tables),
            np.concatenate(slots).astype(np.int32),
            packed=True,
        )
        return cache._backend.plan_step(cache._layers, layout)

    def _store(self) -> None:
        """Make the new tokens part of their segments."""
        cache = self._cache
        if missing := [layer for layer, done in enumerate(self._attended) if not done]:
            hint = "; what was captured runs in step.replay(graph)" if any(self._captured) else ""
            raise ValueError(
                f"step: expected every layer to be attended once, but layers {missing} were "
                f"not{hint}"
            )
        for segment, ids in zip(self._writers, self._ids, strict=True):
            table, length = self._grown[segment]
            segment._put(self._change, table, length, self._order[segment].log.extended(ids))
        cache._finish(self._change)
        cache.stats.steps += 1
        cache.stats.appended_tokens += self.num_tokens

    def __reduce_ex__(self, protocol: object) -> Any:
        raise TypeError(
            "step: expected not to be copied or pickled, got one of "
            f"{self._cache!r}; cache.step(...) makes another one"
        )
