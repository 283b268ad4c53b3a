#include "attention_half.cuh"

namespace hogwild::cuda {
template void launch_attention<Float16>(AttendParams, int, int, unsigned, cudaStream_t);
}
