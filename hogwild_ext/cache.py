"""The segment cache: keys and values of every segment, stored once, seen by workers in any order.

A `Segment` is an append-only run of tokens. A worker's *view* is a list of segments whose
concatenation it has read so far; it writes the last one. All workers of a forward pass append
and attend together, in a `Step`. See sections 3 and 4 of arXiv 2504.06261.

Sharing is cheap: a fork holds the same pages, and a page that two segments hold is copied before
either of them writes into it. Every change is all or nothing: whatever is raised, `OutOfPages`
and Ctrl-C included, the segments are as before. A cache is meant for one thread at a time.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from . import _C, checks
from .backends import Backend, PagedLayers, Scoring, backend_for
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
        self._table: PageTable = EMPTY_TABLE
        self._length = 0
        self._log = TokenLog()

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
        return self._log.read()

    def __len__(self) -> int:
        return self._length

    def __bool__(self) -> bool:
        return True  # an empty segment is still a segment

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens; pages that nobody needs any more are free again.

        Raises TypeError or ValueError for a bad `length` or a freed segment.
        """
        cache = self.cache
        cache._check_segment("segment", self)
        length = checks.is_integer("length", length, 0, self._length)

        def change() -> None:
            pages = pages_for(length)
            cache._pool.release(self._table[pages:])
            self._table, self._length = self._table[:pages], length
            self._log = self._log.head(length)

        cache._all_or_nothing("truncate", [self], change)

    def keys(self, layer: int) -> torch.Tensor:
        """Copy of the layer's keys as stored, rotated to 0, 1, ...: [len, Hkv, D]."""
        return self.cache._read(self, layer, is_key=True)

    def values(self, layer: int) -> torch.Tensor:
        """Copy of the layer's values: [len, Hkv, Dv]."""
        return self.cache._read(self, layer, is_key=False)

    def __repr__(self) -> str:
        cache = self._owner()
        live = cache is not None and cache._segments.get(self._name) is self
        return f"<Segment {self._name!r}, {f'{self._length} tokens' if live else 'freed'}>"


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
        self._created = 0
        self._version = 0  # of the segments: counts changes
        self._busy: str | None = None  # what is going on, if anything
        self._growing: dict[Segment, tuple[PageTable, int]] = {}  # tables and lengths to be
        self._pool = PagePool(pages_for(self.max_tokens) + self.spare_pages)

        code = checks.DTYPE_CODES[dtype]
        shape_of = self._backend.page_shape
        pages = self._pool.count
        key_shape = (pages, *shape_of(code, self.num_kv_heads, self.head_dim, True))
        value_shape = (pages, *shape_of(code, self.num_kv_heads, self.value_dim, False))
        layers = range(self.num_layers)
        self._keys = [self._backend.reserve(key_shape, dtype) for _ in layers]
        self._values = [self._backend.reserve(value_shape, dtype) for _ in layers]
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
        return tuple(self._segments.values())

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
        return self._pool.stored_tokens(
            self._growing.get(segment, (segment._table, segment._length))
            for segment in self._segments.values()
        )

    @property
    def free_tokens(self) -> int:
        """Tokens that a new segment could still take."""
        room = max(0, self.max_tokens - self.used_tokens)
        return min(room, self._pool.free * PAGE_SIZE)

    def segment(self, name: str) -> Segment:
        """A new, empty segment. Raises ValueError if a live one has the name."""
        name = self._check_name(name)
        return self._all_or_nothing("segment", [], lambda: self._add(name))

    def fork(self, segment: Segment, name: str | None = None) -> Segment:
        """A new segment with the same tokens, which costs no memory until one of the two grows.

        Without a name it is called after the original: "prompt.1", "prompt.2", ... Raises
        TypeError or ValueError for a bad argument.
        """
        self._check_segment("segment", segment)
        if name is None:
            number = 1
            while f"{segment._name}.{number}" in self._segments:
                number += 1
            name = f"{segment._name}.{number}"
        unique = self._check_name(name)

        def change() -> Segment:
            fork = self._add(unique)
            self._pool.share(segment._table)
            fork._table, fork._length = segment._table, segment._length
            fork._log = segment._log.copy()
            return fork

        return self._all_or_nothing("fork", [], change)

    def commit(self, source: Segment, target: Segment) -> None:
        """Move the tokens of `source` behind those of `target`; `source` is empty afterwards.

        Its keys are rotated by the length of `target`, once and in float32. Raises TypeError or
        ValueError for a bad argument, and `OutOfPages`: while it copies, both hold pages.
        """
        self._check_segment("source", source)
        self._check_segment("target", target)
        if source is target:
            raise ValueError(f"source: expected another segment than target, got {source!r} twice")
        count, start, pages = source._length, target._length, source._table

        def change() -> None:
            if start == 0:  # rotated by 0: the pages change hands
                target._table = pages
            elif count:
                target._table = self._grow(target, count)
                self._pool.release(pages)
            source._table, source._length = EMPTY_TABLE, 0
            target._length = start + count
            self._check_capacity()
            if start and count:
                self._backend.commit(self._layers, pages, count, target._table, start)
                self.stats.copied_bytes += count * self.bytes_per_token
            target._log.extend_from(source._log)
            source._log = TokenLog()

        self._all_or_nothing("commit", [source, target], change, asked=count)
        self.stats.committed_tokens += count

    def free(self, segment: Segment) -> None:
        """Give back the pages of `segment`, and its name. It has no tokens then, and no use.

        Raises TypeError or ValueError for what is not a live segment of this cache.
        """
        self._check_segment("segment", segment)

        def change() -> None:
            self._pool.release(segment._table)
            del self._segments[segment._name]
            segment._table, segment._length, segment._log = EMPTY_TABLE, 0, TokenLog()

        self._all_or_nothing("free", [segment], change)

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
        self._require_idle("step")
        writers, order, sizes = self._check_views(views, query_lengths)
        ids = _token_lists(tokens, sizes)
        offsets = np.full((len(sizes), len(order)), _C.HIDDEN, np.int32)
        lengths = {segment: segment._length for segment in order}
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
        return Step(self, writers, order, sizes, ids, offsets, view_lengths)

    def __repr__(self) -> str:
        return (
            f"<SegmentCache of {self.num_layers} layers, {self.num_kv_heads} KV heads of "
            f"{self.head_dim}, {self.dtype}, {self.device}: {self.used_tokens} of "
            f"{self.max_tokens} tokens in {len(self._segments)} segments>"
        )

    # ---- for Segment and Step ---------------------------------------------------------------

    def _add(self, name: str) -> Segment:
        segment = Segment(self, name, self._created)
        self._created += 1
        self._segments[name] = segment
        return segment

    def _grow(self, segment: Segment, count: int) -> PageTable:
        """A table for `count` more tokens; where they would write into a shared page, its copy."""
        table, copy = self._pool.grow(segment._table, segment._length, count)
        if copy:
            rows = segment._length % PAGE_SIZE
            self._backend.copy_page(self._layers, *copy, rows)
            self.stats.copied_bytes += rows * self.bytes_per_token
        return table

    def _check_capacity(self) -> None:
        # The pages in use tell, without a count of tokens, that there is room; mostly there is.
        if self._pool.used * PAGE_SIZE > self.max_tokens and self.used_tokens > self.max_tokens:
            raise PagesExhausted

    def _read(self, segment: Segment, layer: int, is_key: bool) -> torch.Tensor:
        self._check_segment("segment", segment)
        layer = checks.is_integer("layer", layer, 0, self.num_layers - 1)
        return self._backend.read(self._layers, layer, is_key, segment._table, segment._length)

    def _require_idle(self, what: str) -> None:
        if self._busy is not None:
            raise RuntimeError(
                f"{what}: expected no open step or change of the cache, got one "
                f"inside {self._busy!r}"
            )

    def _all_or_nothing(
        self, what: str, segments: list[Segment], change: Callable[[], T], asked: int = 0
    ) -> T:
        """Run `change`, which changes `segments`. Whatever it raises, they are as before."""
        self._require_idle(what)
        before = self._savepoint(segments)
        try:
            try:
                self._busy = what
                result = change()
                self._version += 1
                self._busy = None
                return result
            except BaseException:
                before.restore()
                raise
        except BaseException as error:
            before.restore()  # again, because a Ctrl-C may have come in the middle of it
            self._raise_if_full(error, asked)
            raise

    def _savepoint(self, changing: Iterable[Segment]) -> _Savepoint:
        return _Savepoint(self, changing)

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
        if name in self._segments:
            raise ValueError(f"name: expected one that no live segment has, got {name!r}")
        return name

    def _check_segment(self, name: str, segment: Segment) -> None:
        if not isinstance(segment, Segment):
            raise TypeError(f"{name}: expected a Segment, got {checks.describe(segment)}")
        if segment._owner() is not self:
            raise ValueError(
                f"{name}: expected a segment of this cache, got {segment!r} of another one"
            )
        if self._segments.get(segment._name) is not segment:
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
        live = set(self._segments.values())
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
            if not distinct or not distinct <= live:
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


class _Savepoint:
    """What the segments look like before a change of some of them."""

    def __init__(self, cache: SegmentCache, changing: Iterable[Segment]) -> None:
        self._cache = cache
        self._live = dict(cache._segments)
        self._states = [(s, s._table, s._length, s._log) for s in changing]

    def restore(self) -> None:
        """Undo the change, however far it went. Once more does no harm, even if cut short."""
        self._cache._segments = self._live
        for segment, table, length, log in self._states:
            log.truncate(length)  # a change only appends to a log, or puts a new one in its place
            segment._table, segment._length, segment._log = table, length, log
        self._cache._pool.rebuild(segment._table for segment in self._live.values())
        self._cache._growing = {}
        self._cache._busy = None


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
