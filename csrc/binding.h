// What the two halves of the binding share.

#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <vector>

#include "cpu/backend.h"
#include "plan.h"

namespace hogwild {

namespace py = pybind11;

using Ints = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;
using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Address = uintptr_t;
using Strided = std::array<int64_t, 4>;  // address, worker, token and head stride

inline TokenTensor token_tensor(const Strided& t) {
  return {reinterpret_cast<void*>(t[0]), t[1], t[2], t[3]};
}

inline Heads make_heads(int dtype, int kv_heads, int group, int head_dim, int value_dim) {
  return {DType(dtype), kv_heads, group, head_dim, value_dim};
}

// A softcap so small that e to its power is 1 leaves nothing of a score, and one so large changes
// none that float32 tells apart: those between are what the kernels can divide by.
inline Scoring make_scoring(double scale, double softcap) {
  constexpr double LEAST = 0x1p-24, MOST = 0x1p96;
  if (softcap == 0 || softcap > MOST) return {float(scale), 0.f};
  return {float(scale), float(std::max(softcap, LEAST))};
}

inline const int32_t* data_or_null(const std::optional<Ints>& a) { return a ? a->data() : nullptr; }

inline std::vector<void*> pointers(const std::vector<Address>& addresses) {
  std::vector<void*> p;
  for (Address a : addresses) p.push_back(reinterpret_cast<void*>(a));
  return p;
}

// A plan and the memory its layers work in.
struct StepPlan {
  Plan plan;
  int32_t group;
  cpu::Workspace workspace;
};

// [S, 6]: addresses of keys and values, token and head stride of keys, the same of values.
using SegmentTable = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

inline std::vector<SegmentRows> segment_rows(const SegmentTable& segments) {
  std::vector<SegmentRows> rows;
  rows.reserve(segments.size() / 6);
  const int64_t* s = segments.data();
  for (const int64_t* end = s + segments.size(); s < end; s += 6)
    rows.push_back({reinterpret_cast<const void*>(s[0]), reinterpret_cast<const void*>(s[1]), s[2],
                    s[3], s[4], s[5]});
  return rows;
}

// Adds the submodule `cuda`.
void bind_cuda(py::module_& m);

// Adds the class `TensorReader`.
void bind_tensors(py::module_& m);

}  // namespace hogwild
