// The kernels beside attention: merge of partial results, append, move. They are short and bound by
// memory; a thread takes one or two dimensions.

#pragma once

#include "item.cuh"

namespace hogwild::cuda {

constexpr int SMALL_THREADS = 128;

// ---- merge --------------------------------------------------------------------------------

// Partial results of a row group, folded from left to right. A block takes one row of one head.
template <class T, int D>
__global__ void __launch_bounds__(SMALL_THREADS)
    merge_kernel(const __grid_constant__ AttendParams params) {
  constexpr int PER_THREAD = (D + SMALL_THREADS - 1) / SMALL_THREADS;
  const Header& header = *params.header;
  const int work = header.num_merges * params.kv_heads;
  for (int i = blockIdx.x; i < work; i += gridDim.x) {
    const Merge merge = header.array<Merge>(header.merges)[i / params.kv_heads];
    const int head = i % params.kv_heads;
    const Slots slots = slots_of<D>(params, head);
    for (int r = blockIdx.y; r < merge.row_count; r += gridDim.y) {
      float top = -INFINITE, sum = 0.f, out[PER_THREAD] = {};
      for (int s = 0; s < merge.num_slots; ++s) {
        const int64_t at = merge.slot_row + int64_t(s) * merge.row_count + r;
        const float2 stats = slots.stats[at];
        const Weights w = fold(top, sum, stats.x, stats.y);
        if (w.how == Fold::Keep) continue;
#pragma unroll
        for (int k = 0; k < PER_THREAD; ++k)
          if (const int d = threadIdx.x + k * SMALL_THREADS; d < D)
            out[k] = fold(w, out[k], slots.out[at * D + d]);
      }
      const Row row = header.array<Row>(header.rows)[merge.row_begin + r];
      const int query_head = head * params.group + row.head;
      auto* to = static_cast<typename T::Element*>(params.out.data) +
                 row_offset(params.out, row, query_head);
      const float inverse = sum == 0.f ? 0.f : 1.f / sum;
#pragma unroll
      for (int k = 0; k < PER_THREAD; ++k)
        if (const int d = threadIdx.x + k * SMALL_THREADS; d < D)
          to[d] = T::narrow(sum == 0.f ? 0.f : out[k] * inverse);
      if (params.lse && threadIdx.x == 0)
        *lse_place(params, row, query_head) = log_sum<T>(top, sum);
    }
  }
}

// ---- append -------------------------------------------------------------------------------

struct AppendParams {
  const Header* header;
  TokenTensor keys, values;
  void* key_pages;
  void* value_pages;
  int32_t kv_heads, head_dim;
  float rope_scale;
  bool interleaved;
};

// Dimension d of a key, rotated by `angles` [2, half].
template <class T>
__device__ __forceinline__ float rotated_key(const typename T::Element* key, const float* angles,
                                             int half, int d, bool interleaved, float rope_scale) {
  const float x = T::widen(key[d]);
  if (d >= 2 * half) return x;
  const int j = interleaved ? d / 2 : d % half;
  const bool low = interleaved ? d % 2 == 0 : d < half;
  const int step = interleaved ? 1 : half;
  const float other = T::widen(key[low ? d + step : d - step]);
  const float cosine = angles[j], sine = angles[j + half];
  return __fmaf_rn(x, cosine, __fmul_rn(other, low ? -sine : sine)) * rope_scale;
}

// Rotates new keys to their place in their segment and stores keys and values. A block takes a
// token of one head.
template <class T>
__global__ void __launch_bounds__(SMALL_THREADS)
    append_kernel(const __grid_constant__ AppendParams params) {
  using Element = typename T::Element;
  const Header& header = *params.header;
  const int64_t D = params.head_dim;
  const int half = header.half_rotary;
  const int work = header.num_tokens * params.kv_heads;
  for (int i = blockIdx.x; i < work; i += gridDim.x) {
    const int t = i / params.kv_heads, head = i % params.kv_heads;
    const int32_t slot = header.array<int32_t>(header.slots)[t];
    const int64_t to = ((int64_t(slot / TILE) * params.kv_heads + head) * TILE + slot % TILE) * D;
    const Element* key = static_cast<const Element*>(params.keys.data) +
                         t * params.keys.token_stride + head * params.keys.head_stride;
    const Element* value = static_cast<const Element*>(params.values.data) +
                           t * params.values.token_stride + head * params.values.head_stride;
    const float* angles = header.array<float>(header.key_angles) + int64_t(t) * 2 * half;
    for (int d = threadIdx.x; d < D; d += SMALL_THREADS) {
      static_cast<Element*>(params.key_pages)[to + d] =
          T::narrow(rotated_key<T>(key, angles, half, d, params.interleaved, params.rope_scale));
      static_cast<Element*>(params.value_pages)[to + d] = value[d];
    }
  }
}

// ---- move ---------------------------------------------------------------------------------

struct MoveParams {
  const char* tables;  // MoveHeader and what it counts off
  int32_t kv_heads, head_dim, num_layers;
  int32_t length, target_length;
  bool interleaved;
};

// Tokens of one table of pages behind those of another one, all layers. A block takes a token of
// one layer.
template <class T>
__global__ void __launch_bounds__(SMALL_THREADS)
    move_kernel(const __grid_constant__ MoveParams params) {
  using Element = typename T::Element;
  const MoveHeader& header = *reinterpret_cast<const MoveHeader*>(params.tables);
  const auto* angles = reinterpret_cast<const float*>(params.tables + header.angles);
  const auto* source_pages = reinterpret_cast<const int32_t*>(params.tables + header.source_pages);
  const auto* target_pages = reinterpret_cast<const int32_t*>(params.tables + header.target_pages);
  const int64_t D = params.head_dim;
  const int layer = blockIdx.y;
  auto* keys = reinterpret_cast<Element* const*>(params.tables + header.key_layers)[layer];
  auto* values = reinterpret_cast<Element* const*>(params.tables + header.value_layers)[layer];
  for (int l = blockIdx.x; l < params.length; l += gridDim.x) {
    const int goal = params.target_length + l;
    const int64_t from_page = source_pages[l / TILE], to_page = target_pages[goal / TILE];
    for (int i = threadIdx.x; i < params.kv_heads * D; i += SMALL_THREADS) {
      const int head = i / int(D), d = i % int(D);
      const int64_t from = ((from_page * params.kv_heads + head) * TILE + l % TILE) * D;
      const int64_t to = ((to_page * params.kv_heads + head) * TILE + goal % TILE) * D;
      keys[to + d] = T::narrow(
          rotated_key<T>(keys + from, angles, header.half_rotary, d, params.interleaved, 1.f));
      values[to + d] = values[from + d];
    }
  }
}

}  // namespace hogwild::cuda
