// What lies inside a page of the CPU's cache, and the kernels that move tokens into and out of it.
//
//   keys    [Hkv][TILE / 16][units][16]   16 keys side by side, so that scores need no transpose;
//                                         a unit is one float, or two half-precision dimensions
//   values  [Hkv][TILE][padded Dv]        one row a token

#pragma once

#include "kernels.h"
#include "vec.h"

namespace {

using hogwild::Heads;
using hogwild::TILE;
using hogwild::cpu::KEY_BLOCK;

// Elements of a key that share 32 bits.
template <class T>
constexpr int PER_UNIT = 4 / sizeof(typename T::element);

template <class T>
HOGWILD_INLINE int key_units(int head_dim) {
  return head_dim / PER_UNIT<T>;
}

// Element d of the key in `row` of a head's tile.
template <class T>
HOGWILD_INLINE int64_t key_index(int row, int d, int head_dim) {
  const int block = row / KEY_BLOCK, lane = row % KEY_BLOCK;
  const int64_t unit = (int64_t(block) * key_units<T>(head_dim) + d / PER_UNIT<T>)*KEY_BLOCK + lane;
  return unit * PER_UNIT<T> + d % PER_UNIT<T>;
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
      E* stored =
          (E*)a.value_pages + value_base(heads, page, h) + row * hogwild::cpu::padded_value_dim(Dv);
      __builtin_memcpy(stored, value, Dv * sizeof(E));
    }
  }
}

// ---- commit -------------------------------------------------------------------------------

template <class T>
static void commit(const hogwild::cpu::CommitArgs& a, int32_t layer) {
  typedef typename T::element E;
  const Heads& heads = a.heads;
  const int D = heads.head_dim, half = a.half_rotary;
  const int64_t value_row = hogwild::cpu::padded_value_dim(heads.value_dim);
  const float *cos = a.angles, *sin = a.angles + half;
  float x[hogwild::MAX_DIM];
  E* key_pages = (E*)a.layers.key_pages[layer];
  E* value_pages = (E*)a.layers.value_pages[layer];
  for (int32_t i = 0; i < a.length; ++i) {
    const int to = a.target_length + i;
    const int source = a.source_pages[i / TILE], target = a.target_pages[to / TILE];
    for (int h = 0; h < heads.kv_heads; ++h) {
      const E* from_tile = key_pages + key_base(heads, source, h);
      E* to_tile = key_pages + key_base(heads, target, h);
      for (int d = 0; d < D; ++d) x[d] = T::widen(from_tile[key_index<T>(i % TILE, d, D)]);
      rotate(x, cos, sin, half, a.interleaved, 1.f);
      for (int d = 0; d < D; ++d) to_tile[key_index<T>(to % TILE, d, D)] = T::narrow(x[d]);
      __builtin_memcpy(value_pages + value_base(heads, target, h) + (to % TILE) * value_row,
                       value_pages + value_base(heads, source, h) + (i % TILE) * value_row,
                       heads.value_dim * sizeof(E));
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
        out[d] = a.keys ? tile[key_index<T>(row, d, dim)]
                        : tile[row * hogwild::cpu::padded_value_dim(dim) + d];
    }
  }
}

}  // namespace
