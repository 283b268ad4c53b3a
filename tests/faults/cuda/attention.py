"""Faults of csrc/cuda/attention.cuh."""

from __future__ import annotations

from ..fault import Fault

FAULTS = [
    # Barriers, copies in the background
    Fault(
        "no barrier between rotating queries and reading them",
        "csrc/cuda/attention.cuh",
        "enter_segment(segment = pass.segment);\n      __syncthreads();",
        "enter_segment(segment = pass.segment);",
    ),
    Fault(
        "no barrier after the wait for a tile",
        "csrc/cuda/attention.cuh",
        "wait_copies<RING - 2>();\n    __syncthreads();",
        "wait_copies<RING - 2>();",
    ),
    Fault(
        "the wait for a tile leaves one more under way",
        "csrc/cuda/attention.cuh",
        "wait_copies<RING - 2>();",
        "wait_copies<RING - 1>();",
    ),
    Fault(
        "no barrier between writing maxima and reading them",
        "csrc/cuda/attention.cuh",
        "share_maxima();\n      __syncthreads();",
        "share_maxima();",
    ),
    Fault(
        "no barrier between writing sums and reading them",
        "csrc/cuda/attention.cuh",
        "[quarter] = sum;\n      }\n    __syncthreads();",
        "[quarter] = sum;\n      }",
    ),
    Fault(
        "no barrier between two passes",
        "csrc/cuda/attention.cuh",
        "__syncthreads();  // ring, queries and limits are free",
        "",
    ),
    Fault(
        "no barrier between two items",
        "csrc/cuda/attention.cuh",
        "shared).run();\n    __syncthreads();",
        "shared).run();",
    ),
    Fault(
        "copies of a tile are in no group",
        "csrc/cuda/attention.cuh",
        "    }\n    end_copy_group();\n",
        "    }\n",
    ),
    Fault(
        "no group of copies where there is no tile",
        "csrc/cuda/attention.cuh",
        "    }\n    end_copy_group();\n",
        "    }\n    if (tile < s.end) end_copy_group();\n",
    ),
    # Tiles and where their elements lie
    Fault(
        "the page table is read one tile behind",
        "csrc/cuda/attention.cuh",
        "s.page[2] = __ldg(s.pages + t + 3);",
        "s.page[2] = __ldg(s.pages + t + 2);",
    ),
    Fault(
        "a pass ends a tile early",
        "csrc/cuda/attention.cuh",
        "Source s{place, pass.end_tile,",
        "Source s{place, pass.end_tile - 1,",
    ),
    Fault(
        "a page with fewer tokens is copied whole",
        "csrc/cuda/attention.cuh",
        "s.whole_end = min((pass.end - pass.begin) / TILE, s.end);",
        "s.whole_end = s.end;",
    ),
    Fault(
        "rows past a segment's end are copied too",
        "csrc/cuda/attention.cuh",
        "const bool there = row + r < present;",
        "const bool there = true;",
    ),
    Fault(
        "rows past a segment's end keep what lay in the ring",
        "csrc/cuda/attention.cuh",
        "copy_async(place, from + c * 8, there ? 16 : 0);",
        "if (there) copy_async(place, from + c * 8);",
    ),
    Fault(
        "16 bytes at once whatever the stride",
        "csrc/cuda/attention.cuh",
        "((reinterpret_cast<uintptr_t>(base) | (stride * 2)) & 15) == 0",
        "(reinterpret_cast<uintptr_t>(base) & 15) == 0",
    ),
    Fault(
        "8 bytes at once whatever the query's address",
        "csrc/cuda/attention.cuh",
        "plain_rotation(p.wide_query && ",
        "plain_rotation(",
    ),
    Fault(
        "tiles are stored without the swizzle that they are read with",
        "csrc/cuda/attention.cuh",
        "copy_place(kept(ring + S::place(threadIdx.x / COLUMNS, threadIdx.x % COLUMNS)))",
        "copy_place(kept(ring + threadIdx.x / COLUMNS * S::ROW_BYTES + "
        "threadIdx.x % COLUMNS * 16))",
    ),
    Fault(
        "probabilities are stored without the swizzle that they are read with",
        "csrc/cuda/attention.cuh",
        "store_shared((probability_store ^ (n * 16))",
        "store_shared((probability_store + (n * 16))",
    ),
    Fault(
        "rotated queries are stored without the swizzle that they are read with",
        "csrc/cuda/attention.cuh",
        "store_shared(queries + S::place(r, (j + D / 2) / 8) + j % 8 * 2, high);",
        "store_shared(queries + r * S::ROW_BYTES + (j + D / 2) * 2, high);",
    ),
    Fault(
        "fragments of two groups of keys are swapped",
        "csrc/cuda/attention.cuh",
        "T::mma(score[tile][0], query[tile][step], key[0], key[1]);",
        "T::mma(score[tile][0], query[tile][step], key[0], key[2]);",
    ),
    Fault(
        "fragments of the values are swapped",
        "csrc/cuda/attention.cuh",
        "T::mma(out[tile][n + 1], p[tile], v[2], v[3]);",
        "T::mma(out[tile][n + 1], p[tile], v[3], v[2]);",
    ),
    Fault(
        "the ring's places are taken in the wrong order",
        "csrc/cuda/attention.cuh",
        "return (RING - 2) * S::TILE_BYTES - keys;",
        "return keys;",
    ),
    Fault(
        "queries of rows that are not there are whatever lay there",
        "csrc/cuda/attention.cuh",
        "if (item.row_count < S::ROWS)",
        "if (false)",
    ),
    Fault(
        "the second half of a row tile begins at the wrong row",
        "csrc/cuda/attention.cuh",
        "first_row + tile * 16 + half * 8 + lane / 4",
        "first_row + tile * 16 + half * 4 + lane / 4",
    ),
    # What a row sees
    Fault(
        "the first key in the window is masked",
        "csrc/cuda/attention.cuh",
        "if (l < seen.low || l > seen.high)",
        "if (l <= seen.low || l > seen.high)",
    ),
    Fault(
        "the last key that is seen is masked",
        "csrc/cuda/attention.cuh",
        "if (l < seen.low || l > seen.high)",
        "if (l < seen.low || l >= seen.high)",
    ),
    Fault(
        "softcap of masked scores",
        "csrc/cuda/attention.cuh",
        "score[tile][n][2 * half + e] = -INFINITE;",
        "score[tile][n][2 * half + e] =\n"
        "                params.softcap != 0.f ? cap_score(params, -INFINITE) : -INFINITE;",
    ),
    Fault(
        "0 times a value reaches rows that see no key of the tile",
        "csrc/cuda/attention.cuh",
        "sees |= uint32_t(seen.low - TILE < key && seen.high >= key)",
        "sees |= uint32_t(seen.any())",
    ),
    Fault(
        "rows that see a tile's last key only lose it",
        "csrc/cuda/attention.cuh",
        "sees |= uint32_t(seen.low - TILE < key && seen.high >= key)",
        "sees |= uint32_t(seen.low - TILE < key - 1 && seen.high >= key)",
    ),
    Fault(
        "the last tile before 2^31 is behind everybody",
        "csrc/cuda/attention.cuh",
        "seen.low - TILE < key",
        "seen.low < int32_t(uint32_t(key) + TILE)",
    ),
    # Rotation
    Fault(
        "queries are rotated for the first segment only",
        "csrc/cuda/attention.cuh",
        "if (pass.segment != segment)",
        "if (segment < 0)",
    ),
    Fault(
        "queries turn the other way",
        "csrc/cuda/attention.cuh",
        "rotate(x.x, y.x, c.x, s.x, c.y, s.y, low.x, high.x);",
        "rotate(x.x, y.x, c.x, -s.x, c.y, -s.y, low.x, high.x);",
    ),
    Fault(
        "a query's second token counts as its first",
        "csrc/cuda/attention.cuh",
        "if (item.worker_tokens > 1)",
        "if (item.worker_tokens > 2)",
    ),
    Fault(
        "the order of operations depends on how the query lies in memory",
        "csrc/cuda/attention.cuh",
        "T::pack(__fmaf_rn(a.x, c0, __fmul_rn(b.x, -s0)) * factor,",
        "T::pack(__fmaf_rn(b.x, -s0, __fmul_rn(a.x, c0)) * factor,",
    ),
    Fault(
        "interleaved pairs of a query are taken for halves",
        "csrc/cuda/attention.cuh",
        "p.wide_query && !p.interleaved && ",
        "p.wide_query && ",
    ),
    Fault(
        "a partial rotation is taken for a whole one",
        "csrc/cuda/attention.cuh",
        " && header.half_rotary == D / 2)",
        ")",
    ),
    Fault(
        "rope_scale twice",
        "csrc/cuda/attention.cuh",
        "params.query_factor * params.rope_scale;",
        "params.query_factor * params.rope_scale * params.rope_scale;",
    ),
    # Softmax and sums
    Fault(
        "the maximum of half of the keys",
        "csrc/cuda/attention.cuh",
        "one = fmaxf(one, __shfl_xor_sync(~0u, one, 2));",
        "",
    ),
    Fault(
        "the maximum of three quarters of the keys",
        "csrc/cuda/attention.cuh",
        "fmaxf(fmaxf(top.x, top.y), fmaxf(top.z, top.w))",
        "fmaxf(fmaxf(top.x, top.y), top.z)",
    ),
    Fault(
        "maxima begin at 0",
        "csrc/cuda/attention.cuh",
        "highest[tile] = -INFINITE;",
        "highest[tile] = 0.f;",
    ),
    Fault(
        "maxima rounded to bfloat16",
        "csrc/cuda/attention.cuh",
        "mine = __fmaf_rd(now, -scale, T::PROBABILITY_BIAS);",
        "mine = __fmaf_rd(BFloat16::widen(BFloat16::narrow(now)), -scale, T::PROBABILITY_BIAS);",
    ),
    Fault(
        "the first maximum is kept whatever follows",
        "csrc/cuda/attention.cuh",
        "highest[tile] = __fadd_rd(now, params.rise);",
        "highest[tile] = INFINITE;",
    ),
    Fault(
        "a row's maximum goes to the other row of its lanes",
        "csrc/cuda/attention.cuh",
        "const float fresh[2] = {second ? other : mine, second ? mine : other};",
        "const float fresh[2] = {second ? mine : other, second ? other : mine};",
    ),
    Fault(
        "outputs do not shrink when the maximum rises",
        "csrc/cuda/attention.cuh",
        "out[tile][n][e] *= shrink[e / 2];",
        "out[tile][n][e] *= 1.f;",
    ),
    Fault(
        "sums do not shrink when the maximum rises",
        "csrc/cuda/attention.cuh",
        "row_sum[tile][half] *= shrink[half];",
        "",
    ),
    Fault(
        "outputs shrink with the maximum of another row",
        "csrc/cuda/attention.cuh",
        "out[tile][n][e] *= shrink[e / 2];",
        "out[tile][n][e] *= shrink[e % 2];",
    ),
    Fault(
        "float16: probabilities are not raised",
        "csrc/cuda/attention.cuh",
        "mine = __fmaf_rd(now, -scale, T::PROBABILITY_BIAS);",
        "mine = __fmaf_rd(now, -scale, 0.f);",
    ),
    Fault(
        "float16: lse of raised probabilities",
        "csrc/cuda/attention.cuh",
        "bias[tile][half] = -bias[tile][half];",
        "bias[tile][half] = T::PROBABILITY_BIAS - bias[tile][half];",
    ),
    # Partial results
    Fault(
        "a block takes one item only",
        "csrc/cuda/attention.cuh",
        "i < work; i += gridDim.x",
        "i < work; i += work",
    ),
    Fault(
        "the weights of a fold are swapped",
        "csrc/cuda/attention.cuh",
        "x[2 * half] = __fmaf_rn(before.x, w.kept, __fmul_rn(x[2 * half], w.added));",
        "x[2 * half] = __fmaf_rn(before.x, w.added, __fmul_rn(x[2 * half], w.kept));",
    ),
    Fault(
        "a fold loses what was there if a pass adds nothing",
        "csrc/cuda/attention.cuh",
        "x[2 * half + 1] = before.y;",
        "",
    ),
    Fault(
        "every pass folds into the result of the first",
        "csrc/cuda/attention.cuh",
        "folded[(i + 1) % 2 * S::ROWS + row] =",
        "folded[row] =",
    ),
]
