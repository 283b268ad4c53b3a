// Why a GPU cannot be used, in words. Host code, in every build.

#include <algorithm>
#include <string>
#include <vector>

#include "backend.h"

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
  // PTX, unlike machine code, is refused by a driver that is older than the compiler.
  const bool ptx =
      driver >= runtime && !built.empty() && *std::max_element(built.begin(), built.end()) <= gpu;
  if (machine_code || ptx) return "";
  std::string names;
  for (int32_t a : built) names += (names.empty() ? "sm_" : ", sm_") + std::to_string(a);
  return "the GPU has compute capability " + capability(gpu) + " and this build is for " + names +
         ": install hogwild_ext again on this machine, or with HOGWILD_CUDA_ARCHS=" +
         std::to_string(gpu);
}

}  // namespace hogwild::cuda
