// Storage types, the parameters of the attention kernels and the fold of partial results.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../attention.h"
#include "ptx.cuh"
#include "tables.h"

namespace hogwild::cuda {

constexpr int WARP = 32;
constexpr float LN_2 = 0.69314718055994530942f;
constexpr float LOG2_E = 1.44269504088896340736f;
constexpr float INFINITE = __builtin_huge_valf();
// Probabilities are those of exponents up to so much too large (in powers of two) before a row's
// results are rescaled: with PROBABILITY_BIAS the largest of float16 are 2^15.
constexpr float RISE = 5.f;

// ---- storage types ------------------------------------------------------------------------

struct BFloat16 {
  using Element = __nv_bfloat16;
  static constexpr bool SUMS_ROUNDED = false;
  // Probabilities are multiplied by 2^-32, so that no sum of values overflows whose mean does not.
  static constexpr float PROBABILITY_BIAS = -32.f;
  static constexpr float SUM_BIAS = 0.f;  // of that, what a partial result's max leaves out
  static constexpr float QUERY_FACTOR = 1.f;

  static __device__ __forceinline__ float widen(Element x) { return __bfloat162float(x); }
  static __device__ __forceinline__ Element narrow(float x) { return __float2bfloat16_rn(x); }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t pair) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  }
  // c += a b for a 16x16, b 16x8, c 16x8 tile.
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

struct Float16 {
  using Element = __half;
  // The sum is that of the probabilities as the tensor cores see them: where a row sees one key, or
  // hardly any other, rounding then cancels. For bfloat16, whose output is coarse, it does not pay.
  static constexpr bool SUMS_ROUNDED = true;
  // Probabilities are multiplied by 2^10, so that those above 2^-24 are normal numbers, and queries
  // by 1/2, so that a rotation does not overflow. The sum and the scale take both out again.
  static constexpr float PROBABILITY_BIAS = 10.f;
  static constexpr float SUM_BIAS = 0.f;
  static constexpr float QUERY_FACTOR = 0.5f;

  static __device__ __forceinline__ float widen(Element x) { return __half2float(x); }
  static __device__ __forceinline__ Element narrow(float x) { return __float2half_rn(x); }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t pair) {
    return __half22float2(reinterpret_cast<const __half2&>(pair));
  }
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

struct Float32 {
  using Element = float;
  static constexpr float PROBABILITY_BIAS = -32.f;  // as for bfloat16
  static constexpr float SUM_BIAS = PROBABILITY_BIAS;
  static constexpr float QUERY_FACTOR = 1.f;

  static __device__ __forceinline__ float widen(Element x) { return x; }
  static __device__ __forceinline__ Element narrow(float x) { return x; }
};

// ---- parameters of attention --------------------------------------------------------------

struct AttendParams {
  const Header* header;
  const void* key_pages;  // or null
  const void* value_pages;
  TokenTensor query;
  TokenTensor out;
  float* lse;  // or null
  int64_t lse_worker_stride, lse_token_stride;
  float* workspace;
  int32_t kv_heads;
  int32_t group;
  float query_factor;  // of the rotated query, takes the scale's sign
  float rope_scale;    // of the rotated dimensions
  float score_scale;   // of <q, k>, to the softcap's unit
  float softcap;       // in powers of two; 0 = none
  float power_scale;   // > 0, of a score, capped or not, to powers of two
  float rise;          // RISE in the unit of scores
  bool interleaved;
  bool wide_query;     // its rows start at multiples of 8 bytes
  bool wide_out;       // its rows start at multiples of 4 bytes
};

// ---- fold ---------------------------------------------------------------------------------
// A partial result is (max, sum, out): a number near the largest score in powers of two, the sum of
// 2^(score - max) and the values weighted with the same. sum = 0 says that nothing was seen; then
// neither max nor out means anything.

enum class Fold { Keep, Replace, Mix };

struct Weights {
  Fold how;
  float kept, added;
};

// Folds (max_b, sum_b) into (max_a, sum_a); says how out follows.
__device__ __forceinline__ Weights fold(float& max_a, float& sum_a, float max_b, float sum_b) {
  if (sum_b == 0.f) return {Fold::Keep, 1.f, 0.f};
  if (sum_a == 0.f) {
    max_a = max_b;
    sum_a = sum_b;
    return {Fold::Replace, 0.f, 1.f};
  }
  const float top = fmaxf(max_a, max_b);
  const Weights w{Fold::Mix, max_a == top ? 1.f : exp2_fast(max_a - top),
                  max_b == top ? 1.f : exp2_fast(max_b - top)};
  max_a = top;
  sum_a = __fmaf_rn(sum_a, w.kept, __fmul_rn(sum_b, w.added));
  return w;
}

__device__ __forceinline__ float fold(const Weights& w, float a, float b) {
  return w.how == Fold::Keep      ? a
         : w.how == Fold::Replace ? b
                                  : __fmaf_rn(a, w.kept, __fmul_rn(b, w.added));
}

template <class T>
__device__ __forceinline__ float log_sum(float max, float sum) {
  return sum == 0.f ? -INFINITE : (max + (log2f(sum) - T::SUM_BIAS)) * LN_2;
}

// ---- places -------------------------------------------------------------------------------

// Element 0 of a row of the query or of the output.
__device__ __forceinline__ int64_t row_offset(const TokenTensor& t, const Row& row, int head) {
  return row.worker * t.worker_stride + row.index * t.token_stride + head * t.head_stride;
}

__device__ __forceinline__ float* lse_place(const AttendParams& p, const Row& row, int head) {
  return p.lse + row.worker * p.lse_worker_stride + row.index * p.lse_token_stride + head;
}

// Slots of a KV head: outs [slot_rows, D] first, then (max, sum) [slot_rows].
struct Slots {
  float* out;
  float2* stats;
};

template <int D>
__device__ __forceinline__ Slots slots_of(const AttendParams& p, int head) {
  const int64_t rows = p.header->slot_rows;
  return {p.workspace + head * rows * D,
          reinterpret_cast<float2*>(p.workspace + p.kv_heads * rows * D) + head * rows};
}

}  // namespace hogwild::cuda
