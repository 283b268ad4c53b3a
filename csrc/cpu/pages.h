// What lies inside a page of the CPU's cache, and the kernels that move tokens into and out of it.
//
// Both kinds of tile are laid out as multiply.h reads them, in words of 32 bits, a word being one
// float or two half-precision elements that are summed over: dimensions of a key, tokens of a
// value.
//
//   keys    [Hkv][TILE / 16][D / n][16]    word (b, d, i): dimensions n d, ... of token 16 b + i
//   values  [Hkv][TILE / n][padded Dv]     word (t, d): dimension d of tokens n t, ...
//
// with n = 1 for float32 and 2 for half types.

#pragma once

#include "kernels.h"
#include "multiply.h"

namespace {

using hogwild::Heads;
using hogwild::TILE;

// Element d of the key in `row` of a head's tile.
template <class T>
HOGWILD_INLINE int64_t key_index(int row, int d, int dim) {
  constexpr int N = PER_WORD<T>;
  return row / COLUMN_BLOCK * int64_t(COLUMN_BLOCK) * dim +
         (d / N * COLUMN_BLOCK + row % COLUMN_BLOCK) * N + d % N;
}

// Element d of the value in `row`, padded_dim being the padded Dv.
template <class T>
HOGWILD_INLINE int64_t value_index(int row, int d, int64_t padded_dim) {
  constexpr int N = PER_WORD<T>;
  return (row / N * padded_dim + d) * N + row % N;
}

// Where a head's part of a page begins, in elements.
HOGWILD_INLINE int64_t key_base(const Heads& heads, int page, int head) {
  return (int64_t(page) * heads.kv_heads + head) * TILE * heads.head_dim;
}

HOGWILD_INLINE int64_t value_base(const Heads& heads, int page, int head) {
  const int64_t row = hogwild::cpu::padded_value_dim(heads.value_dim);
  return (int64_t(page) * heads.kv_heads + head) * TILE * row;
}

// Rotates x [dim] in place: pair (a, b) -> (a cos - b sin, a sin + b cos), times scale. The
// dimensions past 2 * half stay as they are.
HOGWILD_INLINE void rotate(float* x, const float* cos, const float* sin, int half, bool interleaved,
                           float scale) {
  if (interleaved) {
    for (int j = 0; j < half; ++j) {
      const float a = x[2 * j], b = x[2 * j + 1];
      x[2 * j] = (a * cos[j] - b * sin[j]) * scale;
      x[2 * j + 1] = (a * sin[j] + b * cos[j]) * scale;
    }
  } else {
    float* __restrict__ low = x;
    float* __restrict__ high = x + half;
    for (int j = 0; j < half; ++j) {
      const float a = low[j], b = high[j];
      low[j] = (a * cos[j] - b * sin[j]) * scale;
      high[j] = (a * sin[j] + b * cos[j]) * scale;
    }
  }
}

// ---- append -------------------------------------------------------------------------------

template <class T>
static void append(const hogwild::cpu::AppendArgs& a, int32_t begin, int32_t end) {
  typedef typename T::element E;
  const Heads& heads = a.heads;
  const int D = heads.head_dim, Dv = heads.value_dim, half = a.plan->half_rotary;
  const int64_t padded_dim = hogwild::cpu::padded_value_dim(Dv);
  float x[hogwild::MAX_DIM];
  for (int32_t t = begin; t < end; ++t) {
    const int page = a.plan->slots[t] / TILE, row = a.plan->slots[t] % TILE;
    const float* cos = a.plan->key_angles + int64_t(t) * 2 * half;
    for (int h = 0; h < heads.kv_heads; ++h) {
      const E* key = (const E*)a.keys.data + t * a.keys.token_stride + h * a.keys.head_stride;
      for (int d = 0; d < D; ++d) x[d] = T::widen(key[d]);
      rotate(x, cos, cos + half, half, a.rope.interleaved, a.rope.scale);
      E* tile = (E*)a.key_pages + key_base(heads, page, h);
      for (int d = 0; d < D; ++d) tile[key_index<T>(row, d, D)] = T::narrow(x[d]);

      const E* value =
          (const E*)a.values.data + t * a.values.token_stride + h * a.values.head_stride;
      tile = (E*)a.value_pages + value_base(heads, page, h);
      for (int d = 0; d < Dv; ++d) tile[value_index<T>(row, d, padded_dim)] = value[d];
    }
  }
}

// ---- commit -------------------------------------------------------------------------------

template <class T>
static void commit(const hogwild::cpu::CommitArgs& a, int32_t layer) {
  typedef typename T::element E;
  const Heads& heads = a.heads;
  const int D = heads.head_dim, half = a.half_rotary;
  const int64_t padded_dim = hogwild::cpu::padded_value_dim(heads.value_dim);
  const float *cos = a.angles, *sin = a.angles + half;
  float x[hogwild::MAX_DIM];
  E* key_pages = (E*)a.layers.key_pages[layer];
  E* value_pages = (E*)a.layers.value_pages[layer];
  for (int32_t i = 0; i < a.length; ++i) {
    const int to = a.target_length + i;
    const int source = a.source_pages[i / TILE], target = a.target_pages[to / TILE];
    const int from_row = i % TILE, to_row = to % TILE;
    for (int h = 0; h < heads.kv_heads; ++h) {
      const E* from_tile = key_pages + key_base(heads, source, h);
      E* to_tile = key_pages + key_base(heads, target, h);
      for (int d = 0; d < D; ++d) x[d] = T::widen(from_tile[key_index<T>(from_row, d, D)]);
      rotate(x, cos, sin, half, a.interleaved, 1.f);
      for (int d = 0; d < D; ++d) to_tile[key_index<T>(to_row, d, D)] = T::narrow(x[d]);
      from_tile = value_pages + value_base(heads, source, h);
      to_tile = value_pages + value_base(heads, target, h);
      for (int d = 0; d < heads.value_dim; ++d)
        to_tile[value_index<T>(to_row, d, padded_dim)] =
            from_tile[value_index<T>(from_row, d, padded_dim)];
    }
  }
}

// ---- read back ----------------------------------------------------------------------------

template <class T>
static void read(const hogwild::cpu::ReadArgs& a) {
  typedef typename T::element E;
  const Heads& heads = a.heads;
  const int dim = a.keys ? heads.head_dim : heads.value_dim;
  const E* pages = (const E*)a.pages;
  for (int32_t i = 0; i < a.length; ++i) {
    const int page = a.page_table[(a.start + i) / TILE], row = (a.start + i) % TILE;
    for (int h = 0; h < heads.kv_heads; ++h) {
      E* out = (E*)a.out + (int64_t(i) * heads.kv_heads + h) * dim;
      const E* tile = pages + (a.keys ? key_base(heads, page, h) : value_base(heads, page, h));
      for (int d = 0; d < dim; ++d)
        out[d] = tile[a.keys ? key_index<T>(row, d, dim)
                             : value_index<T>(row, d, hogwild::cpu::padded_value_dim(dim))];
    }
  }
}

}  // namespace
