// Attention over many segments: one thread's share of the work.
//
// For each pair (KV head, row group) the rows' queries are rotated on entering a segment; then,
// tile by tile, scores, softmax and the weighted sum of values run over all rows that see the
// tile, so that a tile is read from memory once for all of them. A chunk's partial result is
// folded into the rows' running result when the chunk ends.

#pragma once

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

// Register blocks: ROWS x vectors of accumulators, sized for the register file.
#if HOGWILD_LANES == 16
constexpr int MAX_ROWS = 12;                                          // of 32 registers
constexpr int wide_vectors(int rows) { return rows > 6 ? 2 : 4; }
#elif HOGWILD_LANES == 8
constexpr int MAX_ROWS = 6;                                           // of 16
constexpr int wide_vectors(int rows) { return rows > 2 ? 2 : 4; }
#else
constexpr int MAX_ROWS = 2;                                           // of 16, or NEON's 32
constexpr int wide_vectors(int) { return 4; }
#endif
constexpr int BLOCK_VECTORS = KEY_BLOCK / LANES;                      // of one block of keys
constexpr int narrow_vectors(int rows) {
  return BLOCK_VECTORS < wide_vectors(rows) ? BLOCK_VECTORS : wide_vectors(rows);
}

struct Folded {
  alignas(64) float out[ROW_GROUP][DIM_STRIDE];  // weighted sums of values, not yet normalised
  float max[ROW_GROUP];                          // the reference of the exponents, base 2
  float sum[ROW_GROUP];                          // sum of weights; 0 where nothing was seen
};

struct Scratch {
  alignas(64) float query[ROW_GROUP][DIM_STRIDE];
  alignas(64) float rotated[ROW_GROUP][DIM_STRIDE];
  alignas(64) float scores[ROW_GROUP][SCORE_STRIDE];
  alignas(64) float lane_sums[ROW_GROUP][LANES];
  Folded chunk, result;
  int64_t position[ROW_GROUP];  // of each row, relative to the segment's first token
  alignas(64) uint32_t keys[TILE * MAX_DIM];
  alignas(64) uint32_t values[TILE * MAX_DIM];
};

struct Run {
  int first, last;  // consecutive rows that see the tile
};

struct TilePlace {
  int segment;
  int begin;  // first key
};

struct KeyTile {
  const uint32_t* units;  // [TILE / 16][units][16]
  int64_t block_stride;
  int64_t ahead;          // from here to the same place in the next tile, in bytes
};

struct ValueTile {
  const char* rows;
  int64_t stride;  // in bytes
  int64_t ahead;
};

// Asks for what the next tile will read, one line for each that this one reads.
HOGWILD_INLINE void prefetch(const void* p, int64_t ahead) {
  __builtin_prefetch((const char*)p + ahead, 0, 2);
}

// ---- scores: rows x keys ------------------------------------------------------------------

// scores[r][v] = <query r, keys of vector v>, added up dimension by dimension: the same sequence of
// operations for a (row, key) whatever the block's shape.
template <class T, int ROWS, int VECTORS>
__attribute__((noinline)) static void score_block(const float* query, const uint32_t* keys,
                                                  int64_t block_stride, int units, int64_t ahead,
                                                  float* scores) {
  vfloat acc[ROWS][VECTORS];
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) acc[r][v] = vfloat{};
  int u = 0;
  do {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v += BLOCK_VECTORS)
      prefetch(keys + (v / BLOCK_VECTORS) * block_stride, ahead);
    if constexpr (PER_UNIT<T> == 2) {
      vfloat even[VECTORS], odd[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) {
        const Pair pair = T::split(
            load<vuint>(keys + (v / BLOCK_VECTORS) * block_stride + (v % BLOCK_VECTORS) * LANES));
        even[v] = pair.even;
        odd[v] = pair.odd;
      }
#pragma GCC unroll 12
      for (int r = 0; r < ROWS; ++r) {
        const vfloat q = splat(query[r * DIM_STRIDE]);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) acc[r][v] = fma(q, even[v], acc[r][v]);
      }
#pragma GCC unroll 12
      for (int r = 0; r < ROWS; ++r) {
        const vfloat q = splat(query[r * DIM_STRIDE + 1]);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) acc[r][v] = fma(q, odd[v], acc[r][v]);
      }
    } else {
      vfloat key[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v)
        key[v] =
            load<vfloat>(keys + (v / BLOCK_VECTORS) * block_stride + (v % BLOCK_VECTORS) * LANES);
#pragma GCC unroll 12
      for (int r = 0; r < ROWS; ++r) {
        const vfloat q = splat(query[r * DIM_STRIDE]);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) acc[r][v] = fma(q, key[v], acc[r][v]);
      }
    }
    keys += KEY_BLOCK;
    query += PER_UNIT<T>;
  } while (++u < units);
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) store(scores + r * SCORE_STRIDE + v * LANES, acc[r][v]);
}

// ---- weighted sum: rows x value dimensions ------------------------------------------------

// out[r] += sum over keys of weight[r][key] * value[key], for PAIRS pairs of vectors of dimensions.
// Half types come apart into even and odd dimensions; they are put in order at the very end.
template <class T, int ROWS, int PAIRS>
__attribute__((noinline)) static void value_block(const float* weights, int keys,
                                                  const char* values, int64_t stride, int64_t ahead,
                                                  float* out) {
  vfloat acc[ROWS][2 * PAIRS];
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 2 * PAIRS; ++v) acc[r][v] = load<vfloat>(out + r * DIM_STRIDE + v * LANES);
  int k = 0;
  do {
#pragma GCC unroll 4
    for (int line = 0; line < 2 * PAIRS * LANES * 4 / PER_UNIT<T>; line += 64)
      prefetch(values + line, ahead);
    vfloat value[2 * PAIRS];
#pragma GCC unroll 2
    for (int p = 0; p < PAIRS; ++p) {
      if constexpr (PER_UNIT<T> == 2) {
        const Pair pair = T::split(load<vuint>(values + p * LANES * 4));
        value[2 * p] = pair.even;
        value[2 * p + 1] = pair.odd;
      } else {
        value[2 * p] = load<vfloat>(values + 2 * p * LANES * 4);
        value[2 * p + 1] = load<vfloat>(values + (2 * p + 1) * LANES * 4);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
      const vfloat w = splat(weights[r * SCORE_STRIDE + k]);
#pragma GCC unroll 4
      for (int v = 0; v < 2 * PAIRS; ++v) acc[r][v] = fma(w, value[v], acc[r][v]);
    }
    values += stride;
  } while (++k < keys);
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 2 * PAIRS; ++v) store(out + r * DIM_STRIDE + v * LANES, acc[r][v]);
}

// ---- dispatch on the number of rows -------------------------------------------------------

typedef void (*ScoreBlock)(const float*, const uint32_t*, int64_t, int, int64_t, float*);
typedef void (*ValueBlock)(const float*, int, const char*, int64_t, int64_t, float*);

template <class T>
struct Blocks {
  struct Table {
    ScoreBlock wide_scores[MAX_ROWS + 1] = {};
    ScoreBlock narrow_scores[MAX_ROWS + 1] = {};
    ValueBlock wide_values[MAX_ROWS + 1] = {};    // wide_vectors(rows) vectors of dimensions
    ValueBlock narrow_values[MAX_ROWS + 1] = {};  // two
  };
  template <int ROWS>
  static constexpr void fill(Table& t) {
    t.wide_scores[ROWS] = score_block<T, ROWS, wide_vectors(ROWS)>;
    t.narrow_scores[ROWS] = score_block<T, ROWS, narrow_vectors(ROWS)>;
    t.wide_values[ROWS] = value_block<T, ROWS, wide_vectors(ROWS) / 2>;
    t.narrow_values[ROWS] = value_block<T, ROWS, 1>;
    if constexpr (ROWS > 1) fill<ROWS - 1>(t);
  }
  static constexpr Table make() {
    Table t;
    fill<MAX_ROWS>(t);
    return t;
  }
  static constexpr Table table = make();
};

// Rows [first, last) in evenly sized blocks of at most MAX_ROWS.
template <class Body>
HOGWILD_INLINE void for_row_blocks(Run run, Body body) {
  const int rows = run.last - run.first, blocks = (rows + MAX_ROWS - 1) / MAX_ROWS;
  for (int b = 0; b < blocks; ++b) {
    const int first = run.first + b * rows / blocks;
    body(first, run.first + (b + 1) * rows / blocks - first);
  }
}

template <class T>
static void score_rows(Scratch& s, Run run, KeyTile tile, int key_blocks, int units) {
  for_row_blocks(run, [&](int row, int rows) {
    const int vectors = wide_vectors(rows), all = key_blocks * BLOCK_VECTORS;
    int v = 0;
    for (; v + vectors <= all; v += vectors)
      Blocks<T>::table.wide_scores[rows](
          s.rotated[row],
          tile.units + (v / BLOCK_VECTORS) * tile.block_stride + (v % BLOCK_VECTORS) * LANES,
          tile.block_stride, units, tile.ahead, s.scores[row] + v * LANES);
    for (; v < all; v += narrow_vectors(rows))
      Blocks<T>::table.narrow_scores[rows](
          s.rotated[row],
          tile.units + (v / BLOCK_VECTORS) * tile.block_stride + (v % BLOCK_VECTORS) * LANES,
          tile.block_stride, units, tile.ahead, s.scores[row] + v * LANES);
  });
}

template <class T>
static void weigh_values(Scratch& s, Run run, ValueTile tile, int keys, int padded_dim) {
  const int64_t element = sizeof(typename T::element);
  for_row_blocks(run, [&](int row, int rows) {
    const int wide = wide_vectors(rows) * LANES;
    int d = 0;
    for (; d + wide <= padded_dim; d += wide)
      Blocks<T>::table.wide_values[rows](s.scores[row], keys, tile.rows + d * element, tile.stride,
                                         tile.ahead, s.chunk.out[row] + d);
    for (; d < padded_dim; d += 2 * LANES)
      Blocks<T>::table.narrow_values[rows](s.scores[row], keys, tile.rows + d * element,
                                           tile.stride, tile.ahead, s.chunk.out[row] + d);
  });
}

// ---- softmax of one row over a tile -------------------------------------------------------

HOGWILD_INLINE void scale_row(float* x, int n, float factor) {
  for (int d = 0; d < n; d += LANES) store(x + d, load<vfloat>(x + d) * splat(factor));
}

// Scores become weights 2^(score - reference), 0 outside keys [first, last) of the tile.
static void softmax_row(Scratch& s, int row, int vectors, int first, int last, float cap,
                        int padded_dim) {
  float* x = s.scores[row];
  if (cap != 0.f)
    for (int v = 0; v < vectors; ++v)
      store(x + v * LANES, splat(cap) * tanh(load<vfloat>(x + v * LANES)));
  if (first > 0 || last < vectors * LANES)
    for (int k = 0; k < vectors * LANES; ++k)
      if (k < first || k >= last) x[k] = -__builtin_inff();

  vfloat top = load<vfloat>(x);
  for (int v = 1; v < vectors; ++v) top = max(top, load<vfloat>(x + v * LANES));
  float& reference = s.chunk.max[row];
  if (any_above(top, reference + RESCALE_AFTER)) {
    const float moved = max_lane(top);
    const float factor = __builtin_exp2f(reference - moved);
    if (reference != -__builtin_inff()) {
      scale_row(s.chunk.out[row], padded_dim, factor);
      scale_row(s.lane_sums[row], LANES, factor);
    }
    reference = moved;
  }

  const vfloat base = splat(reference == -__builtin_inff() ? 0.f : reference);
  vfloat sum = load<vfloat>(s.lane_sums[row]);
  for (int v = 0; v < vectors; ++v) {
    const vfloat weight = exp2(load<vfloat>(x + v * LANES) - base);
    sum = sum + weight;
    store(x + v * LANES, weight);
  }
  store(s.lane_sums[row], sum);
}

// ---- tiles --------------------------------------------------------------------------------

// 16 keys given as rows of 32-bit units -> [units][16].
static void interleave_keys(const uint32_t* const* rows, int units, int64_t ahead, uint32_t* out) {
  for (int u = 0; u < units; u += 4) {
    if (u % 16 == 0)
      for (int k = 0; k < KEY_BLOCK; ++k) prefetch(rows[k] + u, ahead);
    for (int k = 0; k < KEY_BLOCK; k += LANES) {
      const uint32_t* const* from = rows + k;
      const FourVectors block = transpose_quads(load_quads(from, u), load_quads(from + 1, u),
                                                load_quads(from + 2, u), load_quads(from + 3, u));
      for (int i = 0; i < 4; ++i) store(out + (u + i) * KEY_BLOCK + k, block.unit[i]);
    }
  }
}

template <class T>
struct Attention {
  typedef typename T::element E;

  const AttendArgs& args;
  const PlanView& plan;
  const Heads& heads;
  Scratch& s;
  const int padded_dim;  // of the accumulators
  int head;

  Attention(const AttendArgs& a, Scratch& scratch)
      : args(a),
        plan(*a.plan),
        heads(a.heads),
        s(scratch),
        padded_dim((a.heads.value_dim + 2 * LANES - 1) / (2 * LANES) * (2 * LANES)),
        head(0) {}

  const E* key_page(TilePlace at) {
    const int page = plan.tile_pages[plan.first_tile[at.segment] + at.begin / TILE];
    return (const E*)args.keys_values.key_pages + key_base(heads, page, head);
  }

  const E* value_page(TilePlace at) {
    const int page = plan.tile_pages[plan.first_tile[at.segment] + at.begin / TILE];
    return (const E*)args.keys_values.value_pages + value_base(heads, page, head);
  }

  const E* value_rows(TilePlace at) {
    const hogwild::SegmentRows& rows = args.keys_values.rows[at.segment];
    return (const E*)rows.values + at.begin * rows.value_token_stride +
           head * rows.value_head_stride;
  }

  // Plain rows become a tile of the page layout in scratch; keys past the segment's end are zero.
  KeyTile key_tile(TilePlace at, TilePlace next, int keys) {
    const int units = key_units<T>(heads.head_dim);
    const int64_t block_stride = int64_t(units) * KEY_BLOCK;
    if (args.keys_values.layout == hogwild::Layout::Pages) {
      const E* base = key_page(at);
      return {(const uint32_t*)base, block_stride, (const char*)key_page(next) - (const char*)base};
    }
    static const uint32_t zeros[MAX_DIM] = {};
    const hogwild::SegmentRows& rows = args.keys_values.rows[at.segment];
    const E* base = (const E*)rows.keys + head * rows.key_head_stride;
    const hogwild::SegmentRows& next_rows = args.keys_values.rows[next.segment];
    const E* next_base = (const E*)next_rows.keys + head * next_rows.key_head_stride +
                         next.begin * next_rows.key_token_stride;
    const int64_t ahead =
        (const char*)next_base - (const char*)(base + at.begin * rows.key_token_stride);
    for (int block = 0; block * KEY_BLOCK < keys; ++block) {
      const uint32_t* from[KEY_BLOCK];
      for (int k = 0; k < KEY_BLOCK; ++k) {
        const int key = block * KEY_BLOCK + k;
        from[k] = key < keys
                      ? (const uint32_t*)(base + int64_t(at.begin + key) * rows.key_token_stride)
                      : zeros;
      }
      interleave_keys(from, units, ahead, s.keys + block * block_stride);
    }
    return {s.keys, block_stride, 0};
  }

  ValueTile value_tile(TilePlace at, TilePlace next, int keys) {
    const int64_t element = sizeof(E);
    if (args.keys_values.layout == hogwild::Layout::Pages) {
      const E* base = value_page(at);
      return {(const char*)base, hogwild::cpu::padded_value_dim(heads.value_dim) * element,
              (const char*)value_page(next) - (const char*)base};
    }
    const E* base = value_rows(at);
    const int64_t stride = args.keys_values.rows[at.segment].value_token_stride;
    if (padded_dim == heads.value_dim)
      return {(const char*)base, stride * element,
              (const char*)value_rows(next) - (const char*)base};
    // Vectors would read past the row's end: copy into padded rows.
    E* copy = (E*)s.values;
    for (int k = 0; k < keys; ++k)
      __builtin_memcpy(copy + int64_t(k) * padded_dim, base + k * stride,
                       heads.value_dim * element);
    return {(const char*)copy, padded_dim * element, 0};
  }

  // ---- rows ---------------------------------------------------------------------------------

  template <class Body>
  HOGWILD_INLINE void for_rows_of(const Part& part, Body body) {
    for (int row = part.first_row; row < part.last_row; ++row) {
      const int from_start = part.head_row + row - part.first_row;
      body(row, from_start / heads.group, head * heads.group + from_start % heads.group);
    }
  }

  void load_queries(const RowGroup& group) {
    const hogwild::TokenTensor& q = args.query;
    for (int p = group.part_begin; p < group.part_end; ++p) {
      const Part& part = plan.parts[p];
      for_rows_of(part, [&](int row, int token, int query_head) {
        const E* from = (const E*)q.data + part.worker * q.worker_stride +
                        (plan.query_start[part.worker] + int64_t(token)) * q.token_stride +
                        query_head * q.head_stride;
        for (int d = 0; d < heads.head_dim; ++d) s.query[row][d] = T::widen(from[d]);
      });
    }
  }

  // Rotates, afresh from the unrotated query, the rows of all workers that see the segment, by
  // offset + i: the angles of the two are added, in float32; those of i = 0 are exact. The factor
  // of the scores goes in as well.
  void enter_segment(const RowGroup& group, int segment) {
    const int D = heads.head_dim, half = plan.half_rotary;
    const float softcap = args.scoring.softcap;
    const float factor =
        softcap != 0.f ? args.scoring.scale / softcap : args.scoring.scale * LOG2_E;
    float cos[MAX_DIM / 2], sin[MAX_DIM / 2];
    for (int p = group.part_begin; p < group.part_end; ++p) {
      const Part& part = plan.parts[p];
      const int64_t at = int64_t(part.worker) * plan.num_segments + segment;
      if (plan.offsets[at] == hogwild::HIDDEN) continue;
      const float* base_cos = plan.offset_angles + at * 2 * half;
      const float* base_sin = base_cos + half;
      int known = -1;  // the token whose angles stand in cos and sin
      for_rows_of(part, [&](int row, int token, int) {
        if (token != known) {
          const float* token_cos = plan.token_angles + int64_t(token) * 2 * half;
          const float* token_sin = token_cos + half;
          if (token == 0)
            for (int j = 0; j < half; ++j) cos[j] = base_cos[j], sin[j] = base_sin[j];
          else
            for (int j = 0; j < half; ++j) {
              cos[j] = base_cos[j] * token_cos[j] - base_sin[j] * token_sin[j];
              sin[j] = base_sin[j] * token_cos[j] + base_cos[j] * token_sin[j];
            }
          known = token;
        }
        s.position[row] = int64_t(plan.offsets[at]) + token;
        float* x = s.rotated[row];
        for (int d = 0; d < D; ++d) x[d] = s.query[row][d];
        rotate(x, cos, sin, half, args.rope.interleaved, args.rope.scale);
        for (int d = 0; d < D; ++d) x[d] *= factor;
      });
    }
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

  // ---- a chunk's partial result -------------------------------------------------------------

  // `next` is the tile that will be read after the chunk.
  void attend_chunk(const Visit& visit, TilePlace next) {
    const Chunk& chunk = plan.chunks[visit.chunk];
    const int units = key_units<T>(heads.head_dim);
    const float cap = args.scoring.softcap * LOG2_E;
    Run runs[ROW_GROUP];
    for (int i = visit.span_begin; i < visit.span_end; ++i)
      for (int row = plan.spans[i].first; row < plan.spans[i].last; ++row) {
        for (int d = 0; d < padded_dim; d += LANES) store(s.chunk.out[row] + d, vfloat{});
        store(s.lane_sums[row], vfloat{});
        s.chunk.max[row] = -__builtin_inff();
      }

    for (int begin = chunk.begin; begin < chunk.end; begin += TILE) {
      const int keys = chunk.end - begin < TILE ? chunk.end - begin : TILE;
      const int key_blocks = (keys + KEY_BLOCK - 1) / KEY_BLOCK;
      const int count = runs_of(visit, begin, begin + keys, runs);
      if (count == 0) continue;
      const TilePlace here{chunk.segment, begin};
      const TilePlace after =
          begin + TILE < chunk.end ? TilePlace{chunk.segment, begin + TILE} : next;
      const KeyTile key = key_tile(here, after, keys);
      for (int r = 0; r < count; ++r) score_rows<T>(s, runs[r], key, key_blocks, units);
      for (int r = 0; r < count; ++r)
        for (int row = runs[r].first; row < runs[r].last; ++row) {
          const int64_t place = s.position[row] - begin;  // of the row's own token in the tile
          const int64_t first = place - plan.window + 1;
          softmax_row(s, row, key_blocks * BLOCK_VECTORS, first > 0 ? int(first) : 0,
                      place + 1 < keys ? int(place + 1) : keys, cap, padded_dim);
        }
      const ValueTile value = value_tile(here, after, keys);
      for (int r = 0; r < count; ++r) weigh_values<T>(s, runs[r], value, keys, padded_dim);
    }

    for (int i = visit.span_begin; i < visit.span_end; ++i)
      for (int row = plan.spans[i].first; row < plan.spans[i].last; ++row)
        s.chunk.sum[row] = sum_lanes(load<vfloat>(s.lane_sums[row]));
  }

  // ---- fold ---------------------------------------------------------------------------------

  // result[row] <- result[row] (+) (out, max, sum), the merge of two softmaxes.
  void fold_row(int row, const float* out, float max, float sum) {
    Folded& result = s.result;
    if (sum == 0.f) return;
    if (result.sum[row] == 0.f) {
      for (int d = 0; d < padded_dim; d += LANES) store(result.out[row] + d, load<vfloat>(out + d));
      result.max[row] = max;
      result.sum[row] = sum;
      return;
    }
    const float top = max > result.max[row] ? max : result.max[row];
    const float ours = __builtin_exp2f(result.max[row] - top);
    const float theirs = __builtin_exp2f(max - top);
    for (int d = 0; d < padded_dim; d += LANES) {
      const vfloat a = load<vfloat>(result.out[row] + d) * splat(ours);
      store(result.out[row] + d, fma(load<vfloat>(out + d), splat(theirs), a));
    }
    result.sum[row] = result.sum[row] * ours + sum * theirs;
    result.max[row] = top;
  }

  void fold_chunk(const Visit& visit) {
    for (int i = visit.span_begin; i < visit.span_end; ++i)
      for (int row = plan.spans[i].first; row < plan.spans[i].last; ++row)
        fold_row(row, s.chunk.out[row], s.chunk.max[row], s.chunk.sum[row]);
  }

  // Partial results of a split pair, block 0 what the first range folded: [rows][dim], max, sum.
  float* partial_block(const SplitPair& split, int rows, int block) {
    return split.partials + int64_t(block) * rows * (padded_dim + 2);
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
      s.result.sum[row] = 0.f;
      s.result.max[row] = -__builtin_inff();
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
      for (int i = visit.span_begin; i < visit.span_end; ++i)
        for (int row = plan.spans[i].first; row < plan.spans[i].last; ++row)
          fold_stored(block, rows, row);
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
        const float sum = s.result.sum[row];
        const float inverse = sum == 0.f ? 0.f : 1.f / sum;
        for (int d = 0; d < heads.value_dim; ++d) {
          int at = d;  // half types: 2 * LANES dimensions are stored evens first
          if (PER_UNIT<T> == 2) {
            const int within = d % (2 * LANES);
            at = d - within + (within % 2) * LANES + within / 2;
          }
          to[d] = T::narrow(sum == 0.f ? 0.f : s.result.out[row][at] * inverse);
        }
        if (args.lse)
          args.lse[part.worker * args.lse_worker_stride + index * args.lse_token_stride +
                   query_head] =
              sum == 0.f ? -__builtin_inff()
                         : float(LN_2 * (double(s.result.max[row]) + __builtin_log2(double(sum))));
      });
    }
  }

  // ---- a range of work ----------------------------------------------------------------------

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
      head = pair / plan.num_groups;

      load_queries(group);
      clear_result(rows);
      int entered = -1;
      for (int v = first; v < last; ++v) {
        const Visit& visit = plan.visits[group.visit_begin + v];
        const int segment = plan.chunks[visit.chunk].segment;
        if (segment != entered) enter_segment(group, entered = segment);
        const Chunk& next = plan.chunks[plan.visits[group.visit_begin + (v + 1) % visits].chunk];
        attend_chunk(visit, {next.segment, next.begin});
        if (first == 0) {
          fold_chunk(visit);
        } else {
          float* block = partial_block(*split, rows, 1 + v - split->first_stored);
          for (int i = visit.span_begin; i < visit.span_end; ++i)
            for (int row = plan.spans[i].first; row < plan.spans[i].last; ++row)
              store_row(block, rows, row, s.chunk);
        }
      }
      if (!split) {
        write_rows(group);
        continue;
      }
      if (first == 0)
        for (int row = 0; row < rows; ++row)
          store_row(partial_block(*split, rows, 0), rows, row, s.result);
      if (__atomic_sub_fetch(&split->remaining, 1, __ATOMIC_ACQ_REL) == 0) {
        fold_split(group, *split);
        write_rows(group);
      }
    }
  }
};

template <class T>
static void attend(const AttendArgs& args, const WorkRange& range, void* scratch) {
  Attention<T>(args, *(Scratch*)scratch).run(range);
}

}  // namespace
