// What the machine can do at most: reading memory, and multiply-adds in registers. The benchmarks
// hold the kernels against these.
//
// Everything has internal linkage, as in vec.h.

#pragma once

#include "multiply.h"

namespace {

// ---- reading ------------------------------------------------------------------------------

// The sum of the 32-bit words, so that nothing is left out; `bytes` is a multiple of 4.
inline uint32_t read_all(const void* data, int64_t bytes) {
  constexpr int UNROLL = 8;  // loads in flight, each with a sum of its own
  constexpr int64_t STEP = UNROLL * int64_t(sizeof(vuint));
  const char* p = static_cast<const char*>(data);
  const char* end = p + bytes;
  vuint sums[UNROLL] = {};
  for (; end - p >= STEP; p += STEP)
    for (int i = 0; i < UNROLL; ++i) sums[i] += load<vuint>(p + i * sizeof(vuint));
  uint32_t total = 0;
  for (const vuint& sum : sums)
    for (int i = 0; i < LANES; ++i) total += sum[i];
  for (; p < end; p += 4) total += load<uint32_t>(p);
  return total;
}

// ---- multiply-adds ------------------------------------------------------------------------

// A value that the compiler knows nothing about, in a register: else it would move products out of
// the loop.
HOGWILD_INLINE void forget(vfloat& x) {
#if defined(__AVX512F__)
  asm volatile("" : "+v"(x));
#elif defined(__x86_64__)
  asm volatile("" : "+x"(x));
#elif defined(__aarch64__)
  asm volatile("" : "+w"(x));
#else
  asm volatile("" : "+m"(x));
#endif
}

// Independent multiply-adds with the instruction that the kernels of type T multiply with. To be
// specialised for a T that an instruction set has other products for.
template <class T>
struct MultiplyAdd {
  static constexpr int CHAINS = 12;  // cover the latency, and leave registers of 16 for the factors
  static constexpr int64_t PRODUCTS = int64_t(CHAINS) * LANES;  // of an iteration

  static void run(int64_t iterations) {
    vfloat a = splat(0.5f), b = splat(0.25f), sums[CHAINS] = {};
    for (int64_t i = 0; i < iterations; ++i)
      for (int c = 0; c < CHAINS; ++c) {
        forget(a);
        sums[c] = fma(a, b, sums[c]);
      }
    for (vfloat& sum : sums) forget(sum);
  }
};

#if defined(__AMX_BF16__)
template <>
struct MultiplyAdd<BFloat16> {
  static constexpr int64_t PRODUCTS = 4 * AMX_ROWS * 16 * 2 * WORDS_AT_ONCE;

  static void run(int64_t iterations) {
    AmxTiles tiles;
    tiles.configure(AMX_ROWS, AMX_ROWS, WORDS_AT_ONCE);  // all zero
    for (int64_t i = 0; i < iterations; ++i) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
};
#elif defined(__AVX512BF16__)
template <>
struct MultiplyAdd<BFloat16> {
  static constexpr int CHAINS = 12;
  static constexpr int64_t PRODUCTS = int64_t(CHAINS) * LANES * 2;

  static void run(int64_t iterations) {
    vfloat a = {}, sums[CHAINS] = {};
    const vuint b = {};
    for (int64_t i = 0; i < iterations; ++i)
      for (int c = 0; c < CHAINS; ++c) {
        forget(a);
        sums[c] = multiply_pairs((vuint)a, b, sums[c]);
      }
    for (vfloat& sum : sums) forget(sum);
  }
};
#endif

// Returns how many multiply-adds it has done.
template <class T>
int64_t multiply_add(int64_t iterations) {
  MultiplyAdd<T>::run(iterations);
  return iterations * MultiplyAdd<T>::PRODUCTS;
}

}  // namespace
