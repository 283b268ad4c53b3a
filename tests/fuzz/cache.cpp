// A short life of a paged cache: steps of several workers, commits, copies, reads. What is in the
// pages is known only through `read`; all pages that hold nothing are full of NaN.

#include <algorithm>

#include "../../csrc/cpu/backend.h"
#include "../../csrc/plan.h"
#include "cases.h"

namespace fuzz {

using namespace hogwild;

namespace {

constexpr int MAX_STORED = 700;  // tokens
constexpr int PAGES = 40;

struct Stored {
  std::vector<int32_t> table;
  int32_t length = 0;
  std::vector<std::vector<char>> keys, values;  // bytes of each layer, [length, Hkv, D] dense
};

class Life {
 public:
  explicit Life(Rng& rng) : rng_(rng), dtype_(draw_dtype(rng)) {
    kv_heads_ = rng.pick({1, 1, 2, 3, 5});
    group_ = rng.pick({1, 1, 2, 3, 5, 7, 8});
    head_dim_ = draw_dim(rng);
    value_dim_ = rng.chance(0.6) ? head_dim_ : draw_dim(rng);
    layers_ = rng.pick({1, 1, 2, 3});
    budget_ = std::max(20, std::min(MAX_STORED, 100000 / (kv_heads_ * (head_dim_ + value_dim_) *
                                                          (group_ + 1) * layers_)));
    scoring_.dtype = dtype_;
    scoring_.head_dim = head_dim_;
    draw_scoring(rng, scoring_);
    scoring_.inv_freq = draw_frequencies(rng, head_dim_);
    key_bytes_ = size_t(cpu::key_page_elements(heads()) * element_size(dtype_));
    value_bytes_ = size_t(cpu::value_page_elements(heads()) * element_size(dtype_));
    for (int layer = 0; layer < layers_; ++layer) {
      key_pages_.push_back(arena_.make(PAGES * key_bytes_, true));
      value_pages_.push_back(arena_.make(PAGES * value_bytes_, true));
    }
    for (int page = PAGES; page-- > 0;) release(page);
    const bool reversed = rng.chance(0.5);
    if (reversed) std::reverse(free_.begin(), free_.end());
  }

  void run() {
    for (int i = int(rng_.range(2, 5)); i > 0; --i) segments_.push_back(empty());
    for (int i = int(rng_.range(2, 4)); i > 0; --i) {
      step();
      switch (rng_.range(0, 3)) {
        case 0: commit(); break;
        case 1: fork(); break;
        case 2: truncate(); break;
        default: break;
      }
      check_stored();
    }
    arena_.check();
  }

 private:
  Heads heads() const { return {dtype_, kv_heads_, group_, head_dim_, value_dim_}; }
  int threads() { return int(rng_.range(1, 4)); }
  size_t row_bytes(bool keys) const {
    return size_t(kv_heads_ * (keys ? head_dim_ : value_dim_) * element_size(dtype_));
  }

  Stored empty() const {
    Stored s;
    s.keys.resize(layers_);
    s.values.resize(layers_);
    return s;
  }

  // Nobody has the page any more: whatever was there is NaN, and so are pages never used.
  void release(int page) {
    for (int layer = 0; layer < layers_; ++layer) {
      std::memset(key_pages_[layer] + page * key_bytes_, 0xff, key_bytes_);
      std::memset(value_pages_[layer] + page * value_bytes_, 0xff, value_bytes_);
    }
    free_.push_back(page);
  }

  void grow(Stored& s, int tokens) {
    while (int64_t(s.table.size()) * TILE < s.length + tokens) {
      s.table.push_back(free_.back());
      free_.pop_back();
    }
  }

  int stored() const {
    int sum = 0;
    for (const Stored& s : segments_) sum += s.length;
    return sum;
  }

  std::vector<char> read(const Stored& s, int layer, bool keys, int start, int length) {
    Arena own;
    const size_t bytes = row_bytes(keys) * size_t(length);
    char* out = own.make(bytes);
    Heads h = heads();
    if (keys)
      h.value_dim = h.head_dim;
    else
      h.head_dim = h.value_dim;
    cpu::read({h, keys ? key_pages_[layer] : value_pages_[layer], keys, s.table.data(), start,
               length, out});
    own.check();
    return {out, out + bytes};
  }

  // Segments hold what they held, to the bit, wherever one begins to read.
  void check_stored() {
    for (const Stored& s : segments_)
      for (int layer = 0; layer < layers_; ++layer)
        for (bool keys : {true, false}) {
          const int start = int(rng_.range(0, s.length));
          const std::vector<char>& all = keys ? s.keys[layer] : s.values[layer];
          const std::vector<char> part(all.begin() + start * int64_t(row_bytes(keys)), all.end());
          require(read(s, layer, keys, start, s.length - start) == part,
                  keys ? "keys changed in their pages" : "values changed in their pages");
        }
  }

  // `bytes` [tokens, Hkv, D] is `raw` rotated to `first`, first + step, ... within rounding.
  void check_keys(const std::vector<char>& bytes, const std::vector<double>& raw, int64_t first,
                  int64_t step, double scale, const char* what) {
    std::vector<double> x(head_dim_);
    Turn turn(scoring_, first);
    const int64_t rows = int64_t(raw.size()) / head_dim_;
    for (int64_t r = 0; r < rows; ++r) {
      x.assign(raw.begin() + r * head_dim_, raw.begin() + (r + 1) * head_dim_);
      double norm = 0;
      for (double value : x) norm = std::max(norm, std::abs(value));
      if (r % kv_heads_ == 0) turn = Turn(scoring_, first + r / kv_heads_ * step);
      turn.apply(scoring_, scale, x.data());
      for (int d = 0; d < head_dim_; ++d) {
        const double got = widen(dtype_, bytes.data() + (r * head_dim_ + d) * element_size(dtype_));
        const double error = epsilon(dtype_) * 1.01 * std::abs(x[d]) +
                             1e-6 * norm * std::max(1.0, std::abs(scale)) + fuzz::step(dtype_);
        if (!(std::abs(got - x[d]) <= error))
          throw Finding(std::string(what) + ": a key is not where it belongs, row " +
                        std::to_string(r) + ", dimension " + std::to_string(d));
      }
    }
  }

  std::vector<double> widened(const std::vector<char>& bytes) const {
    std::vector<double> numbers(bytes.size() / size_t(element_size(dtype_)));
    for (size_t i = 0; i < numbers.size(); ++i)
      numbers[i] = widen(dtype_, bytes.data() + i * size_t(element_size(dtype_)));
    return numbers;
  }

  Dense dense(const Stored& s, int layer) const {
    Dense d{widened(s.keys[layer]), widened(s.values[layer]), {}};
    d.measure(head_dim_);
    return d;
  }

  // ---- what can happen ---------------------------------------------------------------------

  void step() {
    Problem p = scoring_;
    p.kv_heads = kv_heads_, p.group = group_, p.value_dim = value_dim_;
    const int count = int(segments_.size());
    std::vector<int> writers;
    for (int s = 0; s < count; ++s)
      if (rng_.chance(0.5) && writers.size() < 4) writers.push_back(s);
    if (writers.empty()) writers.push_back(int(rng_.range(0, count - 1)));
    std::vector<int> sizes;
    for (size_t i = 0; i < writers.size(); ++i) {
      int size = rng_.pick({1, 1, 1, 2, 3, 17, 63, 64, 65, int(rng_.range(1, 150))});
      size = std::min(size, std::max(1, (budget_ - stored()) / int(writers.size())));
      sizes.push_back(size);
      int pages = int(writers.size());
      for (const Stored& s : segments_) pages += s.length / TILE + 1;
      if (pages + size / TILE >= PAGES) return;  // full
    }
    p.workers = int(writers.size());
    p.segments = count;
    p.query_lengths.assign(sizes.begin(), sizes.end());
    std::vector<int32_t> key_start, slots, tile_pages;
    for (size_t i = 0; i < writers.size(); ++i) {
      Stored& s = segments_[writers[i]];
      grow(s, sizes[i]);
      key_start.push_back(s.length);
      for (int t = s.length; t < s.length + sizes[i]; ++t)
        slots.push_back(s.table[t / TILE] * TILE + t % TILE);
    }
    std::vector<int32_t> lengths;
    for (int s = 0; s < count; ++s) lengths.push_back(segments_[s].length);
    for (size_t i = 0; i < writers.size(); ++i) lengths[writers[i]] += sizes[i];
    p.lengths = lengths;
    for (int s = 0; s < count; ++s)
      tile_pages.insert(tile_pages.end(), segments_[s].table.begin(),
                        segments_[s].table.begin() + (lengths[s] + TILE - 1) / TILE);
    for (size_t i = 0; i < writers.size(); ++i)
      for (int s = 0; s < count; ++s) {
        const bool own = s == writers[i];
        p.offsets.push_back(own                ? segments_[s].length
                            : rng_.chance(0.3) ? HIDDEN
                                               : draw_offset(rng_, lengths[s]));
      }

    with_words(p, [&] { step(p, writers, key_start, tile_pages, slots); });
    for (size_t i = 0; i < writers.size(); ++i) segments_[writers[i]].length += sizes[i];
  }

  void step(const Problem& p, const std::vector<int>& writers,
            const std::vector<int32_t>& key_start, const std::vector<int32_t>& tile_pages,
            const std::vector<int32_t>& slots) {
    const int tokens = p.num_tokens(), num_heads = kv_heads_ * group_;
    const Plan plan(
        {p.workers, p.segments, group_, kv_heads_, int32_t(p.inv_freq.size()), p.window, true,
         ROW_GROUP, cpu::SHARED_KEYS, p.offsets.data(), p.lengths.data(), p.query_lengths.data(),
         p.inv_freq.data(), key_start.data(), tile_pages.data(), slots.data()},
        cpu::kernels().fill_angles);
    cpu::Workspace workspace;  // of all layers
    for (int layer = 0; layer < layers_; ++layer) {
      Arena own;
      const Tensor key = draw(own, tokens, kv_heads_, head_dim_);
      const Tensor value = draw(own, tokens, kv_heads_, value_dim_);
      const Tensor query = draw(own, tokens, num_heads, head_dim_);
      append(plan, layer, key, value);
      adopt(p, writers, key_start, layer, key, value);

      std::vector<Dense> known;
      for (const Stored& s : segments_) known.push_back(dense(s, layer));
      const Tensor out = attend(own, plan, p, layer, query, threads(), workspace);
      int first = 0;
      for (int w = 0; w < p.workers; first += p.query_lengths[w++])
        check_worker(p, known, w, query, out, 0, first, nullptr, {});
      const Tensor again = attend(own, plan, p, layer, query, int(rng_.range(1, 6)), workspace);
      require_same_rows(out, 0, 0, again, 0, 0, tokens, "other threads, pages");
      compare_rows(own, p, layer, query, out);
      own.check();
    }
  }

  Tensor draw(Arena& arena, int tokens, int num_heads, int dim) {
    Tensor t = draw_tensor(arena, rng_, dtype_, 1, tokens, num_heads, dim, false);
    const Data data = draw_data(rng_);
    t.fill(rng_, data == Data::Large ? Data::Normal : data);
    return t;
  }

  void append(const Plan& plan, int layer, const Tensor& key, const Tensor& value) {
    cpu::append({&plan.view(),
                 heads(),
                 {scoring_.rope_scale, scoring_.interleaved},
                 {key.data, 0, key.stride[1], key.stride[2]},
                 {value.data, 0, value.stride[1], value.stride[2]},
                 key_pages_[layer],
                 value_pages_[layer]},
                threads());
  }

  // Reads back what was appended, compares it, and takes it for what is stored.
  void adopt(const Problem& p, const std::vector<int>& writers,
             const std::vector<int32_t>& key_start, int layer, const Tensor& key,
             const Tensor& value) {
    int first = 0;
    for (int w = 0; w < p.workers; first += p.query_lengths[w++]) {
      Stored& s = segments_[writers[w]];
      const int size = p.query_lengths[w];
      const std::vector<char> keys = read(s, layer, true, key_start[w], size);
      const std::vector<char> values = read(s, layer, false, key_start[w], size);
      std::vector<double> raw;
      const char* at = values.data();
      for (int t = 0; t < size; ++t)
        for (int h = 0; h < kv_heads_; ++h) {
          for (int d = 0; d < head_dim_; ++d) raw.push_back(key.get(0, first + t, h, d));
          const size_t bytes = size_t(value_dim_ * element_size(dtype_));
          require(!std::memcmp(at, value.at(0, first + t, h), bytes), "append: other values");
          at += bytes;
        }
      check_keys(keys, raw, key_start[w], 1, scoring_.rope_scale, "append");
      s.keys[layer].insert(s.keys[layer].end(), keys.begin(), keys.end());
      s.values[layer].insert(s.values[layer].end(), values.begin(), values.end());
    }
  }

  Tensor attend(Arena& arena, const Plan& plan, const Problem& p, int layer, const Tensor& query,
                int threads, cpu::Workspace& workspace) {
    Tensor out = draw_tensor(arena, rng_, dtype_, 1, query.n[1], query.n[2], value_dim_, true);
    const std::vector<char> before = out.copy();
    cpu::attend({&plan.view(),
                 heads(),
                 {p.rope_scale, p.interleaved},
                 {p.scale, p.softcap},
                 {Layout::Pages, nullptr, key_pages_[layer], value_pages_[layer]},
                 {query.data, 0, query.stride[1], query.stride[2]},
                 {out.data, 0, out.stride[1], out.stride[2]},
                 nullptr,
                 0,
                 kv_heads_ * group_},
                0, threads, workspace);
    require_gaps(out, before, "out");
    return out;
  }

  // The op over what is stored, as plain tensors, gives the same bits.
  void compare_rows(Arena& arena, const Problem& p, int layer, const Tensor& query,
                    const Tensor& out) {
    const Plan plan({p.workers, p.segments, group_, kv_heads_, int32_t(p.inv_freq.size()), p.window,
                     true, ROW_GROUP, cpu::SHARED_KEYS, p.offsets.data(), p.lengths.data(),
                     p.query_lengths.data(), p.inv_freq.data(), nullptr, nullptr, nullptr},
                    cpu::kernels().fill_angles);
    std::vector<SegmentRows> rows;
    for (const Stored& s : segments_)
      rows.push_back({in_own_block(arena, s.keys[layer]), in_own_block(arena, s.values[layer]),
                      int64_t(kv_heads_) * head_dim_, head_dim_, int64_t(kv_heads_) * value_dim_,
                      value_dim_});
    const Tensor other =
        draw_tensor(arena, rng_, dtype_, 1, query.n[1], query.n[2], value_dim_, true);
    cpu::Workspace workspace;
    cpu::attend({&plan.view(),
                 heads(),
                 {p.rope_scale, p.interleaved},
                 {p.scale, p.softcap},
                 {Layout::Rows, rows.data(), nullptr, nullptr},
                 {query.data, 0, query.stride[1], query.stride[2]},
                 {other.data, 0, other.stride[1], other.stride[2]},
                 nullptr,
                 0,
                 kv_heads_ * group_},
                0, threads(), workspace);
    require_same_rows(out, 0, 0, other, 0, 0, int(query.n[1]), "plain tensors");
  }

  static char* in_own_block(Arena& arena, const std::vector<char>& bytes) {
    char* block = arena.make(bytes.size());
    std::copy(bytes.begin(), bytes.end(), block);
    return block;
  }

  void commit() {
    if (segments_.size() < 2) return;
    const int a = int(rng_.range(0, int64_t(segments_.size()) - 1));
    const int b = int((a + rng_.range(1, int64_t(segments_.size()) - 1)) % segments_.size());
    Stored &source = segments_[a], &target = segments_[b];
    const size_t pages = size_t(source.length + target.length + TILE - 1) / TILE;
    if (source.length == 0 || pages - target.table.size() > free_.size()) return;
    grow(target, source.length);
    const int half = int(scoring_.inv_freq.size());
    std::vector<float> angles(2 * size_t(half));
    cpu::kernels().fill_angles(&target.length, 1, scoring_.inv_freq.data(), half, angles.data());
    cpu::commit({heads(), layers(), scoring_.interleaved, half, angles.data(), source.table.data(),
                 target.table.data(), source.length, target.length},
                threads());
    for (int layer = 0; layer < layers_; ++layer) {
      const auto keys = read(target, layer, true, target.length, source.length);
      const auto values = read(target, layer, false, target.length, source.length);
      check_keys(keys, widened(source.keys[layer]), target.length, 0, 1.0, "commit");
      require(values == source.values[layer], "commit: other values");
      target.keys[layer].insert(target.keys[layer].end(), keys.begin(), keys.end());
      target.values[layer].insert(target.values[layer].end(), values.begin(), values.end());
    }
    target.length += source.length;
    for (int page : source.table) release(page);
    source = empty();
  }

  // A segment with copies of another one's pages.
  void fork() {
    const Stored& source = segments_[size_t(rng_.range(0, int64_t(segments_.size()) - 1))];
    if (source.table.empty() || source.table.size() + 4 > free_.size() ||
        stored() + source.length > budget_)
      return;
    Stored copy = source;
    copy.table.clear();
    grow(copy, 0);
    cpu::copy_pages(heads(), layers(), source.table.data(), copy.table.data(),
                    int64_t(copy.table.size()), threads());
    for (size_t i = 0; i < copy.table.size(); ++i)
      for (int layer = 0; layer < layers_; ++layer) {
        const auto same = [&](const char* pages, size_t bytes) {
          return !std::memcmp(pages + copy.table[i] * bytes, pages + source.table[i] * bytes,
                              bytes);
        };
        require(same(key_pages_[layer], key_bytes_) && same(value_pages_[layer], value_bytes_),
                "copy: other bytes");
      }
    segments_.push_back(copy);
  }

  void truncate() {
    Stored& s = segments_[size_t(rng_.range(0, int64_t(segments_.size()) - 1))];
    s.length = int32_t(rng_.range(0, s.length));
    while (int64_t(s.table.size()) * TILE >= s.length + TILE) {
      release(s.table.back());
      s.table.pop_back();
    }
    for (int layer = 0; layer < layers_; ++layer) {
      s.keys[layer].resize(row_bytes(true) * size_t(s.length));
      s.values[layer].resize(row_bytes(false) * size_t(s.length));
    }
  }

  LayerPages layers() {
    key_addresses_.assign(key_pages_.begin(), key_pages_.end());
    value_addresses_.assign(value_pages_.begin(), value_pages_.end());
    return {layers_, key_addresses_.data(), value_addresses_.data()};
  }

  Rng& rng_;
  Arena arena_;
  const DType dtype_;
  int kv_heads_, group_, head_dim_, value_dim_, layers_, budget_;
  Problem scoring_;  // what all steps have in common
  size_t key_bytes_, value_bytes_;
  std::vector<char*> key_pages_, value_pages_;
  std::vector<void*> key_addresses_, value_addresses_;
  std::vector<int> free_;
  std::vector<Stored> segments_;
};

}  // namespace

void cache_life(Rng& rng) { Life(rng).run(); }

}  // namespace fuzz
