// Random numbers, memory that shows a stray access, and tensors that lie in it somehow.

#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/attention.h"

namespace fuzz {

using hogwild::DType;
using hogwild::element_size;

// What a case says of something that is wrong.
struct Finding : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void require(bool holds, const char* what) {
  if (!holds) throw Finding(what);
}

// ---- random numbers -----------------------------------------------------------------------

class Rng {
 public:
  Rng(uint64_t seed, uint64_t number) : state_(seed * 0x9e3779b97f4a7c15u + number) {
    for (int i = 0; i < 3; ++i) state_ = next();
  }

  uint64_t next() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  // From low to high, both included.
  int64_t range(int64_t low, int64_t high) { return low + int64_t(next() % (high - low + 1)); }
  bool chance(double p) { return (next() >> 11) * 0x1p-53 < p; }
  double uniform() { return (next() >> 11) * 0x1p-53; }

  template <class T>
  T pick(std::initializer_list<T> list) {
    return list.begin()[next() % list.size()];
  }

 private:
  uint64_t state_;
};

// ---- memory -------------------------------------------------------------------------------

// Blocks of exactly the size asked for. Under a sanitizer they are its own; else each ends where
// memory that nobody may touch begins. What lies before a block, and behind it up to there, is
// looked at in the end.
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  ~Arena();

  // `aligned`: to 64 bytes, else only as far as malloc or the block's end have it.
  char* make(size_t bytes, bool aligned = false);

  // Raises a Finding if anything around a block was written.
  void check() const;

 private:
  struct Block {
    char* start;  // of what was allocated
    size_t before, bytes, behind;
    size_t room;  // of a slot; 0: from malloc
  };
  std::vector<Block> blocks_;
};

// ---- numbers ------------------------------------------------------------------------------

double widen(DType dtype, const void* element);
void put(DType dtype, void* element, float x);  // rounded somehow

// Relative error of rounding to the type, and the least step of its subnormals.
double epsilon(DType dtype);
double step(DType dtype);

// What a tensor's elements are drawn from.
enum class Data { Normal, Outliers, Same, Small, Large, Nan };
Data draw_data(Rng& rng);

// Draws numbers one after the other.
class Numbers {
 public:
  Numbers(Rng& rng, Data data);
  float of(int d);  // the next one, of dimension d

 private:
  Data data_;
  uint32_t at_;
  int outlier_;
  float same_;
};

// ---- tensors ------------------------------------------------------------------------------

// [n0, n1, n2, dim] in memory of its own, the last dimension dense.
struct Tensor {
  DType dtype;
  int64_t n[3];
  int dim;
  int64_t stride[3] = {};
  char* data = nullptr;
  int64_t bytes = 0;

  char* at(int64_t i, int64_t j, int64_t k, int d = 0) const {
    return data + (i * stride[0] + j * stride[1] + k * stride[2] + d) * element_size(dtype);
  }
  double get(int64_t i, int64_t j, int64_t k, int d) const { return widen(dtype, at(i, j, k, d)); }

  void fill(Rng& rng, Data data);
  void fill_bytes(int byte) {
    if (bytes) std::memset(data, byte, size_t(bytes));
  }
  std::vector<char> copy() const { return {data, data + bytes}; }
};

// Strides in any order, with gaps or without; of an input also zero. What lies in the gaps is NaN.
Tensor draw_tensor(Arena& arena, Rng& rng, DType dtype, int64_t n0, int64_t n1, int64_t n2, int dim,
                   bool is_output);

}  // namespace fuzz
