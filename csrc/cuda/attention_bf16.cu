#include "attention_half.cuh"

namespace hogwild::cuda {
template void launch_attention<BFloat16>(AttendParams, int, int, unsigned, cudaStream_t);
}
