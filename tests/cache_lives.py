"""Random lives of a segment cache, held against plain lists after every operation.

    python tests/cache_lives.py --seed 1 --count 30000 [--start 0]

Operations are steps (ragged, several workers, any views), commits, forks, truncations and frees;
steps that fail in the middle, calls that are refused, a pool that is full; and, now and then, an
interruption at some line or other of the package. Whatever happens, the cache is as before or as
after, and goes on working. A life has fifty operations and is drawn from the seed and its number.
Ends in 1 with the first thing that is wrong and a command that repeats it.
"""

from __future__ import annotations

import argparse
import random
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent)

import hogwild_ext as hx
from compare import assert_close, assert_out_near, assert_same_bits
from hogwild_ext._reference import eager_attention, reference_attention, reference_rotate
from hogwild_ext.cache import OutOfPages, Segment, SegmentCache

OPERATIONS = 50  # of a life
PAGE = 64
IDS = 300  # different tokens that there are
SIZES = [1, 1, 1, 2, 3, 17, 31, 63, 64, 65, 129]
PACKAGE = str(Path(hx.__file__).parent)
MESSAGE = "in the middle of it"


class Interrupted(BaseException):
    """Like a Ctrl-C, at a line that nobody chose."""


class Interruption:
    """Raises `Interrupted` at the n-th line or call within the package."""

    def __init__(self, at: int) -> None:
        self.left = at
        self.struck = ""

    def _trace(self, frame: Any, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event in ("line", "call"):
            if self.left == 0:
                self.struck = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                sys.settrace(None)
                raise Interrupted
            self.left -= 1
        return self._trace

    def __enter__(self) -> Interruption:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *error: Any) -> None:
        sys.settrace(None)


Model = dict[str, list[int]]  # the tokens of each segment, in order of creation


class Life:
    """One cache, and what it should hold."""

    def __init__(self, seed: int, number: int) -> None:
        self.rng = random.Random(seed * 1_000_003 + number)
        draw = self.rng.choice
        generator = torch.Generator().manual_seed(self.rng.getrandbits(32))
        self.dtype: torch.dtype = draw(
            [torch.float32, torch.float32, torch.float16, torch.bfloat16]
        )
        self.layers, self.kv_heads, self.group = draw([1, 2, 3]), draw([1, 2]), draw([1, 2, 3])
        self.dim, self.value_dim = draw([8, 16, 24]), draw([8, 16, 40])
        self.max_tokens, self.spare_pages = draw([130, 400, 900]), draw([0, 2, 8])
        self.cache = SegmentCache(
            self.layers,
            self.kv_heads,
            self.dim,
            inv_freq=np.array(draw([[1.0, 0.31, 0.07, 0.011], [0.9], []]), np.float32),
            max_tokens=self.max_tokens,
            spare_pages=self.spare_pages,
            dtype=self.dtype,
            value_dim=self.value_dim,
            rope_scale=draw([1.0, 1.25]),
            interleaved=draw([False, True]),
            softcap=draw([0.0, 0.0, 20.0]),
            window=draw([None, None, 1, 40, 64]),
        )
        shape = self.layers, IDS
        kinds = ((self.kv_heads * self.group, self.dim), (self.kv_heads, self.dim),
                 (self.kv_heads, self.value_dim))  # fmt: skip
        self.numbers = [
            torch.randn(*shape, *kind, generator=generator).to(self.dtype) for kind in kinds
        ]
        self.model: Model = {}
        self.rotations: dict[str, int] = {}  # of the key that was rotated most often
        self.made = 0
        self.next_id = 0
        self.log: list[str] = []

    # ---- an operation ------------------------------------------------------------------------

    def play(self, operations: int = OPERATIONS) -> None:
        """Raises AssertionError; `log` then says what was done."""
        kinds = [self.step] * 6 + [self.commit] * 2 + [self.segment] * 2
        kinds += [self.fork, self.truncate, self.truncate, self.free, self.refused, self.failing]
        for _ in range(operations):
            self.poison()
            self.rng.choice(kinds)()
            self.check()

    def do(self, what: str, call: Callable[[], Any], after: Model, asked: int = 0) -> Any:
        """Runs a call that makes the model `after`; it may be interrupted, or find no room."""
        self.log.append(what)
        stats = self.cache.used_tokens, self.cache.free_tokens
        lines = self.rng.choice([15, 50, 150, 400])  # short operations have few
        interruption = Interruption(self.rng.randrange(lines)) if self.rng.random() < 0.2 else None
        try:
            if interruption is None:
                result = call()
            else:
                with interruption:
                    result = call()
        except OutOfPages as error:
            self.log[-1] += ": no room"
            assert asked, "no room for what takes none"
            assert (error.stored, error.free) == stats and error.asked == asked
            if not self._shares_pages() and len(self.model) <= self.spare_pages:
                assert asked > error.free, "few segments, no forks: the number of tokens decides"
            return None
        except Interrupted:
            assert interruption is not None
            self.log[-1] += f": interrupted at {interruption.struck}"
            if not self._is_as(self.model):
                assert self._is_as(after), "neither as before nor as after"
                self._take(after)
            return None
        self._take(after)
        return result

    def _take(self, after: Model) -> None:
        self.model = after
        for name in after:
            self.rotations.setdefault(name, 1)

    def _is_as(self, model: Model) -> bool:
        found = {segment.name: segment.tokens for segment in self.cache.segments}
        return found == model and list(found) == list(model)

    def _shares_pages(self) -> bool:
        pages = [page for segment in self.cache.segments for page in segment._table.tolist()]
        return len(set(pages)) < len(pages)

    def named(self, name: str) -> Segment:
        return next(segment for segment in self.cache.segments if segment.name == name)

    def some(self) -> str | None:
        return self.rng.choice(list(self.model)) if self.model else None

    # ---- what can happen ---------------------------------------------------------------------

    def segment(self) -> None:
        if len(self.model) >= 7:
            return self.free()
        self.made += 1
        name = f"segment {self.made}"
        self.do(f"segment {name}", lambda: self.cache.segment(name), {**self.model, name: []})
        self.rotations[name] = 1

    def fork(self) -> None:
        if (name := self.some()) is None or len(self.model) >= 7:
            return
        self.made += 1
        new = f"fork {self.made}"
        source, used = self.named(name), self.cache.used_tokens
        after = {**self.model, new: list(self.model[name])}
        self.do(f"fork {name} as {new}", lambda: self.cache.fork(source, new), after)
        self.rotations[new] = self.rotations[name]
        assert self.cache.used_tokens == used

    def truncate(self) -> None:
        if (name := self.some()) is None:
            return
        tokens, segment = self.model[name], self.named(name)
        length = self.rng.choice([len(tokens), self.rng.randint(0, len(tokens))])
        after = {**self.model, name: tokens[:length]}
        self.do(f"truncate {name} to {length}", lambda: segment.truncate(length), after)

    def free(self) -> None:
        if (name := self.some()) is None:
            return
        segment = self.named(name)
        after = {n: tokens for n, tokens in self.model.items() if n != name}
        self.do(f"free {name}", lambda: self.cache.free(segment), after)

    def commit(self) -> None:
        if len(self.model) < 2:
            return
        a, b = self.rng.sample(list(self.model), 2)
        source, target, moved = self.named(a), self.named(b), self.model[a]
        rotations = self.rotations[a] + bool(self.model[b])
        after = {**self.model, a: [], b: self.model[b] + moved}
        self.do(f"commit {a} to {b}", lambda: self.cache.commit(source, target), after, len(moved))
        if moved:  # whether or not it came to that
            self.rotations[b] = max(self.rotations[b], rotations)

    def _some_step(self) -> tuple[list[list[str]], list[list[int]]]:
        names = list(self.model)
        views, ids = [], []
        for writer in self.rng.sample(names, self.rng.randint(1, min(4, len(names)))):
            others = [name for name in names if name != writer]
            views.append([*self.rng.sample(others, self.rng.randint(0, len(others))), writer])
            size = self.rng.choice(SIZES)
            ids.append([(self.next_id + i) % IDS for i in range(size)])
            self.next_id += size
        return views, ids

    def _run(
        self, views: list[list[str]], ids: list[list[int]], layers: Sequence[int], fails: bool
    ) -> list[torch.Tensor]:
        segments = [[self.named(name) for name in view] for view in views]
        flat = [token for row in ids for token in row]
        step = self.cache.step(segments, [len(row) for row in ids], ids)
        outs = []
        try:
            with step:
                for layer in layers:
                    query, key, value = (kind[layer][flat] for kind in self.numbers)
                    outs.append(step.attend(layer, query, key, value))
                if fails:
                    raise ZeroDivisionError(MESSAGE)
        except BaseException:
            step.abandon()
            raise
        return outs

    def step(self) -> None:
        if not self.model:
            return
        views, ids = self._some_step()
        layers = self.rng.sample(range(self.layers), self.layers)
        after = dict(self.model)
        for view, row in zip(views, ids, strict=True):
            after[view[-1]] = after[view[-1]] + row
        outs = self.do(
            f"step {views} {[len(row) for row in ids]}",
            lambda: self._run(views, ids, layers, False), after, sum(map(len, ids)),
        )  # fmt: skip
        if outs is not None:
            at = self.rng.randrange(self.layers)
            self.check_outputs(layers[at], outs[at], views, ids)

    def failing(self) -> None:
        """A step that something is raised in, or that leaves out layers."""
        if not self.model:
            return
        views, ids = self._some_step()
        layers = self.rng.sample(range(self.layers), self.rng.randint(0, self.layers))
        forgets = len(layers) < self.layers and self.rng.random() < 0.5
        self.log.append(f"failing step {views} {[len(row) for row in ids]}, layers {layers}")
        try:
            self._run(views, ids, layers, not forgets)
        except OutOfPages:
            pass
        except ValueError as error:
            assert forgets and "every layer" in str(error), error
        except ZeroDivisionError:
            assert not forgets
        else:
            raise AssertionError("nothing was raised")
        assert self._is_as(self.model)

    def refused(self) -> None:
        """Calls that no cache can follow."""
        if (name := self.some()) is None:
            return
        segment, cache = self.named(name), self.cache
        other = SegmentCache(1, 1, 8, inv_freq=[1.0], max_tokens=64).segment("elsewhere")
        fork = cache.fork(segment, "passing")
        cache.free(fork)
        for call in (
            lambda: cache.segment(name),
            lambda: cache.fork(segment, name),
            lambda: cache.fork(fork),
            lambda: cache.commit(segment, segment),
            lambda: cache.commit(segment, other),
            lambda: cache.commit(fork, segment),
            lambda: segment.truncate(len(segment) + 1),
            lambda: fork.truncate(0),
            lambda: cache.free(other),
            lambda: cache.free(fork),
            lambda: cache.step([[segment, segment]], [1]),
            lambda: cache.step([[segment], [segment]], [1, 1]),
            lambda: cache.step([[other, segment]], [1]),
            lambda: cache.step([[fork, segment]], [1]),
            lambda: cache.step([[segment]], [0]),
            lambda: cache.step([], []),
            lambda: cache.step([[segment]], [2], [[1]]),
        ):
            try:
                call()
            except ValueError:
                continue
            raise AssertionError("nothing was raised")

    # ---- what must hold ----------------------------------------------------------------------

    def poison(self) -> None:
        """Pages that no segment has are NaN."""
        used = {page for segment in self.cache.segments for page in segment._table.tolist()}
        for storage in (*self.cache._keys, *self.cache._values):
            storage[[page for page in range(len(storage)) if page not in used]] = torch.nan

    def check(self) -> None:
        cache = self.cache
        assert self._is_as(self.model), f"expected {self.model}, got {cache.segments}"
        _, keys, values = self.numbers
        layer = self.rng.randrange(self.layers)
        places = set()
        for name, tokens in self.model.items():
            segment = self.named(name)
            table = segment._table.tolist()
            assert len(segment) == len(tokens) and len(table) == -(-len(tokens) // PAGE)
            places |= {(table[i // PAGE], i % PAGE) for i in range(len(tokens))}
            assert_same_bits(segment.values(layer), values[layer][tokens], "values")
            expected = reference_rotate(
                keys[layer][tokens], cache.inv_freq, range(len(tokens)),
                rope_scale=cache.rope_scale, interleaved=cache.interleaved,
            )  # fmt: skip
            limit = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}[self.dtype]
            limit *= self.rotations[name]
            assert_close(segment.keys(layer), expected, relative=limit, name="keys")
        assert cache.used_tokens == len(places) <= self.max_tokens
        pages = len({page for page, _ in places})
        every = -(-self.max_tokens // PAGE) + self.spare_pages
        assert cache.free_tokens == min(self.max_tokens - len(places), PAGE * (every - pages))

    def check_outputs(
        self, layer: int, out: torch.Tensor, views: list[list[str]], ids: list[list[int]]
    ) -> None:
        cache, names, sizes = self.cache, list(self.model), [len(row) for row in ids]
        flat = [token for row in ids for token in row]
        query = self.numbers[0][layer][flat]
        padded = query.new_zeros(len(views), max(sizes), *query.shape[1:])
        for w, rows in enumerate(query.split(sizes)):
            padded[w, : len(rows)] = rows
        offsets = hx.view_offsets(
            [[names.index(name) for name in view] for view in views],
            [len(self.model[name]) for name in names],
            sizes,
        )
        segments = [self.named(name) for name in names]
        arguments = (
            padded, [s.keys(layer) for s in segments], [s.values(layer) for s in segments], offsets,
        )  # fmt: skip
        options = {
            "inv_freq": cache.inv_freq, "query_lengths": sizes, "scale": cache.scale,
            "rope_scale": cache.rope_scale, "interleaved": cache.interleaved,
            "softcap": cache.softcap, "window": cache.window,
        }  # fmt: skip

        def packed(x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x[w, :size] for w, size in enumerate(sizes)])

        expected = packed(reference_attention(*arguments, **options)[0])
        assert_out_near(out, expected, lambda: packed(eager_attention(*arguments, **options)))


def live(seed: int, number: int, operations: int = OPERATIONS) -> str | None:
    """A life; a few lines if something was wrong."""
    life = Life(seed, number)
    try:
        life.play(operations)
    except Exception:
        return "\n".join(["", *life.log[-8:], traceback.format_exc()])
    finally:
        sys.settrace(None)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=3000, help="operations, in lives of 50")
    parser.add_argument("--start", type=int, default=0, help="number of the first life")
    given = parser.parse_args()
    torch.set_num_threads(1)
    lives = range(given.start, given.start + -(-given.count // OPERATIONS))
    for number in lives:
        wrong = live(given.seed, number)
        if wrong:
            print(wrong, file=sys.stderr)
            print(
                f"repeat: python tests/cache_lives.py --seed {given.seed} --start {number} "
                f"--count {OPERATIONS}"
            )
            return 1
        print(f"\r{number + 1 - given.start} of {len(lives)}", end="", file=sys.stderr, flush=True)
    print(
        f"\nseed {given.seed}: lives {lives.start} to {lives.stop - 1}, "
        f"{len(lives) * OPERATIONS} operations, 0 findings"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
