// cos and sin of position * frequency, for rotary embeddings.

#pragma once

#include "vec.h"

namespace {

// The angle is reduced by multiples of pi/2 taken off in four pieces. The first three have so few
// bits that n times them is exact for angles up to FURTHEST; the polynomials are good to 1e-13 on
// [-pi/4, pi/4].
constexpr double FURTHEST = 0x1p32;
HOGWILD_INLINE void cos_sin(double angle, float* cos, float* sin) {
  const double magic = 6755399441055744.0;  // 1.5 * 2^52
  const double shifted = angle * 0.63661977236758134308 + magic;
  const double n = shifted - magic;
  int64_t quadrant;
  __builtin_memcpy(&quadrant, &shifted, 8);

  double r = angle - n * 0x1.921fa00000000p+0;
  r = r - n * 0x1.5444200000000p-20;
  r = r - n * 0x1.a308c00000000p-41;
  r = r - n * 0x1.313198a2e0370p-61;

  const double z = r * r;
  double s = 1.0 / 6227020800.0;
  s = s * z - 1.0 / 39916800.0;
  s = s * z + 1.0 / 362880.0;
  s = s * z - 1.0 / 5040.0;
  s = s * z + 1.0 / 120.0;
  s = s * z - 1.0 / 6.0;
  s = r + r * z * s;
  double c = 1.0 / 87178291200.0;
  c = -c * z + 1.0 / 479001600.0;
  c = c * z - 1.0 / 3628800.0;
  c = c * z + 1.0 / 40320.0;
  c = c * z - 1.0 / 720.0;
  c = c * z + 1.0 / 24.0;
  c = c * z - 0.5;
  c = 1.0 + z * c;

  const bool swap = quadrant & 1;
  const double cos_magnitude = swap ? s : c;
  const double sin_magnitude = swap ? c : s;
  *cos = float((quadrant + 1) & 2 ? -cos_magnitude : cos_magnitude);
  *sin = float(quadrant & 2 ? -sin_magnitude : sin_magnitude);
}

static void fill_angles(const int32_t* positions, int64_t n, const float* inv_freq, int32_t half,
                        float* angles) {
  uint32_t largest = 0;  // as bits, without the sign: they are in the order of the numbers
  for (int32_t j = 0; j < half; ++j) {
    const uint32_t size = float_to_bits(inv_freq[j]) & 0x7fffffff;
    largest = size > largest ? size : largest;
  }
  for (int64_t i = 0; i < n; ++i) {
    const double position = positions[i];
    float* cos = angles + i * 2 * half;
    float* sin = cos + half;
    if (__builtin_fabs(position) * double(bits_to_float(largest)) <= FURTHEST)
      for (int32_t j = 0; j < half; ++j) cos_sin(position * double(inv_freq[j]), &cos[j], &sin[j]);
    else
      for (int32_t j = 0; j < half; ++j) {
        cos[j] = float(__builtin_cos(position * double(inv_freq[j])));
        sin[j] = float(__builtin_sin(position * double(inv_freq[j])));
      }
  }
}

}  // namespace
