// The op on plain tensors: a plan and one attend, with rows that lie anyhow.

#include <algorithm>
#include <limits>
#include <memory>

#include "../../csrc/cpu/backend.h"
#include "../../csrc/plan.h"
#include "cases.h"

namespace fuzz {

using namespace hogwild;

namespace {

// Most multiply-adds of the oracle; what is larger is cut down, now and then at twenty times that.
constexpr double COST = 1e5;

struct Call {
  Problem p;
  Tensor query;              // [W, Q, Hq, D]
  std::vector<Tensor> keys;  // [1, L, Hkv, D] of each segment
  std::vector<Tensor> values;

  TokenTensor queries() const {
    return {query.data, query.stride[0], query.stride[1], query.stride[2]};
  }
};

struct Result {
  Tensor out;
  std::vector<float> lse;  // [W, Q, Hq], or empty
};

Problem draw_problem(Rng& rng) {
  Problem p;
  p.dtype = draw_dtype(rng);
  p.kv_heads = rng.pick({1, 1, 2, 3, 4, 9});
  p.group = rng.pick({1, 1, 2, 3, 5, 7, 8});
  p.head_dim = draw_dim(rng);
  p.value_dim = rng.chance(0.6) ? p.head_dim : draw_dim(rng);
  p.inv_freq = draw_frequencies(rng, p.head_dim);
  draw_scoring(rng, p);
  p.workers = rng.pick({1, 1, 2, 3, 4, 6});
  for (int w = 0; w < p.workers; ++w)
    p.query_lengths.push_back(rng.pick({0, 1, 1, 1, 2, 3, int(rng.range(1, 20))}));
  const bool short_ones = rng.chance(0.35);  // which share tiles
  p.segments = short_ones ? int(rng.range(16, 44)) : int(rng.range(1, 6));
  for (int s = 0; s < p.segments; ++s)
    p.lengths.push_back(short_ones && !rng.chance(0.06)
                            ? rng.pick({0, 1, 2, 3, 8, 15, 16, 17, 31, 32, int(rng.range(1, 34))})
                            : draw_length(rng));
  const double most = rng.chance(0.02) ? 20 * COST : COST;
  const auto cost = [&] {
    double keys = 0;
    for (int n : p.lengths) keys += n;
    const double dims = p.head_dim + p.value_dim;
    return dims * p.kv_heads * keys * (1 + p.group * p.num_tokens());
  };
  while (cost() > most) {
    if (rng.chance(0.5) && p.workers > 1) --p.workers, p.query_lengths.pop_back();
    if (p.kv_heads > 1 && rng.chance(0.5)) --p.kv_heads;
    for (int32_t& n : p.lengths)
      if (rng.chance(short_ones ? 0.05 : 0.3)) n = n * 2 / 3;
    for (int32_t& n : p.query_lengths)
      if (n > 1 && rng.chance(0.5)) --n;
  }
  const double hidden = rng.pick({0.0, 0.15, 0.5});
  const bool as_views = rng.chance(0.3);  // as a cache would have it
  const bool alike = rng.chance(0.4);     // workers see the same segments
  for (int w = 0; w < p.workers; ++w) {
    int64_t distance = 0;
    for (int s = 0; s < p.segments; ++s) distance += p.lengths[s];
    distance -= p.query_lengths[w];
    for (int s = 0; s < p.segments; ++s) {
      const bool hides = alike && w ? !p.sees(0, s) : rng.chance(hidden);
      p.offsets.push_back(hides      ? HIDDEN
                          : as_views ? int32_t(distance)
                                     : draw_offset(rng, p.lengths[s]));
      distance -= p.lengths[s];
    }
  }
  return p;
}

// `packed`: tokens worker after worker, as a cache has them; else padded.
Plan make_plan(const Problem& p, int32_t row_group, int32_t shared_keys) {
  return Plan({p.workers, p.segments, p.group, p.kv_heads, int32_t(p.inv_freq.size()), p.window,
               false, row_group, shared_keys, p.offsets.data(), p.lengths.data(),
               p.query_lengths.data(), p.inv_freq.data(), nullptr, nullptr, nullptr},
              cpu::kernels().fill_angles);
}

// Runs it; `out` and `lse` are in memory of their own size, full of NaN.
Result run(Arena& arena, Rng& rng, const Call& call, int threads, bool with_lse,
           int32_t row_group = ROW_GROUP, int32_t shared_keys = cpu::SHARED_KEYS) {
  const Problem& p = call.p;
  const int heads = p.kv_heads * p.group, queries = int(call.query.n[1]);
  Result r{draw_tensor(arena, rng, p.dtype, p.workers, queries, heads, p.value_dim, true), {}};
  const std::vector<char> before = r.out.copy();
  const size_t lse_bytes = size_t(p.workers) * queries * heads * sizeof(float);
  float* lse = nullptr;
  if (with_lse) {
    lse = reinterpret_cast<float*>(arena.make(lse_bytes));
    std::memset(lse, 0xff, lse_bytes);
  }
  std::vector<SegmentRows> rows;
  for (int s = 0; s < p.segments; ++s) {
    const Tensor &k = call.keys[s], &v = call.values[s];
    rows.push_back({k.data, v.data, k.stride[1], k.stride[2], v.stride[1], v.stride[2]});
  }
  const Plan plan = make_plan(p, row_group, shared_keys);
  cpu::Workspace workspace;
  cpu::attend({&plan.view(),
               {p.dtype, p.kv_heads, p.group, p.head_dim, p.value_dim},
               {p.rope_scale, p.interleaved},
               {p.scale, p.softcap},
               {Layout::Rows, rows.data(), nullptr, nullptr},
               call.queries(),
               {r.out.data, r.out.stride[0], r.out.stride[1], r.out.stride[2]},
               lse,
               int64_t(queries) * heads,
               heads},
              queries, threads, workspace);
  require_gaps(r.out, before, "out");
  if (lse) r.lse.assign(lse, lse + lse_bytes / sizeof(float));
  return r;
}

// The call of some of its workers alone, in another order.
Call part_of(Arena& arena, Rng& rng, const Call& call, const std::vector<int>& workers) {
  Call part;
  part.p = call.p;
  part.keys = call.keys;
  part.values = call.values;
  part.p.workers = int(workers.size());
  part.p.query_lengths.clear();
  part.p.offsets.clear();
  for (int w : workers) {
    part.p.query_lengths.push_back(call.p.query_lengths[w]);
    for (int s = 0; s < call.p.segments; ++s) part.p.offsets.push_back(call.p.offset(w, s));
  }
  const int queries = part.p.max_query() + int(rng.range(0, 1));
  part.query = draw_tensor(arena, rng, call.p.dtype, part.p.workers, queries, call.query.n[2],
                           call.p.head_dim, true);
  for (size_t i = 0; i < workers.size(); ++i)
    for (int t = 0; t < part.p.query_lengths[i]; ++t)
      for (int h = 0; h < call.query.n[2]; ++h)
        std::memcpy(part.query.at(int64_t(i), t, h), call.query.at(workers[i], t, h),
                    size_t(call.p.head_dim * element_size(call.p.dtype)));
  return part;
}

}  // namespace

namespace {

void check_call(Rng& rng, const Problem& problem) {
  Arena arena;
  Call call;
  const Problem& p = call.p = problem;
  const int heads = p.kv_heads * p.group;
  const int queries = p.max_query() + rng.pick({0, 0, 1, 3});
  call.query = draw_tensor(arena, rng, p.dtype, p.workers, queries, heads, p.head_dim, false);
  call.query.fill(rng, draw_data(rng));
  const bool is_own = call.query.stride[0] && call.query.stride[1] && call.query.stride[2];
  for (int w = 0; w < p.workers && is_own; ++w)  // what nobody asked
    for (int i = p.query_lengths[w]; i < queries; ++i)
      for (int h = 0; h < heads; ++h)
        for (int d = 0; d < p.head_dim; ++d) put(p.dtype, call.query.at(w, i, h, d), NAN);

  std::vector<Dense> dense(p.segments);
  std::vector<bool> poisoned(p.segments);
  const Data data = draw_data(rng);
  const double poison = rng.pick({0.0, 0.0, 0.2, 1.0});
  for (int s = 0; s < p.segments; ++s) {
    bool hidden = true;  // from everybody
    for (int w = 0; w < p.workers; ++w) hidden &= !p.sees(w, s);
    poisoned[s] = rng.chance(hidden ? 0.9 : poison / p.segments);
    for (bool is_key : {true, false}) {
      const int dim = is_key ? p.head_dim : p.value_dim;
      Tensor t = draw_tensor(arena, rng, p.dtype, 1, p.lengths[s], p.kv_heads, dim, false);
      t.fill(rng, poisoned[s] ? Data::Nan : data == Data::Large ? Data::Normal : data);
      std::vector<double>& to = is_key ? dense[s].keys : dense[s].values;
      for (int l = 0; l < p.lengths[s]; ++l)
        for (int h = 0; h < p.kv_heads; ++h)
          for (int d = 0; d < dim; ++d) to.push_back(t.get(0, l, h, d));
      (is_key ? call.keys : call.values).push_back(t);
    }
    dense[s].measure(p.head_dim);
  }
  // Of all that a token sees nothing is NaN.
  std::vector<std::vector<bool>> sound(p.workers);
  for (int w = 0; w < p.workers; ++w)
    for (int i = 0; i < p.query_lengths[w]; ++i) {
      bool all = true;
      for (int s = 0; s < p.segments; ++s) all &= !(poisoned[s] && p.sees_a_key(w, s, i));
      sound[w].push_back(all);
    }

  const bool with_lse = rng.chance(0.5);
  const Result whole = run(arena, rng, call, 1, with_lse);
  for (int w = 0; w < p.workers; ++w) {
    const float* lse = with_lse ? &whole.lse[size_t(w) * queries * heads] : nullptr;
    check_worker(p, dense, w, call.query, whole.out, w, 0, lse, sound[w]);
    for (int i = p.query_lengths[w]; i < queries; ++i)
      for (int h = 0; h < heads; ++h) {
        for (int d = 0; d < p.value_dim; ++d)
          require(whole.out.get(w, i, h, d) == 0, "out of a token that is not there is not 0");
        if (lse) require(lse[i * heads + h] == -INFINITY, "lse of a token that is not there");
      }
  }

  const Result spread = run(arena, rng, call, int(rng.range(2, 7)), with_lse);
  std::vector<int> some;
  for (int w = 0; w < p.workers; ++w)
    if (rng.chance(0.5)) some.insert(some.begin() + rng.range(0, int64_t(some.size())), w);
  if (some.empty()) some.push_back(int(rng.range(0, p.workers - 1)));
  const Call part = part_of(arena, rng, call, some);
  const Result alone = run(arena, rng, part, int(rng.range(1, 3)), with_lse);
  // How many rows travel together decides nothing either.
  const Result narrow = run(arena, rng, call, 1, with_lse, int32_t(rng.range(1, ROW_GROUP)));
  const auto require_same = [&](const Result& other, int other_queries, int w, int at,
                                const char* what) {
    for (int i = 0; i < p.query_lengths[w]; ++i) {
      if (!sound[w][i]) continue;
      require_same_rows(whole.out, w, i, other.out, at, i, 1, what);
      if (!with_lse) continue;
      const float* a = whole.lse.data() + (size_t(w) * queries + i) * heads;
      const float* b = other.lse.data() + (size_t(at) * other_queries + i) * heads;
      if (std::memcmp(a, b, size_t(heads) * sizeof(float)))
        throw Finding(std::string(what) + ": other bits in lse");
    }
  };
  for (int w = 0; w < p.workers; ++w) {
    require_same(spread, queries, w, w, "several threads");
    require_same(narrow, queries, w, w, "smaller row groups");
  }
  for (size_t i = 0; i < some.size(); ++i)
    require_same(alone, int(part.query.n[1]), some[i], int(i), "in other company");
  arena.check();
}

}  // namespace

void attend_rows(Rng& rng) {
  const Problem p = draw_problem(rng);
  with_words(p, [&] { check_call(rng, p); });
}

// ---- a plan alone -------------------------------------------------------------------------

void large_plan(Rng& rng) {
  Problem p;
  p.kv_heads = rng.pick({1, 2, 8, 64});
  p.group = int(rng.range(1, 9));
  p.window = rng.pick<int64_t>({0, 0, 1, 100, 5000, int64_t(1) << 40});
  p.workers = int(rng.range(1, 40));
  p.segments = int(rng.range(1, 60));
  for (int w = 0; w < p.workers; ++w) p.query_lengths.push_back(int32_t(rng.range(0, 12)));
  const bool short_ones = rng.chance(0.5);
  for (int s = 0; s < p.segments; ++s)
    p.lengths.push_back(short_ones && rng.chance(0.95) ? int32_t(rng.range(0, 34))
                        : rng.chance(0.3)              ? int32_t(rng.range(0, 1 << 20))
                                                       : draw_length(rng));
  for (int i = 0; i < p.workers * p.segments; ++i)
    p.offsets.push_back(rng.chance(0.3) ? HIDDEN : draw_offset(rng, p.lengths[i % p.segments]));
  const int row_group = rng.pick({ROW_GROUP, ROW_GROUP, 32, 1, 7});
  const int shared = rng.pick({0, cpu::SHARED_KEYS, cpu::SHARED_KEYS});
  const Plan plan = make_plan(p, row_group, shared);
  const PlanView& v = plan.view();

  // Chunks are the segments, in order.
  int next_segment = -1, next_key = 0;
  for (int c = 0; c < v.num_chunks; ++c) {
    const Chunk& chunk = v.chunks[c];
    if (next_segment < 0 || next_key == p.lengths[next_segment]) {
      do ++next_segment;
      while (next_segment < p.segments && p.lengths[next_segment] == 0);
      next_key = 0;
    }
    require(chunk.segment == next_segment && chunk.begin == next_key && chunk.end > chunk.begin &&
                chunk.begin % TILE == 0,
            "chunks do not follow each other");
    next_key = chunk.end;
  }
  for (++next_segment; next_segment < p.segments; ++next_segment)
    require(p.lengths[next_segment] == 0, "a segment has no chunks");

  // Every row goes once over each chunk of which it sees a key, in their order.
  int rows = 0;
  for (int g = 0; g < v.num_groups; ++g) {
    const RowGroup& group = v.groups[g];
    require(group.row_begin == rows && group.row_end - rows <= row_group, "row groups");
    rows = group.row_end;
    const int size = group.row_end - group.row_begin;
    std::vector<std::vector<int>> visited(size), sees(size);
    for (int i = group.visit_begin; i < group.visit_end; ++i) {
      const Visit& visit = v.visits[i];
      int keys = 0;
      for (int c = visit.chunk; c < visit.chunk_end; ++c) {
        const Part& first = v.parts[v.spans[visit.span_begin].part];
        if (p.sees(first.worker, v.chunks[c].segment)) keys += (v.chunks[c].end + 1) / 2 * 2;
      }
      require(visit.chunk_end == visit.chunk + 1 || keys <= TILE, "more chunks than fit a tile");
      for (int j = visit.span_begin; j < visit.span_end; ++j) {
        const Span& span = v.spans[j];
        const Part& part = v.parts[span.part];
        require(
            part.first_row <= span.first && span.first < span.last && span.last <= part.last_row,
            "a span leaves its part");
        for (int row = span.first; row < span.last; ++row)
          for (int c = visit.chunk; c < visit.chunk_end; ++c)
            if (p.sees(part.worker, v.chunks[c].segment)) visited[row].push_back(c);
      }
    }
    for (int i = group.part_begin; i < group.part_end; ++i) {
      const Part& part = v.parts[i];
      for (int row = part.first_row; row < part.last_row; ++row) {
        const int token = (part.head_row + row - part.first_row) / p.group;
        for (int c = 0; c < v.num_chunks; ++c) {
          const Chunk& chunk = v.chunks[c];
          if (!p.sees(part.worker, chunk.segment)) continue;
          const int64_t at = int64_t(p.offset(part.worker, chunk.segment)) + token;
          const bool any = at >= chunk.begin && (!p.window || at - (chunk.end - 1) < p.window);
          if (any) sees[row].push_back(c);
        }
        require(std::is_sorted(visited[row].begin(), visited[row].end()), "order of the fold");
        require(std::adjacent_find(visited[row].begin(), visited[row].end()) == visited[row].end(),
                "a chunk is visited twice");
        require(std::includes(visited[row].begin(), visited[row].end(), sees[row].begin(),
                              sees[row].end()),
                "a row misses a chunk of which it sees a key");
      }
    }
  }
  require(rows == p.num_tokens() * p.group, "rows are lost");

  // Angles at positions of any size.
  int32_t positions[8];
  float inv_freq[3];
  for (int32_t& x : positions) x = draw_offset(rng, int32_t(rng.range(0, INT32_MAX - 4)));
  for (float& x : inv_freq) x = rng.chance(0.2) ? 1.f : float(rng.uniform());
  float angles[8][2][3];
  cpu::kernels().fill_angles(positions, 8, inv_freq, 3, &angles[0][0][0]);
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < 3; ++j) {
      const double angle = double(positions[i]) * double(inv_freq[j]);
      if (!(std::abs(angles[i][0][j] - std::cos(angle)) < 1e-7 &&
            std::abs(angles[i][1][j] - std::sin(angle)) < 1e-7))
        throw Finding("cos and sin at position " + std::to_string(positions[i]));
    }
}

}  // namespace fuzz
