#include "cases.h"

#include <algorithm>
#include <cstdio>

#include "../../csrc/cpu/backend.h"

namespace fuzz {

using hogwild::HIDDEN;

DType draw_dtype(Rng& rng) { return rng.pick({DType::Float32, DType::Float16, DType::BFloat16}); }

int draw_dim(Rng& rng) {
  if (rng.chance(0.1)) return int(8 * rng.range(1, 32));
  return rng.pick(
      {8, 16, 24, 32, 40, 48, 56, 64, 64, 64, 72, 88, 96, 104, 120, 128, 128, 136, 256});
}

std::vector<float> draw_frequencies(Rng& rng, int head_dim) {
  int half = rng.pick({head_dim / 2, head_dim / 2, head_dim / 2, head_dim / 4, 3, 1, 0});
  std::vector<float> inv_freq(half);
  const bool usual = rng.chance(0.7);
  for (int j = 0; j < half; ++j)
    inv_freq[j] = usual ? float(std::pow(1e4, -double(j) / half)) : float(rng.uniform());
  return inv_freq;
}

void draw_scoring(Rng& rng, Problem& p) {
  p.window = rng.pick<int64_t>({0, 0, 0, 0, 1, 2, 17, 63, 64, 65, 100, int64_t(1) << 40});
  p.scale = float(std::pow(p.head_dim, -0.5));
  p.scale *= rng.pick({1.f, 1.f, 1.f, 1.f, -1.f, 0.f, 3.f});
  p.rope_scale = rng.pick({1.f, 1.f, 1.25f, 0.5f});
  p.softcap = rng.pick({0.f, 0.f, 0.f, 1.f, 20.f, 50.f});
  p.interleaved = rng.chance(0.3);
}

int draw_length(Rng& rng) {
  if (rng.chance(0.3)) return int(rng.range(0, 80));
  return rng.pick({0, 1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 192, 257});
}

int32_t draw_offset(Rng& rng, int32_t length) {
  switch (rng.range(0, 9)) {
    case 0: return rng.pick({INT32_MAX, INT32_MIN + 1, INT32_MAX - 7, -(1 << 30), 1 << 24});
    case 1: return rng.pick({0, -1, 1, 63, 64});
    case 2: return int32_t(rng.range(-5, 100000));
    default: return int32_t(rng.range(-4, length + 4));
  }
}

Limits limits_of(DType dtype) {
  const std::string isa = hogwild::cpu::kernels().name;
  const bool pairs = dtype == DType::BFloat16 && (isa == "avx512_bf16" || isa == "amx");
  return pairs ? Limits{5e-5, 0x1p-8} : Limits{2e-6, 0};
}

namespace {

void require_near(double actual, double expected, double error, const char* what, int w, int i,
                  int h, int d) {
  const bool near =
      std::isinf(expected) ? actual == expected : std::abs(actual - expected) <= error;
  if (near) return;
  char text[200];
  std::snprintf(text, sizeof text,
                "%s of worker %d, token %d, head %d, dimension %d: expected %.9g within %.2g, got "
                "%.9g",
                what, w, i, h, d, expected, error, actual);
  throw Finding(text);
}

}  // namespace

std::string Problem::words() const {
  const auto list = [](const auto& numbers) {
    std::string text = "[";
    for (auto x : numbers) text += (text.size() > 1 ? ", " : "") + std::to_string(x);
    return text + "]";
  };
  const char* types[] = {"float32", "float16", "bfloat16"};
  char text[300];
  std::snprintf(
      text, sizeof text,
      "%s, %d x %d heads of %d and %d, window %lld, scale %g, rope_scale %g, softcap %g%s",
      types[int(dtype)], kv_heads, group, head_dim, value_dim, static_cast<long long>(window),
      scale, rope_scale, softcap, interleaved ? ", interleaved" : "");
  return std::string(text) + "\n  lengths " + list(lengths) + "\n  query_lengths " +
         list(query_lengths) + "\n  offsets " + list(offsets) + "\n  inv_freq " + list(inv_freq);
}

void check_worker(const Problem& p, const std::vector<Dense>& segments, int w, const Tensor& query,
                  const Tensor& out, int at, int first, const float* lse,
                  const std::vector<bool>& sound) {
  const Limits limits = limits_of(p.dtype);
  const int heads = p.kv_heads * p.group;
  std::vector<double> x(p.head_dim);
  for (int i = 0; i < p.query_lengths[w]; ++i) {
    if (!sound.empty() && !sound[i]) continue;
    std::vector<Turn> turns;
    for (int s = 0; s < p.segments; ++s) turns.emplace_back(p, int64_t(p.offset(w, s)) + i);
    for (int h = 0; h < heads; ++h) {
      for (int d = 0; d < p.head_dim; ++d) x[d] = query.get(at, first + i, h, d);
      const Answer a = answer(p, segments, turns, limits, w, i, h / p.group, x.data());
      for (int d = 0; d < p.value_dim; ++d)
        require_near(out.get(at, first + i, h, d), a.out[d], a.out_error[d], "out", w, i, h, d);
      if (lse) require_near(lse[i * heads + h], a.lse, a.lse_error, "lse", w, i, h, 0);
    }
  }
}

void require_same_rows(const Tensor& a, int a_at, int a_first, const Tensor& b, int b_at,
                       int b_first, int tokens, const std::string& what) {
  const size_t bytes = size_t(a.dim * element_size(a.dtype));
  for (int i = 0; i < tokens; ++i)
    for (int h = 0; h < a.n[2]; ++h)
      if (std::memcmp(a.at(a_at, a_first + i, h), b.at(b_at, b_first + i, h), bytes))
        throw Finding(what + ": other bits in out, token " + std::to_string(i) + ", head " +
                      std::to_string(h));
}

void require_gaps(const Tensor& t, const std::vector<char>& before, const std::string& what) {
  std::vector<char> now = t.copy();
  for (int64_t i = 0; i < t.n[0]; ++i)
    for (int64_t j = 0; j < t.n[1]; ++j)
      for (int64_t k = 0; k < t.n[2]; ++k) {
        const int64_t from = t.at(i, j, k) - t.data;
        std::copy_n(before.begin() + from, t.dim * element_size(t.dtype), now.begin() + from);
      }
  if (now != before) throw Finding(what + ": something was written between its rows");
}

}  // namespace fuzz
