"""The CUDA kernels alone, without torch: append, attention, merge and move, against float64.

    python kernels.py all|few              # kinds of kernels, each with several layouts
    python kernels.py one WORKERS TOKENS   # one layer's attention, nothing compared: for a profiler

Memory comes from the driver and is filled with NaN where nothing was written, so that
compute-sanitizer has little to watch and an unwritten row shows. Every launch runs twice and must
give the same bits. HOGWILD_MODULE names the compiled module; with FIRST_RUN_DRY=1 the emulated GPU
of the tests takes the GPU's place. Lines that begin with "> " are for the summary.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import os
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

HIDDEN = -(2**31)
PAGE = 64  # tokens
KINDS = ("bfloat16", "float16", "float32")
DIMS = (64, 96, 128, 256)
FEW = (("bfloat16", 128), ("float16", 64), ("float32", 64), ("bfloat16", 256))
# Of the output's norm. Half types may miss by half as much again as the op's promise: there are few
# rows here, and the rounding of a query, a probability or a result may go the same way in all.
LIMITS = {"float32": 1e-5, "float16": 7.5e-4, "bfloat16": 6e-3}
MOVE_LIMITS = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}  # of an element near 4


# ---- memory --------------------------------------------------------------------------------------


class Gpu:
    """The first GPU, through the driver alone."""

    def __init__(self) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)

    def _call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._driver, name)(*arguments):
            raise SystemExit(f"> {name} ended with error {code}")

    def room(self, count: int) -> int:
        """The address of `count` new bytes, all 0xff: NaN in every type."""
        address, size = ctypes.c_uint64(), ctypes.c_size_t(max(count, 16))
        self._call("cuMemAlloc_v2", ctypes.byref(address), size)
        self._call("cuMemsetD8_v2", address, ctypes.c_ubyte(0xFF), size)
        return address.value

    def put(self, array: np.ndarray) -> int:
        array = np.ascontiguousarray(array)
        address = self.room(array.nbytes)
        if array.nbytes:
            self._call(
                "cuMemcpyHtoD_v2", ctypes.c_uint64(address), ctypes.c_void_p(array.ctypes.data),
                ctypes.c_size_t(array.nbytes),
            )  # fmt: skip
        return address

    def get(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        array = np.empty(shape, dtype)
        self._call(
            "cuMemcpyDtoH_v2", ctypes.c_void_p(array.ctypes.data), ctypes.c_uint64(address),
            ctypes.c_size_t(array.nbytes),
        )  # fmt: skip
        return array

    def free(self, addresses: list[int]) -> None:
        for address in addresses:
            self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def wait(self) -> None:
        self._call("cuCtxSynchronize")


class EmulatedGpu:
    """The same of the tests' emulated GPU, whose addresses are those of this process."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._kept: dict[int, np.ndarray] = {}

    def room(self, count: int, known: bool = False) -> int:
        memory = np.full(max(count, 16) + 64, 0xFF, np.uint8)
        address = -(-memory.ctypes.data // 64) * 64
        self._kept[address] = memory
        self._engine.register(address, max(count, 16), initialised=known)
        return address

    def put(self, array: np.ndarray) -> int:
        array = np.ascontiguousarray(array)
        address = self.room(array.nbytes, known=True)
        ctypes.memmove(address, array.ctypes.data, array.nbytes)
        return address

    def get(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        array = np.empty(shape, dtype)
        ctypes.memmove(array.ctypes.data, address, array.nbytes)
        return array

    def free(self, addresses: list[int]) -> None:
        for address in addresses:
            self._engine.unregister(address)
            del self._kept[address]

    def wait(self) -> None:
        if findings := self._engine.findings():
            raise SystemExit(f"> the emulated GPU found {findings[:3]}")


def start() -> tuple[Any, Any]:
    """The compiled module, and the GPU's memory."""
    if os.environ.get("FIRST_RUN_DRY"):
        from emulator import session  # of the tests, which PYTHONPATH names

        emulated = session.start(90)
        return sys.modules["hogwild_ext._C"], EmulatedGpu(emulated.engine)
    # Not through the package, which needs torch.
    spec = importlib.util.spec_from_file_location("_C", os.environ["HOGWILD_MODULE"])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    usable, why_not, *_ = module.cuda.device_state(0)
    if not usable:
        raise SystemExit(f"> the GPU cannot be used: {why_not}")
    return module, Gpu()


# ---- numbers -------------------------------------------------------------------------------------


def stored(x: np.ndarray, kind: str) -> np.ndarray:
    """As a type stores it; the bits of half types as uint16."""
    x = np.ascontiguousarray(x, np.float32)
    if kind == "float32":
        return x
    if kind == "float16":
        return x.astype(np.float16).view(np.uint16)
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def value_of(x: np.ndarray, kind: str) -> np.ndarray:
    """What is stored, as float64."""
    if kind == "float16":
        return x.view(np.float16).astype(np.float64)
    if kind == "bfloat16":
        return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.astype(np.float64)


def element(kind: str) -> type:
    return np.float32 if kind == "float32" else np.uint16


def frequencies(dim: int) -> np.ndarray:
    return (1e4 ** (-np.arange(0, dim, 2) / dim)).astype(np.float32)


def turned(x: np.ndarray, places: Any, inv_freq: np.ndarray) -> np.ndarray:
    """RoPE of [n, heads, dim] to these places: pairs (j, j + dim / 2), in float64."""
    half = len(inv_freq)
    angles = np.multiply.outer(np.asarray(places, float), inv_freq.astype(float))[:, None]
    first, second = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


@dataclass(frozen=True)
class Layout:
    """Segments of these lengths; each view's worker writes `new` tokens to the end of its last."""

    lengths: list[int]
    views: list[list[int]]
    new: int
    kv_heads: int
    group: int

    @property
    def after(self) -> list[int]:
        """The lengths with the new tokens."""
        written = [view[-1] for view in self.views]
        return [n + self.new * written.count(s) for s, n in enumerate(self.lengths)]

    @property
    def offsets(self) -> np.ndarray:
        offsets = np.full((len(self.views), len(self.lengths)), HIDDEN, np.int32)
        for w, view in enumerate(self.views):
            for i, s in enumerate(view):
                offsets[w, s] = sum(self.after[x] for x in view[i:]) - self.new
        return offsets


def attention(
    query: np.ndarray, keys: list[np.ndarray], values: list[np.ndarray], layout: Layout,
    inv_freq: np.ndarray, scale: float,
) -> np.ndarray:  # fmt: skip
    """The reference. query [T, Hq, D], not rotated; keys and values [L, Hkv, D]; all float64."""
    rows = []
    for t, unrotated in enumerate(query):
        worker, i = divmod(t, layout.new)
        scores, seen = [], []
        for s, (key, value) in enumerate(zip(keys, values, strict=True)):
            place = int(layout.offsets[worker, s]) + i
            count = max(0, min(place + 1, len(key)))
            if layout.offsets[worker, s] == HIDDEN or count == 0:
                continue
            turn = turned(unrotated[None], [place], inv_freq)[0]
            key, value = (np.repeat(x[:count], layout.group, axis=1) for x in (key, value))
            scores.append(np.einsum("lhd,hd->hl", key, turn) * scale)
            seen.append(value)
        logits = np.concatenate(scores, axis=1)
        weights = np.exp(logits - logits.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        rows.append(np.einsum("hl,lhd->hd", weights, np.concatenate(seen)))
    return np.array(rows)


# ---- launches ------------------------------------------------------------------------------------


class Kernels:
    """What is launched, on memory that is given back after each case."""

    def __init__(self, module: Any, gpu: Any, rng: np.random.Generator) -> None:
        self._c, self._gpu, self._rng = module, gpu, rng
        self._codes = {
            "float32": module.FLOAT32, "float16": module.FLOAT16, "bfloat16": module.BFLOAT16,
        }  # fmt: skip
        self._mine: list[int] = []

    def _put(self, array: np.ndarray) -> int:
        self._mine.append(self._gpu.put(array))
        return self._mine[-1]

    def _room(self, count: int) -> int:
        self._mine.append(self._gpu.room(count))
        return self._mine[-1]

    def _done(self) -> None:
        self._gpu.free(self._mine)
        self._mine = []

    def _drawn(self, kind: str, *shape: int) -> np.ndarray:
        return stored(self._rng.standard_normal(shape, np.float32), kind)

    def attend(
        self, kind: str, dim: int, layout: Layout, *, plain: bool = False, compare: bool = True
    ) -> tuple[float, bool]:
        """The relative error, and whether a second launch gave the same bits.

        Keys lie in pages, where the append kernel stores the new ones, or in plain tensors.
        """
        heads = layout.kv_heads * layout.group
        tokens = layout.new * len(layout.views)
        inv_freq, scale, code = frequencies(dim), dim**-0.5, self._codes[kind]
        query = self._drawn(kind, tokens, heads, dim)
        key = self._drawn(kind, tokens, layout.kv_heads, dim)
        value = self._drawn(kind, tokens, layout.kv_heads, dim)
        keys, values = (
            [self._drawn(kind, n, layout.kv_heads, dim) for n in layout.after] for _ in range(2)
        )
        for w, view in enumerate(layout.views):  # the new tokens, as append is to store them
            rows = slice(w * layout.new, (w + 1) * layout.new)
            places = np.arange(layout.lengths[view[-1]], layout.after[view[-1]])
            keys[view[-1]][places] = stored(
                turned(value_of(key[rows], kind), places, inv_freq), kind
            )
            values[view[-1]][places] = value[rows]

        common = (
            layout.offsets, np.array(layout.after, np.int32),
            np.full(len(layout.views), layout.new, np.int32), inv_freq, layout.group,
            layout.kv_heads, 0,
        )  # fmt: skip
        row_group = self._c.cuda.row_group(code, dim)
        token, head = layout.kv_heads * dim, dim  # strides of keys and values
        if plain:
            table = np.array(
                [[self._put(k), self._put(v), token, head, token, head]
                 for k, v in zip(keys, values, strict=True)],
                np.int64,
            )  # fmt: skip
            plan = self._c.Plan(*common, None, None, None, True, row_group)
            tables = self._c.cuda.Tables(plan, layout.kv_heads, 0, table)
            key_pages = value_pages = 0
        else:
            pages, first = self._page_table(layout)
            key_pages, value_pages = (
                self._put(self._paged(kind, dim, layout, side, pages, first))
                for side in (keys, values)
            )
            starts = np.array([layout.lengths[view[-1]] for view in layout.views], np.int32)
            slots = [
                pages[first[view[-1]] + place // PAGE] * PAGE + place % PAGE
                for start, view in zip(starts, layout.views, strict=True)
                for place in range(start, start + layout.new)
            ]
            plan = self._c.Plan(
                *common, starts, pages, np.array(slots, np.int32), True, row_group
            )  # fmt: skip
            tables = self._c.cuda.Tables(plan, layout.kv_heads)
        data = self._put(np.frombuffer(tables.bytes, np.uint8))
        if not plain:
            self._c.cuda.append(
                tables, data, code, layout.kv_heads, dim, (self._put(key), token, head),
                (self._put(value), token, head), key_pages, value_pages, 1.0, False, 0,
            )  # fmt: skip

        where = self._put(query)
        out = self._room(query.nbytes)
        lse = self._room(4 * tokens * heads)
        workspace = self._room(4 * max(4, tables.workspace_floats(layout.kv_heads, dim)))
        results = []
        for _ in range(2):
            self._c.cuda.attend(
                tables, data, code, heads, layout.kv_heads, dim, (where, 0, heads * dim, dim),
                key_pages, value_pages, (out, 0, heads * dim, dim), lse, 0, workspace, scale, 1.0,
                False, 0.0, 0,
            )  # fmt: skip
            self._gpu.wait()
            results.append(self._gpu.get(out, query.shape, element(kind)))
        self._done()
        same = np.array_equal(*results)
        if not compare:
            return 0.0, same
        sides = ([value_of(x, kind) for x in side] for side in (keys, values))
        expected = attention(value_of(query, kind), *sides, layout, inv_freq, scale)
        error = np.linalg.norm(value_of(results[0], kind) - expected) / np.linalg.norm(expected)
        return float(error), same

    def _page_table(self, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
        """Page numbers, in no order, segment after segment, and where each segment's begin."""
        counts = [-(-n // PAGE) for n in layout.after]
        first = np.concatenate([[0], np.cumsum(counts)])
        return self._rng.permutation(int(first[-1])).astype(np.int32), first

    def _paged(
        self, kind: str, dim: int, layout: Layout, side: list[np.ndarray], pages: np.ndarray,
        first: np.ndarray,
    ) -> np.ndarray:  # fmt: skip
        """The pages as they are before the step: old tokens, and NaN everywhere else."""
        nothing = stored(np.full(1, np.nan, np.float32), kind)[0]
        image = np.full((len(pages), layout.kv_heads, PAGE, dim), nothing, element(kind))
        for s, length in enumerate(layout.lengths):
            for j in range(0, length, PAGE):
                old = side[s][j : min(j + PAGE, length)]
                image[pages[first[s] + j // PAGE], :, : len(old)] = old.swapaxes(0, 1)
        return image

    def move(self, kind: str, dim: int) -> float:
        """The worst error of a commit: 70 tokens behind 100 others, in two layers."""
        kv_heads, count, start, inv_freq = 2, 70, 100, frequencies(dim)
        source, target = np.array([3, 0], np.int32), np.array([4, 1, 2], np.int32)
        sides = [[self._drawn(kind, 5, kv_heads, PAGE, dim) for _ in range(2)] for _ in range(2)]
        places = [[self._put(layer) for layer in side] for side in sides]
        tables = self._c.cuda.MoveTables(*places, source, target, start, inv_freq)
        data = self._put(np.frombuffer(tables.bytes, np.uint8))
        self._c.cuda.move(
            data, 2, self._codes[kind], kv_heads, dim, count, start, False, 0
        )  # fmt: skip
        self._gpu.wait()
        worst = 0.0
        old, new = np.arange(count), np.arange(start, start + count)
        for side, where in zip(sides, places, strict=True):
            for layer, address in zip(side, where, strict=True):
                got = self._gpu.get(address, layer.shape, layer.dtype)
                moved = value_of(got[target[new // PAGE], :, new % PAGE], kind)
                expected = value_of(layer[source[old // PAGE], :, old % PAGE], kind)
                if side is sides[0]:
                    expected = turned(expected, np.full(count, start), inv_freq)
                worst = max(worst, float(np.abs(moved - expected).max()))
        self._done()
        return worst


def own_segments(
    shared: list[int], workers: int, own: int, *, new: int = 1, kv_heads: int = 2
) -> Layout:
    """Everybody reads the shared segments, each from another one on, and then one of its own."""
    count = len(shared)
    views = [[*((s + w) % count for s in range(count)), count + w] for w in range(workers)]
    return Layout(shared + [own] * workers, views, new, kv_heads, 5)


def compare(kernels: Kernels, shapes: list[tuple[str, int]], sizes: list[tuple[int, int]]) -> int:
    """How many results are wrong."""
    wrong = 0
    for kind, dim in shapes:
        words = []
        for workers, new in sizes:
            # Segments that end inside a tile and on its edge, and one that nobody else sees.
            layout = own_segments([130, 64, 3], workers, 17, new=new)
            for plain in (False, True):
                error, same = kernels.attend(kind, dim, layout, plain=plain)
                good = error <= LIMITS[kind] and same  # NaN is not
                wrong += not good
                words.append(f"{error:.1e}")
                words += [] if good else ["WRONG" if same else "OTHER BITS"]
        moved = kernels.move(kind, dim)
        good = moved <= MOVE_LIMITS[kind]
        wrong += not good
        print(
            f"> {kind} D {dim}: attention {' '.join(words)}; move {moved:.1e}"
            f"{'' if good else ' WRONG'}",
            flush=True,
        )
    print(f"> {wrong} wrong")
    return wrong


def main(what: str, *numbers: str) -> int:
    module, gpu = start()
    kernels = Kernels(module, gpu, np.random.default_rng(int(os.environ["FIRST_RUN_SEED"])))
    if what == "one":
        workers, tokens = map(int, numbers)
        layout = own_segments([tokens], workers, 31, kv_heads=8)
        print(kernels.attend("bfloat16", 128, layout, compare=False))
        return 0
    if what == "few":
        return compare(kernels, list(FEW), [(1, 1), (5, 2)])
    return compare(kernels, list(itertools.product(KINDS, DIMS)), [(1, 1), (4, 1), (6, 2)])


if __name__ == "__main__":
    sys.exit(min(1, main(*sys.argv[1:])))
