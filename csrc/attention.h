// The one contract between the planner, the backends and the Python binding: plain data, no code.
//
// A step of concurrent attention has one layout for all layers. The planner (plan.h) turns the
// workers' views into the arrays of a `PlanView`; a backend then runs, layer by layer,
//
//     append   rotate the new keys to their place in their segment, store keys and values
//     attend   queries of all workers against all segments (with a merge where work was split)
//
// and, between steps,
//
//     commit   move a segment behind another one: keys rotated once by the target's length
//     copy     whole pages, for a fork that is about to be written
//
// Pointers are addresses in the backend's memory, strides are counted in elements, and the last
// dimension is always dense.

#pragma once

#include <cstdint>

namespace hogwild {

constexpr int32_t HIDDEN = INT32_MIN;  // offset of a segment that a worker does not see
constexpr int32_t TILE = 64;           // keys of a tile; one page of the cache holds one tile
constexpr int32_t ROW_GROUP = 64;      // rows that share one pass over the keys, at most
constexpr int32_t MAX_DIM = 256;       // head dimension of keys and of values, at most

enum class DType : int32_t { Float32 = 0, Float16 = 1, BFloat16 = 2 };

static inline int64_t element_size(DType dtype) { return dtype == DType::Float32 ? 4 : 2; }

// ---- shapes -------------------------------------------------------------------------------

struct Heads {
  DType dtype;        // of query, keys, values, output and storage alike
  int32_t kv_heads;   // Hkv
  int32_t group;      // Hq / Hkv: query head h reads KV head h / group
  int32_t head_dim;   // D, of queries and keys
  int32_t value_dim;  // Dv, of values and output
};

struct Rope {
  float scale;       // multiplies the rotated dimensions
  bool interleaved;  // pairs (2j, 2j + 1) instead of (j, j + R/2)
};

struct Scoring {
  float scale;    // of <q, k>
  float softcap;  // c: score -> c * tanh(score / c); 0 = none, else from 2^-24 to 2^96
};

// ---- tensors ------------------------------------------------------------------------------

// Element (worker w, its token i, head h, dim d) lies at
//     data + w * worker_stride + (query_start[w] + i) * token_stride + h * head_stride + d.
// Packed tensors [T, H, D] have worker_stride 0 and query_start as prefix sums; padded ones
// [W, Q, H, D] have query_start all zero.
struct TokenTensor {
  void* data;
  int64_t worker_stride;
  int64_t token_stride;
  int64_t head_stride;
};

// Keys and values of one segment as plain tensors [L, Hkv, D] and [L, Hkv, Dv].
struct SegmentRows {
  const void* keys;
  const void* values;
  int64_t key_token_stride, key_head_stride;
  int64_t value_token_stride, value_head_stride;
};

enum class Layout : int32_t {
  Rows,   // one SegmentRows a segment
  Pages,  // pages of TILE tokens, numbered by PlanView::tile_pages
};

struct KeyValues {
  Layout layout;
  const SegmentRows* rows;   // [S], for Rows
  const void* key_pages;     // this layer's pages, for Pages; what lies inside a page is the
  const void* value_pages;   //   backend's business
};

// The pages of all layers, for commit and copy.
struct LayerPages {
  int32_t num_layers;
  void* const* key_pages;    // [num_layers]
  void* const* value_pages;  // [num_layers]
};

// ---- the plan of a step -------------------------------------------------------------------

// Keys [begin, end) of one segment: the unit whose partial result is folded, in list order,
// into a row's result; or, where short segments share a tile, a part of that unit.
struct Chunk {
  int32_t segment;
  int32_t begin, end;
};

// Consecutive rows, up to ROW_GROUP or what the backend takes, a row being (token, head of the KV
// group).
struct RowGroup {
  int32_t row_begin, row_end;      // rows, in the order of PlanView::tokens, times group
  int32_t part_begin, part_end;    // its parts
  int32_t visit_begin, visit_end;  // its visits
};

// The rows of one worker within a row group.
struct Part {
  int32_t worker;
  int32_t first_row, last_row;  // [first, last), counted from the group's first row
  int32_t head_row;             // rows from the worker's token 0, head 0 to first_row
};

// A row group's pass over a chunk, by those of its rows that see a key of it. Several chunks that
// share a tile are passed over at once, by rows of workers from whom the same segments are hidden:
// of [chunk, chunk_end) those that are not.
struct Visit {
  int32_t chunk, chunk_end;
  int32_t span_begin, span_end;
};

// Rows [first, last) of the group, all of one part.
struct Span {
  int32_t part;
  int32_t first, last;
};

struct PlanView {
  int32_t num_workers;       // W
  int32_t num_segments;      // S
  int32_t num_tokens;        // T, the sum of query_lengths
  int32_t max_query;         // the longest of query_lengths
  int32_t half_rotary;       // R / 2
  int64_t window;            // a key is seen while p - l < window
  int32_t num_chunks, num_groups, num_parts, num_visits, num_spans, num_tiles;

  const int32_t* offsets;        // [W, S], HIDDEN where unseen
  const int32_t* lengths;        // [S], after this step's append
  const int32_t* query_lengths;  // [W]
  const int32_t* query_start;    // [W + 1], see TokenTensor
  const int32_t* first_tile;  // [S + 1]: where a segment's tiles begin in tile_pages, 0 without
  const int32_t* tile_pages;  // [num_tiles], or null
  const int32_t* slots;  // [T]: page * TILE + row of each new token, or null

  const Chunk* chunks;
  const RowGroup* groups;
  const Part* parts;
  const Visit* visits;
  const Span* spans;

  // cos and sin of position * inv_freq, side by side: [..., 2, R/2] float32
  const float* offset_angles;  // [W, S, 2, R/2], by offset
  const float* token_angles;  // [max_query, 2, R/2], by the token's index within its worker
  const float* key_angles;  // [T, 2, R/2], by the new token's place in its segment, or null
};

}  // namespace hogwild
