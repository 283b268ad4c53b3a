// Kernels and host code for the tests of the runtime, and faults as nvcc compiles them. A line with
// a "// FOUND" comment is where the sanitizer has to find the fault.

#include <cuda_runtime.h>

#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Line {
  float slope;
  double unused;
  float offset;
};

__global__ void line_kernel(float* data, int n, Line line) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) data[i] = data[i] * line.slope + line.offset;
}

__global__ void __launch_bounds__(64) bounded_kernel(float* data) { data[threadIdx.x] = 1.f; }

__global__ void static_kernel(float* data) {
  __shared__ float tile[1024];  // 4 KB
  tile[threadIdx.x] = data[threadIdx.x];
  __syncthreads();
  data[threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];
}

__global__ void dynamic_kernel(float* data) {
  extern __shared__ float dynamic[];
  dynamic[threadIdx.x] = data[threadIdx.x];
  data[threadIdx.x] = dynamic[threadIdx.x] + 1.f;
}

__device__ float neighbour(const float* tile) {
  return tile[threadIdx.x ^ 32];  // FOUND race
}

template <bool WAIT>
__global__ void exchange_kernel(float* data) {
  __shared__ float tile[64];
  tile[threadIdx.x] = data[threadIdx.x];
  if (WAIT) __syncthreads();
  if (threadIdx.x >= 32) data[threadIdx.x] = neighbour(tile);
}

__global__ void shift_kernel(float* data, int by) {
  data[threadIdx.x + by] = 2.f;  // FOUND bounds
}

// Waits for a thread that comes only when this one has left.
__global__ void spin_kernel(float* data) {
  if (threadIdx.x == 0)
    while (data[1] != -1.f) asm volatile("" ::: "memory");
  __syncthreads();
  data[1] = -1.f;
}

// Asks for what is not emulated.
__global__ void volatile_kernel(volatile float* data) { data[0] = data[1]; }

const void* const KERNELS[] = {
    reinterpret_cast<const void*>(line_kernel),     reinterpret_cast<const void*>(bounded_kernel),
    reinterpret_cast<const void*>(static_kernel),   reinterpret_cast<const void*>(dynamic_kernel),
    reinterpret_cast<const void*>(volatile_kernel),
};

}  // namespace

// Each returns a cudaError_t.
EXPORT int test_launch(int kernel, const unsigned* grid, const unsigned* block, size_t shared,
                       uint64_t stream, float* data) {
  const dim3 g(grid[0], grid[1], grid[2]), b(block[0], block[1], block[2]);
  void* params[] = {&data};
  return cudaLaunchKernel(KERNELS[kernel], g, b, params, shared,
                          reinterpret_cast<cudaStream_t>(stream));
}

EXPORT int test_line(float* data, int n, float slope, float offset, uint64_t stream) {
  line_kernel<<<(n + 31) / 32, 32, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
      data, n, Line{slope, 0, offset});
  return cudaGetLastError();
}

EXPORT int test_exchange(float* data, int wait) {
  if (wait)
    exchange_kernel<true><<<1, 64>>>(data);
  else
    exchange_kernel<false><<<1, 64>>>(data);
  return cudaGetLastError();
}

EXPORT int test_shift(float* data, int by) {
  shift_kernel<<<1, 32>>>(data, by);
  return cudaGetLastError();
}

EXPORT int test_spin(float* data) {
  spin_kernel<<<1, 64>>>(data);
  return cudaGetLastError();
}

EXPORT int test_allow_shared(int kernel, int bytes) {
  return cudaFuncSetAttribute(KERNELS[kernel], cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

EXPORT int test_blocks_of_processor(int* blocks, int kernel, int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, KERNELS[kernel], threads, shared);
}

EXPORT int test_attribute(int* value, int attribute, int device) {
  return cudaDeviceGetAttribute(value, cudaDeviceAttr(attribute), device);
}

EXPORT int test_device_count(int* count) { return cudaGetDeviceCount(count); }
EXPORT int test_driver_version(int* version) { return cudaDriverGetVersion(version); }
EXPORT int test_set_device(int device) { return cudaSetDevice(device); }
EXPORT int test_last_error() { return cudaGetLastError(); }
EXPORT int test_peek() { return cudaPeekAtLastError(); }
EXPORT const char* test_error_name(int error) { return cudaGetErrorName(cudaError_t(error)); }
EXPORT const char* test_error_string(int error) { return cudaGetErrorString(cudaError_t(error)); }
EXPORT int test_malloc(void** address, size_t bytes) { return cudaMalloc(address, bytes); }
EXPORT int test_free(void* address) { return cudaFree(address); }
EXPORT int test_copy(void* to, const void* from, size_t bytes) {
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, nullptr);
}
EXPORT int test_fill(void* to, int value, size_t bytes) {
  return cudaMemsetAsync(to, value, bytes, nullptr);
}
EXPORT int test_synchronise() { return cudaDeviceSynchronize(); }

EXPORT int test_is_capturing(int* capturing, uint64_t stream) {
  cudaStreamCaptureStatus status;
  const auto error = cudaStreamIsCapturing(reinterpret_cast<cudaStream_t>(stream), &status);
  *capturing = status == cudaStreamCaptureStatusActive;
  return error;
}
