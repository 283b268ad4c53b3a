// What this machine has, and why a GPU cannot be used.

#include <cuda_runtime.h>

#include <algorithm>
#include <sstream>

#include "backend.h"

// Architectures of the build, such as 80,90; the last one is there as PTX too.
#ifndef HOGWILD_CUDA_ARCHITECTURES
#define HOGWILD_CUDA_ARCHITECTURES 80
#endif

namespace hogwild::cuda {

namespace {

constexpr int32_t OLDEST = 80;

std::string version(int number) {  // 13000 -> 13.0
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

std::string capability(int number) {  // 86 -> 8.6
  return std::to_string(number / 10) + "." + std::to_string(number % 10);
}

}  // namespace

std::vector<int32_t> built_architectures() { return {HOGWILD_CUDA_ARCHITECTURES}; }

std::string why_not(int32_t runtime, int32_t driver, int32_t devices, int32_t gpu,
                    const std::vector<int32_t>& built) {
  if (driver == 0)
    return "there is no NVIDIA driver: install one that runs CUDA " + version(runtime) +
           " (https://www.nvidia.com/drivers)";
  // Within a major version of CUDA older drivers run newer code.
  if (driver / 1000 < runtime / 1000)
    return "the NVIDIA driver runs CUDA " + version(driver) + " at most and this build needs " +
           version(runtime) +
           ": update the driver, or install hogwild_ext again with nvcc of CUDA " +
           std::to_string(driver / 1000);
  if (devices == 0)
    return "the NVIDIA driver shows no GPU: see nvidia-smi and CUDA_VISIBLE_DEVICES";
  if (gpu < OLDEST)
    return "the GPU has compute capability " + capability(gpu) + " and the kernels need " +
           capability(OLDEST) + " (Ampere) or newer: use device='cpu'";
  const bool machine_code = std::any_of(built.begin(), built.end(),
                                        [&](int32_t a) { return a / 10 == gpu / 10 && a <= gpu; });
  const bool ptx = !built.empty() && *std::max_element(built.begin(), built.end()) <= gpu;
  if (machine_code || ptx) return "";
  std::ostringstream names;
  for (int32_t a : built) names << (names.tellp() > 0 ? ", " : "") << "sm_" << a;
  return "the GPU has compute capability " + capability(gpu) + " and this build is for " +
         names.str() + ": install hogwild_ext again with HOGWILD_CUDA_ARCHS=" + std::to_string(gpu);
}

DeviceState device_state(int32_t device) {
  int runtime = 0, driver = 0, devices = 0, major = 0, minor = 0, processors = 0;
  cudaRuntimeGetVersion(&runtime);
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  if (driver / 1000 >= runtime / 1000 && cudaGetDeviceCount(&devices) != cudaSuccess) devices = 0;
  if (device < devices) {
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  cudaGetLastError();  // what failed above is in the sentence, not for the next launch to find
  const int32_t gpu = major * 10 + minor;
  const std::string reason = why_not(runtime, driver, devices, gpu, built_architectures());
  return {reason.empty(), reason, gpu, processors};
}

}  // namespace hogwild::cuda
