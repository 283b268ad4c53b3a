"""The segment cache: keys and values of every segment, stored once, seen by workers in any order.

A `Segment` is an append-only run of tokens. A worker's *view* is a list of segments whose
concatenation it has read so far; it writes the last one. All workers of a forward pass append
and attend together, in a `Step`. See sections 3 and 4 of arXiv 2504.06261.

Sharing is cheap: a fork holds the same pages, and a page that two segments hold is copied before
either of them writes into it. Every change is all or nothing: whatever is raised, `OutOfPages`
and Ctrl-C included, the cache is as before or, in the last instant, as after it (changes.py).

A cache is for one thread at a time: a change while another thread is at one is refused, and so is
reading keys and values that change meanwhile. Everything else may be looked at from any thread.
"""

from __future__ import annotations

import math
import operator
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from . import _C, checks
from .backends import Backend, PagedLayers, Scoring, backend_for
from .changes import Cell, Change, Turns, changed_meanwhile, refusal
from .never_compiled import never_compiled
from .pages import EMPTY_TABLE, PAGE_SIZE, PagePool, PagesExhausted, PageTable, pages_for
from .step import CapturedStep, Step
from .token_log import TokenLog

T = TypeVar("T")


class OutOfPages(RuntimeError):
    """There is no room for the tokens that were asked for; nothing has changed.

    Like `torch.OutOfMemoryError` it is a RuntimeError. Truncate or free segments and try again.

    Attributes: `max_tokens` of the cache, `stored` tokens, `free` tokens, `asked` for.
    """

    def __init__(self, max_tokens: int, stored: int, free: int, asked: int) -> None:
        self.max_tokens, self.stored, self.free, self.asked = max_tokens, stored, free, asked
        message = (
            f"the cache is full: {stored} tokens are stored, {free} are free, {asked} were asked "
            f"for (max_tokens={max_tokens})"
        )
        if asked <= max_tokens - stored:
            message += (
                f". By number they fit, but not into the free pages: a segment takes whole pages "
                f"of {PAGE_SIZE} tokens, and pages shared with a fork are copied before writing"
            )
        super().__init__(message)


@dataclass
class CacheStats:
    """What a cache has done so far. Plain numbers: set them to 0 to count afresh."""

    steps: int = 0  # that ended well
    appended_tokens: int = 0
    committed_tokens: int = 0
    copied_bytes: int = 0  # keys and values: by commits, and where one of two forks grows
    attention_seconds: float = 0.0  # inside Step.attend, all layers; on a GPU launching only


class Content(NamedTuple):
    """What a segment holds. A change puts another one in its place."""

    table: PageTable
    length: int
    log: TokenLog


_EMPTY = Content(EMPTY_TABLE, 0, TokenLog())
_GONE = Content(EMPTY_TABLE, 0, TokenLog())  # of a segment that is freed, or not there yet


class _Totals(NamedTuple):
    """What all segments come to."""

    stored: int  # tokens
    free_pages: int
    version: int  # counts changes


@never_compiled
class Segment:
    """An append-only run of tokens of one cache. `SegmentCache.segment` and `fork` make them.

    `len(segment)` is its number of tokens; token `l` has its key rotated to position `l`.
    """

    def __init__(self, cache: SegmentCache, name: str, serial: int) -> None:
        # Weak, so that a cache's gigabytes go with the last reference to the cache.
        self._owner = weakref.ref(cache)
        self._name = name
        self._serial = serial  # counts up in order of creation
        self._cell = Cell(_GONE)
        self._next_fork = 1  # no smaller number is free for the name of a fork

    @property
    def _content(self) -> Content:
        return self._cell.get()

    @property
    def _table(self) -> PageTable:
        return self._cell.get().table

    def _put(self, change: Change, table: PageTable, length: int, log: TokenLog) -> None:
        self._cell.put(change, Content(table, length, log))

    @property
    def _is_live(self) -> bool:
        return self._cell.get() is not _GONE

    @property
    def name(self) -> str:
        """Unique among the live segments of a cache."""
        return self._name

    @property
    def cache(self) -> SegmentCache:
        """The cache that it belongs to. Raises ValueError once the cache is gone."""
        cache = self._owner()
        if cache is None:
            raise ValueError(f"segment: expected a live cache, got {self._name!r} of a deleted one")
        return cache

    @property
    def tokens(self) -> list[int]:
        """Token ids as a new list, -1 where unknown. Ids still on a device are read back now."""
        return self._cell.get().log.read()

    def __len__(self) -> int:
        return self._cell.get().length

    def __bool__(self) -> bool:
        return True  # an empty segment is still a segment

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens; pages that nobody needs any more are free again.

        Raises TypeError or ValueError for a bad `length` or a freed segment.
        """
        cache = self.cache
        version = cache._version
        cache._check_segment("segment", self)
        table, stored, log = self._content
        length = checks.is_integer("length", length, 0, stored)

        def truncate(change: Change) -> None:
            kept = cache._pool.cut(table, stored, length)
            self._put(change, kept, length, log.head(length))

        cache._all_or_nothing("truncate", version, truncate)

    def keys(self, layer: int) -> torch.Tensor:
        """Copy of the layer's keys as stored, rotated to 0, 1, ...: [len, Hkv, D]."""
        return self.cache._read(self, layer, is_key=True)

    def values(self, layer: int) -> torch.Tensor:
        """Copy of the layer's values: [len, Hkv, Dv]."""
        return self.cache._read(self, layer, is_key=False)

    def __repr__(self) -> str:
        live = self._owner() is not None and self._is_live
        return f"<Segment {self._name!r}, {f'{len(self)} tokens' if live else 'freed'}>"

    def __reduce_ex__(self, protocol: object) -> Any:
        raise TypeError(
            f"segment: expected not to be copied or pickled, got {self!r}, which is a part of its "
            "cache; cache.fork(segment) gives one with the same tokens"
        )


@never_compiled
class SegmentCache:
    """Paged keys and values of all layers, shared by every worker.

    Args:
        num_layers, num_kv_heads, head_dim: of the model. `head_dim` D is a multiple of 8, up to
            256, and so is `value_dim` Dv, which is D unless given.
        inv_freq: [R/2] floats on the host, R <= D: the rotary frequencies.
        max_tokens: how many tokens fit, over all segments; what forks share counts once. A
            segment takes whole pages of 64 tokens, so each may leave up to 63 places empty. To
            make up for that there are `spare_pages` pages beyond `max_tokens`: with up to that
            many segments, `max_tokens` tokens fit however they are spread.
        dtype: float32, float16 or bfloat16; queries, keys and values must come in it.
        device: "cpu", or a GPU as torch names it. The memory is reserved at once; on the CPU it is
            used only as segments grow, where Linux has them in huge pages of 2 MB.
        rope_scale, interleaved, scale, softcap, window: as in `concurrent_attention`.
        max_position: number of positions that the model knows; a step whose view is longer is
            refused. None: no limit.

    Public: `stats`, `segments`, `bytes_per_token`, `used_tokens`, `free_tokens`, and every
    argument by its name.

    Raises TypeError and ValueError for a bad argument, by its name.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        inv_freq: Any,
        max_tokens: int = 65536,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        value_dim: int | None = None,
        rope_scale: float = 1.0,
        interleaved: bool = False,
        scale: float | None = None,
        softcap: float = 0.0,
        window: int | None = None,
        max_position: int | None = None,
        spare_pages: int = 64,
    ) -> None:
        checks.is_unobserved("cache")
        self.num_layers = checks.is_integer("num_layers", num_layers, 1)
        self.num_kv_heads = checks.is_integer("num_kv_heads", num_kv_heads, 1)
        self.head_dim = checks.is_integer("head_dim", head_dim, 1)
        self.value_dim = (
            self.head_dim if value_dim is None else checks.is_integer("value_dim", value_dim, 1)
        )
        self.device, self._backend = _device("device", device)
        self._backend.check_head_dims(("head_dim", "value_dim"), self.head_dim, self.value_dim)
        self.inv_freq = checks.is_inv_freq(
            inv_freq, self.head_dim
        ).copy()  # the caller's may change
        self.inv_freq.flags.writeable = False
        self.max_tokens = checks.is_integer("max_tokens", max_tokens, 1, 2**30)
        self.dtype = checks.is_storage_dtype("dtype", dtype)
        self.rope_scale = checks.is_number("rope_scale", rope_scale)
        self.interleaved = checks.is_bool("interleaved", interleaved)
        self.scale = self.head_dim**-0.5 if scale is None else checks.is_number("scale", scale)
        self.softcap = checks.is_number("softcap", softcap, low=0.0)
        self.window = None if window is None else checks.is_integer("window", window, 1)
        self.max_position = (
            None if max_position is None else checks.is_integer("max_position", max_position, 1)
        )
        self.spare_pages = checks.is_integer("spare_pages", spare_pages, 0, 2**20)
        self.stats = CacheStats()

        self._segments: dict[str, Segment] = {}  # the live ones, in order of creation
        self._known: set[Segment] = set()  # the same
        self._created = 0
        self._turns = Turns()
        self._pool = PagePool(pages_for(self.max_tokens) + self.spare_pages)
        self._totals = Cell(_Totals(0, self._pool.free, 0))

        code = checks.DTYPE_CODES[dtype]
        self._keys, self._values = self._reserve(code)
        self._layers = PagedLayers(
            code,
            self.num_kv_heads,
            self.head_dim,
            self.value_dim,
            self.inv_freq,
            Scoring(self.scale, self.rope_scale, self.interleaved, self.softcap),
            self._keys,
            self._values,
            [storage.data_ptr() for storage in self._keys],
            [storage.data_ptr() for storage in self._values],
            self._backend.step_memory(),
        )
        self._graphs: weakref.WeakKeyDictionary[Any, CapturedStep] = weakref.WeakKeyDictionary()

    @classmethod
    def for_model(
        cls, model: Any, max_tokens: int = 65536, *, spare_pages: int = 64
    ) -> SegmentCache:
        """A cache that fits a transformers model: its sizes, frequencies, dtype and device.

        Needs transformers. Raises ValueError for a model that is not supported.
        """
        from . import patching  # needs transformers, which the cache itself does not

        cache: SegmentCache = patching.cache_for_model(cls, model, max_tokens, spare_pages)
        return cache

    # ---- segments ---------------------------------------------------------------------------

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The live segments in order of creation."""
        return tuple(s for s in list(self._segments.values()) if s._is_live)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        per_layer = self.num_kv_heads * (self.head_dim + self.value_dim) * self.dtype.itemsize
        return self.num_layers * per_layer

    @property
    def used_tokens(self) -> int:
        """Tokens stored in all segments, those that forks share counted once.

        An open step's new tokens count as stored.
        """
        return self._totals.get_ahead().stored

    @property
    def free_tokens(self) -> int:
        """Tokens that a new segment could still take."""
        stored, free_pages, _ = self._totals.get_ahead()
        return min(max(0, self.max_tokens - stored), free_pages * PAGE_SIZE)

    @property
    def _version(self) -> int:
        return self._totals.get().version

    def segment(self, name: str) -> Segment:
        """A new, empty segment. Raises ValueError if a live one has the name."""
        version = self._version
        name = self._check_name(name)
        return self._all_or_nothing("segment", version, lambda c: self._add(c, name, _EMPTY))

    def fork(self, segment: Segment, name: str | None = None) -> Segment:
        """A new segment with the same tokens, which costs no memory until one of the two grows.

        Without a name it is called after the original: "prompt.1", "prompt.2", ... Raises
        TypeError or ValueError for a bad argument.
        """
        version = self._version
        self._check_segment("segment", segment)
        if name is None:
            while self._is_taken(name := f"{segment._name}.{segment._next_fork}"):
                segment._next_fork += 1
        unique, content = self._check_name(name), segment._content

        def fork(change: Change) -> Segment:
            self._pool.share(content.table, content.length)
            return self._add(change, unique, content)

        return self._all_or_nothing("fork", version, fork)

    def commit(self, source: Segment, target: Segment) -> None:
        """Move the tokens of `source` behind those of `target`; `source` is empty afterwards.

        Its keys are rotated by the length of `target`, once and in float32. Raises TypeError or
        ValueError for a bad argument, and `OutOfPages`: while it copies, both hold pages.
        """
        version = self._version
        self._check_segment("source", source)
        self._check_segment("target", target)
        if source is target:
            raise ValueError(f"source: expected another segment than target, got {source!r} twice")
        (pages, count, ids), (table, start, log) = source._content, target._content

        def commit(change: Change) -> None:
            if start == 0:  # rotated by 0: the pages change hands
                grown = pages
            elif count:
                grown = self._grow(target._content, count)
                self._pool.cut(pages, count, 0)
                self._check_capacity()
                self._backend.commit(self._layers, pages, count, grown, start)
                self.stats.copied_bytes += count * self.bytes_per_token
            else:
                grown = table
            target._put(change, grown, start + count, log.joined(ids))
            source._cell.put(change, _EMPTY)

        self._all_or_nothing("commit", version, commit, asked=count)
        self.stats.committed_tokens += count

    def free(self, segment: Segment) -> None:
        """Give back the pages of `segment`, and its name. It has no tokens then, and no use.

        Raises TypeError or ValueError for what is not a live segment of this cache.
        """
        version = self._version
        self._check_segment("segment", segment)
        table, length, _ = segment._content

        def free(change: Change) -> None:
            self._pool.cut(table, length, 0)
            segment._cell.put(change, _GONE)

        self._all_or_nothing("free", version, free, freed=segment)

    def step(
        self,
        views: Sequence[Sequence[Segment]],
        query_lengths: Sequence[int],
        tokens: Sequence[Sequence[int]] | torch.Tensor | None = None,
        allow_beyond: bool = False,
    ) -> Step:
        """One forward pass of the workers that have something to say, as a context manager.

        Args:
            views: one list of segments a worker: what it has read, in its order. The last one
                takes the worker's new tokens; no two workers may write one segment.
            query_lengths: how many new tokens each worker brings, at least 1. (Leave a worker
                with nothing to say out of `views`.)
            tokens: their ids, only kept for `Segment.tokens`: one list a worker, or an integer
                tensor [W, Q] where all bring Q; one on a device is not read back. None: unknown.
            allow_beyond: allow views longer than `max_position`.

        Raises TypeError or ValueError for a bad argument; on entering also `OutOfPages`, and
        RuntimeError while another step is open or if the cache has changed in between.
        """
        last = self._turns.newest()
        if not last.over:
            if last.is_going_on():
                raise RuntimeError(refusal("step", last))
            self._all_or_nothing("step", self._version, lambda change: None)  # to tidy up after it
        version = self._version
        writers, order, sizes = self._check_views(views, query_lengths)
        ids = _token_lists(tokens, sizes)
        offsets = np.full((len(sizes), len(order)), _C.HIDDEN, np.int32)
        contents = {segment: segment._cell.get() for segment in order}
        lengths = {segment: content.length for segment, content in contents.items()}
        for segment, size in zip(writers, sizes, strict=True):
            lengths[segment] += size
        beyond = checks.is_bool("allow_beyond", allow_beyond)
        columns = {segment: s for s, segment in enumerate(order)}
        view_lengths = []
        for w, view in enumerate(views):
            total = sum(lengths[segment] for segment in view)
            if self.max_position is not None and total > self.max_position and not beyond:
                raise ValueError(
                    f"views[{w}]: expected at most max_position={self.max_position} tokens, new "
                    f"ones included (or allow_beyond=True), got {total}"
                )
            view_lengths.append(total)
            distance = total - sizes[w]
            for segment in view:
                offsets[w, columns[segment]] = distance
                distance -= lengths[segment]
        return Step(self, version, writers, contents, sizes, ids, offsets, view_lengths)

    def __repr__(self) -> str:
        return (
            f"<SegmentCache of {self.num_layers} layers, {self.num_kv_heads} KV heads of "
            f"{self.head_dim}, {self.dtype}, {self.device}: {self.used_tokens} of "
            f"{self.max_tokens} tokens in {len(self.segments)} segments>"
        )

    def __reduce_ex__(self, protocol: object) -> Any:
        raise TypeError(
            f"cache: expected not to be copied or pickled, got {self!r}: its segments, open steps "
            "and memory belong together; cache.fork(segment) gives a segment with the same tokens, "
            "SegmentCache(...) a cache of its own"
        )

    # ---- for Segment and Step ---------------------------------------------------------------

    def _reserve(self, code: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Memory for the keys and values of all layers."""
        shape_of, pages = self._backend.page_shape, self._pool.count
        shapes = (
            (pages, *shape_of(code, self.num_kv_heads, self.head_dim, True)),
            (pages, *shape_of(code, self.num_kv_heads, self.value_dim, False)),
        )
        reserved: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []
        try:
            for _ in range(self.num_layers):
                for storages, shape in zip(reserved, shapes, strict=True):
                    storages.append(self._backend.reserve(shape, self.dtype))
        except (MemoryError, OSError, OverflowError, ValueError, RuntimeError) as error:
            for storages in reserved:
                storages.clear()  # now: the traceback would keep them
            raise self._too_large(sum(map(math.prod, shapes)), error) from error
        return reserved

    def _too_large(self, elements: int, error: Exception) -> Exception:
        """What to say if there is no memory for this cache, with `elements` in a layer."""
        wanted = self.num_layers * elements * self.dtype.itemsize
        free = self._backend.free_memory()
        known = "" if free is None else f" of about {_gigabytes(free)} that are free"
        message = (
            f"max_tokens: expected a cache that fits into memory, got max_tokens={self.max_tokens} "
            f"and spare_pages={self.spare_pages}, which take {_gigabytes(wanted)}{known} on "
            f"{self.device}; with fewer tokens it takes less ({error})"
        )
        # A caller who waits for the device's own error finds it.
        kind = torch.OutOfMemoryError if isinstance(error, torch.OutOfMemoryError) else MemoryError
        return kind(message)

    def _add(self, change: Change, name: str, content: Content) -> Segment:
        segment = Segment(self, name, self._created)
        self._created += 1
        self._segments[name] = segment
        self._known.add(segment)
        segment._cell.put(change, content)
        return segment

    def _grow(self, content: Content, count: int) -> PageTable:
        """A table for `count` more tokens; where they would write into a shared page, its copy."""
        table, copy = self._pool.grow(content.table, content.length, count)
        if copy:
            rows = content.length % PAGE_SIZE
            self._backend.copy_page(self._layers, *copy, rows)
            self.stats.copied_bytes += rows * self.bytes_per_token
        return table

    def _check_capacity(self) -> None:
        if self._pool.stored > self.max_tokens:
            raise PagesExhausted

    def _read(self, segment: Segment, layer: int, is_key: bool) -> torch.Tensor:
        self._check_segment("segment", segment)
        layer = checks.is_integer("layer", layer, 0, self.num_layers - 1)
        content = segment._content
        rows = self._backend.read(self._layers, layer, is_key, content.table, content.length)
        # Its pages were its own all the time, and nobody writes into rows that a segment has.
        if segment._content is not content:
            raise RuntimeError(
                f"{'keys' if is_key else 'values'}: expected a segment that nobody changes "
                f"meanwhile, got {segment!r}, changed by another thread; a cache is for one "
                "thread at a time"
            )
        return rows

    # ---- changes ----------------------------------------------------------------------------

    def _all_or_nothing(
        self,
        what: str,
        version: int,
        action: Callable[[Change], T],
        *,
        asked: int = 0,
        freed: Segment | None = None,
    ) -> T:
        """Run `action`, which puts what it makes new into cells. Whatever it raises, the cache is
        as before. `version` is the one for which arguments were checked."""
        change = Change(what, sys._getframe())
        self._savepoint(change)
        try:
            if version != self._version:
                raise RuntimeError(changed_meanwhile(what))
            result = action(change)
            self._note_totals(change)
            self._finish(change, freed)
            return result
        except BaseException as error:
            self._tidy_up(change)
            self._raise_if_full(error, asked)
            raise

    def _savepoint(self, change: Change) -> None:
        """The turn for `change`: until it is done, the cache is as it is now."""
        if not self._turns.take(change):
            self._restore()

    def _finish(self, change: Change, freed: Segment | None = None) -> None:
        """The change is done, in the one line that says so."""
        change.done = True
        if freed is not None:
            self._forget(freed)
        change.end()

    def _note_totals(self, change: Change) -> None:
        pool = self._pool
        self._totals.put(change, _Totals(pool.stored, pool.free, self._version + 1))

    def _forget(self, segment: Segment) -> None:
        del self._segments[segment._name]
        self._known.remove(segment)
        name, _, number = segment._name.rpartition(".")
        original = self._segments.get(name)
        if original is not None and number.isascii() and number.isdecimal() and len(number) < 10:
            original._next_fork = min(original._next_fork, max(int(number), 1))

    def _tidy_up(self, change: Change) -> None:
        """After a change that raised: undone, unless it was done already."""
        if not change.over:
            self._restore()
            change.end()

    def _restore(self) -> None:
        """Everything else as it follows from what the segments hold."""
        segments = self.segments
        self._segments = {segment._name: segment for segment in segments}
        self._known = set(segments)
        self._pool.rebuild(segment._content[:2] for segment in segments)
        self._totals.settle()
        for segment in segments:
            segment._cell.settle()
            segment._next_fork = 1

    def _raise_if_full(self, error: BaseException, asked: int) -> None:
        if isinstance(error, PagesExhausted):
            stored, free = self.used_tokens, self.free_tokens
            raise OutOfPages(self.max_tokens, stored, free, asked) from None

    # ---- checks -----------------------------------------------------------------------------

    def _check_name(self, name: object) -> str:
        if not isinstance(name, str):
            raise TypeError(f"name: expected a string, got {checks.describe(name)}")
        if not name:
            raise ValueError("name: expected at least one letter, got an empty string")
        if self._is_taken(name):
            raise ValueError(f"name: expected one that no live segment has, got {name!r}")
        return name

    def _is_taken(self, name: str) -> bool:
        segment = self._segments.get(name)
        return segment is not None and segment._is_live

    def _check_segment(self, name: str, segment: Segment) -> None:
        if not isinstance(segment, Segment):
            raise TypeError(f"{name}: expected a Segment, got {checks.describe(segment)}")
        if segment._owner() is not self:
            raise ValueError(
                f"{name}: expected a segment of this cache, got {segment!r} of another one"
            )
        if not segment._is_live:
            raise ValueError(f"{name}: expected a live segment, got {segment!r}")

    def _check_views(
        self, views: Sequence[Sequence[Segment]], query_lengths: Sequence[int]
    ) -> tuple[list[Segment], list[Segment], list[int]]:
        """The segments written, all segments seen, and the query lengths as plain integers."""
        checks.is_sequence("views", views, "lists of segments, one a worker")
        if not views:
            raise ValueError("views: expected one list of segments a worker, got none")
        what = f"integers [workers] = [{len(views)}], at least 1"
        sizes: list[int] = checks.is_int32_array(
            "query_lengths", query_lengths, (len(views),), what, low=1
        ).tolist()
        seen: set[Segment] = set()
        writer_of: dict[Segment, int] = {}
        for w, view in enumerate(views):
            checks.is_sequence(f"views[{w}]", view, "segments")
            if not view:
                raise ValueError(f"views[{w}]: expected at least one segment, got none")
            try:
                distinct = set(view)
            except TypeError:  # not even hashable
                distinct = set()
            if not distinct or not distinct <= self._known:
                for i, segment in enumerate(view):
                    self._check_segment(f"views[{w}][{i}]", segment)
            if len(distinct) < len(view):
                twice = next(s for i, s in enumerate(view) if s in view[:i])
                raise ValueError(f"views[{w}]: expected each segment once, got {twice!r} twice")
            other = writer_of.setdefault(view[-1], w)
            if other != w:
                raise ValueError(
                    f"views[{w}]: expected a last segment that no other worker writes, got "
                    f"{view[-1]!r}, the last of views[{other}] too"
                )
            seen |= distinct
        # Results are folded in this order: an order of the cache, not of who is in the step.
        return list(writer_of), sorted(seen, key=operator.attrgetter("_serial")), sizes


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"


def _device(name: str, device: torch.device | str) -> tuple[torch.device, Backend]:
    if not isinstance(device, (torch.device, str)):
        raise TypeError(
            f"{name}: expected a torch.device or its name, got {checks.describe(device)}"
        )
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"{name}: expected a device or its name, got {device!r}") from None
    backend_for(name, device)  # before torch is asked: it says what to do
    try:
        device = torch.empty(0, device=device).device  # "cuda" -> the current one, such as "cuda:0"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{name}: expected a device that torch can use, got {device}: {reason}"
        ) from error
    return device, backend_for(name, device)


def _token_lists(
    tokens: Sequence[Sequence[int]] | torch.Tensor | None, sizes: list[int]
) -> Sequence[list[int] | torch.Tensor]:
    """The ids of each worker's new tokens: lists, or tensors that are still on a device."""
    if tokens is None:
        return [[-1] * size for size in sizes]
    if isinstance(tokens, torch.Tensor):
        shape = (len(sizes), sizes[0])
        tokens = checks.is_plain("tokens", tokens)
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise TypeError(f"tokens: expected integers, got {checks.describe(tokens)}")
        if tuple(tokens.shape) != shape or min(sizes) < max(sizes):
            raise ValueError(
                f"tokens: expected a tensor [workers, query length] for query_lengths {sizes}, or "
                f"one list a worker, got {checks.describe(tokens)}"
            )
        if tokens.device.type == "cpu":
            return _token_lists(tokens.tolist(), sizes)
        return list(tokens.detach().clone())  # the caller's may be overwritten by the next step
    checks.is_sequence("tokens", tokens, "lists of token ids, one a worker")
    if len(tokens) != len(sizes):
        raise ValueError(f"tokens: expected one list a worker, {len(sizes)}, got {len(tokens)}")
    lists = []
    for w, (ids, size) in enumerate(zip(tokens, sizes, strict=True)):
        checks.is_sequence(f"tokens[{w}]", ids, "token ids")
        if len(ids) != size:
            raise ValueError(
                f"tokens[{w}]: expected query_lengths[{w}]={size} token ids, got {len(ids)}"
            )
        if set(map(type, ids)) != {int} or min(ids) < -1 or max(ids) > checks.INT32_MAX:
            ids = [checks.is_integer(f"tokens[{w}][{i}]", t, -1) for i, t in enumerate(ids)]
        lists.append(list(ids))
    return lists
