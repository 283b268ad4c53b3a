// Attention in float32 on the CUDA cores: up to 16 rows, the same items, folds and rules as the
// tensor-core kernel. Keys and values of a tile share one buffer, one after the other: it is there
// for exactness, not for speed.

#pragma once

#include <cfloat>

#include "item.cuh"

namespace hogwild::cuda {

template <int D>
struct ShapeF32 {
  static constexpr int ROWS = 16;
  static constexpr int THREADS = 128;
  static constexpr int BLOCKS = D > 128 ? 1 : 2;  // a multiprocessor; unasked, ptxas spills for 4
  static constexpr int STRIDE = D + 4;  // floats of a row in shared memory: a shift of 4 banks each
  static constexpr int FOURS = D / 4;
  // Accumulating: a thread has four dimensions of every ROW_SETS-th row.
  static constexpr int ROW_SETS = D == 96 ? 4 : THREADS / FOURS;
  static constexpr int OUT_ROWS = ROWS / ROW_SETS;
  // Scores: a thread has one key and every other row.
  static constexpr int SCORE_ROWS = ROWS / 2;
  static constexpr int PROBABILITY_STRIDE = TILE + 4;
  static constexpr int shared_bytes() {
    return 4 * (TILE * STRIDE + ROWS * STRIDE + ROWS * PROBABILITY_STRIDE) +
           ROWS * (int(sizeof(QueryRow<float>)) + int(sizeof(Limits)) + 4 * int(sizeof(float)));
  }
};

template <int D>
struct AttentionF32 {
  using S = ShapeF32<D>;

  const AttendParams& params;
  const Header& header;
  const Item& item;
  const int head;
  const int lane, warp;

  float* const tile;  // [TILE, STRIDE]
  float* const queries;  // [ROWS, STRIDE]
  float* const probabilities;  // [ROWS, PROBABILITY_STRIDE]
  QueryRow<float>* const rows;
  Limits* const limits;
  float* const halves;  // [ROWS, 2]: maxima, then sums, of 32 keys each
  float* const shrinks;  // [ROWS]
  float* const totals;  // [ROWS]
  int segment = -1;

  float out[S::OUT_ROWS][4];
  float row_max[S::SCORE_ROWS], row_sum[S::SCORE_ROWS];  // of rows 2 i + warp / 2
  float pass_max[S::OUT_ROWS], pass_sum[S::OUT_ROWS];  // of the rows of `out`
  float folded_max[S::OUT_ROWS], folded_sum[S::OUT_ROWS];

  __device__ AttentionF32(const AttendParams& p, const Item& item, int head, float* shared)
      : params(p),
        header(*p.header),
        item(item),
        head(head),
        lane(threadIdx.x % WARP),
        warp(threadIdx.x / WARP),
        tile(shared),
        queries(tile + TILE * S::STRIDE),
        probabilities(queries + S::ROWS * S::STRIDE),
        rows(reinterpret_cast<QueryRow<float>*>(probabilities + S::ROWS * S::PROBABILITY_STRIDE)),
        limits(reinterpret_cast<Limits*>(rows + S::ROWS)),
        halves(reinterpret_cast<float*>(limits + S::ROWS)),
        shrinks(halves + 2 * S::ROWS),
        totals(shrinks + S::ROWS) {}

  __device__ void enter_segment() {
    for (int i = threadIdx.x; i < S::ROWS * D; i += S::THREADS) {
      const int r = i / D, d = i % D;
      float x = 0.f;
      if (r < item.row_count) x = rotated_query<Float32>(params, header, rows[r], segment, d);
      queries[r * S::STRIDE + d] = x;
    }
  }

  __device__ void load_tile(const Pass& pass, int t, bool values) const {
    const float* base;
    int64_t stride;
    if (params.key_pages) {
      const int64_t page = header.array<int32_t>(header.tile_pages)[pass.tile + t];
      base = static_cast<const float*>(values ? params.value_pages : params.key_pages) +
             (page * params.kv_heads + head) * (TILE * D);
      stride = D;
    } else {
      const SegmentRows& rows = header.array<SegmentRows>(header.segments)[pass.segment];
      stride = values ? rows.value_token_stride : rows.key_token_stride;
      base = static_cast<const float*>(values ? rows.values : rows.keys) +
             (pass.begin + t * TILE) * stride +
             head * (values ? rows.value_head_stride : rows.key_head_stride);
    }
    const int present = pass.end - pass.begin - t * TILE;
    const bool wide = ((reinterpret_cast<uintptr_t>(base) | (stride * 4)) & 15) == 0;
    for (int i = threadIdx.x; i < TILE * S::FOURS; i += S::THREADS) {
      const int r = i / S::FOURS, d = i % S::FOURS * 4;
      const bool there = r < present;
      const float* from = base + (there ? r : 0) * stride + d;
      float* to = tile + r * S::STRIDE + d;
      if (wide) {
        copy_async(shared_address(to), from, there ? 16 : 0);
      } else {
        float4 x{0.f, 0.f, 0.f, 0.f};
        if (there) x = {from[0], from[1], from[2], from[3]};
        *reinterpret_cast<float4*>(to) = x;
      }
    }
    end_copy_group();
    wait_copies<0>();
    __syncthreads();
  }

  // Scores of key `threadIdx.x % 64` and of rows 2 i + warp / 2.
  __device__ void compute_scores(float (&score)[S::SCORE_ROWS], int key) const {
    const int l = threadIdx.x % TILE;
#pragma unroll
    for (int i = 0; i < S::SCORE_ROWS; ++i) score[i] = 0.f;
#pragma unroll 4
    for (int d = 0; d < D; d += 4) {
      const float4 k = *reinterpret_cast<const float4*>(tile + l * S::STRIDE + d);
#pragma unroll
      for (int i = 0; i < S::SCORE_ROWS; ++i) {
        const float4 q =
            *reinterpret_cast<const float4*>(queries + (2 * i + warp / 2) * S::STRIDE + d);
        score[i] = __fmaf_rn(q.x, k.x, score[i]);
        score[i] = __fmaf_rn(q.y, k.y, score[i]);
        score[i] = __fmaf_rn(q.z, k.z, score[i]);
        score[i] = __fmaf_rn(q.w, k.w, score[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < S::SCORE_ROWS; ++i) {
      if (params.softcap != 0.f) score[i] = cap_score(params, score[i]);
      const Limits seen = limits[2 * i + warp / 2];
      if (key + l < seen.low || key + l > seen.high) score[i] = -INFINITE;
    }
  }

  __device__ void compute_probabilities(float (&score)[S::SCORE_ROWS]) {
    const float scale = params.power_scale;
    constexpr float SMALLER = 1.f / (1ull << int(-Float32::PROBABILITY_BIAS));
#pragma unroll
    for (int i = 0; i < S::SCORE_ROWS; ++i) {
      float top = score[i];
#pragma unroll
      for (int step = 1; step < WARP; step *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
      if (lane == 0) halves[(2 * i + warp / 2) * 2 + warp % 2] = top;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < S::SCORE_ROWS; ++i) {
      const int row = 2 * i + warp / 2;
      const float before = row_max[i];
      const float now = fmaxf(before, fmaxf(halves[row * 2], halves[row * 2 + 1]));
      const float shrink = now == before ? 1.f : exp2_fast((before - now) * scale);
      row_max[i] = now;
      const float p = exp2_fast((score[i] - now) * scale) * SMALLER;
      row_sum[i] = __fmaf_rn(row_sum[i], shrink, p);
      probabilities[row * S::PROBABILITY_STRIDE + threadIdx.x % TILE] = p;
      if (threadIdx.x % TILE == 0) shrinks[row] = shrink;
    }
    __syncthreads();
  }

  __device__ bool accumulates() const { return threadIdx.x < S::ROW_SETS * S::FOURS; }
  __device__ int out_row(int i) const { return threadIdx.x / S::FOURS + i * S::ROW_SETS; }
  __device__ int dimension() const { return threadIdx.x % S::FOURS * 4; }

  // A row that sees nothing of the tile keeps what it has: 0 times a value may not be 0.
  __device__ void accumulate(int key) {
    if (!accumulates()) return;
    bool sees[S::OUT_ROWS];
#pragma unroll
    for (int i = 0; i < S::OUT_ROWS; ++i) {
      const Limits seen = limits[out_row(i)];
      sees[i] = seen.low - TILE < key && seen.high >= key;
      const float shrink = shrinks[out_row(i)];
#pragma unroll
      for (int e = 0; e < 4; ++e) out[i][e] *= shrink;
    }
#pragma unroll 4
    for (int l = 0; l < TILE; ++l) {
      const float4 v = *reinterpret_cast<const float4*>(tile + l * S::STRIDE + dimension());
#pragma unroll
      for (int i = 0; i < S::OUT_ROWS; ++i) {
        if (!sees[i]) continue;
        const float p = probabilities[out_row(i) * S::PROBABILITY_STRIDE + l];
        out[i][0] = __fmaf_rn(p, v.x, out[i][0]);
        out[i][1] = __fmaf_rn(p, v.y, out[i][1]);
        out[i][2] = __fmaf_rn(p, v.z, out[i][2]);
        out[i][3] = __fmaf_rn(p, v.w, out[i][3]);
      }
    }
  }

  __device__ __forceinline__ void attend(const Pass& pass) {
#pragma unroll
    for (int i = 0; i < S::OUT_ROWS; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) out[i][e] = 0.f;
#pragma unroll
    for (int i = 0; i < S::SCORE_ROWS; ++i) {
      row_max[i] = -FLT_MAX;  // finite: a masked score is -inf, and becomes 0 and not nan
      row_sum[i] = 0.f;
    }
    find_limits<S::ROWS>(header, rows, item.row_count, pass, limits);
    if (pass.segment != segment) {
      segment = pass.segment;
      enter_segment();
    }
    for (int t = pass.first_tile; t < pass.end_tile; ++t) {
      const int key = pass.begin + t * TILE;
      float score[S::SCORE_ROWS];
      load_tile(pass, t, false);
      compute_scores(score, key);
      compute_probabilities(score);
      load_tile(pass, t, true);
      accumulate(key);
      __syncthreads();
    }
    share_sums(pass);
  }

  __device__ void share_sums(const Pass& pass) {
    const float scale = params.power_scale;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < S::SCORE_ROWS; ++i) {
      const int row = 2 * i + warp / 2;
      float sum = row_sum[i];
#pragma unroll
      for (int step = 1; step < WARP; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
      if (lane == 0) halves[row * 2 + warp % 2] = sum;
      if (threadIdx.x % TILE == 0) totals[row] = row_max[i] * scale;
    }
    __syncthreads();
    if (!accumulates()) return;
#pragma unroll
    for (int i = 0; i < S::OUT_ROWS; ++i) {
      const int row = out_row(i);
      pass_max[i] = totals[row];
      pass_sum[i] = pass.seen_by[0] >> row & 1 ? halves[row * 2] + halves[row * 2 + 1] : 0.f;
    }
  }

  __device__ void store(int slot_row, const float (&top)[S::OUT_ROWS],
                        const float (&sum)[S::OUT_ROWS]) const {
    const Slots slots = slots_of<D>(params, head);
#pragma unroll
    for (int i = 0; i < S::OUT_ROWS; ++i) {
      const int row = out_row(i);
      if (!accumulates() || row >= item.row_count) continue;
      if (dimension() == 0) slots.stats[slot_row + row] = {top[i], sum[i]};
      if (sum[i] == 0.f) continue;
      *reinterpret_cast<float4*>(slots.out + int64_t(slot_row + row) * D + dimension()) = {
          out[i][0], out[i][1], out[i][2], out[i][3]};
    }
  }

  __device__ void fold_pass() {
    const Slots slots = slots_of<D>(params, head);
#pragma unroll
    for (int i = 0; i < S::OUT_ROWS; ++i) {
      const int row = out_row(i);
      if (!accumulates() || row >= item.row_count) continue;
      const Weights w = fold(folded_max[i], folded_sum[i], pass_max[i], pass_sum[i]);
      if (w.how == Fold::Replace || folded_sum[i] == 0.f) continue;
      const float4 before = *reinterpret_cast<const float4*>(
          slots.out + int64_t(item.slot_row + row) * D + dimension());
      out[i][0] = fold(w, before.x, out[i][0]);
      out[i][1] = fold(w, before.y, out[i][1]);
      out[i][2] = fold(w, before.z, out[i][2]);
      out[i][3] = fold(w, before.w, out[i][3]);
    }
  }

  __device__ void write_output() const {
#pragma unroll
    for (int i = 0; i < S::OUT_ROWS; ++i) {
      const int r = out_row(i);
      if (!accumulates() || r >= item.row_count) continue;
      const Row row = header.array<Row>(header.rows)[item.row_begin + r];
      const int query_head = head * params.group + row.head;
      const float sum = folded_sum[i];
      const float inverse = sum == 0.f ? 0.f : 1.f / sum;
      float* to = static_cast<float*>(params.out.data) + row_offset(params.out, row, query_head) +
                  dimension();
#pragma unroll
      for (int e = 0; e < 4; ++e) to[e] = sum == 0.f ? 0.f : out[i][e] * inverse;
      if (params.lse && dimension() == 0)
        *lse_place(params, row, query_head) = log_sum<Float32>(folded_max[i], sum);
    }
  }

  __device__ void run() {
    const Row* from = header.array<Row>(header.rows) + item.row_begin;
    for (int r = threadIdx.x; r < item.row_count; r += S::THREADS)
      rows[r] = query_row<float>(params, from[r], head);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < S::OUT_ROWS; ++i) {
      folded_max[i] = -INFINITE;
      folded_sum[i] = 0.f;
    }
    const Pass* passes = header.array<Pass>(header.passes);
    for (int i = item.pass_begin; i < item.pass_end; ++i) {
      attend(passes[i]);
      if (item.what == STORES) {
        store(item.slot_row + (i - item.pass_begin) * item.row_count, pass_max, pass_sum);
      } else {
        fold_pass();
        if (item.what == FOLDS || i + 1 < item.pass_end)
          store(item.slot_row, folded_max, folded_sum);
      }
      __syncthreads();
    }
    if (item.what == WRITES_OUTPUT) write_output();
  }
};

template <int D>
__global__ void __launch_bounds__(ShapeF32<D>::THREADS, ShapeF32<D>::BLOCKS)
    attend_f32_kernel(const __grid_constant__ AttendParams params) {
  extern __shared__ __align__(128) char shared[];
  const Header& header = *params.header;
  const int work = header.num_items * params.kv_heads;
  for (int i = blockIdx.x; i < work; i += gridDim.x) {
    const Item item = header.array<Item>(header.items)[i / params.kv_heads];
    AttentionF32<D>(params, item, i % params.kv_heads, reinterpret_cast<float*>(shared)).run();
    __syncthreads();
  }
}

}  // namespace hogwild::cuda
