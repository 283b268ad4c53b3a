#include "attention_f32.cuh"
#include "launch.h"

namespace hogwild::cuda {

namespace {

template <int D>
void launch_head_dim(const AttendParams& params, unsigned blocks, cudaStream_t stream) {
  using S = ShapeF32<D>;
  auto* kernel = attend_f32_kernel<D>;
  check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes()),
      "attention: shared memory");
  kernel<<<blocks, S::THREADS, S::shared_bytes(), stream>>>(params);
  check(cudaGetLastError(), "attention: launch");
}

}  // namespace

template <>
void launch_attention<Float32>(AttendParams params, int head_dim, int, unsigned blocks,
                               cudaStream_t stream) {
  switch (head_dim) {
    case 64: return launch_head_dim<64>(params, blocks, stream);
    case 96: return launch_head_dim<96>(params, blocks, stream);
    case 128: return launch_head_dim<128>(params, blocks, stream);
    case 256: return launch_head_dim<256>(params, blocks, stream);
  }
}

}  // namespace hogwild::cuda
