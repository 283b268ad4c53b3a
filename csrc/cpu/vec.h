// Vectors of one width W for the instruction set that this file is compiled for. Compiler vector
// types do nearly everything; what they cannot say has one function here.
//
// Everything has internal linkage and nothing from the standard library is used: code that is
// compiled for AVX-512 must never be merged, by the linker, with code for an older CPU.

#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define HOGWILD_LANES 16
#elif defined(__AVX2__)
#define HOGWILD_LANES 8
#else
#define HOGWILD_LANES 4
#endif

#define HOGWILD_INLINE inline __attribute__((always_inline))

namespace {

constexpr int LANES = HOGWILD_LANES;

typedef float vfloat __attribute__((vector_size(LANES * 4)));
typedef int32_t vint __attribute__((vector_size(LANES * 4)));
typedef uint32_t vuint __attribute__((vector_size(LANES * 4)));

template <class V>
HOGWILD_INLINE V load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
HOGWILD_INLINE void store(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

HOGWILD_INLINE vfloat splat(float x) { return x - vfloat{}; }
HOGWILD_INLINE vint splat(int32_t x) { return x - vint{}; }
HOGWILD_INLINE vuint splat(uint32_t x) { return x - vuint{}; }

HOGWILD_INLINE float bits_to_float(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}

HOGWILD_INLINE uint32_t float_to_bits(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}

// a * b + c, fused where the instruction set can. Contraction is off elsewhere, so that the same
// row takes the same rounding in every instantiation. The one-line asm keeps GCC's register
// allocator from spilling accumulators in the inner loops.
#if defined(__FMA__) && defined(__GNUC__) && !defined(__clang__)
HOGWILD_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) {
  asm("vfmadd231ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
  return c;
}
#elif defined(__AVX512F__)
HOGWILD_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) {
  return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
#elif defined(__FMA__)
HOGWILD_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) {
  return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
#else
HOGWILD_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) { return a * b + c; }
#endif

// The larger of each lane; b where either is NaN.
#if defined(__AVX512F__)
constexpr __mmask16 ALL = 0xffff;  // GCC 12 warns about the forms that take no mask
HOGWILD_INLINE vfloat max(vfloat a, vfloat b) {
  return (vfloat)_mm512_maskz_max_ps(ALL, (__m512)a, (__m512)b);
}
#elif defined(__AVX2__)
HOGWILD_INLINE vfloat max(vfloat a, vfloat b) {
  return (vfloat)_mm256_max_ps((__m256)a, (__m256)b);
}
#else
HOGWILD_INLINE vfloat max(vfloat a, vfloat b) { return a > b ? a : b; }
#endif

// Whether any lane is above b, or NaN.
HOGWILD_INLINE bool any_above(vfloat a, float b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)splat(b), _CMP_NLE_UQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)splat(b), _CMP_NLE_UQ)) != 0;
#else
  for (int i = 0; i < LANES; ++i)
    if (!(a[i] <= b)) return true;
  return false;
#endif
}

// Of lanes that are not NaN, if there are any.
HOGWILD_INLINE float max_lane(vfloat v) {
#if defined(__AVX512F__)
  __m512 a = (__m512)v;
  a = _mm512_maskz_max_ps(ALL, a, _mm512_maskz_shuffle_f32x4(ALL, a, a, 0x4e));
  a = _mm512_maskz_max_ps(ALL, a, _mm512_maskz_shuffle_f32x4(ALL, a, a, 0xb1));
  a = _mm512_maskz_max_ps(ALL, a, _mm512_maskz_permute_ps(ALL, a, 0x4e));
  a = _mm512_maskz_max_ps(ALL, a, _mm512_maskz_permute_ps(ALL, a, 0xb1));
  return _mm512_cvtss_f32(a);
#else
  float m = v[0];
  for (int i = 1; i < LANES; ++i) m = v[i] > m || m != m ? v[i] : m;
  return m;
#endif
}

// first, first + 1, ...
HOGWILD_INLINE vint counting(int32_t first) {
  vint v;
  for (int i = 0; i < LANES; ++i) v[i] = i;
  return v + splat(first);
}

// The same tree on every call, so the same bits.
HOGWILD_INLINE float sum_lanes(vfloat v) {
  float x[LANES];
  store(x, v);
  for (int n = LANES / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) x[i] += x[i + n];
  return x[0];
}

// The polynomial with these coefficients, that of the highest power first, times a power of two.
template <int N>
HOGWILD_INLINE vfloat polynomial(vfloat x, const float (&coefficients)[N], float factor = 1.f) {
  vfloat p = splat(coefficients[0] * factor);
#pragma GCC unroll 8
  for (int i = 1; i < N; ++i) p = fma(p, x, splat(coefficients[i] * factor));
  return p;
}

// 2^(x - DOWN) for x <= 128, relative error below 1e-7, or 4e-6 where it will be rounded to 8 bits
// anyway; 0 where that is below 2^-126; NaN stays NaN. Taking DOWN off x would round it.
template <bool ROUNDED = false, int DOWN = 0>
HOGWILD_INLINE vfloat exp2(vfloat x) {
  constexpr float FACTOR = 1.f / (uint64_t(1) << DOWN), LEAST = DOWN - 126.f;
#if defined(__AVX512DQ__)
  // 2^floor(x) * 2^f with f in [0, 1); the first factor is the instruction's own.
  constexpr int FLOOR = 1;
  const vfloat f = (vfloat)_mm512_maskz_reduce_ps(ALL, (__m512)x, FLOOR);
  vfloat p;
  if constexpr (ROUNDED)
    p = polynomial(f, {0.01342668571f, 0.05224247277f, 0.241280213f, 0.6930448413f, 1.f}, FACTOR);
  else
    p = polynomial(f,
                   {0.0002161291632f, 0.001246784581f, 0.009675451554f, 0.05548528209f,
                    0.2402293086f, 0.6931470633f, 1.f},
                   FACTOR);
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(LEAST), _CMP_NLT_UQ);
  return (vfloat)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)x);
#else
  const vfloat magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const vfloat y = max(splat(LEAST - 1), x);
  const vfloat t = y + magic;
  const vfloat f = y - (t - magic);  // in [-1/2, 1/2]
  const vfloat p = polynomial(f,
                              {0.0001546144746f, 0.001339086735f, 0.00961805667f, 0.05550357104f,
                               0.2402265092f, 0.693147188f, 1.f},
                              FACTOR);
  const vfloat scaled = (vfloat)((vint)p + ((vint)t << 23));
  return x < splat(LEAST) ? vfloat{} : scaled;
#endif
}

// Weights of values are so many powers of two below 1 that no sum overflows whose mean does not.
constexpr int HEADROOM = 32;
template <bool ROUNDED>
HOGWILD_INLINE vfloat softmax_weight(vfloat x) {
  return exp2<ROUNDED, HEADROOM>(x);
}

// tanh to about two units in the last place: an odd polynomial near zero, where the exponential
// form would cancel, and (1 - e) / (1 + e) with e = exp(-2 |x|) elsewhere.
HOGWILD_INLINE vfloat tanh(vfloat x) {
  const vfloat a = max(x, -x);
  const vfloat e = exp2(a * splat(-2.8853900817779268f));
  const vfloat far = (splat(1.f) - e) / (splat(1.f) + e);
  const vfloat z = x * x;
  const vfloat p = polynomial(
      z, {-0.0066157547f, 0.0213127445f, -0.05391006651f, 0.1333311762f, -0.3333333205f});
  const vfloat near = fma(p * z, a, a);
  const vfloat magnitude = a < splat(0.55f) ? near : far;
  return x < vfloat{} ? -magnitude : magnitude;
}

// ---- transposing --------------------------------------------------------------------------

struct FourVectors {
  vuint row[4];
};

// Each quarter (128 bits) of the four is a block of 4 x 4: rows become columns.
HOGWILD_INLINE FourVectors transpose_quarters(vuint a, vuint b, vuint c, vuint d) {
#if defined(__AVX512F__)
#define HOGWILD_UNPACK(name, a, b) (vuint) _mm512_maskz_##name(ALL, (__m512i)a, (__m512i)b)
#define HOGWILD_UNPACK64(name, a, b) (vuint) _mm512_maskz_##name(0xff, (__m512i)a, (__m512i)b)
#elif defined(__AVX2__)
#define HOGWILD_UNPACK(name, a, b) (vuint) _mm256_##name((__m256i)a, (__m256i)b)
#define HOGWILD_UNPACK64(name, a, b) (vuint) _mm256_##name((__m256i)a, (__m256i)b)
#endif
#if defined(HOGWILD_UNPACK)
  const vuint ab_low = HOGWILD_UNPACK(unpacklo_epi32, a, b);
  const vuint ab_high = HOGWILD_UNPACK(unpackhi_epi32, a, b);
  const vuint cd_low = HOGWILD_UNPACK(unpacklo_epi32, c, d);
  const vuint cd_high = HOGWILD_UNPACK(unpackhi_epi32, c, d);
  return {{HOGWILD_UNPACK64(unpacklo_epi64, ab_low, cd_low),
           HOGWILD_UNPACK64(unpackhi_epi64, ab_low, cd_low),
           HOGWILD_UNPACK64(unpacklo_epi64, ab_high, cd_high),
           HOGWILD_UNPACK64(unpackhi_epi64, ab_high, cd_high)}};
#else
  return {{vuint{a[0], b[0], c[0], d[0]}, vuint{a[1], b[1], c[1], d[1]},
           vuint{a[2], b[2], c[2], d[2]}, vuint{a[3], b[3], c[3], d[3]}}};
#endif
}

// rows[i][j] <-> rows[j][i].
HOGWILD_INLINE void transpose(vuint (&rows)[LANES]) {
  FourVectors some[LANES / 4];
#pragma GCC unroll 4
  for (int q = 0; q < LANES / 4; ++q)
    some[q] = transpose_quarters(rows[4 * q], rows[4 * q + 1], rows[4 * q + 2], rows[4 * q + 3]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // row 4 j + i is made of the quarters j
#if defined(__AVX512F__)
#define HOGWILD_QUARTERS(a, b, which) \
  _mm512_maskz_shuffle_i32x4(ALL, (__m512i)(a), (__m512i)(b), which)
    const __m512i low01 = HOGWILD_QUARTERS(some[0].row[i], some[1].row[i], 0x44);
    const __m512i high01 = HOGWILD_QUARTERS(some[0].row[i], some[1].row[i], 0xee);
    const __m512i low23 = HOGWILD_QUARTERS(some[2].row[i], some[3].row[i], 0x44);
    const __m512i high23 = HOGWILD_QUARTERS(some[2].row[i], some[3].row[i], 0xee);
    rows[i] = (vuint)HOGWILD_QUARTERS(low01, low23, 0x88);
    rows[4 + i] = (vuint)HOGWILD_QUARTERS(low01, low23, 0xdd);
    rows[8 + i] = (vuint)HOGWILD_QUARTERS(high01, high23, 0x88);
    rows[12 + i] = (vuint)HOGWILD_QUARTERS(high01, high23, 0xdd);
#elif defined(__AVX2__)
    const __m256i first = (__m256i)some[0].row[i], second = (__m256i)some[1].row[i];
    rows[i] = (vuint)_mm256_permute2x128_si256(first, second, 0x20);
    rows[4 + i] = (vuint)_mm256_permute2x128_si256(first, second, 0x31);
#else
    rows[i] = some[0].row[i];
#endif
  }
}

// ---- storage types ------------------------------------------------------------------------
// Half-precision elements are read as 32-bit pairs, the first in the low half. Taking them apart
// costs no shuffle.

struct BFloat16 {
  typedef uint16_t element;

  static HOGWILD_INLINE vfloat first(vuint pairs) { return (vfloat)(pairs << 16); }
  static HOGWILD_INLINE vfloat second(vuint pairs) { return (vfloat)(pairs & 0xffff0000u); }
  static HOGWILD_INLINE float widen(uint16_t x) { return bits_to_float(uint32_t(x) << 16); }
  static HOGWILD_INLINE uint16_t narrow(float x) {  // to nearest, ties to even
    const uint32_t u = float_to_bits(x);
    if (x != x) return uint16_t((u >> 16) | 0x40);
    return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
};

struct Float16 {
  typedef uint16_t element;

  // Lanes hold a half in their low 16 bits.
  static HOGWILD_INLINE vfloat from_low(vuint h) {
#if defined(__AVX512F__)
    return (vfloat)_mm512_maskz_cvtph_ps(ALL, _mm512_maskz_cvtepi32_epi16(ALL, (__m512i)h));
#elif defined(__F16C__) && defined(__AVX2__)
    const __m128i low = _mm256_castsi256_si128((__m256i)h);
    const __m128i high = _mm256_extracti128_si256((__m256i)h, 1);
    return (vfloat)_mm256_cvtph_ps(_mm_packus_epi32(low, high));
#else
    // Shifted into place, the exponent is 112 too small; multiplying repairs it, exactly, and
    // brings subnormals with it. Infinities and NaN need their exponent filled.
    const vfloat scaled = (vfloat)((h & 0x7fffu) << 13) * splat(5.192296858534828e33f);
    const vuint special = (vuint)((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;
    return (vfloat)((vuint)scaled | special | ((h & 0x8000u) << 16));
#endif
  }
  static HOGWILD_INLINE vfloat first(vuint pairs) { return from_low(pairs & 0xffffu); }
  static HOGWILD_INLINE vfloat second(vuint pairs) { return from_low(pairs >> 16); }
  static HOGWILD_INLINE float widen(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16;
    if ((h & 0x7c00) == 0x7c00)
      return bits_to_float(sign | 0x7f800000u | uint32_t(h & 0x3ff) << 13);
    const float scaled = bits_to_float(uint32_t(h & 0x7fff) << 13) * 5.192296858534828e33f;
    return bits_to_float(sign | float_to_bits(scaled));
  }
  static HOGWILD_INLINE uint16_t narrow(float x) {  // to nearest, ties to even
    const uint32_t u = float_to_bits(x), sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
    if (a > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (a >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and above round to infinity
    if (a < 0x38800000) {  // subnormal: let the adder round at 2^-24
      const float shifted = bits_to_float(a) + 0.5f;
      return uint16_t(sign | (float_to_bits(shifted) - 0x3f000000));
    }
    return uint16_t(sign | ((a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13));
  }
};

struct Float32 {
  typedef float element;

  static HOGWILD_INLINE vfloat first(vuint word) { return (vfloat)word; }
  static HOGWILD_INLINE float widen(float x) { return x; }
  static HOGWILD_INLINE float narrow(float x) { return x; }
};

// Elements that share 32 bits.
template <class T>
constexpr int PER_WORD = 4 / sizeof(typename T::element);

// Whether the instruction set multiplies pairs of T as they are. What they are multiplied by then
// has to be pairs of T as well; else it is float32.
template <class T>
constexpr bool MULTIPLIES_PAIRS = false;

#if defined(__AVX512BF16__)
template <>
constexpr bool MULTIPLIES_PAIRS<BFloat16> = true;

// c + a.first * b.first + a.second * b.second
HOGWILD_INLINE vfloat multiply_pairs(vuint a, vuint b, vfloat c) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
  return c;
}
#endif

// Words in which `count` factors for elements of T are kept.
template <class T>
constexpr int factor_words(int count) {
  return MULTIPLIES_PAIRS<T> ? count / 2 : count;
}

// Factors [index, index + LANES) of a row of them. Returns them as they are stored, rounded or not.
template <class T>
HOGWILD_INLINE vfloat store_factors(void* row, int index, vfloat v) {
#if defined(__AVX512BF16__)
  if constexpr (MULTIPLIES_PAIRS<T>) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh((__m512)v);
    __builtin_memcpy((uint16_t*)row + index, &rounded, sizeof rounded);
    return (vfloat)((vuint)_mm512_maskz_cvtepu16_epi32(ALL, rounded) << 16);
  }
#endif
  store((float*)row + index, v);
  return v;
}

// Factors [index, index + 2 LANES) of a row of them, whole: where they are stored with fewer bits,
// cut off, what that leaves follows `remainders` words behind.
template <class T>
HOGWILD_INLINE void store_split_factors(uint32_t* row, int remainders, int index, vfloat a,
                                        vfloat b) {
#if defined(__AVX512BF16__)
  if constexpr (MULTIPLIES_PAIRS<T>) {
    vuint upper_halves;  // indices of 16-bit elements of a and b
    for (int i = 0; i < LANES; ++i) upper_halves[i] = (4 * i + 1) | (4 * i + 3) << 16;
    const vfloat rest_a = a - (vfloat)((vuint)a & 0xffff0000u);
    const vfloat rest_b = b - (vfloat)((vuint)b & 0xffff0000u);
    uint32_t* to = row + index / 2;
    store(to, _mm512_maskz_permutex2var_epi16(~0u, (__m512i)a, (__m512i)upper_halves, (__m512i)b));
    store(to + remainders, _mm512_cvtne2ps_pbh((__m512)rest_b, (__m512)rest_a));
    return;
  }
#endif
  (void)remainders;
  store((float*)row + index, a);
  store((float*)row + index + LANES, b);
}

}  // namespace
