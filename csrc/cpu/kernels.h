// What backend.cpp and the kernels of each instruction set agree on.

#pragma once

#include "../attention.h"

namespace hogwild::cpu {

// Segments of at most so many keys share tiles with their neighbours.
constexpr int32_t SHARED_KEYS = 32;

constexpr int32_t VALUE_ALIGN = 32;  // the dimensions of values in a page are a multiple of this

static inline int64_t padded_value_dim(int32_t value_dim) {
  return (value_dim + VALUE_ALIGN - 1) / VALUE_ALIGN * VALUE_ALIGN;
}

// Attention of one layer.
struct AttendArgs {
  const PlanView* plan;
  Heads heads;
  Rope rope;
  Scoring scoring;
  KeyValues keys_values;
  TokenTensor query;
  TokenTensor out;
  float* lse;                // or null; addressed like out, with the strides below
  int64_t lse_worker_stride, lse_token_stride;
  int32_t heads_at_once = 1;  // KV heads of a pair
};

// A place in the list of all work: a pair (KV heads, row group) and one of the group's visits. A
// pair has `heads_at_once` KV heads, the last ones maybe fewer; pairs are numbered
// (first head / heads_at_once) * num_groups + group.
struct Cursor {
  int32_t pair;
  int32_t visit;  // counted from the group's first
};

// A pair whose visits are divided among several ranges. The range with its first visits stores
// what it folded, the others store one partial result a visit, and whoever is done last folds all
// of it in list order: the same left fold that an undivided pair goes through.
struct SplitPair {
  int32_t pair;
  int32_t first_stored;  // visits from here on are stored one by one
  int32_t remaining;     // ranges that have not finished, counted down atomically
  float* partials;       // [1 + visits stored, heads_at_once] blocks of
                         // group_rows * (padded_value_dim + 2)
};

struct WorkRange {
  Cursor begin, end;
  SplitPair* head;  // the pair that begin (tail: end) stands inside of, or null
  SplitPair* tail;
};

struct AppendArgs {
  const PlanView* plan;
  Heads heads;
  Rope rope;
  TokenTensor keys, values;  // [T, Hkv, D] and [T, Hkv, Dv]; worker_stride unused
  void* key_pages;
  void* value_pages;
};

struct CommitArgs {
  Heads heads;
  LayerPages layers;
  bool interleaved;
  int32_t half_rotary;
  const float* angles;            // [2, R/2] of the target's length
  const int32_t* source_pages;
  const int32_t* target_pages;
  int32_t length, target_length;
};

struct ReadArgs {
  Heads heads;
  const void* pages;
  bool keys;                   // else values
  const int32_t* page_table;
  int32_t start, length;
  void* out;                   // [length, Hkv, D or Dv] dense
};

constexpr int32_t LINEAR_PANEL = 64;  // outputs that a thread computes at a time

// A linear layer: out [rows, outputs] = x [rows, inputs] W^T + bias, all dense.
struct LinearArgs {
  DType dtype;         // of weight, bias and out
  int64_t rows;
  int32_t inputs, outputs;
  const float* x;
  const void* weight;  // packed, outputs padded to whole panels; see linear.h
  const void* bias;    // [outputs] or null
  void* out;
};

// One instruction set's kernels.
struct Kernels {
  const char* name;
  // A thread's working memory, aligned to 64 bytes: with one KV head at once, and for each further
  // one.
  int64_t scratch_bytes, head_scratch_bytes;
  void (*fill_angles)(const int32_t* positions, int64_t n, const float* inv_freq, int32_t half,
                      float* angles);
  void (*attend)(const AttendArgs& args, const WorkRange& range, void* scratch);
  void (*append)(const AppendArgs& args, int32_t token_begin, int32_t token_end);
  void (*commit)(const CommitArgs& args, int32_t layer);
  void (*read)(const ReadArgs& args);
  void (*linear)(const LinearArgs& args, int32_t panel);

  // What the machine can do at most, see ceilings.h.
  uint32_t (*read_all)(const void* data, int64_t bytes);
  int64_t (*multiply_add)(DType dtype, int64_t iterations);  // returns multiply-adds done
};

extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;
extern const Kernels kernels_amx;

}  // namespace hogwild::cpu
