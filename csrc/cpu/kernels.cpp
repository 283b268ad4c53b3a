// The kernels of one instruction set. The build compiles this file once for each, with
// HOGWILD_ISA set to its name.

#include "kernels.h"

#include "angles.h"
#include "attend.h"
#include "ceilings.h"
#include "linear.h"
#include "pages.h"

namespace {

using hogwild::DType;

void attend_any(const hogwild::cpu::AttendArgs& a, const hogwild::cpu::WorkRange& range,
                void* scratch) {
  switch (a.heads.dtype) {
    case DType::Float32: return attend<Float32>(a, range, scratch);
    case DType::Float16: return attend<Float16>(a, range, scratch);
    case DType::BFloat16: return attend<BFloat16>(a, range, scratch);
  }
}

void append_any(const hogwild::cpu::AppendArgs& a, int32_t begin, int32_t end) {
  switch (a.heads.dtype) {
    case DType::Float32: return append<Float32>(a, begin, end);
    case DType::Float16: return append<Float16>(a, begin, end);
    case DType::BFloat16: return append<BFloat16>(a, begin, end);
  }
}

void commit_any(const hogwild::cpu::CommitArgs& a, int32_t layer) {
  switch (a.heads.dtype) {
    case DType::Float32: return commit<Float32>(a, layer);
    case DType::Float16: return commit<Float16>(a, layer);
    case DType::BFloat16: return commit<BFloat16>(a, layer);
  }
}

void read_any(const hogwild::cpu::ReadArgs& a) {
  switch (a.heads.dtype) {
    case DType::Float32: return read<Float32>(a);
    case DType::Float16: return read<Float16>(a);
    case DType::BFloat16: return read<BFloat16>(a);
  }
}

int64_t multiply_add_any(DType dtype, int64_t iterations) {
  switch (dtype) {
    case DType::Float32: return multiply_add<Float32>(iterations);
    case DType::Float16: return multiply_add<Float16>(iterations);
    case DType::BFloat16: return multiply_add<BFloat16>(iterations);
  }
  return 0;
}

void linear_any(const hogwild::cpu::LinearArgs& a, int32_t panel) {
  switch (a.dtype) {
    case DType::Float32: return linear<Float32>(a, panel);
    case DType::Float16: return linear<Float16>(a, panel);
    case DType::BFloat16: return linear<BFloat16>(a, panel);
  }
}

}  // namespace

namespace hogwild::cpu {

#define HOGWILD_CONCAT_(a, b) a##b
#define HOGWILD_CONCAT(a, b) HOGWILD_CONCAT_(a, b)
#define HOGWILD_STRING_(a) #a
#define HOGWILD_STRING(a) HOGWILD_STRING_(a)

extern const Kernels HOGWILD_CONCAT(kernels_, HOGWILD_ISA) = {
    HOGWILD_STRING(HOGWILD_ISA),
    sizeof(Scratch),
    sizeof(HeadState),
    fill_angles,
    attend_any,
    append_any,
    commit_any,
    read_any,
    linear_any,
    read_all,
    multiply_add_any,
};

}  // namespace hogwild::cpu
