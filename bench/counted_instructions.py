"""Counts instructions of the CPU backend: `python bench/counted_instructions.py`.

The kernels run through the public API under valgrind's callgrind, which counts the instructions
that they execute. Nothing here is a time, and a count is the same on a busy machine. valgrind knows
AVX2, but neither AVX-512 nor AMX: the kernels of the other instruction sets are not counted.

    counted       within step.attend, concurrent_attention and packed linear layers, on one thread,
                  what is compiled from csrc/cpu, functions that were inlined under their own names.
                  Plans, Python and torch are left out
    one more      the difference of two runs that differ in the number of tokens or segments only

Multiply-adds are those of keys that a row sees: tiles on the diagonal of a prompt cost more.
Builds csrc with debug information, in build/counted_instructions, which takes a minute the first
time. Needs what the package's build needs, valgrind with its headers and binutils (addr2line).
Prints tables of Markdown.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "counted_instructions"
MODULE = BUILD / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
SWITCH = BUILD / "switch.so"

ISAS = ("avx2", "baseline")
DTYPES = ("float32", "bfloat16")
TILE = 64  # keys

# Definitions in csrc/cpu whose instructions count as a part, with those of all functions inlined
# into them that have no part of their own.
SOURCES = ("multiply.h", "attend.h", "pages.h", "linear.h")
PARTS = {
    "product": ["void multiply_block", "void multiply_vectors"],
    "asking ahead": ["class Ahead", "void look_ahead"],
    "softmax": ["void softmax_row"],
    "packing": [
        "Tile key_tile", "Tile value_tile", "void interleave_keys", "void interleave_values",
    ],
    "entering": ["void enter_segment"],
    "folding": ["void fold_row", "void fold_chunk"],
    "append": ["void append"],
    "linear": ["void linear", "void linear_block"],
}  # fmt: skip
REST = "rest"
ALL_BUT_APPEND = (*(part for part in PARTS if part != "append"), REST)
OUTSIDE = "outside"  # of csrc/cpu

# ---- workloads, in the process that is counted --------------------------------------------------

Counted = Callable[[], AbstractContextManager[None]]


def inv_freq(dim: int) -> list[float]:
    return [10000 ** (-2 * j / dim) for j in range(dim // 2)]


def attend_cached(
    counted: Counted, dtype: str, *, group: int, workers: int, lengths: Sequence[int] = (),
    kv_heads: int = 8, dim: int = 128, queries: int = 1,
) -> None:  # fmt: skip
    """One step.attend of workers that see segments of these lengths, and then each its own."""
    import torch

    from hogwild_ext import SegmentCache

    cache = SegmentCache(
        1, kv_heads, dim, inv_freq=inv_freq(dim), dtype=getattr(torch, dtype),
        max_tokens=sum(lengths) + workers * queries, spare_pages=len(lengths) + workers,
    )  # fmt: skip

    def random(tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(tokens, heads, dim, dtype=cache.dtype)

    shared = [cache.segment(f"shared {s}") for s in range(len(lengths))]
    cache.window = 1  # while it is filled: nobody asks for that attention
    for segment, length in zip(shared, lengths, strict=True):
        with cache.step([[segment]], [length]) as fill:
            fill.attend(0, *(random(length, kv_heads) for _ in range(3)))
    cache.window = None

    views = [[*shared, cache.segment(f"own {w}")] for w in range(workers)]
    tokens = workers * queries
    query, key, value = (random(tokens, kv_heads * n) for n in (group, 1, 1))
    with cache.step(views, [queries] * workers) as step, counted():
        step.attend(0, query, key, value)


def attend_tensors(counted: Counted, dtype: str, *, group: int, workers: int, length: int) -> None:
    """One concurrent_attention of workers that see one segment."""
    import torch

    from hogwild_ext import concurrent_attention

    kv_heads, dim = 8, 128
    query = torch.randn(workers, 1, kv_heads * group, dim, dtype=getattr(torch, dtype))
    keys, values = (torch.randn(length, kv_heads, dim, dtype=query.dtype) for _ in range(2))
    offsets = [[length]] * workers
    with counted():
        concurrent_attention(query, [keys], [values], offsets, inv_freq=inv_freq(dim))


def linear(counted: Counted, dtype: str, *, rows: int, size: int) -> None:
    """A packed layer, called as StepLinear does (which leaves many rows to torch)."""
    import torch

    from hogwild_ext import _C
    from hogwild_ext.packed_linear import PackedWeight

    packed = PackedWeight(torch.randn(size, size, dtype=getattr(torch, dtype)))
    x, out = torch.randn(rows, size), torch.empty(rows, size, dtype=getattr(torch, dtype))
    with counted():
        _C.linear(
            packed.code, rows, size, size, x.data_ptr(), packed.data.data_ptr(), 0, out.data_ptr(),
            1,
        )  # fmt: skip


# ---- rows of the tables -------------------------------------------------------------------------


class Workload(Protocol):
    def __call__(self, counted: Counted, dtype: str) -> None: ...


@dataclass(frozen=True)
class Row:
    """What `more` costs beyond `less`, divided by the number of units between them."""

    table: str
    name: str
    units: float
    more: Workload
    less: Workload | None = None  # None: all of `more` counts
    parts: Sequence[str] = ALL_BUT_APPEND  # those that count
    dtype: str = ""

    def matches(self, words: Sequence[str]) -> bool:
        text = f"{self.table} {self.name} {self.dtype}".lower().replace(", ", " ").split()
        return all(word.lower() in text for word in words)


def make_rows() -> list[Row]:
    rows = []
    few_rows = {"1": (1, 1), "5": (5, 1), "20": (5, 4)}  # query heads of a KV head, workers
    short, long = TILE, 2 * TILE  # one chunk either way
    for name, (group, workers) in few_rows.items():
        cached = partial(attend_cached, group=group, workers=workers)
        tensors = partial(attend_tensors, group=group, workers=workers)
        rows += [
            Row(
                "Decode, one more tile of 64 keys, per KV head", name, 8,
                partial(cached, lengths=[long]), partial(cached, lengths=[short]),
            ),
            Row(
                "Decode from plain tensors, one more tile of 64 keys, per KV head", name, 8,
                partial(tensors, length=long), partial(tensors, length=short),
            ),
            Row(
                "Decode, one more segment of 16 tokens, per KV head", name, 16 * 8,
                partial(cached, lengths=[16] * 17), partial(cached, lengths=[16]),
            ),
        ]  # fmt: skip
    prompt, dim, kv_heads, group = 256, 64, 3, 3  # SmolLM2's heads
    rows += [
        Row(
            f"Prompt of {prompt} tokens, head dimension {dim}, per 1,000 multiply-adds",
            f"{prompt * group}",
            2 * dim * kv_heads * group * prompt * (prompt + 1) / 2 / 1000,
            partial(
                attend_cached, group=group, workers=1, kv_heads=kv_heads, dim=dim, queries=prompt
            ),
        ),
        Row(
            "Append, one token, per KV head", "1", 8,
            partial(attend_cached, group=1, workers=1), parts=["append"],
        ),
    ]  # fmt: skip
    for count in (1, 4):
        rows.append(
            Row(
                "Linear layer, packed, 1,024 x 1,024, per 1,000 multiply-adds",
                f"{count}",
                count * 1024 * 1024 / 1000,
                partial(linear, rows=count, size=1024),
            )
        )
    by_dtype = [replace(row, dtype=dtype) for row in rows for dtype in DTYPES]
    tables = list(dict.fromkeys(row.table for row in rows))
    return sorted(by_dtype, key=lambda row: tables.index(row.table))


def run_workloads(words: Sequence[str]) -> None:
    """Runs under valgrind, and has it write a profile for each workload."""
    sys.path.insert(0, str(ROOT))
    import torch

    spec = importlib.util.spec_from_file_location("hogwild_ext._C", MODULE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["hogwild_ext._C"] = module  # the one with debug information, not the package's

    switch = ctypes.CDLL(str(SWITCH))
    torch.set_num_threads(1)
    for number, row in enumerate(make_rows()):
        if not row.matches(words):
            continue
        for which, workload in (("more", row.more), ("less", row.less)):

            @contextmanager
            def counted(name: str = f"{number} {which}") -> Iterator[None]:
                switch.start()
                yield
                switch.stop(name.encode())

            if workload:
                torch.manual_seed(0)
                workload(counted, row.dtype)


# ---- valgrind -----------------------------------------------------------------------------------

SWITCH_SOURCE = """
#include <valgrind/callgrind.h>
void start(void) { CALLGRIND_START_INSTRUMENTATION; }
void stop(const char *name) { CALLGRIND_DUMP_STATS_AT(name); CALLGRIND_STOP_INSTRUMENTATION; }
"""


def need(tool: str, hint: str) -> str:
    path = shutil.which(tool)
    if not path:
        raise SystemExit(f"{tool} was not found; it comes with: {hint}")
    return path


def build() -> None:
    """The package's module as a release has it, but with debug information and not stripped."""
    need("valgrind", "apt-get install valgrind")
    need("addr2line", "apt-get install binutils")
    cmake = need("cmake", "pip install cmake ninja")
    try:
        import pybind11
    except ImportError:
        raise SystemExit("pybind11 was not found; it comes with: pip install pybind11") from None

    BUILD.mkdir(parents=True, exist_ok=True)
    options = [
        "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_CXX_FLAGS=-g", "-DCMAKE_STRIP=",
        "-DHOGWILD_CUDA=OFF", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={BUILD}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]  # fmt: skip
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    compiler = shutil.which("cc") or need("gcc", "apt-get install gcc")
    (BUILD / "switch.c").write_text(SWITCH_SOURCE)
    for command in (
        [cmake, "-S", str(ROOT), "-B", str(BUILD), *generator, *options],
        [cmake, "--build", str(BUILD), "--parallel", str(os.cpu_count() or 1)],
        [compiler, "-shared", "-fPIC", "-o", str(SWITCH), str(BUILD / "switch.c")],
    ):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise SystemExit(f"{done.stdout}\n{' '.join(command[:3])} failed; see above")


def count(isa: str, words: Sequence[str], folder: Path) -> dict[str, Counter[str]]:
    """By "number more" or "number less" of a row: instructions of each part."""
    environment = os.environ | {
        "HOGWILD_ISA": isa, "OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "avx2",
        "PYTHONHASHSEED": "0",
    }  # fmt: skip
    command = [
        "valgrind", "--tool=callgrind", "--instr-atstart=no", "--dump-instr=yes", "--dump-line=no",
        "--compress-strings=no", "--compress-pos=no", f"--callgrind-out-file={folder / isa}",
        f"--log-file={folder / isa}.log",
        sys.executable, __file__, "--run", "--only", *words,
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stderr}\nvalgrind ended with status {done.returncode}; see above")
    profiles = {}
    for path in folder.glob(f"{isa}.*"):
        text = path.read_text()
        if found := re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.M):
            profiles[found[1]] = instructions(text)
    part_of = parts_of({address for profile in profiles.values() for address in profile})
    counts = {}
    for name, profile in profiles.items():
        counts[name] = Counter[str]()
        for address, executed in profile.items():
            counts[name][part_of[address]] += executed
    return counts


def instructions(profile: str) -> Counter[str]:
    """By address in the module: how often a callgrind profile says that it was executed."""
    executed = Counter[str]()
    lines = iter(profile.splitlines())
    within = False
    for line in lines:
        if line.startswith("ob="):
            within = line == f"ob={MODULE}"
        elif line.startswith("calls="):
            next(lines)  # what the called function cost
        elif within and line.startswith("0x"):
            address, cost = line.split()
            executed[address] += int(cost)
    return executed


def part_of_lines() -> dict[tuple[str, int], str]:
    """By file and line in csrc/cpu: the part of the definition that it stands in."""
    parts: dict[tuple[str, int], str] = {}
    texts = {name: (ROOT / "csrc" / "cpu" / name).read_text().split("\n") for name in SOURCES}
    for part, definitions in PARTS.items():
        for definition in definitions:
            head = re.compile(rf"( *)([\w()]+ )*{definition}\b[^;]*$")
            found = [
                (name, number, match[1])
                for name, lines in texts.items()
                for number, line in enumerate(lines)
                if (match := head.match(line))
            ]
            if len(found) != 1:
                raise SystemExit(f"expected one definition of {definition!r}, got {len(found)}")
            name, first, indent = found[0]
            last = next(
                number
                for number in range(first, len(texts[name]))
                if texts[name][number] in (f"{indent}}}", f"{indent}}};")
            )
            parts |= {(name, number + 1): part for number in range(first, last + 1)}
    return parts


def parts_of(addresses: Iterable[str]) -> dict[str, str]:
    """The part that the instruction at an address of the module belongs to."""
    done = subprocess.run(
        ["addr2line", "--addresses", "--inlines", "-e", str(MODULE)],
        input="\n".join(addresses), check=True, capture_output=True, text=True,
    )  # fmt: skip
    lines = part_of_lines()
    parts: dict[str, str] = {}
    # An address, then places in the source: of the innermost function, of the call inlined there,
    # and so on.
    for block in re.split(r"^(?=0x)", done.stdout, flags=re.M)[1:]:
        places = re.findall(r"/csrc/cpu/([\w.]+):(\d+)", block)
        known = [lines[place] for file, n in places if (place := (file, int(n))) in lines]
        parts[hex(int(block.split()[0], 16))] = known[0] if known else REST if places else OUTSIDE
    return parts


# ---- tables -------------------------------------------------------------------------------------


def figure(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.1f}"


def print_row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |")


def print_table(table: str, rows: dict[tuple[str, str, str], dict[str, float]]) -> None:
    """`rows` by their first cells: instructions of each part."""
    parts = [part for part in (*PARTS, REST) if any(row[part] for row in rows.values())]
    print(f"\n## {table}\n")
    columns = [*FIRST_COLUMNS, *parts, *(["total"] if len(parts) > 1 else [])]
    print_row(*columns)
    print_row(*("---" if name in FIRST_COLUMNS else "---:" for name in columns))
    for cells, row in rows.items():
        total = [sum(row.values())] if len(parts) > 1 else []
        print_row(*cells, *(figure(n) for n in [*(row[part] for part in parts), *total]))


FIRST_COLUMNS = ("rows", "dtype", "ISA")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="*", metavar="WORD", default=[],
        help="rows whose title or cells hold all these words, such as: decode tile bfloat16",
    )  # fmt: skip
    parser.add_argument("--isa", nargs="*", choices=ISAS, default=ISAS, help="default: all")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run_workloads(options.only)
        return 0
    rows = make_rows()
    chosen = [number for number, row in enumerate(rows) if row.matches(options.only)]
    if not chosen:
        parser.error(f"--only: no row has all of: {' '.join(options.only)}")

    build()
    with tempfile.TemporaryDirectory() as folder:
        counts = {isa: count(isa, options.only, Path(folder)) for isa in options.isa}
    print("Instructions, one thread; callgrind, which knows neither AVX-512 nor AMX.")
    for table in dict.fromkeys(rows[number].table for number in chosen):
        figures: dict[tuple[str, str, str], dict[str, float]] = {}
        for number in chosen:
            row = rows[number]
            if row.table != table:
                continue
            for isa in options.isa:
                more, less = (counts[isa].get(f"{number} {w}", Counter()) for w in ("more", "less"))
                figures[row.name, row.dtype, isa] = {
                    part: (more[part] - less[part]) / row.units if part in row.parts else 0
                    for part in (*PARTS, REST)
                }
        print_table(table, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
