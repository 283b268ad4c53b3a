// What this build and this machine have.

#include <cuda_runtime.h>

#include "backend.h"

namespace hogwild::cuda {

std::vector<int32_t> built_architectures() {
  std::vector<int32_t> list = {__CUDA_ARCH_LIST__};  // by nvcc: 800, 900
  for (int32_t& architecture : list) architecture /= 10;
  return list;
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
  if (devices > 0 && device >= devices)
    return {false,  "the GPUs are numbered from 0 to " + std::to_string(devices - 1), 0, 0, driver,
            runtime};
  const int32_t gpu = major * 10 + minor;
  const std::string reason = why_not(runtime, driver, devices, gpu, built_architectures());
  return {reason.empty(), reason, gpu, processors, driver, runtime};
}

}  // namespace hogwild::cuda
