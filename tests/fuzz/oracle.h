// What the kernels should compute, in double precision and as simply as possible.

#pragma once

#include <cmath>
#include <vector>

#include "memory.h"

namespace fuzz {

// Everything about a call but its tensors.
struct Problem {
  DType dtype;
  int kv_heads, group, head_dim, value_dim;
  int workers, segments;
  std::vector<int32_t> offsets, lengths, query_lengths;
  std::vector<float> inv_freq;
  int64_t window;  // 0: none
  float scale, rope_scale, softcap;
  bool interleaved;

  int max_query() const {
    int most = 0;
    for (int32_t n : query_lengths) most = n > most ? n : most;
    return most;
  }
  int num_tokens() const {
    int sum = 0;
    for (int32_t n : query_lengths) sum += n;
    return sum;
  }
  int32_t offset(int w, int s) const { return offsets[size_t(w) * segments + s]; }
  bool sees(int w, int s) const { return offset(w, s) != hogwild::HIDDEN; }
  std::string words() const;
};

// Keys [L, Hkv, D] and values [L, Hkv, Dv] of a segment, dense.
struct Dense {
  std::vector<double> keys, values;
};

// How far results may be from the oracle's.
struct Limits {
  double arithmetic;  // relative error of a score's float32 arithmetic
  double weight;      // relative error of a softmax weight
};

// x [D] rotated to a position, in double precision.
inline void rotate(const Problem& p, int64_t position, double scale, double* x) {
  const int half = int(p.inv_freq.size());
  for (int j = 0; j < half; ++j) {
    const double angle = double(position) * double(p.inv_freq[j]);
    const double c = std::cos(angle), s = std::sin(angle);
    double& a = x[p.interleaved ? 2 * j : j];
    double& b = x[p.interleaved ? 2 * j + 1 : half + j];
    const double low = a * c - b * s, high = a * s + b * c;
    a = low * scale, b = high * scale;
  }
}

// One query's result, and the largest error that arithmetic in float32 explains.
struct Answer {
  std::vector<double> out, out_error;
  double lse, lse_error;
};

// `query` [D] of token i of worker w, not rotated, for one KV head.
inline Answer answer(const Problem& p, const std::vector<Dense>& segments, const Limits& limits,
                     int w, int i, int kv_head, const double* query) {
  const int D = p.head_dim, Dv = p.value_dim;
  std::vector<double> scores, rotated(D);
  std::vector<const double*> seen;
  double top = -INFINITY, error = 0;
  for (int s = 0; s < p.segments; ++s) {
    if (!p.sees(w, s)) continue;
    const int64_t position = int64_t(p.offset(w, s)) + i;
    rotated.assign(query, query + D);
    rotate(p, position, p.rope_scale, rotated.data());
    for (int64_t l = 0; l < p.lengths[s] && l <= position; ++l) {
      if (p.window && position - l >= p.window) continue;
      const double* key = &segments[s].keys[(l * p.kv_heads + kv_head) * D];
      double sum = 0, magnitude = 0;
      for (int d = 0; d < D; ++d) {
        sum += rotated[d] * key[d];
        magnitude += std::abs(rotated[d] * key[d]);
      }
      // Rotation mixes two dimensions, so each is off by part of the other as well.
      double query_norm = 0, key_norm = 0;
      for (int d = 0; d < D; ++d) query_norm += query[d] * query[d], key_norm += key[d] * key[d];
      magnitude += std::sqrt(query_norm * key_norm) * std::abs(p.rope_scale);
      sum *= p.scale, magnitude *= std::abs(p.scale);
      if (p.softcap != 0) sum = p.softcap * std::tanh(sum / p.softcap);
      scores.push_back(sum);
      seen.push_back(&segments[s].values[(l * p.kv_heads + kv_head) * Dv]);
      top = std::max(top, sum);
      error = std::max(error, (magnitude + std::abs(sum)) * limits.arithmetic);
    }
  }
  Answer a{std::vector<double>(Dv, 0.0), std::vector<double>(Dv, 0.0), -INFINITY, 0};
  if (scores.empty()) return a;
  double total = 0;
  std::vector<double> share(Dv, 0.0);  // of absolute values
  for (size_t l = 0; l < scores.size(); ++l) {
    const double weight = std::exp(scores[l] - top);
    total += weight;
    for (int d = 0; d < Dv; ++d) {
      a.out[d] += weight * seen[l][d];
      share[d] += weight * std::abs(seen[l][d]);
    }
  }
  a.lse = top + std::log(total);
  const double relative = 2 * error + limits.weight + 4e-6;
  a.lse_error = relative + 1e-6 * std::abs(a.lse);
  for (int d = 0; d < Dv; ++d) {
    a.out[d] /= total;
    a.out_error[d] = 2 * relative * share[d] / total;
    a.out_error[d] += epsilon(p.dtype) * std::abs(a.out[d]) + step(p.dtype);
  }
  return a;
}

}  // namespace fuzz
