// Launchers of everything but the attention kernels, and the operations of backend.h.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <stdexcept>
#include <string>

#include "launch.h"
#include "small.cuh"

namespace hogwild::cuda {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorName(status) + " (" +
                           cudaGetErrorString(status) + ")");
}

namespace {

// While a graph is captured nothing may be left out that a later step would need.
bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "capture status");
  return status != cudaStreamCaptureStatusNone;
}

// Calls f with the storage type.
template <class F>
void dispatch(DType dtype, F f) {
  switch (dtype) {
    case DType::Float32: return f(Float32{});
    case DType::Float16: return f(Float16{});
    case DType::BFloat16: return f(BFloat16{});
  }
}

bool is_multiple(const TokenTensor& t, int64_t elements, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(t.data) % bytes == 0 && t.worker_stride % elements == 0 &&
         t.token_stride % elements == 0 && t.head_stride % elements == 0;
}

AttendParams make_params(const AttendArgs& args) {
  AttendParams p{};
  p.header = static_cast<const Header*>(args.step.tables);
  p.key_pages = args.key_pages;
  p.value_pages = args.value_pages;
  p.query = args.query;
  p.out = args.out;
  p.lse = args.lse;
  p.lse_worker_stride = args.lse_worker_stride;
  p.lse_token_stride = args.lse_token_stride;
  p.workspace = args.workspace;
  p.kv_heads = args.heads.kv_heads;
  p.group = args.heads.group;
  p.rope_scale = args.rope.scale;
  p.interleaved = args.rope.interleaved;

  const float query_factor =
      args.heads.dtype == DType::Float16 ? Float16::QUERY_FACTOR : BFloat16::QUERY_FACTOR;
  const float scale = std::fabs(args.scoring.scale) / query_factor;
  p.query_factor = std::copysign(query_factor, args.scoring.scale);
  const auto finite = [](float x) { return std::min(x, FLT_MAX); };
  if (args.scoring.scale == 0.f) {  // it would turn the -inf of an unseen key into nan
    p.query_factor = 0.f;
    p.power_scale = 1.f;
  } else if (args.scoring.softcap != 0.f) {
    p.score_scale = finite(scale / args.scoring.softcap);
    p.softcap = args.scoring.softcap * LOG2_E;
    p.power_scale = 1.f;
  } else {
    p.power_scale = finite(scale * LOG2_E);
  }
  p.rise = finite(RISE / p.power_scale);
  p.wide_query = is_multiple(args.query, 4, 8);
  p.wide_out = is_multiple(args.out, 2, 4);
  return p;
}

template <class T>
void launch_merge(const AttendParams& params, int head_dim, dim3 blocks, cudaStream_t stream) {
  switch (head_dim) {
    case 64: merge_kernel<T, 64><<<blocks, SMALL_THREADS, 0, stream>>>(params); break;
    case 96: merge_kernel<T, 96><<<blocks, SMALL_THREADS, 0, stream>>>(params); break;
    case 128: merge_kernel<T, 128><<<blocks, SMALL_THREADS, 0, stream>>>(params); break;
    case 256: merge_kernel<T, 256><<<blocks, SMALL_THREADS, 0, stream>>>(params); break;
  }
  check(cudaGetLastError(), "merge: launch");
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

unsigned blocks_for(int64_t work) { return unsigned(std::clamp<int64_t>(work, 1, 1 << 20)); }

}  // namespace

bool attend(const AttendArgs& args, void* stream_address) {
  const auto stream = static_cast<cudaStream_t>(stream_address);
  const AttendParams params = make_params(args);
  const bool capturing = is_capturing(stream);
  if (args.step.num_items == 0 && !capturing) return false;
  const Heads& heads = args.heads;
  const int most_rows = args.step.most_rows;
  int64_t items = int64_t(args.step.num_items) * heads.kv_heads;
  int64_t merges = int64_t(args.step.num_merges) * heads.kv_heads;
  if (capturing) {
    // A later step may have longer segments: more items, more groups of rows to merge. Any number
    // of blocks is right, since they take the work in turn. It has no more tokens, and so no item
    // with more rows than the kernel chosen here takes.
    items = std::max(items, ITEMS_WANTED);
    merges = ceil_div(int64_t(args.step.num_tokens) * heads.group,
                      row_group(heads.dtype, heads.head_dim)) *
             heads.kv_heads;
  }
  dispatch(heads.dtype, [&](auto type) {
    using T = decltype(type);
    launch_attention<T>(params, heads.head_dim, most_rows, blocks_for(items), stream);
    if (merges == 0) return;
    const dim3 blocks(blocks_for(merges), unsigned(std::max(1, most_rows)));
    launch_merge<T>(params, heads.head_dim, blocks, stream);
  });
  return capturing;
}

void append(const AppendArgs& args, void* stream_address) {
  const auto stream = static_cast<cudaStream_t>(stream_address);
  if (args.step.num_tokens == 0 && !is_capturing(stream)) return;
  const AppendParams params{static_cast<const Header*>(args.step.tables),
                            args.keys,
                            args.values,
                            args.key_pages,
                            args.value_pages,
                            args.heads.kv_heads,
                            args.heads.head_dim,
                            args.rope.scale,
                            args.rope.interleaved};
  const unsigned blocks = blocks_for(int64_t(args.step.num_tokens) * args.heads.kv_heads);
  dispatch(args.heads.dtype, [&](auto type) {
    append_kernel<decltype(type)><<<blocks, SMALL_THREADS, 0, stream>>>(params);
  });
  check(cudaGetLastError(), "append: launch");
}

void move(const MoveArgs& args, void* stream_address) {
  if (args.length == 0 || args.num_layers == 0) return;
  const auto stream = static_cast<cudaStream_t>(stream_address);
  const MoveParams params{static_cast<const char*>(args.tables),
                          args.heads.kv_heads,
                          args.heads.head_dim,
                          args.num_layers,
                          args.length,
                          args.target_length,
                          args.interleaved};
  const dim3 blocks(unsigned(std::min(args.length, 4096)), unsigned(args.num_layers));
  dispatch(args.heads.dtype, [&](auto type) {
    move_kernel<decltype(type)><<<blocks, SMALL_THREADS, 0, stream>>>(params);
  });
  check(cudaGetLastError(), "move: launch");
}

}  // namespace hogwild::cuda
