// What every attention kernel does at the edges of its main loop: read the item's rows, find the
// keys that each row sees in a visit, rotate the queries.

#pragma once

#include "types.cuh"

namespace hogwild::cuda {

// Keys [low, high] that a row sees of a visit; none if high < low.
struct Limits {
  int32_t low, high;
  __device__ bool any() const { return low <= high; }
};

constexpr Limits NOTHING{INT32_MAX, -1};

// What is common to the rows of an item that see something of a visit.
struct Reach {
  int32_t first_tile, last_tile;  // counted from the visit's first; none if last < first
  int32_t inner_low, inner_high;  // all of these rows see keys [inner_low, inner_high]
};

__device__ __forceinline__ Limits find_limits(const Header& header, const Row& row,
                                              const KeyRange& keys) {
  const int32_t offset =
      header.array<int32_t>(header.offsets)[row.worker * header.num_segments + keys.segment];
  if (offset == HIDDEN) return NOTHING;
  const int64_t place = int64_t(offset) + row.token;
  const int64_t low = max(place - header.window + 1, int64_t(keys.begin));
  const int64_t high = min(place, int64_t(keys.end) - 1);
  return low <= high ? Limits{int32_t(low), int32_t(high)} : NOTHING;
}

// Every warp works it out for itself; the first one leaves the limits in shared memory.
template <int ROWS>
__device__ __forceinline__ Reach find_reach(const Header& header, const Row* rows, int row_count,
                                            const KeyRange& keys, Limits* limits) {
  const int lane = threadIdx.x % WARP;
  int32_t first = INT32_MAX, last = -1, inner_low = -1, inner_high = INT32_MAX;
#pragma unroll
  for (int r = lane; r < ROWS; r += WARP) {
    const Limits seen = r < row_count ? find_limits(header, rows[r], keys) : NOTHING;
    if (threadIdx.x < WARP) limits[r] = seen;
    if (seen.any()) {
      first = min(first, seen.low);
      last = max(last, seen.high);
      inner_low = max(inner_low, seen.low);
      inner_high = min(inner_high, seen.high);
    }
  }
  first = __reduce_min_sync(~0u, first);
  last = __reduce_max_sync(~0u, last);
  inner_low = __reduce_max_sync(~0u, inner_low);
  inner_high = __reduce_min_sync(~0u, inner_high);
  if (last < 0) return {0, -1, 0, 0};
  return {(first - keys.begin) / TILE, (last - keys.begin) / TILE, inner_low, inner_high};
}

// Angles of a row's query on a segment: cos and sin of position * inv_freq [R/2].
struct Angles {
  const float* offset;  // [2, R/2]
  const float* token;   // [2, R/2]

  __device__ Angles(const Header& header, const Row& row, int segment) {
    const int64_t half = header.half_rotary;
    offset = header.array<float>(header.offset_angles) +
             (int64_t(row.worker) * header.num_segments + segment) * 2 * half;
    token = header.array<float>(header.token_angles) + row.token * 2 * half;
  }
};

// Angle addition; token 0 adds nothing, and the result is the offset's angle to the bit.
__device__ __forceinline__ float2 add_angles(float cos_a, float sin_a, float cos_b, float sin_b) {
  return {__fmaf_rn(cos_a, cos_b, -__fmul_rn(sin_a, sin_b)),
          __fmaf_rn(sin_a, cos_b, __fmul_rn(cos_a, sin_b))};
}

// Dimension d of a row's query, rotated for a segment and scaled. Any layout, one at a time.
template <class T>
__device__ __forceinline__ float rotated_query(const AttendParams& p, const Header& header,
                                               const typename T::Element* query, const Row& row,
                                               int segment, int d) {
  const int half = header.half_rotary;
  const float x = T::widen(query[d]);
  if (d >= 2 * half) return x * p.query_factor;
  const int j = p.interleaved ? d / 2 : d % half;
  const bool low = p.interleaved ? d % 2 == 0 : d < half;
  const int step = p.interleaved ? 1 : half;
  const float other = T::widen(query[low ? d + step : d - step]);
  const Angles angles(header, row, segment);
  const float2 turn = add_angles(angles.offset[j], angles.offset[j + half], angles.token[j],
                                 angles.token[j + half]);
  const float turned = __fmaf_rn(x, turn.x, __fmul_rn(other, low ? -turn.y : turn.y));
  return turned * (p.query_factor * p.rope_scale);
}

// Score -> powers of two. A softcap is rare: one uniform branch.
__device__ __forceinline__ float cap_score(const AttendParams& p, float score) {
  return p.softcap * tanhf(score * p.score_scale);
}

}  // namespace hogwild::cuda
