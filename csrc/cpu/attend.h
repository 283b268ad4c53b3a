// Attention over many segments: one thread's share of the work.
//
// For each pair (KV heads, row group) the rows' queries are rotated on entering a segment; then,
// tile by tile, scores, softmax and the weighted sum of values run over all rows that see the
// tile, so that a tile is read from memory once for all of them. A chunk's partial result is
// folded into the rows' running result when the chunk ends. Short chunks may share a tile: each is
// scored with queries rotated for it, and from there on they are one chunk.
//
// A pair has one KV head, or, where a token's heads lie side by side in memory, several that take
// turns at each tile: so memory is read in order.

#pragma once

#include "multiply.h"
#include "pages.h"

namespace {

using hogwild::Chunk;
using hogwild::MAX_DIM;
using hogwild::Part;
using hogwild::PlanView;
using hogwild::ROW_GROUP;
using hogwild::RowGroup;
using hogwild::Span;
using hogwild::Visit;
using hogwild::cpu::AttendArgs;
using hogwild::cpu::SplitPair;
using hogwild::cpu::WorkRange;

// Row strides of the scratch arrays, off powers of two so that rows do not share cache sets.
constexpr int DIM_STRIDE = MAX_DIM + 16;
constexpr int SCORE_STRIDE = TILE + 16;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr double LN_2 = 0.69314718055994530942;

// The reference that exponents are taken against follows the running maximum only when that has
// moved by more than this (in powers of two): most tiles then rescale nothing.
constexpr float RESCALE_AFTER = 6.f;

struct Folded {
  alignas(64) float out[ROW_GROUP][DIM_STRIDE];  // weighted sums of values, not yet normalised
  float max[ROW_GROUP];                          // the reference of the exponents, base 2
  float sum[ROW_GROUP];                          // sum of weights; 0 where nothing was seen
};

// What is kept of each KV head of a pair.
struct HeadState {
  alignas(64) float query[ROW_GROUP][DIM_STRIDE];
  // Else what is read of a query and written of its rotation would be multiples of 4096 bytes
  // apart, and processors would take the one for the other.
  uint32_t apart[144];
  alignas(64) uint32_t rotated[ROW_GROUP][DIM_STRIDE];  // factors of keys, and their remainders
  alignas(64) float lane_sums[ROW_GROUP][LANES];
  Folded chunk, result;
};

struct Scratch {
  alignas(64) float scores[ROW_GROUP][SCORE_STRIDE];  // then weights, factors of values
  int64_t position[ROW_GROUP];  // of each row, relative to the segment's first token
  alignas(64) uint32_t keys[TILE * MAX_DIM];  // of plain tensors, as in a page
  alignas(64) uint32_t values[TILE * MAX_DIM];
  alignas(64) uint32_t packed_values[TILE * MAX_DIM];  // of short segments, or a tile's last ones
  // Of chunks that share a tile:
  uint32_t seen[ROW_GROUP];  // a bit for each that has a key which the row sees
  bool whole[ROW_GROUP];  // whether the row sees all keys of all of them
  alignas(64) int32_t is_key[TILE];  // -1 for the places of keys
  HeadState heads[1];  // as many as a pair has
};

struct Run {
  int first, last;  // consecutive rows that see the tile
};

struct TilePlace {
  int head;
  int segment;
  int begin;  // first key
};

// ---- softmax of one row over a tile -------------------------------------------------------

HOGWILD_INLINE void scale_row(float* x, int n, float factor) {
  for (int d = 0; d < n; d += LANES) store(x + d, load<vfloat>(x + d) * splat(factor));
}

// What makes <q, k> a score to base 2.
struct ScoreFactors {
  float query;  // of the query
  float late;  // of the product: what would not fit into a query without overflow, or else 1
  float cap;  // 0 = none

  explicit ScoreFactors(const hogwild::Scoring& scoring)
      : query(scoring.softcap != 0.f ? scoring.scale / scoring.softcap : scoring.scale * LOG2_E),
        late(1.f),
        cap(scoring.softcap * LOG2_E) {
    constexpr float MOST = 0x1p64f;
    const float size = query < 0.f ? -query : query;
    if (size == 0.f || (size >= 1 / MOST && size <= MOST)) return;
    late = query > __FLT_MAX__ ? __FLT_MAX__ : query < -__FLT_MAX__ ? -__FLT_MAX__ : query;
    query = 1.f;
  }
  bool finish() const { return late != 1.f || cap != 0.f; }
};

// Scores become weights 2^(score - reference - HEADROOM), 0 where `mask` makes a score -inf; the
// weights are factors, which may take less room, in the same place.
template <class T, class Mask>
HOGWILD_INLINE void softmax_row(Scratch& s, HeadState* h, int row, int vectors,
                                const ScoreFactors& factors, int padded_dim, Mask mask) {
  float* x = s.scores[row];
  if (factors.finish())
    for (int v = 0; v < vectors; ++v) {
      const vfloat score = load<vfloat>(x + v * LANES) * splat(factors.late);
      store(x + v * LANES, factors.cap != 0.f ? splat(factors.cap) * tanh(score) : score);
    }
  mask(x);

  vfloat top = load<vfloat>(x);
  for (int v = 1; v < vectors; ++v) top = max(top, load<vfloat>(x + v * LANES));
  float& reference = h->chunk.max[row];
  if (any_above(top, reference + RESCALE_AFTER)) {
    const float moved = max_lane(top);
    if (reference != -__builtin_inff()) {
      const float factor = exp2(splat(reference - moved))[0];
      scale_row(h->chunk.out[row], padded_dim, factor);
      scale_row(h->lane_sums[row], LANES, factor);
    }
    reference = moved;
  }

  const vfloat base = splat(reference == -__builtin_inff() ? 0.f : reference);
  vfloat sum = load<vfloat>(h->lane_sums[row]);
  for (int v = 0; v < vectors; ++v) {
    const vfloat weight = softmax_weight<MULTIPLIES_PAIRS<T>>(load<vfloat>(x + v * LANES) - base);
    // What values are multiplied by is what is summed: where a row sees one key, or hardly any
    // other, rounding then cancels.
    sum = sum + store_factors<T>(x, v * LANES, weight);
  }
  // Products in tiles take two vectors of weights at once.
  if (IN_TILES<T> && vectors % 2) store_factors<T>(x, vectors * LANES, vfloat{});
  store(h->lane_sums[row], sum);
}

// Scores outside keys [first, last) of the tile become -inf.
HOGWILD_INLINE void mask_keys(float* x, int vectors, int first, int last) {
  if (first == 0 && last == vectors * LANES) return;
  for (int v = 0; v < vectors; ++v) {
    const vint key = counting(v * LANES);
    const vfloat score = load<vfloat>(x + v * LANES);
    store(x + v * LANES,
          (key >= splat(first)) & (key < splat(last)) ? score : splat(-__builtin_inff()));
  }
}

// ---- tiles of plain tensors ---------------------------------------------------------------

// A block of keys given as rows of words -> [words][16].
static void interleave_keys(const uint32_t* const* rows, int words, Ahead& ahead, uint32_t* out) {
  for (int w = 0; w < words; w += LANES) {
    ahead.step();
    const int some = words - w < LANES ? words - w : LANES;
    for (int k = 0; k < COLUMN_BLOCK; k += LANES) {
      vuint block[LANES];
      uint32_t* to = out + w * COLUMN_BLOCK + k;
      if (some == LANES) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) block[i] = load<vuint>(rows[k + i] + w);
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) store(to + i * COLUMN_BLOCK, block[i]);
      } else {
        for (int i = 0; i < LANES; ++i) {
          block[i] = vuint{};
          __builtin_memcpy(&block[i], rows[k + i] + w, some * 4);
        }
        transpose(block);
        for (int i = 0; i < some; ++i) store(to + i * COLUMN_BLOCK, block[i]);
      }
    }
  }
}

// Two tokens' values -> words of the two.
HOGWILD_INLINE void interleave_values(const uint16_t* first, const uint16_t* second, int dim,
                                      uint32_t* out) {
  for (int d = 0; d < dim; ++d) out[d] = first[d] | uint32_t(second[d]) << 16;
}

template <class T>
struct Attention {
  typedef typename T::element E;

  const AttendArgs& args;
  const PlanView& plan;
  const Heads& heads;
  Scratch& s;
  const int key_words;  // of a key
  const int remainders;  // where they lie behind the factors of keys, in words; 0: there are none
  const int padded_dim;  // of the accumulators
  const ScoreFactors factors;
  Multiplier multiply;
  int first_head = 0, num_heads = 0;  // of the pair
  int head = 0;  // the one that is being worked on
  HeadState* h;  // its state

  Attention(const AttendArgs& a, Scratch& scratch)
      : args(a),
        plan(*a.plan),
        heads(a.heads),
        s(scratch),
        key_words(a.heads.head_dim / PER_WORD<T>),
        remainders(MULTIPLIES_PAIRS<T> ? (a.heads.head_dim + 2 * LANES - 1) / (2 * LANES) * LANES
                                       : 0),
        padded_dim((a.heads.value_dim + COLUMN_BLOCK - 1) / COLUMN_BLOCK * COLUMN_BLOCK),
        factors(a.scoring),
        h(scratch.heads) {}

  template <class Body>
  HOGWILD_INLINE void for_heads(Body body) {
    for (int i = 0; i < num_heads; ++i) {
      head = first_head + i;
      h = s.heads + i;
      body();
    }
  }

  const E* key_page(TilePlace at) {
    const int page = plan.tile_pages[plan.first_tile[at.segment] + at.begin / TILE];
    return (const E*)args.keys_values.key_pages + key_base(heads, page, at.head);
  }

  const E* value_page(TilePlace at) {
    const int page = plan.tile_pages[plan.first_tile[at.segment] + at.begin / TILE];
    return (const E*)args.keys_values.value_pages + value_base(heads, page, at.head);
  }

  const E* key_rows(TilePlace at) {
    const hogwild::SegmentRows& rows = args.keys_values.rows[at.segment];
    return (const E*)rows.keys + at.begin * rows.key_token_stride + at.head * rows.key_head_stride;
  }

  const E* value_rows(TilePlace at) {
    const hogwild::SegmentRows& rows = args.keys_values.rows[at.segment];
    return (const E*)rows.values + at.begin * rows.value_token_stride +
           at.head * rows.value_head_stride;
  }

  int keys_of(TilePlace at) {
    const int left = plan.lengths[at.segment] - at.begin;
    return left < TILE ? left : TILE;
  }

  bool in_pages() { return args.keys_values.layout == hogwild::Layout::Pages; }

  // Keys past the segment's end are whatever the page holds, or zero.
  Tile key_tile(TilePlace at, int keys) {
    const int block_words = key_words * COLUMN_BLOCK;
    if (in_pages()) return {(const uint32_t*)key_page(at), COLUMN_BLOCK, block_words};
    static const uint32_t zeros[MAX_DIM] = {};
    const E* base = key_rows(at);
    const int64_t stride = args.keys_values.rows[at.segment].key_token_stride;
    for (int block = 0; block < keys; block += COLUMN_BLOCK) {
      const uint32_t* from[COLUMN_BLOCK];
      for (int k = 0; k < COLUMN_BLOCK; ++k)
        from[k] = block + k < keys ? (const uint32_t*)(base + (block + k) * stride) : zeros;
      interleave_keys(from, key_words, multiply.ahead, s.keys + block * key_words);
    }
    return {s.keys, COLUMN_BLOCK, block_words};
  }

  Tile value_tile(TilePlace at, int keys) {
    if (in_pages())
      return {(const uint32_t*)value_page(at), hogwild::cpu::padded_value_dim(heads.value_dim),
              COLUMN_BLOCK};
    const E* base = value_rows(at);
    const int64_t stride = args.keys_values.rows[at.segment].value_token_stride;
    if constexpr (PER_WORD<T> == 2) {
      for (int k = 0; k < keys; k += 2) {
        multiply.ahead.step();
        interleave_values(base + k * stride, base + (k + 1 < keys ? k + 1 : k) * stride,
                          heads.value_dim, s.values + k / 2 * padded_dim);
      }
    } else {
      // Products count words by how far they are apart.
      if (padded_dim == heads.value_dim && stride != 0)
        return {(const uint32_t*)base, stride, COLUMN_BLOCK};
      // Vectors would read past the row's end.
      for (int k = 0; k < keys; ++k)
        __builtin_memcpy(s.values + k * padded_dim, base + k * stride, heads.value_dim * 4);
    }
    return {s.values, padded_dim, COLUMN_BLOCK};
  }

  // ---- rows ---------------------------------------------------------------------------------

  template <class Body>
  HOGWILD_INLINE void for_rows_of(const Part& part, Body body) {
    int token = part.head_row / heads.group, in_group = part.head_row % heads.group;
    for (int row = part.first_row; row < part.last_row; ++row) {
      body(row, token, head * heads.group + in_group);
      if (++in_group == heads.group) in_group = 0, ++token;
    }
  }

  template <class Body>
  HOGWILD_INLINE void for_rows_of(const Visit& visit, Body body) {
    for (int i = visit.span_begin; i < visit.span_end; ++i)
      for (int row = plan.spans[i].first; row < plan.spans[i].last; ++row) body(row);
  }

  // The factors of the scores go in with the queries.
  void load_queries(const RowGroup& group) {
    const hogwild::TokenTensor& q = args.query;
    const float factor = factors.query, rotary_factor = factor * args.rope.scale;
    for (int p = group.part_begin; p < group.part_end; ++p) {
      const Part& part = plan.parts[p];
      for_rows_of(part, [&](int row, int token, int query_head) {
        const E* from = (const E*)q.data + part.worker * q.worker_stride +
                        (plan.query_start[part.worker] + int64_t(token)) * q.token_stride +
                        query_head * q.head_stride;
        float* to = h->query[row];
        const int D = heads.head_dim, rotary = 2 * plan.half_rotary;
        for (int d = 0; d < rotary; ++d) to[d] = T::widen(from[d]) * rotary_factor;
        for (int d = rotary; d < D; ++d) to[d] = T::widen(from[d]) * factor;
        for (int d = D; d % (2 * LANES); ++d) to[d] = 0.f;
      });
    }
  }

  // Rotates, afresh from the unrotated query, the rows of all workers that see the segment, by
  // offset + i: the angles of the two are added, in float32; those of i = 0 are exact. Factors that
  // have fewer bits are kept in two parts: a score is then as exact as a product with the query
  // itself.
  void enter_segment(const RowGroup& group, int segment) {
    for (int p = group.part_begin; p < group.part_end; ++p) rotate_part(plan.parts[p], segment);
  }

  void rotate_part(const Part& part, int segment) {
    const int half = plan.half_rotary;
    const int64_t at = int64_t(part.worker) * plan.num_segments + segment;
    if (plan.offsets[at] == hogwild::HIDDEN) return;
    float combined[2][MAX_DIM / 2];
    const float* base_cos = plan.offset_angles + at * 2 * half;
    const float* base_sin = base_cos + half;
    for (int j = 0; j < 2 * half; j += 16) __builtin_prefetch(base_cos + 2 * half + j);
    const float *cos = base_cos, *sin = base_sin;
    int known = 0;  // the token whose angles those are
    for_rows_of(part, [&](int row, int token, int) {
      if (token != known) {
        const float* token_cos = plan.token_angles + int64_t(token) * 2 * half;
        const float* token_sin = token_cos + half;
        for (int j = 0; j < half; ++j) {
          combined[0][j] = base_cos[j] * token_cos[j] - base_sin[j] * token_sin[j];
          combined[1][j] = base_sin[j] * token_cos[j] + base_cos[j] * token_sin[j];
        }
        cos = combined[0], sin = combined[1];
        known = token;
      }
      multiply.ahead.step();
      s.position[row] = int64_t(plan.offsets[at]) + token;
      rotate_row(row, cos, sin);
    });
  }

  void rotate_row(int row, const float* cos, const float* sin) {
    constexpr int STEP = 2 * LANES;
    const int D = heads.head_dim, half = plan.half_rotary;
    const float* x = h->query[row];
    uint32_t* rotated = h->rotated[row];
    int done = 0;
    alignas(64) float y[MAX_DIM];
    if (!args.rope.interleaved && half % STEP == 0) {
      for (int j = 0; j < half; j += STEP) {
        vfloat low[2], high[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const int at = j + i * LANES;
          const vfloat a = load<vfloat>(x + at), b = load<vfloat>(x + half + at);
          const vfloat c = load<vfloat>(cos + at), s = load<vfloat>(sin + at);
          low[i] = a * c - b * s;
          high[i] = a * s + b * c;
        }
        store_split_factors<T>(rotated, remainders, j, low[0], low[1]);
        store_split_factors<T>(rotated, remainders, half + j, high[0], high[1]);
      }
      done = 2 * half;
    } else {
      __builtin_memcpy(y, x, sizeof y);
      rotate(y, cos, sin, half, args.rope.interleaved, 1.f);
      x = y;
    }
    for (int d = done; d < D; d += STEP)
      store_split_factors<T>(rotated, remainders, d, load<vfloat>(x + d),
                             load<vfloat>(x + d + LANES));
  }

  // Keys [first, last) of a chunk that a worker's token sees.
  struct Seen {
    int first, last;
  };

  Seen seen_of(const Chunk& chunk, int worker, int token) {
    const int64_t offset = plan.offsets[int64_t(worker) * plan.num_segments + chunk.segment];
    if (offset == hogwild::HIDDEN) return {0, 0};
    const int64_t first = offset + token - plan.window + 1, last = offset + token + 1;
    return {first > 0 ? int(first < chunk.end ? first : chunk.end) : 0,
            last < chunk.end ? int(last) : chunk.end};
  }

  // The keys of a chunk that any row sees, from a tile's first one on.
  Seen seen_tiles(const Visit& visit, const Chunk& chunk) {
    int64_t first = chunk.end, last = chunk.begin;
    for (int i = visit.span_begin; i < visit.span_end; ++i) {
      const Span& span = plan.spans[i];
      const int64_t low = s.position[span.first] - plan.window + 1;
      const int64_t high = s.position[span.last - 1] + 1;
      first = low < first ? low : first;
      last = high > last ? high : last;
    }
    first = first < chunk.begin ? chunk.begin : first / TILE * TILE;
    return {int(first), int(last < chunk.end ? last : chunk.end)};
  }

  // The runs of consecutive rows that see a key of [begin, end); returns how many.
  int runs_of(const Visit& visit, int begin, int end, Run* runs) {
    int count = 0;
    for (int i = visit.span_begin; i < visit.span_end; ++i) {
      const Span& span = plan.spans[i];
      int first = span.first, last = span.last;
      while (first < last && s.position[first] < begin) ++first;
      while (first < last && s.position[last - 1] - plan.window >= end - 1) --last;
      if (first == last) continue;
      if (count && runs[count - 1].last == first)
        runs[count - 1].last = last;
      else
        runs[count++] = {first, last};
    }
    return count;
  }

  static int rows_of(const Run* runs, int count) {
    int rows = 0;
    for (int r = 0; r < count; ++r) rows += runs[r].last - runs[r].first;
    return rows;
  }

  // A tile in memory: pages are dense, rows of plain tensors lie apart.
  Lines key_lines(TilePlace at) {
    const int keys = keys_of(at), row_bytes = key_words * 4;
    if (in_pages())
      return {key_page(at), 1,
              (keys + COLUMN_BLOCK - 1) / COLUMN_BLOCK * COLUMN_BLOCK * row_bytes / 64, 0};
    const hogwild::SegmentRows& rows = args.keys_values.rows[at.segment];
    return row_lines(key_rows(at), keys, row_bytes, rows.key_token_stride, rows.key_head_stride);
  }

  Lines value_lines(TilePlace at) {
    const int keys = keys_of(at), row_bytes = heads.value_dim * int(sizeof(E));
    if (in_pages()) {
      const int words = (keys + PER_WORD<T> - 1) / PER_WORD<T>;
      return {value_page(at), 1,
              words * int(hogwild::cpu::padded_value_dim(heads.value_dim)) / COLUMN_BLOCK, 0};
    }
    const hogwild::SegmentRows& rows = args.keys_values.rows[at.segment];
    return row_lines(value_rows(at), keys, row_bytes, rows.value_token_stride,
                     rows.value_head_stride);
  }

  // Of all heads of the pair.
  Lines row_lines(const E* first, int keys, int row_bytes, int64_t token_stride,
                  int64_t head_stride) {
    const int64_t bytes = (num_heads - 1) * head_stride * int64_t(sizeof(E)) + row_bytes;
    return {first, keys, int((bytes + 63) / 64), token_stride * int64_t(sizeof(E))};
  }

  // Asks for `next` in steps, while the runs of a tile of `keys` are computed.
  void look_ahead(const Run* runs, int count, int keys, TilePlace next) {
    const int blocks = (keys + COLUMN_BLOCK - 1) / COLUMN_BLOCK;
    int steps = 0;
    if (!in_pages()) {
      steps += blocks * ((key_words + LANES - 1) / LANES);
      if (PER_WORD<T> == 2) steps += keys / 2;
    }
    for (int r = 0; r < count; ++r) {
      const int rows = runs[r].last - runs[r].first;
      steps += rows;
      steps += Multiplier::steps<T>(MULTIPLIES_PAIRS<T>, rows, key_words, blocks * COLUMN_BLOCK);
      steps +=
          Multiplier::steps<T>(false, rows, (keys + PER_WORD<T> - 1) / PER_WORD<T>, padded_dim);
    }
    multiply.ahead.start(key_lines(next), value_lines(next), steps * num_heads);
  }

  // Adds weights times values to the chunk's result, or begins it with them.
  void weigh_values(Run run, Tile value, int keys, bool add) {
    constexpr int AT_ONCE = IN_TILES<T> ? WORDS_AT_ONCE : 1;
    const int rows = run.last - run.first;
    const int words = keys / (AT_ONCE * PER_WORD<T>)*AT_ONCE, rest = keys - words * PER_WORD<T>;
    const uint32_t* weights = (const uint32_t*)s.scores[run.first];
    float* out = h->chunk.out[run.first];
    if (words)
      multiply.template operator()<T, SCORE_STRIDE, DIM_STRIDE>(weights, 0, rows, value, words,
                                                                padded_dim, out, add);
    if (rest) {
      multiply.template operator()<T, SCORE_STRIDE, DIM_STRIDE>(
          weights + factor_words<T>(words * PER_WORD<T>), 0, rows,
          last_values(value, words, rest, AT_ONCE, s.packed_values), AT_ONCE, padded_dim, out,
          add || words);
    }
  }

  // `count` values from a tile's word `first` on, followed by zeros to make `words` of them: what
  // the page holds there is nobody's, and a weight of zero would not hide it if it is not a number.
  Tile last_values(Tile value, int first, int count, int words, uint32_t* to) {
    const Tile packed{to, padded_dim, COLUMN_BLOCK};
    const uint32_t* from = value.words + first * value.stride;
    int word = 0;
    for (; word < count / PER_WORD<T>; ++word, from += value.stride, to += padded_dim)
      for (int d = 0; d < padded_dim; d += LANES) store(to + d, load<vuint>(from + d));
    if (count % PER_WORD<T>) {
      for (int d = 0; d < padded_dim; d += LANES)
        store(to + d, load<vuint>(from + d) & splat(0xffffu));
      ++word, to += padded_dim;
    }
    for (; word < words; ++word, to += padded_dim)
      for (int d = 0; d < padded_dim; d += LANES) store(to + d, vuint{});
    return packed;
  }

  // ---- a chunk's partial result -------------------------------------------------------------

  // `next` is the tile that will be read after the chunk.
  void attend_chunk(const Visit& visit, TilePlace next) {
    const Chunk& chunk = plan.chunks[visit.chunk];
    Run runs[ROW_GROUP];
    int rows = 0;
    for (int i = visit.span_begin; i < visit.span_end; ++i)
      rows += plan.spans[i].last - plan.spans[i].first;
    for_heads([&] {
      for_rows_of(visit, [&](int row) {
        store(h->lane_sums[row], vfloat{});
        h->chunk.max[row] = -__builtin_inff();
      });
    });
    bool begun = false;  // whether there is something in chunk.out

    int keys;
    const Seen seen = seen_tiles(visit, chunk);
    for (int begin = seen.first; begin < seen.last; begin += keys) {
      keys = chunk.end - begin < TILE ? chunk.end - begin : TILE;
      const int key_blocks = (keys + COLUMN_BLOCK - 1) / COLUMN_BLOCK;
      const int count = runs_of(visit, begin, begin + keys, runs);
      if (count == 0) continue;
      if (!begun && rows_of(runs, count) < rows) {  // some rows see nothing of the tile
        for_heads([&] {
          for_rows_of(visit, [&](int row) {
            for (int d = 0; d < padded_dim; d += LANES) store(h->chunk.out[row] + d, vfloat{});
          });
        });
        begun = true;
      }
      const bool last = seen.last - begin <= keys;
      look_ahead(runs, count, keys,
                 last ? next : TilePlace{first_head, chunk.segment, begin + TILE});
      for_heads([&] {
        const TilePlace here{head, chunk.segment, begin};
        const Tile key = key_tile(here, keys);
        for (int r = 0; r < count; ++r)
          multiply.template operator()<T, DIM_STRIDE, SCORE_STRIDE>(
              h->rotated[runs[r].first], remainders, runs[r].last - runs[r].first, key, key_words,
              key_blocks * COLUMN_BLOCK, s.scores[runs[r].first], false);
        for (int r = 0; r < count; ++r)
          for (int row = runs[r].first; row < runs[r].last; ++row) {
            multiply.ahead.step();
            const int64_t place = s.position[row] - begin;  // of the row's own token in the tile
            const int64_t first = place - plan.window + 1;
            softmax_row<T>(
                s, h, row, key_blocks * BLOCK_VECTORS, factors, padded_dim, [&](float* scores) {
                  mask_keys(scores, key_blocks * BLOCK_VECTORS, first > 0 ? int(first) : 0,
                            place + 1 < keys ? int(place + 1) : keys);
                });
          }
        const Tile value = value_tile(here, keys);
        for (int r = 0; r < count; ++r) weigh_values(runs[r], value, keys, begun);
      });
      begun = true;
    }

    for_heads([&] {
      for_rows_of(visit,
                  [&](int row) { h->chunk.sum[row] = sum_lanes(load<vfloat>(h->lane_sums[row])); });
    });
  }

  // ---- chunks that share a tile --------------------------------------------------------------
  // Each has a product of its own with the queries as they are rotated for it. Their scores lie
  // side by side, and from there on they are one tile of keys.

  static int places_of(int keys) { return (keys + 1) / 2 * 2; }

  struct SharedTile {
    int chunks[TILE / 2];  // those that are not hidden from the visit's workers
    int count = 0, places = 0;
  };

  // Fills s.seen, s.whole and s.is_key as well.
  SharedTile survey(const Visit& visit) {
    SharedTile tile;
    const int worker = plan.parts[plan.spans[visit.span_begin].part].worker;
    for (int c = visit.chunk; c < visit.chunk_end; ++c) {
      const Chunk& chunk = plan.chunks[c];
      if (plan.offsets[int64_t(worker) * plan.num_segments + chunk.segment] == hogwild::HIDDEN)
        continue;
      tile.chunks[tile.count++] = c;
      for (int k = 0; k < places_of(chunk.end); ++k)
        s.is_key[tile.places++] = k < chunk.end ? -1 : 0;
    }
    for (int k = tile.places; k % COLUMN_BLOCK; ++k) s.is_key[k] = 0;
    for (int i = visit.span_begin; i < visit.span_end; ++i) {
      const Part& part = plan.parts[plan.spans[i].part];
      int known = -1;  // the token of these two
      uint32_t seen = 0;
      bool whole = true;
      for_rows_of(part, [&](int row, int token, int) {
        if (token != known) {
          known = token, seen = 0, whole = true;
          for (int c = 0; c < tile.count; ++c) {
            const Chunk& chunk = plan.chunks[tile.chunks[c]];
            const Seen keys = seen_of(chunk, part.worker, token);
            if (keys.first < keys.last) seen |= 1u << c;
            whole &= keys.first == 0 && keys.last == chunk.end;
          }
        }
        s.seen[row] = seen, s.whole[row] = whole;
      });
    }
    return tile;
  }

  // Scores of what a worker's token does not see become -inf.
  void mask_places(float* x, int vectors, const SharedTile& tile, int row, int worker, int token) {
    for (int v = 0; v < vectors; ++v) {
      const vfloat score = load<vfloat>(x + v * LANES);
      store(x + v * LANES, load<vint>(s.is_key + v * LANES) ? score : splat(-__builtin_inff()));
    }
    if (s.whole[row]) return;
    for (int c = 0; c < tile.count; ++c) {
      const Chunk& chunk = plan.chunks[tile.chunks[c]];
      const Seen keys = seen_of(chunk, worker, token);
      for (int k = 0; k < chunk.end; ++k)
        if (k < keys.first || k >= keys.last) x[k] = -__builtin_inff();
      x += places_of(chunk.end);
    }
  }

  // The values of the chunks with a bit in `seen`, zeros for the others: a weight of zero would not
  // hide what is not a number.
  Tile pack_values(const SharedTile& tile, uint32_t seen, int words) {
    uint32_t* to = s.packed_values;
    for (int c = 0; c < tile.count; ++c) {
      const Chunk& chunk = plan.chunks[tile.chunks[c]];
      const int keys = seen >> c & 1 ? chunk.end : 0;
      const int some = places_of(chunk.end) / PER_WORD<T>;
      last_values(keys ? value_tile({head, chunk.segment, 0}, keys) : Tile{}, 0, keys, some, to);
      to += some * padded_dim;
      words -= some;
    }
    last_values(Tile{}, 0, 0, words, to);
    return {s.packed_values, padded_dim, COLUMN_BLOCK};
  }

  void attend_shared(const Visit& visit, TilePlace next) {
    constexpr int AT_ONCE = IN_TILES<T> ? WORDS_AT_ONCE : 1;
    const SharedTile tile = survey(visit);
    const int vectors = (tile.places + COLUMN_BLOCK - 1) / COLUMN_BLOCK * BLOCK_VECTORS;
    const int words = (tile.places / PER_WORD<T> + AT_ONCE - 1) / AT_ONCE * AT_ONCE;
    const Run rows{plan.spans[visit.span_begin].first, plan.spans[visit.span_end - 1].last};

    for_heads([&] {
      float* scores = s.scores[rows.first];
      for (int c = 0; c < tile.count; ++c) {
        const TilePlace here{head, plan.chunks[tile.chunks[c]].segment, 0};
        const int keys = keys_of(here);
        if (head == first_head)
          look_ahead(&rows, 1, keys,
                     c + 1 < tile.count
                         ? TilePlace{head, plan.chunks[tile.chunks[c + 1]].segment, 0}
                         : next);
        for (int i = visit.span_begin; i < visit.span_end; ++i)
          rotate_part(plan.parts[plan.spans[i].part], here.segment);
        multiply.template operator()<T, DIM_STRIDE, SCORE_STRIDE>(
            h->rotated[rows.first], remainders, rows.last - rows.first, key_tile(here, keys),
            key_words, (keys + COLUMN_BLOCK - 1) / COLUMN_BLOCK * COLUMN_BLOCK, scores, false);
        scores += places_of(keys);
      }
      for (int i = visit.span_begin; i < visit.span_end; ++i) {
        const Span& span = plan.spans[i];
        const Part& part = plan.parts[span.part];
        for (int row = span.first; row < span.last; ++row) {
          const int token = (part.head_row + row - part.first_row) / heads.group;
          h->chunk.max[row] = -__builtin_inff();
          store(h->lane_sums[row], vfloat{});
          softmax_row<T>(s, h, row, vectors, factors, padded_dim,
                         [&](float* x) { mask_places(x, vectors, tile, row, part.worker, token); });
          h->chunk.sum[row] = sum_lanes(load<vfloat>(h->lane_sums[row]));
        }
      }
      Run run{0, 0};
      const auto weigh = [&] {
        if (run.first == run.last) return;
        multiply.template operator()<T, SCORE_STRIDE, DIM_STRIDE>(
            (const uint32_t*)s.scores[run.first], 0, run.last - run.first,
            pack_values(tile, s.seen[run.first], words), words, padded_dim, h->chunk.out[run.first],
            false);
      };
      for_rows_of(visit, [&](int row) {
        if (row != run.last || s.seen[row] != s.seen[run.first]) {
          weigh();
          run.first = row;
        }
        run.last = row + 1;
      });
      weigh();
    });
  }

  // ---- fold ---------------------------------------------------------------------------------

  // result[row] <- result[row] (+) (out, max, sum), the merge of two softmaxes.
  void fold_row(int row, const float* out, float max, float sum) {
    Folded& result = h->result;
    if (sum == 0.f) return;
    if (result.sum[row] == 0.f) {
      for (int d = 0; d < padded_dim; d += LANES) store(result.out[row] + d, load<vfloat>(out + d));
      result.max[row] = max;
      result.sum[row] = sum;
      return;
    }
    const float top = max > result.max[row] ? max : result.max[row];
    const float ours = exp2(splat(result.max[row] - top))[0];
    const float theirs = exp2(splat(max - top))[0];
    for (int d = 0; d < padded_dim; d += LANES) {
      const vfloat a = load<vfloat>(result.out[row] + d) * splat(ours);
      store(result.out[row] + d, fma(load<vfloat>(out + d), splat(theirs), a));
    }
    result.sum[row] = result.sum[row] * ours + sum * theirs;
    result.max[row] = top;
  }

  void fold_chunk(const Visit& visit) {
    for_rows_of(visit, [&](int row) {
      fold_row(row, h->chunk.out[row], h->chunk.max[row], h->chunk.sum[row]);
    });
  }

  // Partial results of a split pair, block 0 what the first range folded, for each of its heads:
  // [rows][dim], max, sum.
  float* partial_block(const SplitPair& split, int rows, int block) {
    const int64_t index = int64_t(block) * args.heads_at_once + head - first_head;
    return split.partials + index * rows * (padded_dim + 2);
  }

  void store_row(float* block, int rows, int row, const Folded& from) {
    for (int d = 0; d < padded_dim; d += LANES)
      store(block + int64_t(row) * padded_dim + d, load<vfloat>(from.out[row] + d));
    block[int64_t(rows) * padded_dim + row] = from.max[row];
    block[int64_t(rows) * (padded_dim + 1) + row] = from.sum[row];
  }

  void fold_stored(const float* block, int rows, int row) {
    fold_row(row, block + int64_t(row) * padded_dim, block[int64_t(rows) * padded_dim + row],
             block[int64_t(rows) * (padded_dim + 1) + row]);
  }

  void clear_result(int rows) {
    for (int row = 0; row < rows; ++row) {
      h->result.sum[row] = 0.f;
      h->result.max[row] = -__builtin_inff();
    }
  }

  void fold_split(const RowGroup& group, const SplitPair& split) {
    const int rows = group.row_end - group.row_begin;
    clear_result(rows);
    const float* first = partial_block(split, rows, 0);
    for (int row = 0; row < rows; ++row) fold_stored(first, rows, row);
    for (int v = group.visit_begin + split.first_stored; v < group.visit_end; ++v) {
      const Visit& visit = plan.visits[v];
      const float* block =
          partial_block(split, rows, 1 + v - group.visit_begin - split.first_stored);
      for_rows_of(visit, [&](int row) { fold_stored(block, rows, row); });
    }
  }

  // ---- output -------------------------------------------------------------------------------

  void write_rows(const RowGroup& group) {
    const hogwild::TokenTensor& o = args.out;
    for (int p = group.part_begin; p < group.part_end; ++p) {
      const Part& part = plan.parts[p];
      for_rows_of(part, [&](int row, int token, int query_head) {
        const int64_t index = plan.query_start[part.worker] + int64_t(token);
        E* to = (E*)o.data + part.worker * o.worker_stride + index * o.token_stride +
                query_head * o.head_stride;
        const float sum = h->result.sum[row];
        const float inverse = sum == 0.f ? 0.f : 1.f / sum;
        for (int d = 0; d < heads.value_dim; ++d) {
          to[d] = T::narrow(sum == 0.f ? 0.f : h->result.out[row][d] * inverse);
        }
        if (args.lse)
          args.lse[part.worker * args.lse_worker_stride + index * args.lse_token_stride +
                   query_head] = sum == 0.f ? -__builtin_inff()
                                            : float(LN_2 * (double(h->result.max[row]) + HEADROOM +
                                                            __builtin_log2(double(sum))));
      });
    }
  }

  // ---- a range of work ----------------------------------------------------------------------

  // The tile that is read first when a visit of a pair is done, or, after the last one, again.
  TilePlace tile_after(int pair, int visit) {
    const RowGroup* group = &plan.groups[pair % plan.num_groups];
    int index = group->visit_begin + visit;
    if (index + 1 < group->visit_end) {
      ++index;
    } else if ((pair + 1) / plan.num_groups * args.heads_at_once < heads.kv_heads) {
      group = &plan.groups[(pair + 1) % plan.num_groups];
      if (group->visit_begin < group->visit_end) {
        ++pair;
        index = group->visit_begin;
      }
    }
    const Chunk& chunk = plan.chunks[plan.visits[index].chunk];
    return {pair / plan.num_groups * args.heads_at_once, chunk.segment, chunk.begin};
  }

  void run(const WorkRange& range) {
    for (int pair = range.begin.pair; pair <= range.end.pair; ++pair) {
      const int index = pair % plan.num_groups;
      if (pair == range.end.pair && range.end.visit == 0) break;
      const RowGroup& group = plan.groups[index];
      const int rows = group.row_end - group.row_begin;
      const int visits = group.visit_end - group.visit_begin;
      const int first = pair == range.begin.pair ? range.begin.visit : 0;
      const int last = pair == range.end.pair ? range.end.visit : visits;
      SplitPair* split = first > 0 ? range.head : last < visits ? range.tail : nullptr;
      first_head = pair / plan.num_groups * args.heads_at_once;
      num_heads = heads.kv_heads - first_head;
      if (num_heads > args.heads_at_once) num_heads = args.heads_at_once;

      for_heads([&] {
        load_queries(group);
        clear_result(rows);
      });
      int entered = -1;
      for (int v = first; v < last; ++v) {
        const Visit& visit = plan.visits[group.visit_begin + v];
        const int segment = plan.chunks[visit.chunk].segment;
        if (visit.chunk_end > visit.chunk + 1) {
          attend_shared(visit, tile_after(pair, v));
          entered = -1;
        } else {
          if (segment != entered) {
            for_heads([&] { enter_segment(group, segment); });
            entered = segment;
          }
          attend_chunk(visit, tile_after(pair, v));
        }
        for_heads([&] {
          if (first == 0) return fold_chunk(visit);
          float* block = partial_block(*split, rows, 1 + v - split->first_stored);
          for_rows_of(visit, [&](int row) { store_row(block, rows, row, h->chunk); });
        });
      }
      if (!split) {
        for_heads([&] { write_rows(group); });
        continue;
      }
      if (first == 0)
        for_heads([&] {
          float* block = partial_block(*split, rows, 0);
          for (int row = 0; row < rows; ++row) store_row(block, rows, row, h->result);
        });
      if (__atomic_sub_fetch(&split->remaining, 1, __ATOMIC_ACQ_REL) == 0)
        for_heads([&] {
          fold_split(group, *split);
          write_rows(group);
        });
    }
  }
};

template <class T>
static void attend(const AttendArgs& args, const WorkRange& range, void* scratch) {
  Attention<T>(args, *(Scratch*)scratch).run(range);
}

}  // namespace
