// A linear layer with packed weights.

#include "../../csrc/cpu/backend.h"
#include "cases.h"

namespace fuzz {

using namespace hogwild;

void linear_layer(Rng& rng) {
  Arena arena;
  const DType dtype = draw_dtype(rng);
  const int unit = int(4 / element_size(dtype));
  const int64_t rows = rng.range(0, 3) ? rng.range(1, 14) : rng.range(1, 40);
  const int inputs = unit * int(rng.chance(0.2) ? rng.range(1, 400) : rng.range(1, 70));
  const int outputs = int(rng.chance(0.2) ? rng.range(1, 300) : rng.range(1, 80));
  const int panels = (outputs + cpu::LINEAR_PANEL - 1) / cpu::LINEAR_PANEL;
  const int64_t size = element_size(dtype);

  const Data data = draw_data(rng);
  Numbers numbers(rng, data), weights(rng, Data::Normal);
  std::vector<double> w(size_t(outputs) * inputs);
  // Padded outputs are computed and thrown away.
  char* packed = arena.make(size_t(panels * cpu::LINEAR_PANEL * int64_t(inputs) * size), true);
  std::memset(packed, 0xff, size_t(panels * cpu::LINEAR_PANEL * int64_t(inputs) * size));
  for (int o = 0; o < outputs; ++o)
    for (int i = 0; i < inputs; ++i) {
      const int64_t at = ((int64_t(o / 16) * (inputs / unit) + i / unit) * 16 + o % 16) * unit;
      char* element = packed + (at + i % unit) * size;
      put(dtype, element, weights.of(i));
      w[size_t(o) * inputs + i] = widen(dtype, element);
    }
  char* bias = rng.chance(0.5) ? arena.make(size_t(outputs * size)) : nullptr;
  for (int o = 0; bias && o < outputs; ++o) put(dtype, bias + o * size, weights.of(o));
  float* x = reinterpret_cast<float*>(arena.make(size_t(rows * inputs) * 4));
  for (int64_t i = 0; i < rows * inputs; ++i) {
    // As it comes from a tensor of the layer's type.
    uint32_t element = 0;
    put(dtype, &element, numbers.of(int(i % inputs)));
    x[i] = float(widen(dtype, &element));
  }

  const auto run = [&](int64_t first, int64_t count, int threads) {
    char* out = arena.make(size_t(count * outputs * size));
    std::memset(out, 0xff, size_t(count * outputs * size));
    cpu::linear({dtype, count, inputs, outputs, x + first * inputs, packed, bias, out}, threads);
    return out;
  };
  const char* out = run(0, rows, 1);
  for (int64_t r = 0; r < rows; ++r)
    for (int o = 0; o < outputs; ++o) {
      double sum = bias ? widen(dtype, bias + o * size) : 0, magnitude = std::abs(sum);
      for (int i = 0; i < inputs; ++i) {
        const double product = double(x[r * inputs + i]) * w[size_t(o) * inputs + i];
        sum += product, magnitude += std::abs(product);
      }
      const double got = widen(dtype, out + (r * outputs + o) * size);
      const double error =
          2e-6 * magnitude + epsilon(dtype) * 1.01 * std::abs(sum) + fuzz::step(dtype);
      if (!(std::abs(got - sum) <= error || (dtype == DType::Float16 && std::abs(sum) > 65000)))
        throw Finding("linear: row " + std::to_string(r) + ", output " + std::to_string(o));
    }
  const size_t row_bytes = size_t(outputs * size);
  const int64_t first = rng.range(0, rows - 1), count = rng.range(1, rows - first);
  require(!std::memcmp(run(first, count, int(rng.range(1, 5))), out + size_t(first) * row_bytes,
                       size_t(count) * row_bytes),
          "linear: other bits beside other rows");
  arena.check();
}

}  // namespace fuzz
