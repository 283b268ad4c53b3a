// Views and lengths -> who reads what together, and in which order results are folded.
//
//                 chunk 0   chunk 1   chunk 2        chunks never cross a segment
//               +---------+---------+---------+
//     group 0   |  visit  |  visit  |         |      a visit: the rows of a group that see a key
//     group 1   |         |  visit  |  visit  |      of the chunk; what nobody sees is not there
//               +---------+---------+---------+
//                 ------- fold, left to right ->     one result a row
//
// Everything that touches arithmetic (tiles, chunks, fold order) is a function of the lengths of
// the segments that a worker sees and of Hkv alone. The rows only decide who travels together, so
// that a worker's result does not depend, to the bit, on who else is in the call.

#pragma once

#include <memory>
#include <vector>

#include "attention.h"

namespace hogwild {

struct PlanInput {
  int32_t num_workers;
  int32_t num_segments;
  int32_t group;                 // Hq / Hkv
  int32_t kv_heads;              // Hkv
  int32_t half_rotary;           // R / 2
  int64_t window;                // 0: none
  bool packed;                   // queries come worker after worker, [T, H, D]
  int32_t row_group;             // most rows of a row group
  int32_t shared_keys;           // most keys of a segment that shares a tile with its neighbours
  const int32_t* offsets;        // [W, S]
  const int32_t* lengths;        // [S]
  const int32_t* query_lengths;  // [W]
  const float* inv_freq;         // [R/2]
  const int32_t* key_start;  // [W]: place of a worker's first new token in its segment, or null
  const int32_t* tile_pages;  // or null
  const int32_t* slots;  // or null
};

// Fills angles [n, 2, half] with cos and sin of positions[i] * inv_freq[j]; the product and the
// reduction are taken in double precision. Each backend brings its own.
using FillAngles = void (*)(const int32_t* positions, int64_t n, const float* inv_freq,
                            int32_t half, float* angles);

class Plan {
 public:
  Plan(const PlanInput& input, FillAngles fill_angles);

  const PlanView& view() const { return view_; }

 private:
  void cut_chunks(int32_t kv_heads);
  void share_tiles(int32_t most_keys);
  int32_t tile_end(int32_t part, int32_t chunk) const;
  void add_spans(int32_t part, int32_t chunk, int32_t chunk_end, int32_t group);
  void group_rows(int32_t group, int32_t most_rows);
  void list_visits(int32_t group);
  void tabulate_angles(const PlanInput& input, FillAngles fill_angles);
  void publish();

  PlanView view_{};
  std::vector<int32_t> offsets_, lengths_, query_lengths_, query_start_, first_tile_, tile_pages_,
      slots_;
  std::vector<Chunk> chunks_;
  // Workers from whom the same segments are hidden have one number, and chunks that share a tile in
  // their eyes: [numbers, num_chunks], one past the tile's last chunk, where it begins, else 0.
  std::vector<int32_t> outlook_, tile_end_;
  std::vector<RowGroup> groups_;
  std::vector<Part> parts_;
  std::vector<Visit> visits_;
  std::vector<Span> spans_;
  std::unique_ptr<float[]> offset_angles_, token_angles_, key_angles_;
};

}  // namespace hogwild
