"""Plants faults in the CUDA backend, one at a time, and sees the emulated tests catch every one.

    python tests/faults.py [--list] [--only WORDS] [--check-anchors] [-j 2]

For each fault, csrc/ is copied, one small change is made in the copy, an emulated GPU is built of
it, and a choice of tests runs on that until one fails. A fault that no test sees is a survivor:
the tests are too weak, and the exit status is 1. So it is if the text to change is no longer there
exactly once, or if the changed source does not compile. The tests' numbers are the same in every
run. Needs nvcc, see emulator/README.md.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import hypothesis
import pytest

from emulator.build import CSRC, cache_folder

TESTS = Path(__file__).resolve().parent
SECONDS = 900  # for the tests of one fault, on however busy a machine

# Tests are in the order in which they run, those first that see most for their time.
OP = (
    "test_op_oracle.py::test_any_layout",
    "test_op_oracle.py::test_ugly_sizes[2-dtype1]",
    "test_kernel_details.py::test_fewer_blocks_than_work",
    "test_kernel_details.py::test_a_block_turns_its_queries_for_every_segment",
    "test_kernel_details.py::test_rotation_does_not_depend_on_how_the_query_lies",
    "test_kernel_details.py::test_windows_that_end_at_every_key_around_a_tiles_edge",
    "test_kernel_details.py::test_lse_is_of_probabilities_that_nobody_rounded",
    "test_op_oracle.py::test_a_row_that_sees_one_key_gets_its_value",
    "test_cache.py::test_attend_is_the_op_over_what_is_stored[plain-dtype1]",
    "test_op_nonfinite.py::test_nan_in_tiles_ahead",
    "test_op_nonfinite.py::test_nan_in_tiles_behind_the_window",
    "test_op_oracle.py::test_all_scores_far_from_zero",
    "test_op_numbers.py",
    "test_op_bits.py::test_same_bits_however_tensors_lie_in_memory",
    "test_kernel_details.py::test_more_pages_than_are_known_ahead",
    "test_kernel_details.py::test_more_tiles_than_places_in_the_ring",
    "test_op_bits.py::test_same_bits_where_work_is_split",
    "test_op_oracle.py::test_float16_queries_and_keys_near_overflow",
    "test_op_bits.py::test_what_a_row_cannot_see_is_a_bitwise_no_op",
    "test_op_bits.py::test_same_bits_whoever_else_is_in_the_call",
    "test_kernel_details.py::test_same_bits_where_a_block_folds_several_partial_results",
    "test_op_oracle.py::test_out_given_is_filled_and_returned",
    "test_op_oracle.py::test_other_data_at_most_twice_the_eager_error",
    "test_op_nonfinite.py::test_one_bad_number_reaches_only_who_sees_it",
    "test_op_nonfinite.py::test_memory_that_held_nan_before_is_no_matter",
)
PAGES = (
    "test_cache.py::test_recycled_pages_leave_no_trace",
    "test_cache.py::test_commit_rotates_like_the_reference",
    "test_cache.py::test_half_types_store_the_rounded_rotation",
    "test_cache.py::test_attend_from_raw_keys_to_output",
    "test_cache.py::test_strided_tensors_and_out",
    "test_cache.py::test_attend_is_the_op_over_what_is_stored[plain-dtype0]",
)


@dataclass(frozen=True)
class Fault:
    """`old`, which stands once in csrc/cuda/`file`, becomes `new`.

    One `.cu` file is compiled with the fault, the others without: that is faster, and harder to
    see.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = (*OP, *PAGES)
    compiled: str = ""  # the `.cu` file; by default that of COMPILED


COMPILED = {
    "attention.cuh": "attention_f16.cu",
    "attention_f32.cuh": "attention_f32.cu",
    "item.cuh": "attention_f16.cu",
    "ptx.cuh": "attention_f16.cu",
    "types.cuh": "attention_f16.cu",
    "small.cuh": "launch.cu",
    "launch.cu": "launch.cu",
}


# Barriers, copies in the background ---------------------------------------------------------------

SYNCHRONISATION = [
    Fault(
        "no barrier between rotating queries and reading them",
        "attention.cuh",
        "enter_segment(segment = pass.segment);\n      __syncthreads();",
        "enter_segment(segment = pass.segment);",
    ),
    Fault(
        "no barrier after the wait for a tile",
        "attention.cuh",
        "wait_copies<RING - 2>();\n    __syncthreads();",
        "wait_copies<RING - 2>();",
    ),
    Fault(
        "the wait for a tile leaves one more under way",
        "attention.cuh",
        "wait_copies<RING - 2>();",
        "wait_copies<RING - 1>();",
    ),
    Fault(
        "no barrier between writing maxima and reading them",
        "attention.cuh",
        "share_maxima();\n      __syncthreads();",
        "share_maxima();",
    ),
    Fault(
        "no barrier between writing sums and reading them",
        "attention.cuh",
        "[quarter] = sum;\n      }\n    __syncthreads();",
        "[quarter] = sum;\n      }",
    ),
    Fault(
        "no barrier between two passes",
        "attention.cuh",
        "__syncthreads();  // ring, queries and limits are free",
        "",
    ),
    Fault(
        "no barrier between two items",
        "attention.cuh",
        "shared).run();\n    __syncthreads();",
        "shared).run();",
    ),
    Fault(
        "copies of a tile are in no group",
        "attention.cuh",
        "    }\n    end_copy_group();\n",
        "    }\n",
    ),
    Fault(
        "no group of copies where there is no tile",
        "attention.cuh",
        "    }\n    end_copy_group();\n",
        "    }\n    if (tile < s.end) end_copy_group();\n",
    ),
    Fault(
        "float32: no barrier after the wait for a tile",
        "attention_f32.cuh",
        "wait_copies<0>();\n    __syncthreads();",
        "wait_copies<0>();",
    ),
    Fault(
        "float32: no wait for a tile",
        "attention_f32.cuh",
        "wait_copies<0>();\n    __syncthreads();",
        "__syncthreads();",
    ),
    Fault(
        "float32: no barrier between writing maxima and reading them",
        "attention_f32.cuh",
        "= top;\n    }\n    __syncthreads();",
        "= top;\n    }",
    ),
    Fault(
        "float32: no barrier between loading rows and reading them",
        "attention_f32.cuh",
        "from[r], head);\n    __syncthreads();",
        "from[r], head);",
    ),
    Fault(
        "float32: no barrier between accumulating and loading keys over the values",
        "attention_f32.cuh",
        "accumulate(key);\n      __syncthreads();",
        "accumulate(key);",
    ),
    Fault(
        "float32: no barrier between writing sums and reading them",
        "attention_f32.cuh",
        "totals[row] = row_max[i] * scale;\n    }\n    __syncthreads();",
        "totals[row] = row_max[i] * scale;\n    }",
    ),
]

# Tiles and where their elements lie ---------------------------------------------------------------

TILES = [
    Fault(
        "the page table is read one tile behind",
        "attention.cuh",
        "s.page[2] = __ldg(s.pages + t + 3);",
        "s.page[2] = __ldg(s.pages + t + 2);",
    ),
    Fault(
        "a pass ends a tile early",
        "attention.cuh",
        "Source s{place, pass.end_tile,",
        "Source s{place, pass.end_tile - 1,",
    ),
    Fault(
        "a page with fewer tokens is copied whole",
        "attention.cuh",
        "s.whole_end = min((pass.end - pass.begin) / TILE, s.end);",
        "s.whole_end = s.end;",
    ),
    Fault(
        "rows past a segment's end are copied too",
        "attention.cuh",
        "const bool there = row + r < present;",
        "const bool there = true;",
    ),
    Fault(
        "rows past a segment's end keep what lay in the ring",
        "attention.cuh",
        "copy_async(place, from + c * 8, there ? 16 : 0);",
        "if (there) copy_async(place, from + c * 8);",
    ),
    Fault(
        "16 bytes at once whatever the stride",
        "attention.cuh",
        "((reinterpret_cast<uintptr_t>(base) | (stride * 2)) & 15) == 0",
        "(reinterpret_cast<uintptr_t>(base) & 15) == 0",
    ),
    Fault(
        "8 bytes at once whatever the query's address",
        "attention.cuh",
        "plain_rotation(p.wide_query && ",
        "plain_rotation(",
    ),
    Fault(
        "a query at multiples of 4 bytes counts as aligned to 8",
        "launch.cu",
        "is_multiple(args.query, 4, 8)",
        "is_multiple(args.query, 2, 4)",
    ),
    Fault(
        "an output at any address counts as aligned to 4",
        "launch.cu",
        "is_multiple(args.out, 2, 4)",
        "is_multiple(args.out, 1, 2)",
    ),
    Fault(
        "tiles are stored without the swizzle that they are read with",
        "attention.cuh",
        "copy_place(kept(ring + S::place(threadIdx.x / COLUMNS, threadIdx.x % COLUMNS)))",
        "copy_place(kept(ring + threadIdx.x / COLUMNS * S::ROW_BYTES + "
        "threadIdx.x % COLUMNS * 16))",
    ),
    Fault(
        "probabilities are stored without the swizzle that they are read with",
        "attention.cuh",
        "store_shared((probability_store ^ (n * 16))",
        "store_shared((probability_store + (n * 16))",
    ),
    Fault(
        "rotated queries are stored without the swizzle that they are read with",
        "attention.cuh",
        "store_shared(queries + S::place(r, (j + D / 2) / 8) + j % 8 * 2, high);",
        "store_shared(queries + r * S::ROW_BYTES + (j + D / 2) * 2, high);",
    ),
    Fault(
        "fragments of two groups of keys are swapped",
        "attention.cuh",
        "T::mma(score[tile][0], query[tile][step], key[0], key[1]);",
        "T::mma(score[tile][0], query[tile][step], key[0], key[2]);",
    ),
    Fault(
        "fragments of the values are swapped",
        "attention.cuh",
        "T::mma(out[tile][n + 1], p[tile], v[2], v[3]);",
        "T::mma(out[tile][n + 1], p[tile], v[3], v[2]);",
    ),
    Fault(
        "values are not transposed",
        "ptx.cuh",
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16",
    ),
    Fault(
        "96 dimensions: the last tile of values is not transposed",
        "ptx.cuh",
        "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16",
        "ldmatrix.sync.aligned.m8n8.x2.shared.b16",
    ),
    Fault(
        "the ring's places are taken in the wrong order",
        "attention.cuh",
        "return (RING - 2) * S::TILE_BYTES - keys;",
        "return keys;",
    ),
    Fault(
        "queries of rows that are not there are whatever lay there",
        "attention.cuh",
        "if (item.row_count < S::ROWS)",
        "if (false)",
    ),
    Fault(
        "the second half of a row tile begins at the wrong row",
        "attention.cuh",
        "first_row + tile * 16 + half * 8 + lane / 4",
        "first_row + tile * 16 + half * 4 + lane / 4",
    ),
    Fault(
        "float32: rows past a segment's end are copied too",
        "attention_f32.cuh",
        "const bool there = r < present;",
        "const bool there = true;",
    ),
    Fault(
        "float32: 16 bytes at once whatever the stride",
        "attention_f32.cuh",
        "((reinterpret_cast<uintptr_t>(base) | (stride * 4)) & 15) == 0",
        "(reinterpret_cast<uintptr_t>(base) & 15) == 0",
    ),
]

# What a row sees ----------------------------------------------------------------------------------

MASKS = [
    Fault(
        "the first key in the window is masked",
        "attention.cuh",
        "if (l < seen.low || l > seen.high)",
        "if (l <= seen.low || l > seen.high)",
    ),
    Fault(
        "the last key that is seen is masked",
        "attention.cuh",
        "if (l < seen.low || l > seen.high)",
        "if (l < seen.low || l >= seen.high)",
    ),
    Fault(
        "a window one key too wide",
        "item.cuh",
        "place - header.window + 1",
        "place - header.window",
    ),
    Fault(
        "a key past the chunk's end is seen",
        "item.cuh",
        "min(place, int64_t(pass.end) - 1)",
        "min(place, int64_t(pass.end))",
    ),
    Fault(
        "positions in 32 bits",
        "item.cuh",
        "const int64_t place = int64_t(offset) + row.token;",
        "const int64_t place = int32_t(uint32_t(offset) + row.token);",
    ),
    Fault(
        "every worker sees what the first one sees",
        "item.cuh",
        "[row.worker * header.num_segments + pass.segment]",
        "[pass.segment]",
    ),
    Fault(
        "softcap of masked scores",
        "attention.cuh",
        "score[tile][n][2 * half + e] = -INFINITE;",
        "score[tile][n][2 * half + e] =\n"
        "                params.softcap != 0.f ? cap_score(params, -INFINITE) : -INFINITE;",
    ),
    Fault(
        "float32: the last key that is seen is masked",
        "attention_f32.cuh",
        "key + l > seen.high",
        "key + l >= seen.high",
    ),
    Fault(
        "float32: softcap of masked scores",
        "attention_f32.cuh",
        "score[i] = -INFINITE;",
        "score[i] = params.softcap != 0.f ? cap_score(params, -INFINITE) : -INFINITE;",
    ),
    Fault(
        "0 times a value reaches rows that see no key of the tile",
        "attention.cuh",
        "sees |= uint32_t(seen.low - TILE < key && seen.high >= key)",
        "sees |= uint32_t(seen.any())",
    ),
    Fault(
        "rows that see a tile's last key only lose it",
        "attention.cuh",
        "sees |= uint32_t(seen.low - TILE < key && seen.high >= key)",
        "sees |= uint32_t(seen.low - TILE < key - 1 && seen.high >= key)",
    ),
    Fault(
        "the last tile before 2^31 is behind everybody",
        "attention.cuh",
        "seen.low - TILE < key",
        "seen.low < int32_t(uint32_t(key) + TILE)",
    ),
    Fault(
        "float32: the last tile before 2^31 is behind everybody",
        "attention_f32.cuh",
        "seen.low - TILE < key",
        "seen.low < int32_t(uint32_t(key) + TILE)",
    ),
    Fault(
        "float32: 0 times a value reaches rows that see no key of the tile",
        "attention_f32.cuh",
        "sees[i] = seen.low - TILE < key && seen.high >= key;",
        "sees[i] = seen.any();",
    ),
]

# Rotation -----------------------------------------------------------------------------------------

ROTATION = [
    Fault(
        "queries are rotated for the first segment only",
        "attention.cuh",
        "if (pass.segment != segment)",
        "if (segment < 0)",
    ),
    Fault(
        "float32: queries are rotated for the first segment only",
        "attention_f32.cuh",
        "if (pass.segment != segment)",
        "if (segment < 0)",
    ),
    Fault(
        "queries turn the other way",
        "attention.cuh",
        "rotate(x.x, y.x, c.x, s.x, c.y, s.y, low.x, high.x);",
        "rotate(x.x, y.x, c.x, -s.x, c.y, -s.y, low.x, high.x);",
    ),
    Fault(
        "a query's second token counts as its first",
        "attention.cuh",
        "if (item.worker_tokens > 1)",
        "if (item.worker_tokens > 2)",
    ),
    Fault(
        "angles are subtracted",
        "item.cuh",
        "__fmaf_rn(cos_a, cos_b, -__fmul_rn(sin_a, sin_b))",
        "__fmaf_rn(cos_a, cos_b, __fmul_rn(sin_a, sin_b))",
    ),
    Fault(
        "the order of operations depends on how the query lies in memory",
        "attention.cuh",
        "T::pack(__fmaf_rn(a.x, c0, __fmul_rn(b.x, -s0)) * factor,",
        "T::pack(__fmaf_rn(b.x, -s0, __fmul_rn(a.x, c0)) * factor,",
    ),
    Fault(
        "interleaved pairs of a query are taken for halves",
        "attention.cuh",
        "p.wide_query && !p.interleaved && ",
        "p.wide_query && ",
    ),
    Fault(
        "a partial rotation is taken for a whole one",
        "attention.cuh",
        " && header.half_rotary == D / 2)",
        ")",
    ),
    Fault(
        "rope_scale twice",
        "attention.cuh",
        "params.query_factor * params.rope_scale;",
        "params.query_factor * params.rope_scale * params.rope_scale;",
    ),
    Fault(
        "rope_scale on dimensions that do not rotate",
        "item.cuh",
        "return x * p.query_factor;",
        "return x * (p.query_factor * p.rope_scale);",
    ),
]

# Softmax and sums ---------------------------------------------------------------------------------

SOFTMAX = [
    Fault(
        "the maximum of half of the keys",
        "attention.cuh",
        "one = fmaxf(one, __shfl_xor_sync(~0u, one, 2));",
        "",
    ),
    Fault(
        "the maximum of three quarters of the keys",
        "attention.cuh",
        "fmaxf(fmaxf(top.x, top.y), fmaxf(top.z, top.w))",
        "fmaxf(fmaxf(top.x, top.y), top.z)",
    ),
    Fault(
        "maxima begin at 0",
        "attention.cuh",
        "highest[tile] = -INFINITE;",
        "highest[tile] = 0.f;",
    ),
    Fault(
        "maxima rounded to bfloat16",
        "attention.cuh",
        "mine = __fmaf_rd(now, -scale, T::PROBABILITY_BIAS);",
        "mine = __fmaf_rd(BFloat16::widen(BFloat16::narrow(now)), -scale, T::PROBABILITY_BIAS);",
    ),
    Fault(
        "the first maximum is kept whatever follows",
        "attention.cuh",
        "highest[tile] = __fadd_rd(now, params.rise);",
        "highest[tile] = INFINITE;",
    ),
    Fault(
        "a row's maximum goes to the other row of its lanes",
        "attention.cuh",
        "const float fresh[2] = {second ? other : mine, second ? mine : other};",
        "const float fresh[2] = {second ? mine : other, second ? other : mine};",
    ),
    Fault(
        "outputs do not shrink when the maximum rises",
        "attention.cuh",
        "out[tile][n][e] *= shrink[e / 2];",
        "out[tile][n][e] *= 1.f;",
    ),
    Fault(
        "sums do not shrink when the maximum rises",
        "attention.cuh",
        "row_sum[tile][half] *= shrink[half];",
        "",
    ),
    Fault(
        "outputs shrink with the maximum of another row",
        "attention.cuh",
        "out[tile][n][e] *= shrink[e / 2];",
        "out[tile][n][e] *= shrink[e % 2];",
    ),
    Fault(
        "float16: sums of probabilities before they are rounded",
        "types.cuh",
        "static constexpr bool SUMS_ROUNDED = true;",
        "static constexpr bool SUMS_ROUNDED = false;",
    ),
    Fault(
        "bfloat16: sums of rounded probabilities",
        "types.cuh",
        "static constexpr bool SUMS_ROUNDED = false;",
        "static constexpr bool SUMS_ROUNDED = true;",
        compiled="attention_bf16.cu",
    ),
    Fault(
        "float16: probabilities are not raised",
        "attention.cuh",
        "mine = __fmaf_rd(now, -scale, T::PROBABILITY_BIAS);",
        "mine = __fmaf_rd(now, -scale, 0.f);",
    ),
    Fault(
        "float16: lse of raised probabilities",
        "attention.cuh",
        "bias[tile][half] = -bias[tile][half];",
        "bias[tile][half] = T::PROBABILITY_BIAS - bias[tile][half];",
    ),
    Fault(
        "float16: queries are not halved",
        "launch.cu",
        "args.heads.dtype == DType::Float16 ? Float16::QUERY_FACTOR : BFloat16::QUERY_FACTOR",
        "BFloat16::QUERY_FACTOR",
    ),
    Fault(
        "lse to base 2",
        "types.cuh",
        "(max + (log2f(sum) - T::SUM_BIAS)) * LN_2",
        "(max + (log2f(sum) - T::SUM_BIAS))",
    ),
    Fault(
        "a negative scale counts as positive",
        "launch.cu",
        "std::copysign(query_factor, args.scoring.scale)",
        "query_factor",
    ),
    Fault(
        "a scale of 0 makes nan of masked scores",
        "launch.cu",
        "if (args.scoring.scale == 0.f) {",
        "if (false) {",
    ),
    Fault(
        "float32: rows that have seen nothing yet subtract an infinite maximum",
        "attention_f32.cuh",
        "row_max[i] = -FLT_MAX;",
        "row_max[i] = -INFINITE;",
    ),
    Fault(
        "float32: outputs do not shrink when the maximum rises",
        "attention_f32.cuh",
        "out[i][e] *= shrink;",
        "out[i][e] *= 1.f;",
    ),
]

# Partial results ----------------------------------------------------------------------------------

FOLDS = [
    Fault(
        "a block takes one item only",
        "attention.cuh",
        "i < work; i += gridDim.x",
        "i < work; i += work",
    ),
    Fault(
        "float32: a block takes one item only",
        "attention_f32.cuh",
        "i < work; i += gridDim.x",
        "i < work; i += work",
    ),
    Fault(
        "a block of the merge takes one row only",
        "small.cuh",
        "r += gridDim.y",
        "r += merge.row_count",
    ),
    Fault(
        "the merge folds from right to left",
        "small.cuh",
        "merge.slot_row + int64_t(s) * merge.row_count + r",
        "merge.slot_row + int64_t(merge.num_slots - 1 - s) * merge.row_count + r",
    ),
    Fault(
        "the merge leaves out the last partial result",
        "small.cuh",
        "s < merge.num_slots",
        "s + 1 < merge.num_slots",
    ),
    Fault(
        "the merge folds partial results that saw nothing",
        "types.cuh",
        "if (sum_b == 0.f) return {Fold::Keep, 1.f, 0.f};",
        "",
        compiled="launch.cu",
    ),
    Fault(
        "the weights of a fold are swapped",
        "attention.cuh",
        "x[2 * half] = __fmaf_rn(before.x, w.kept, __fmul_rn(x[2 * half], w.added));",
        "x[2 * half] = __fmaf_rn(before.x, w.added, __fmul_rn(x[2 * half], w.kept));",
    ),
    Fault(
        "float32: the weights of a fold are swapped",
        "types.cuh",
        ": __fmaf_rn(a, w.kept, __fmul_rn(b, w.added));",
        ": __fmaf_rn(a, w.added, __fmul_rn(b, w.kept));",
        compiled="attention_f32.cu",
    ),
    Fault(
        "the merge swaps the weights of a fold",
        "types.cuh",
        ": __fmaf_rn(a, w.kept, __fmul_rn(b, w.added));",
        ": __fmaf_rn(a, w.added, __fmul_rn(b, w.kept));",
        compiled="launch.cu",
    ),
    Fault(
        "a fold loses what was there if a pass adds nothing",
        "attention.cuh",
        "x[2 * half + 1] = before.y;",
        "",
    ),
    Fault(
        "every pass folds into the result of the first",
        "attention.cuh",
        "folded[(i + 1) % 2 * S::ROWS + row] =",
        "folded[row] =",
    ),
    Fault(
        "a fold's sum forgets the smaller maximum",
        "types.cuh",
        "sum_a = __fmaf_rn(sum_a, w.kept, __fmul_rn(sum_b, w.added));",
        "sum_a = __fmaf_rn(sum_a, w.kept, sum_b);",
    ),
    Fault(
        "merged outputs are not divided by the sum",
        "small.cuh",
        "const float inverse = sum == 0.f ? 0.f : 1.f / sum;",
        "const float inverse = 1.f;",
    ),
    Fault(
        "slots of two items overlap by a row",
        "tables.cpp",
        "slot_rows_ += int64_t(first ? 1 : end - begin) * count;",
        "slot_rows_ += int64_t(first ? 1 : end - begin) * count - 1;",
    ),
    Fault(
        "the last cut of a row group's passes is lost",
        "tables.cpp",
        "if (sum * runs >= total * int64_t(ends.size() + 1)) ends.push_back(i + 1);",
        "if (i + 1 < end && sum * runs >= total * int64_t(ends.size() + 1))\n"
        "      ends.push_back(i + 1);",
    ),
    Fault(
        "a pass's pages are its segment's first",
        "tables.cpp",
        "plan.first_tile[chunk.segment] + chunk.begin / TILE",
        "plan.first_tile[chunk.segment]",
    ),
    Fault(
        "a pass begins a tile late",
        "tables.cpp",
        "pass.first_tile = int32_t((first - chunk.begin) / TILE);",
        "pass.first_tile = int32_t(ceil_div(first - chunk.begin, TILE));",
    ),
    Fault(
        "the tile in which a window begins is not masked",
        "tables.cpp",
        "int32_t(ceil_div(inner_low - chunk.begin, TILE))",
        "int32_t((inner_low - chunk.begin) / TILE)",
    ),
    Fault(
        "the tile in which the keys seen end is not masked",
        "tables.cpp",
        "int32_t((inner_high + 1 - chunk.begin) / TILE)",
        "int32_t(ceil_div(inner_high + 1 - chunk.begin, TILE))",
    ),
    Fault(
        "rows 32 to 63 have seen what rows 0 to 31 have",
        "tables.cpp",
        "pass.seen_by[1] = uint32_t(seen_by >> 32);",
        "pass.seen_by[1] = uint32_t(seen_by);",
    ),
    Fault(
        "the last padding row is not written",
        "tables.cpp",
        "i < padded_queries; ++i)",
        "i + 1 < padded_queries; ++i)",
    ),
    Fault(
        "a worker's tokens are those of the row group's last worker",
        "tables.cpp",
        "tokens = std::max(tokens, plan.query_lengths[plan.parts[p].worker]);",
        "tokens = plan.query_lengths[plan.parts[p].worker];",
    ),
]

# Append and move ----------------------------------------------------------------------------------

STORING = [
    Fault(
        "append: a row too far",
        "small.cuh",
        "* TILE + slot % TILE) * D",
        "* TILE + (slot + 1) % TILE) * D",
        PAGES,
    ),
    Fault(
        "append: keys are rotated by the token before's angles",
        "small.cuh",
        "header.array<float>(header.key_angles) + int64_t(t) * 2 * half",
        "header.array<float>(header.key_angles) + int64_t(max(t - 1, 0)) * 2 * half",
        PAGES,
    ),
    Fault(
        "append: values of the first head",
        "small.cuh",
        "t * params.values.token_stride + head * params.values.head_stride",
        "t * params.values.token_stride",
        PAGES,
    ),
    Fault(
        "append: no rope_scale",
        "small.cuh",
        "params.interleaved, params.rope_scale));",
        "params.interleaved, 1.f));",
        PAGES,
    ),
    Fault(
        "append and move: keys turn the other way",
        "small.cuh",
        "low ? -sine : sine",
        "low ? sine : -sine",
        PAGES,
    ),
    Fault(
        "append and move: interleaved pairs are taken for halves",
        "small.cuh",
        "const int step = interleaved ? 1 : half;",
        "const int step = half;",
        PAGES,
    ),
    Fault(
        "move: into the page of the source's row",
        "small.cuh",
        "target_pages[goal / TILE]",
        "target_pages[l / TILE]",
        PAGES,
    ),
    Fault(
        "move: into the row of the source",
        "small.cuh",
        "* TILE + goal % TILE) * D",
        "* TILE + l % TILE) * D",
        PAGES,
    ),
    Fault(
        "move: keys keep their angle",
        "small.cuh",
        "keys[to + d] = T::narrow(\n"
        "          rotated_key<T>(keys + from, angles, header.half_rotary, d, "
        "params.interleaved, 1.f));",
        "keys[to + d] = keys[from + d];",
        PAGES,
    ),
    Fault(
        "move: the first layer's values only",
        "small.cuh",
        "(params.tables + header.value_layers)[layer]",
        "(params.tables + header.value_layers)[0]",
        PAGES,
    ),
]

FAULTS = [*SYNCHRONISATION, *TILES, *MASKS, *ROTATION, *SOFTMAX, *FOLDS, *STORING]


# ---- planting ------------------------------------------------------------------------------------


class StaleFault(Exception):
    """The text to change does not stand in its file exactly once."""


def planted(fault: Fault, csrc: Path) -> tuple[str, int]:
    """The file with the fault in it, and the line where it begins. Raises StaleFault."""
    text = (csrc / "cuda" / fault.file).read_text()
    count = text.count(fault.old)
    if count != 1:
        raise StaleFault(f"{fault.file} has {count} times, not once: {fault.old!r}")
    pairs = enumerate(zip(fault.old, fault.new, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), min(len(fault.old), len(fault.new)))
    line = text.count("\n", 0, text.index(fault.old) + first) + 1
    return text.replace(fault.old, fault.new), line


def stale_faults(csrc: Path = CSRC) -> list[str]:
    """A line for each fault that cannot be planted."""
    lines = []
    for fault in FAULTS:
        try:
            planted(fault, csrc)
        except StaleFault as error:
            lines.append(f"{fault.name}: {error}")
    return lines


# ---- running -------------------------------------------------------------------------------------


def pytest_configure() -> None:
    """In the tests' own process, where this file is a plugin: the same examples in every run, and
    no search for a smaller one that fails too."""
    hypothesis.settings.register_profile(
        "faults",
        hypothesis.settings.get_profile("quick"),
        derandomize=True,
        database=None,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
        report_multiple_bugs=False,
    )
    hypothesis.settings.load_profile("faults")


@dataclass(frozen=True)
class Outcome:
    """What the tests said: passed, failed (which is good of a fault), or neither."""

    verdict: Literal["passed", "failed", "broken"]
    words: str


@contextmanager
def passing_cache() -> Iterator[Path]:
    """A cache of builds that knows what is built already, and takes what is built of faults with
    it when it goes."""
    with tempfile.TemporaryDirectory() as folder:
        for built in cache_folder().iterdir():
            if built.is_dir():
                (Path(folder) / built.name).symlink_to(built)
        yield Path(folder)


def run_tests(tests: Sequence[str], csrc: Path, cache: Path) -> Outcome:
    """The tests on an emulated GPU built from `csrc`, up to the first that fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "faults"]
    environment = {
        **os.environ,
        "HOGWILD_EMULATE": "1",
        "HOGWILD_EMULATE_CSRC": str(csrc),
        "HOGWILD_EMULATOR_CACHE": str(cache),
        "HOGWILD_TEST_SEED": "1",
        "COLUMNS": "1000",  # where pytest cuts off the lines of its summary
    }
    try:
        done = subprocess.run(
            [*command, *tests], cwd=TESTS, env=environment, capture_output=True, text=True,
            timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Outcome("broken", f"no end after {SECONDS} s")
    if done.returncode < 0:
        return Outcome("failed", f"the process died of signal {-done.returncode}")
    if done.returncode == pytest.ExitCode.OK:
        return Outcome("passed", done.stdout.strip().splitlines()[-1])
    test = re.search(r"^(?:FAILED|ERROR) (\S+)(?: - (.*))?$", done.stdout, re.M)
    if done.returncode != pytest.ExitCode.TESTS_FAILED or not test:
        return Outcome("broken", f"the tests did not run\n{done.stdout}{done.stderr}")
    finding = re.search(r"SanitizerError: (.*?) \(PTX", done.stdout)
    words = f"sanitizer: {finding[1]}" if finding else (test[2] or "no message")
    return Outcome("failed", f"{test[1]}: {words}")


def try_fault(fault: Fault, cache: Path) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "csrc"
        shutil.copytree(CSRC, copy)
        try:
            text, line = planted(fault, copy)
        except StaleFault as error:
            return Outcome("broken", str(error))
        (copy / "cuda" / fault.file).write_text(text)
        for unit in copy.glob("cuda/*.cu"):
            if unit.name != (fault.compiled or COMPILED.get(fault.file)):
                unit.write_text(f'#include "{CSRC / "cuda" / unit.name}"\n')
        outcome = run_tests(fault.tests, copy, cache)
        return replace(outcome, words=f"{fault.file}:{line}: {outcome.words}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--list", action="store_true", help="names of the faults, and leave")
    parser.add_argument("--only", default="", metavar="WORDS", help="faults with WORDS in the name")
    parser.add_argument(
        "--check-anchors", action="store_true", help="see if all can be planted, and leave"
    )
    parser.add_argument("-j", type=int, default=2, dest="jobs", help="how many at a time")
    given = parser.parse_args()

    faults = [fault for fault in FAULTS if given.only in fault.name]
    if given.list:
        print(*(f"{fault.file:18}  {fault.name}" for fault in faults), sep="\n")
        return 0
    if given.check_anchors:
        stale = stale_faults()
        print(*stale, f"{len(FAULTS)} faults, {len(stale)} stale", sep="\n")
        return bool(stale)

    began = time.monotonic()
    with passing_cache() as cache, ThreadPoolExecutor(given.jobs) as pool:
        every = dict.fromkeys(test for fault in faults for test in fault.tests)
        without = pool.submit(run_tests, list(every), CSRC, cache)
        tried = [pool.submit(try_fault, fault, cache) for fault in faults]
        sound = without.result()
        print(f"no fault: {sound.words}", flush=True)
        if sound.verdict != "passed":
            pool.shutdown(cancel_futures=True)
            return 1
        caught = 0
        for fault, future in zip(faults, tried, strict=True):
            outcome = future.result()
            caught += outcome.verdict == "failed"
            mark = {"failed": "caught", "passed": "SURVIVED", "broken": "BROKEN"}[outcome.verdict]
            print(f"{mark:8}  {fault.name}\n          {outcome.words}", flush=True)
    minutes = (time.monotonic() - began) / 60
    print(f"{caught} of {len(faults)} faults caught, {minutes:.0f} minutes")
    return caught < len(faults)


if __name__ == "__main__":
    sys.exit(main())
