// PTX instructions that CUDA C++ has no words for: one function each.

#pragma once

#include <cstdint>

namespace hogwild::cuda {

// Address of shared memory as the instructions below want it.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

// Loads and stores at addresses of shared memory. As pointers they keep the older of nvcc's two
// front ends busy for hours with finding out that they are shared.
__device__ __forceinline__ void store_shared(uint32_t address, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, uint2 x) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(x.x), "r"(x.y) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
}

__device__ __forceinline__ float4 load_shared(uint32_t address) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

// The same value, computed once: what is kept in a register is cheaper than what the compiler works
// out again in every turn of a loop.
template <class V>
__device__ __forceinline__ V kept(V x) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8, "a register or two");
  if constexpr (sizeof(V) == 4)
    asm volatile("mov.b32 %0, %0;" : "+r"(x));
  else
    asm volatile("mov.b64 %0, %0;" : "+l"(x));
  return x;
}

// p + count * bytes in one instruction; written as a product it becomes five.
__device__ __forceinline__ const char* advance(const char* p, int32_t count, int32_t bytes) {
  int64_t address;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(address) : "r"(count), "r"(bytes), "l"(p));
  return reinterpret_cast<const char*>(address);
}

// Copies 16 bytes to shared memory in the background, past the L1 cache (each byte is read once).
__device__ __forceinline__ void copy_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// The same, but only `bytes` of the 16 are read and the others are zero.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}

// Closes a group of copies; wait_copies counts groups.
__device__ __forceinline__ void end_copy_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until all but the newest N groups of this thread's copies have arrived.
template <int N>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane 8 i + r gives the address of row r of matrix i, and
// gets elements 2 (lane % 4), + 1 of row lane / 4 of each: operands of mma as they lie in memory.
__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}

// The same, each matrix transposed: values, whose rows are the summed dimension.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&m)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}

// Two matrices; lanes 16 to 31 give addresses that are not used.
__device__ __forceinline__ void load_2_matrices_transposed(uint32_t (&m)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(m[0]), "=r"(m[1])
               : "r"(address)
               : "memory");
}

// 2^x within 2 units in the last place, 0 for -inf; exp2f spends a hundred instructions a tile on
// subnormal results, which a softmax has no use for.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace hogwild::cuda
