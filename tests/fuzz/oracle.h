// What the kernels should compute, in double precision and as simply as possible.

#pragma once

#include <algorithm>
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
  // Whether token i sees any key of the segment.
  bool sees_a_key(int w, int s, int i) const {
    const int64_t position = int64_t(offset(w, s)) + i;
    return sees(w, s) && lengths[s] > 0 && position >= 0 &&
           (window == 0 || position - (lengths[s] - 1) < window);
  }
  std::string words() const;
};

// Keys [L, Hkv, D] and values [L, Hkv, Dv] of a segment, dense, and the length of each key.
struct Dense {
  std::vector<double> keys, values, norms;

  void measure(int dim) {
    norms.clear();
    for (size_t at = 0; at < keys.size(); at += size_t(dim)) norms.push_back(norm(&keys[at], dim));
  }
  static double norm(const double* x, int dim) {
    double sum = 0;
    for (int d = 0; d < dim; ++d) sum += x[d] * x[d];
    return std::sqrt(sum);
  }
};

// How far results may be from the oracle's.
struct Limits {
  double arithmetic;  // relative error of a score's float32 arithmetic
  double weight;      // relative error of a softmax weight
};

// cos and sin of all frequencies at a position.
struct Turn {
  std::vector<double> cos, sin;

  Turn(const Problem& p, int64_t position) {
    for (float frequency : p.inv_freq) {
      const double angle = double(position) * double(frequency);
      cos.push_back(std::cos(angle));
      sin.push_back(std::sin(angle));
    }
  }

  // x [D] is rotated.
  void apply(const Problem& p, double scale, double* x) const {
    const int half = int(cos.size());
    for (int j = 0; j < half; ++j) {
      double& a = x[p.interleaved ? 2 * j : j];
      double& b = x[p.interleaved ? 2 * j + 1 : half + j];
      const double low = a * cos[j] - b * sin[j], high = a * sin[j] + b * cos[j];
      a = low * scale, b = high * scale;
    }
  }
};

// One query's result, and the largest error that arithmetic in float32 explains.
struct Answer {
  std::vector<double> out, out_error;
  double lse, lse_error;
};

// `query` [D] of token i of worker w, not rotated, for one KV head; `turns`: of each segment.
inline Answer answer(const Problem& p, const std::vector<Dense>& segments,
                     const std::vector<Turn>& turns, const Limits& limits, int w, int i,
                     int kv_head, const double* query) {
  const int D = p.head_dim, Dv = p.value_dim;
  const double query_norm = Dense::norm(query, D) * std::max(1.0, std::abs(double(p.rope_scale)));
  std::vector<double> scores, rotated(D);
  std::vector<const double*> seen;
  double top = -INFINITY, error = 0;
  for (int s = 0; s < p.segments; ++s) {
    if (!p.sees(w, s)) continue;
    const int64_t position = int64_t(p.offset(w, s)) + i;
    rotated.assign(query, query + D);
    turns[s].apply(p, p.rope_scale, rotated.data());
    int64_t l = p.window ? std::max<int64_t>(0, position - p.window + 1) : 0;
    for (; l < p.lengths[s] && l <= position; ++l) {
      const int64_t row = l * p.kv_heads + kv_head;
      const double* key = &segments[s].keys[row * D];
      double sums[8] = {};
      for (int d = 0; d < D; d += 8)
        for (int j = 0; j < 8; ++j) sums[j] += rotated[d + j] * key[d + j];
      double score = 0;
      for (double sum : sums) score += sum;
      score *= p.scale;
      if (p.softcap != 0) score = p.softcap * std::tanh(score / p.softcap);
      scores.push_back(score);
      seen.push_back(&segments[s].values[row * Dv]);
      top = std::max(top, score);
      const double most = query_norm * segments[s].norms[row] * std::abs(p.scale);
      error = std::max(error, (2 * most + std::abs(score)) * limits.arithmetic);
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
    // Weights carry 2^-32: products of values far below 1e-26 lose digits, or vanish.
    a.out_error[d] += double(scores.size() + 1) * 0x1p-90;
  }
  return a;
}

}  // namespace fuzz
