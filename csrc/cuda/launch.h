// What the launchers of one library share: errors, device limits, and the kernels by their shape.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "backend.h"
#include "types.cuh"

namespace hogwild::cuda {

// Throws std::runtime_error with the name of what failed.
void check(cudaError_t status, const char* what);

// One translation unit a storage type, so that they compile side by side.
template <class T>
void launch_attention(AttendParams params, int head_dim, int most_rows, unsigned blocks,
                      cudaStream_t stream);

}  // namespace hogwild::cuda
