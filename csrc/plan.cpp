#include "plan.h"

#include <algorithm>
#include <limits>
#include <numeric>

namespace hogwild {

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Enough chunks to fill a large GPU (two blocks on each of 132 processors) once the heads are
// multiplied in, but none shorter than 128 keys, so that partial results stay small beside the KV.
constexpr int64_t BLOCKS_WANTED = 264;
constexpr int64_t SHORTEST_CHUNK = 128;

std::vector<int32_t> copy(const int32_t* data, int64_t n) {
  return data ? std::vector<int32_t>(data, data + n) : std::vector<int32_t>();
}

}  // namespace

Plan::Plan(const PlanInput& input, FillAngles fill_angles) {
  const int64_t W = input.num_workers, S = input.num_segments;
  view_.num_workers = input.num_workers;
  view_.num_segments = input.num_segments;
  view_.half_rotary = input.half_rotary;
  view_.window = input.window > 0 ? input.window : std::numeric_limits<int64_t>::max() / 2;
  offsets_ = copy(input.offsets, W * S);
  lengths_ = copy(input.lengths, S);
  query_lengths_ = copy(input.query_lengths, W);

  query_start_.assign(W + 1, 0);
  for (int64_t w = 0; w < W; ++w) {
    view_.num_tokens += query_lengths_[w];
    view_.max_query = std::max(view_.max_query, query_lengths_[w]);
    if (input.packed) query_start_[w + 1] = view_.num_tokens;
  }
  first_tile_.assign(S + 1, 0);
  for (int64_t s = 0; s < S && input.tile_pages; ++s)
    first_tile_[s + 1] = first_tile_[s] + int32_t(ceil_div(lengths_[s], TILE));
  tile_pages_ = copy(input.tile_pages, first_tile_[S]);
  slots_ = copy(input.slots, view_.num_tokens);

  cut_chunks(input.kv_heads);
  share_tiles(input.shared_keys);
  group_rows(input.group, input.row_group);
  list_visits(input.group);
  tabulate_angles(input, fill_angles);
  publish();
}

void Plan::cut_chunks(int32_t kv_heads) {
  for (int32_t s = 0; s < view_.num_segments; ++s) {
    const int64_t length = lengths_[s];
    if (length == 0) continue;
    const int64_t count =
        std::min(ceil_div(length, SHORTEST_CHUNK), ceil_div(BLOCKS_WANTED, kv_heads));
    const int64_t step = TILE * ceil_div(length, TILE * count);
    for (int64_t begin = 0; begin < length; begin += step)
      chunks_.push_back({s, int32_t(begin), int32_t(std::min(begin + step, length))});
  }
}

constexpr size_t FEWEST_SHARING = 16;

// Short segments that follow each other in a worker's eyes share a tile, as many as fit: what it
// costs to take the softmax of a tile and to fold its result is then paid once for all of them.
// Each begins at an even place, because half types are multiplied in pairs. Only long runs of them:
// workers from whom different segments are hidden cannot go through a shared tile together.
void Plan::share_tiles(int32_t most_keys) {
  const int32_t W = view_.num_workers, S = view_.num_segments, count = int32_t(chunks_.size());
  const auto sees = [&](int32_t w, int32_t s) { return offsets_[int64_t(w) * S + s] != HIDDEN; };
  std::vector<int32_t> first_worker;  // of each outlook
  for (int32_t w = 0; w < W; ++w) {
    const auto same = [&](int32_t other) {
      for (int32_t s = 0; s < S; ++s)
        if (lengths_[s] > 0 && sees(w, s) != sees(other, s)) return false;
      return true;
    };
    const auto found = std::find_if(first_worker.begin(), first_worker.end(), same);
    outlook_.push_back(int32_t(found - first_worker.begin()));
    if (found != first_worker.end()) continue;
    first_worker.push_back(w);
    tile_end_.resize(tile_end_.size() + count);
    int32_t* ends = tile_end_.data() + tile_end_.size() - count;
    std::vector<int32_t> seen;
    for (int32_t c = 0; c < count; ++c)
      if (sees(w, chunks_[c].segment)) seen.push_back(c);
    for (size_t i = 0; i < seen.size();) {
      size_t end = i;  // of a run of short segments
      while (end < seen.size() && lengths_[chunks_[seen[end]].segment] <= most_keys) ++end;
      const bool shares = end - i >= FEWEST_SHARING;
      int32_t begin = -1, keys = TILE;  // of the tile that is being filled
      for (end = std::max(end, i + 1); i < end; ++i) {
        const int32_t more = shares ? (chunks_[seen[i]].end + 1) / 2 * 2 : TILE;
        if (keys + more > TILE) begin = seen[i], keys = 0;
        ends[begin] = seen[i] + 1;
        keys += more;
      }
    }
  }
}

// One past the last chunk of the tile that begins with `chunk`, 0 where none does.
int32_t Plan::tile_end(int32_t part, int32_t chunk) const {
  return tile_end_[int64_t(outlook_[parts_[part].worker]) * int64_t(chunks_.size()) + chunk];
}

// Workers line up by what they see, so that those who read the same segments share a group.
void Plan::group_rows(int32_t group, int32_t most_rows) {
  std::vector<int32_t> order(view_.num_workers);
  std::iota(order.begin(), order.end(), 0);
  const int32_t S = view_.num_segments;
  if (int64_t(view_.num_tokens) * group > most_rows) {
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      for (int32_t s = 0; s < S; ++s) {
        const bool sees_a = offsets_[int64_t(a) * S + s] != HIDDEN;
        const bool sees_b = offsets_[int64_t(b) * S + s] != HIDDEN;
        if (sees_a != sees_b) return sees_a;
      }
      return false;
    });
  }

  int32_t row = 0;
  for (int32_t worker : order) {
    const int32_t rows = query_lengths_[worker] * group;
    for (int32_t done = 0; done < rows;) {
      if (row % most_rows == 0)
        groups_.push_back({row, row, int32_t(parts_.size()), int32_t(parts_.size()), 0, 0});
      RowGroup& last = groups_.back();
      const int32_t first = row - last.row_begin;
      const int32_t taken = std::min(rows - done, most_rows - first);
      parts_.push_back({worker, first, first + taken, done});
      row += taken;
      done += taken;
      last.row_end = row;
      last.part_end = int32_t(parts_.size());
    }
  }
}

// The rows of a part that see a key of the chunks.
void Plan::add_spans(int32_t p, int32_t chunk, int32_t chunk_end, int32_t group) {
  const Part& part = parts_[p];
  const int64_t rows = part.last_row - part.first_row;
  int64_t first = rows, last = 0;
  for (int32_t c = chunk; c < chunk_end; ++c) {
    const int64_t offset = offsets_[int64_t(part.worker) * view_.num_segments + chunks_[c].segment];
    if (offset == HIDDEN) continue;
    // Tokens i with offset + i >= begin (causal) and offset + i - window < end - 1.
    const int64_t first_token = chunks_[c].begin - offset;
    const int64_t last_token = chunks_[c].end - 1 + view_.window - offset;
    const int64_t from = std::clamp<int64_t>(first_token * group - part.head_row, 0, rows);
    const int64_t to = std::clamp<int64_t>(
        std::min<int64_t>(last_token, view_.max_query) * group - part.head_row, 0, rows);
    if (from >= to) continue;
    first = std::min(first, from);
    last = std::max(last, to);
  }
  if (first < last)
    spans_.push_back({p, int32_t(part.first_row + first), int32_t(part.first_row + last)});
}

void Plan::list_visits(int32_t group) {
  for (RowGroup& g : groups_) {
    g.visit_begin = int32_t(visits_.size());
    const auto add_visit = [&](int32_t chunk, int32_t end, auto takes_part) {
      const int32_t span_begin = int32_t(spans_.size());
      for (int32_t p = g.part_begin; p < g.part_end; ++p)
        if (takes_part(p)) add_spans(p, chunk, end, group);
      if (int32_t(spans_.size()) > span_begin)
        visits_.push_back({chunk, end, span_begin, int32_t(spans_.size())});
    };
    for (int32_t c = 0; c < int32_t(chunks_.size()); ++c) {
      add_visit(c, c + 1, [&](int32_t p) { return tile_end(p, c) == c + 1; });
      for (int32_t p = g.part_begin; p < g.part_end; ++p) {
        const int32_t end = tile_end(p, c), outlook = outlook_[parts_[p].worker];
        const auto is_alike = [&](int32_t q) { return outlook_[parts_[q].worker] == outlook; };
        bool is_first = end > c + 1;
        for (int32_t q = g.part_begin; q < p && is_first; ++q) is_first = !is_alike(q);
        if (is_first) add_visit(c, end, is_alike);
      }
    }
    g.visit_end = int32_t(visits_.size());
  }
}

void Plan::tabulate_angles(const PlanInput& input, FillAngles fill_angles) {
  const int32_t half = view_.half_rotary;
  const int64_t W = view_.num_workers, S = view_.num_segments;
  if (half == 0) return;

  offset_angles_.reset(new float[W * S * 2 * half]);
  for (int64_t ws = 0; ws < W * S; ++ws)
    if (offsets_[ws] != HIDDEN)
      fill_angles(&offsets_[ws], 1, input.inv_freq, half, &offset_angles_[ws * 2 * half]);

  std::vector<int32_t> positions(std::max(view_.max_query, view_.num_tokens));
  std::iota(positions.begin(), positions.end(), 0);
  token_angles_.reset(new float[int64_t(view_.max_query) * 2 * half]);
  fill_angles(positions.data(), view_.max_query, input.inv_freq, half, token_angles_.get());

  if (!input.key_start) return;
  int64_t t = 0;
  for (int64_t w = 0; w < W; ++w)
    for (int32_t i = 0; i < query_lengths_[w]; ++i) positions[t++] = input.key_start[w] + i;
  key_angles_.reset(new float[t * 2 * half]);
  fill_angles(positions.data(), t, input.inv_freq, half, key_angles_.get());
}

void Plan::publish() {
  view_.num_chunks = int32_t(chunks_.size());
  view_.num_groups = int32_t(groups_.size());
  view_.num_parts = int32_t(parts_.size());
  view_.num_visits = int32_t(visits_.size());
  view_.num_spans = int32_t(spans_.size());
  view_.num_tiles = first_tile_.back();
  view_.offsets = offsets_.data();
  view_.lengths = lengths_.data();
  view_.query_lengths = query_lengths_.data();
  view_.query_start = query_start_.data();
  view_.first_tile = first_tile_.data();
  view_.tile_pages = tile_pages_.empty() ? nullptr : tile_pages_.data();
  view_.slots = slots_.empty() ? nullptr : slots_.data();
  view_.chunks = chunks_.data();
  view_.groups = groups_.data();
  view_.parts = parts_.data();
  view_.visits = visits_.data();
  view_.spans = spans_.data();
  view_.offset_angles = offset_angles_.get();
  view_.token_angles = token_angles_.get();
  view_.key_angles = key_angles_.get();
}

}  // namespace hogwild
