// What every attention kernel does at the edges of its main loop: read the item's rows, find the
// keys that each row sees of a pass, rotate the queries.

#pragma once

#include "types.cuh"

namespace hogwild::cuda {

// Keys [low, high] that a row sees of a pass; none if high < low.
struct Limits {
  int32_t low, high;
  __device__ bool any() const { return low <= high; }
};

constexpr Limits NOTHING{INT32_MAX, -1};

// What of a query row the kernels keep in shared memory.
template <class Element>
struct QueryRow {
  const Element* query;
  int32_t worker, token;
};

template <class Element>
__device__ __forceinline__ QueryRow<Element> query_row(const AttendParams& p, const Row& row,
                                                       int head) {
  return {static_cast<const Element*>(p.query.data) +
              row_offset(p.query, row, head * p.group + row.head),
          row.worker, row.token};
}

template <class Element>
__device__ __forceinline__ Limits find_limits(const Header& header, const QueryRow<Element>& row,
                                              const Pass& pass) {
  const int32_t offset =
      header.array<int32_t>(header.offsets)[row.worker * header.num_segments + pass.segment];
  if (offset == HIDDEN) return NOTHING;
  const int64_t place = int64_t(offset) + row.token;
  const int64_t low = max(place - header.window + 1, int64_t(pass.begin));
  const int64_t high = min(place, int64_t(pass.end) - 1);
  return low <= high ? Limits{int32_t(low), int32_t(high)} : NOTHING;
}

// Leaves the limits of all rows in shared memory; those past row_count see nothing.
template <int ROWS, class Element>
__device__ __forceinline__ void find_limits(const Header& header, const QueryRow<Element>* rows,
                                            int row_count, const Pass& pass, Limits* limits) {
  for (int r = threadIdx.x; r < ROWS; r += blockDim.x)
    limits[r] = r < row_count ? find_limits(header, rows[r], pass) : NOTHING;
}

// Angles of a row's query on a segment: cos and sin of position * inv_freq [R/2].
struct Angles {
  const float* offset;  // [2, R/2]
  const float* token;   // [2, R/2]

  __device__ Angles(const Header& header, int worker, int token, int segment) {
    const int64_t half = header.half_rotary;
    offset = header.array<float>(header.offset_angles) +
             (int64_t(worker) * header.num_segments + segment) * 2 * half;
    this->token = header.array<float>(header.token_angles) + token * 2 * half;
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
                                               const QueryRow<typename T::Element>& row,
                                               int segment, int d) {
  const int half = header.half_rotary;
  const float x = T::widen(row.query[d]);
  if (d >= 2 * half) return x * p.query_factor;
  const int j = p.interleaved ? d / 2 : d % half;
  const bool low = p.interleaved ? d % 2 == 0 : d < half;
  const int step = p.interleaved ? 1 : half;
  const float other = T::widen(row.query[low ? d + step : d - step]);
  const Angles angles(header, row.worker, row.token, segment);
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
