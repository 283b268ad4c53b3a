// The CUDA backend: tables of a step, and one launch for each operation on them.
//
// Nothing here allocates on the device, copies to it or waits for it: the caller owns the memory,
// copies a step's tables there once, and passes addresses and the stream. Each launch reads its
// counts from the tables, so that a captured launch stays right when the tables are replaced by
// those of a step with as many query heads and no more tokens.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../attention.h"

namespace hogwild::cuda {

// Rows that one pass over the keys serves at most: what the plan's row groups may hold.
int32_t row_group(DType dtype, int32_t head_dim);

// Items of a step, all KV heads together, that keep the largest GPUs busy to the end.
constexpr int64_t ITEMS_WANTED = 1056;

// Whether there are kernels for this head dimension; value_dim must equal it.
bool has_head_dim(int32_t head_dim);

// A step's arrays in one block of bytes that means the same at any address (see tables.h).
class Tables {
 public:
  // `padded_queries`: Q of a padded query [W, Q, H, D], whose tokens past query_lengths are set to
  // out = 0, lse = -inf; 0 for packed ones. `segments` [S], or null for pages.
  Tables(const PlanView& plan, int32_t kv_heads, int32_t group, int32_t padded_queries,
         const SegmentRows* segments);

  const std::vector<char>& bytes() const { return bytes_; }
  // Floats of device memory that attend needs beside its operands.
  int64_t workspace_floats(int32_t kv_heads, int32_t head_dim) const;

  int32_t num_items() const { return num_items_; }    // of one KV head
  int32_t num_merges() const { return num_merges_; }  // row groups with several partial results
  int32_t num_tokens() const { return num_tokens_; }
  int32_t most_rows() const { return most_rows_; }    // of any item

 private:
  std::vector<char> bytes_;
  int32_t num_items_ = 0, num_merges_ = 0, num_tokens_ = 0, most_rows_ = 0;
  int64_t slot_rows_ = 0;
};

// A tables' shape, as far as the launches need to know it on the host.
struct Step {
  const void* tables;  // device address of Tables::bytes()
  int32_t num_items, num_merges, num_tokens, most_rows;
};

struct AttendArgs {
  Step step;
  Heads heads;
  Rope rope;
  Scoring scoring;
  const void* key_pages;    // [pages, Hkv, TILE, D], or null where the tables hold the segments
  const void* value_pages;
  TokenTensor query;
  TokenTensor out;
  float* lse;  // or null; [.., Hq] dense, addressed like out with the strides below
  int64_t lse_worker_stride, lse_token_stride;
  float* workspace;  // Tables::workspace_floats
};
// Whether the launches are captured into a graph, and not run.
bool attend(const AttendArgs& args, void* stream);

struct AppendArgs {
  Step step;
  Heads heads;
  Rope rope;
  TokenTensor keys, values;  // [T, Hkv, D]; worker_stride unused
  void* key_pages;
  void* value_pages;
};
void append(const AppendArgs& args, void* stream);

// Tokens [0, length) of a table of pages -> behind the first target_length of another one, keys
// rotated by `angles`; all layers in one launch. With half_rotary = 0 it only copies.
class MoveTables {
 public:
  MoveTables(const LayerPages& layers, const int32_t* source_pages, int64_t num_source,
             const int32_t* target_pages, int64_t num_target, int32_t half_rotary,
             const float* angles);  // [2, R/2]
  const std::vector<char>& bytes() const { return bytes_; }

 private:
  std::vector<char> bytes_;
};

struct MoveArgs {
  const void* tables;  // device address of MoveTables::bytes()
  Heads heads;
  bool interleaved;
  int32_t num_layers, length, target_length;
};
void move(const MoveArgs& args, void* stream);

// ---- what this machine has ----------------------------------------------------------------

struct DeviceState {
  bool usable;
  std::string why_not;  // one sentence with the remedy; empty if usable
  int32_t compute_capability;  // 90 for 9.0; 0 if unknown
  int32_t multiprocessors;
  int32_t driver, runtime;  // versions of CUDA, 13000 for 13.0; no driver: 0
};

// Never throws: a missing driver, one too old for this runtime, a GPU below sm_80 or one that the
// binary has no code for are sentences in `why_not`.
DeviceState device_state(int32_t device);
// The sentence for a machine, and empty if its GPU can be used. Versions as CUDA counts them
// (13000), capabilities as 90 for 9.0, 0 where there is none; `built` is what built_architectures
// gives. In every build.
std::string why_not(int32_t runtime, int32_t driver, int32_t devices, int32_t gpu,
                    const std::vector<int32_t>& built);
std::vector<int32_t> built_architectures();  // such as {80, 90}; the last one as PTX too

}  // namespace hogwild::cuda
