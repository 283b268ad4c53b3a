// Launches the tensor-core kernels of one storage type.

#pragma once

#include "attention.cuh"
#include "launch.h"

namespace hogwild::cuda {

template <class T, int D, int ROW_TILES>
void launch_shape(const AttendParams& params, unsigned blocks, cudaStream_t stream) {
  using S = Shape<D, ROW_TILES>;
  auto* kernel = attend_kernel<T, D, ROW_TILES>;
  // The architecture that the code was compiled for, which the driver may have translated further.
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "attention: attributes");
  const int bytes = S::shared_bytes(S::ring(attributes.ptxVersion));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "attention: shared memory");
  kernel<<<blocks, S::THREADS, bytes, stream>>>(params);
  check(cudaGetLastError(), "attention: launch");
}

// 16 and 32 rows are what decoding brings, 64 is for prefill; with 256 dimensions the queries of 64
// rows would not leave room for the ring on GPUs with 99 KB a block.
template <class T, int D>
void launch_head_dim(const AttendParams& params, int most_rows, unsigned blocks,
                     cudaStream_t stream) {
  if (most_rows <= 16) return launch_shape<T, D, 1>(params, blocks, stream);
  if constexpr (D > 128) {
    launch_shape<T, D, 2>(params, blocks, stream);
  } else {
    if (most_rows <= 32) return launch_shape<T, D, 2>(params, blocks, stream);
    launch_shape<T, D, 4>(params, blocks, stream);
  }
}

template <class T>
void launch_attention(AttendParams params, int head_dim, int most_rows, unsigned blocks,
                      cudaStream_t stream) {
  switch (head_dim) {
    case 64: return launch_head_dim<T, 64>(params, most_rows, blocks, stream);
    case 96: return launch_head_dim<T, 96>(params, most_rows, blocks, stream);
    case 128: return launch_head_dim<T, 128>(params, most_rows, blocks, stream);
    case 256: return launch_head_dim<T, 256>(params, most_rows, blocks, stream);
  }
}

}  // namespace hogwild::cuda
