// A step's tables as the kernels read them: a header and arrays behind it, in one block of bytes.
// Offsets are counted in bytes from the header, so that the block means the same at any address.
//
// Work is cut like this, for one KV head (every head has the same items):
//
//     passes of a row group, in list order:     p0  p1  p2  p3  p4  p5  p6
//     items (one block each):                  [ 0:  folds  ][ 1    ][ 2    ]
//     partial results (slots):                       s0        s1  s2  s3  s4
//
// A pass is a visit of the plan: the row group against a chunk of one segment. The first item folds
// its passes, the others store the result of each; the merge folds all of it from left to right.
// The result of a row is the same left fold wherever the cuts are. A group that has one item only
// writes its output itself. Short neighbours could share a pass and a partial result; but then a
// segment between them would change the bits of rows that do not see it.

#pragma once

#include "../attention.h"

namespace hogwild::cuda {

struct Header {
  int32_t num_items;  // of one KV head
  int32_t num_merges;
  int32_t num_segments;  // S
  int32_t num_tokens;  // T
  int32_t half_rotary;  // R / 2
  int32_t slot_rows;  // rows of all slots of one KV head
  int64_t window;  // a key is seen while p - l < window
  int32_t items;  // Item [num_items]
  int32_t merges;  // Merge [num_merges]
  int32_t rows;  // Row [rows of all groups, then those of padding]
  int32_t passes;  // Pass [passes]
  int32_t offsets;  // int32 [W, S]
  int32_t tile_pages;  // int32 [tiles], for pages
  int32_t segments;  // SegmentRows [S], for plain tensors
  int32_t slots;  // int32 [T]: page * TILE + row of each new token
  int32_t offset_angles;  // float [W, S, 2, R/2]
  int32_t token_angles;  // float [Q, 2, R/2]
  int32_t key_angles;  // float [T, 2, R/2]

#ifdef __CUDACC__
  template <class T>
  __device__ const T* array(int32_t offset) const {
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(this) + offset);
  }
#endif
};

enum : int32_t {
  WRITES_OUTPUT = 0,  // the item is all there is to its rows
  FOLDS = 1,  // first of several: its passes folded into one slot
  STORES = 2,  // a slot for each pass
};

struct Item {
  int32_t pass_begin, pass_end;
  int32_t row_begin, row_count;  // in Header::rows
  int32_t slot_row;  // where its slots begin, in rows; a slot has row_count of them
  int32_t what;
  int32_t worker_tokens;  // most tokens that a worker of these rows brings: 1 needs no angle sums
  int32_t reserved;
};

struct Merge {
  int32_t row_begin, row_count;
  int32_t slot_row, num_slots;
};

// A query row: head `head` of the KV group, token `token` of worker `worker`.
struct Row {
  int32_t worker, token;
  int32_t index;  // query_start[worker] + token, see TokenTensor
  int32_t head;
};

// A row group against keys [begin, end) of a segment, begin at a tile's first key. Tiles are
// counted from there: those before first_tile and from end_tile on are seen by nobody, and of
// [whole_begin, whole_end) every row that sees any of the keys sees all.
struct alignas(16) Pass {
  int32_t segment;
  int32_t begin, end;
  int32_t tile;  // index of the first one in tile_pages
  int32_t first_tile, end_tile;
  int32_t whole_begin, whole_end;
  uint32_t seen_by[2];  // bit r: row r of the group sees a key
};

struct MoveHeader {
  int32_t half_rotary;
  int32_t key_layers, value_layers;  // addresses [num_layers]
  int32_t source_pages, target_pages;
  int32_t angles;  // float [2, R/2]
};

}  // namespace hogwild::cuda
