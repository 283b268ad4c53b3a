#include "tables.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "backend.h"

namespace hogwild::cuda {

namespace {

// Partial results beyond this much (1 GB with 128 dimensions) are not worth the memory: then items
// fold more passes. 64 workers at 64K tokens stay below it with 128 blocks or more.
constexpr int64_t MOST_SLOT_ROWS = int64_t(1) << 21;

constexpr int64_t ALIGNMENT = 16;

// Appends arrays to a block of bytes.
class Writer {
 public:
  explicit Writer(std::vector<char>& bytes) : bytes_(bytes) {}

  template <class T>
  int32_t put(const T* data, int64_t count) {
    bytes_.resize((bytes_.size() + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    const int64_t at = int64_t(bytes_.size());
    if (at + count * int64_t(sizeof(T)) > std::numeric_limits<int32_t>::max())
      throw std::length_error("the tables of this step take more than 2 GiB");
    if (count && data)
      bytes_.insert(bytes_.end(), reinterpret_cast<const char*>(data),
                    reinterpret_cast<const char*>(data + count));
    return int32_t(at);
  }

  template <class T>
  int32_t put(const std::vector<T>& data) {
    return put(data.data(), int64_t(data.size()));
  }

 private:
  std::vector<char>& bytes_;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Which tiles a visit reads, and which of them need no mask.
Pass make_pass(const PlanView& plan, const Visit& visit, int32_t group) {
  const Chunk& chunk = plan.chunks[visit.chunk];
  int64_t first = chunk.end, last = -1, inner_low = chunk.begin, inner_high = chunk.end - 1;
  uint64_t seen_by = 0;
  for (int32_t s = visit.span_begin; s < visit.span_end; ++s) {
    const Span& span = plan.spans[s];
    const Part& part = plan.parts[span.part];
    const int64_t offset = plan.offsets[int64_t(part.worker) * plan.num_segments + chunk.segment];
    const auto place = [&](int32_t row) {
      return offset + (part.head_row + row - part.first_row) / group;
    };
    const int64_t low = place(span.first), high = place(span.last - 1);
    first = std::min(first, std::max<int64_t>(low - plan.window + 1, chunk.begin));
    last = std::max(last, std::min<int64_t>(high, chunk.end - 1));
    inner_low = std::max(inner_low, high - plan.window + 1);
    inner_high = std::min(inner_high, low);
    seen_by |= (~uint64_t(0) >> (64 - (span.last - span.first))) << span.first;
  }
  Pass pass{};
  pass.segment = chunk.segment;
  pass.begin = chunk.begin;
  pass.end = chunk.end;
  pass.tile = plan.first_tile[chunk.segment] + chunk.begin / TILE;
  pass.first_tile = int32_t((first - chunk.begin) / TILE);
  pass.end_tile = int32_t((last - chunk.begin) / TILE) + 1;
  pass.whole_begin = int32_t(ceil_div(inner_low - chunk.begin, TILE));
  pass.whole_end = int32_t((inner_high + 1 - chunk.begin) / TILE);
  pass.seen_by[0] = uint32_t(seen_by);
  pass.seen_by[1] = uint32_t(seen_by >> 32);
  return pass;
}

// Where passes [begin, end) are cut into items: ends of about equally long runs of tiles.
std::vector<int32_t> cut_passes(const std::vector<Pass>& passes, int32_t begin, int32_t end,
                                int64_t runs) {
  // Entering a pass costs about a tile.
  const auto cost = [&](int32_t i) {
    return int64_t(passes[i].end_tile) - passes[i].first_tile + 1;
  };
  int64_t total = 0;
  for (int32_t i = begin; i < end; ++i) total += cost(i);
  std::vector<int32_t> ends;
  int64_t sum = 0;
  for (int32_t i = begin; i < end; ++i) {
    sum += cost(i);
    if (sum * runs >= total * int64_t(ends.size() + 1)) ends.push_back(i + 1);
  }
  return ends;
}

}  // namespace

int32_t row_group(DType dtype, int32_t head_dim) {
  if (dtype == DType::Float32) return 16;
  return head_dim > 128 ? 32 : 64;  // shared memory holds the rotated queries
}

bool has_head_dim(int32_t head_dim) {
  return head_dim == 64 || head_dim == 96 || head_dim == 128 || head_dim == 256;
}

Tables::Tables(const PlanView& plan, int32_t kv_heads, int32_t group, int32_t padded_queries,
               const SegmentRows* segments) {
  const int64_t W = plan.num_workers, S = plan.num_segments;
  std::vector<Row> rows;
  std::vector<Item> items;
  std::vector<Merge> merges;
  std::vector<Pass> passes;
  passes.reserve(plan.num_visits);
  for (int32_t v = 0; v < plan.num_visits; ++v)
    passes.push_back(make_pass(plan, plan.visits[v], group));

  int64_t runs_wanted =
      ceil_div(ITEMS_WANTED, std::max<int64_t>(1, int64_t(plan.num_groups) * kv_heads));
  // Fewer cuts where their results would take too much memory.
  for (;; runs_wanted = (runs_wanted + 1) / 2) {
    items.clear();
    merges.clear();
    slot_rows_ = 0;
    for (int32_t g = 0; g < plan.num_groups; ++g) {
      const RowGroup& group_rows = plan.groups[g];
      const int32_t count = group_rows.row_end - group_rows.row_begin;
      int32_t tokens = 1;
      for (int32_t p = group_rows.part_begin; p < group_rows.part_end; ++p)
        tokens = std::max(tokens, plan.query_lengths[plan.parts[p].worker]);
      most_rows_ = std::max(most_rows_, count);
      int32_t begin = group_rows.visit_begin;
      const int32_t last = group_rows.visit_end;
      const std::vector<int32_t> ends = cut_passes(passes, begin, last, runs_wanted);
      if (ends.size() <= 1) {
        const bool many = last - begin > 1;
        items.push_back({begin, last, group_rows.row_begin, count, many ? int32_t(slot_rows_) : 0,
                         WRITES_OUTPUT, tokens, 0});
        if (many) slot_rows_ += count;
        continue;
      }
      const int64_t first_slot = slot_rows_;
      for (int32_t end : ends) {
        const bool first = begin == group_rows.visit_begin;
        items.push_back({begin, end, group_rows.row_begin, count, int32_t(slot_rows_),
                         first ? FOLDS : STORES, tokens, 0});
        slot_rows_ += int64_t(first ? 1 : end - begin) * count;
        begin = end;
      }
      merges.push_back({group_rows.row_begin, count, int32_t(first_slot),
                        int32_t((slot_rows_ - first_slot) / count)});
    }
    if (runs_wanted == 1 || slot_rows_ * kv_heads <= MOST_SLOT_ROWS) break;
  }
  // Row groups that read the same keys sit side by side, so that they meet in the L2 cache.
  std::stable_sort(items.begin(), items.end(), [&](const Item& a, const Item& b) {
    const bool empty_a = a.pass_begin == a.pass_end, empty_b = b.pass_begin == b.pass_end;
    if (empty_a || empty_b) return !empty_a && empty_b;
    return plan.visits[a.pass_begin].chunk < plan.visits[b.pass_begin].chunk;
  });

  rows.resize(plan.num_groups ? plan.groups[plan.num_groups - 1].row_end : 0);
  for (int32_t g = 0; g < plan.num_groups; ++g) {
    const RowGroup& group_rows = plan.groups[g];
    for (int32_t p = group_rows.part_begin; p < group_rows.part_end; ++p) {
      const Part& part = plan.parts[p];
      for (int32_t r = part.first_row; r < part.last_row; ++r) {
        const int32_t within = part.head_row + r - part.first_row;
        const int32_t token = within / group;
        rows[group_rows.row_begin + r] = {part.worker, token, plan.query_start[part.worker] + token,
                                          within % group};
      }
    }
  }
  // Padding: rows that see nothing.
  const int32_t first_padding = int32_t(rows.size());
  for (int32_t w = 0; w < W; ++w)
    for (int32_t i = plan.query_lengths[w]; i < padded_queries; ++i)
      for (int32_t h = 0; h < group; ++h) rows.push_back({w, i, plan.query_start[w] + i, h});
  for (int32_t r = first_padding; r < int32_t(rows.size()); r += 16) {
    const int32_t count = std::min<int32_t>(16, int32_t(rows.size()) - r);
    items.push_back({0, 0, r, count, 0, WRITES_OUTPUT, 1, 0});
    most_rows_ = std::max(most_rows_, count);
  }

  num_items_ = int32_t(items.size());
  num_merges_ = int32_t(merges.size());
  num_tokens_ = plan.num_tokens;

  const int64_t half = plan.half_rotary;
  Header header{};
  bytes_.resize(sizeof(Header));
  Writer writer(bytes_);
  header.num_items = num_items_;
  header.num_merges = num_merges_;
  header.num_segments = int32_t(S);
  header.num_tokens = num_tokens_;
  header.half_rotary = int32_t(half);
  header.slot_rows = int32_t(slot_rows_);
  header.window = plan.window;
  header.items = writer.put(items);
  header.merges = writer.put(merges);
  header.passes = writer.put(passes);
  header.rows = writer.put(rows);
  header.offsets = writer.put(plan.offsets, W * S);
  header.tile_pages = writer.put(plan.tile_pages, plan.tile_pages ? plan.num_tiles : 0);
  header.segments = writer.put(segments, segments ? S : 0);
  header.slots = writer.put(plan.slots, plan.slots ? plan.num_tokens : 0);
  header.offset_angles = writer.put(plan.offset_angles, half ? W * S * 2 * half : 0);
  header.token_angles = writer.put(plan.token_angles, half ? plan.max_query * 2 * half : 0);
  header.key_angles = writer.put(plan.key_angles, plan.key_angles ? plan.num_tokens * 2 * half : 0);
  std::memcpy(bytes_.data(), &header, sizeof header);
}

int64_t Tables::workspace_floats(int32_t kv_heads, int32_t head_dim) const {
  return slot_rows_ * kv_heads * (head_dim + 2);
}

MoveTables::MoveTables(const LayerPages& layers, const int32_t* source_pages, int64_t num_source,
                       const int32_t* target_pages, int64_t num_target, int32_t half_rotary,
                       const float* angles) {
  MoveHeader header{};
  bytes_.resize(sizeof header);
  Writer writer(bytes_);
  header.half_rotary = half_rotary;
  header.key_layers = writer.put(layers.key_pages, layers.num_layers);
  header.value_layers = writer.put(layers.value_pages, layers.num_layers);
  header.source_pages = writer.put(source_pages, num_source);
  header.target_pages = writer.put(target_pages, num_target);
  header.angles = writer.put(angles, 2 * half_rotary);
  std::memcpy(bytes_.data(), &header, sizeof header);
}

}  // namespace hogwild::cuda
